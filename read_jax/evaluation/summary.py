"""The numbers of an evaluation: over all questions and by group, each with a bootstrap interval.

Every value is what `SegmentationMetrics` gives for the questions of the group. The intervals come from
drawing pictures, not questions, with replacement: questions about one picture succeed and fail together, and
drawing them one by one would make the intervals too narrow. All groups are judged on the same draws.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import numpy as np

from read_jax.evaluation.groups import GROUPINGS, Questions
from read_jax.evaluation.metrics import THRESHOLDS, MaskCounts, SegmentationMetrics

METRICS = ("giou", "ciou", "see_accuracy", "n_acc", "t_acc", *(f"precision@{t}" for t in THRESHOLDS))
LEVEL = 0.95
_BLOCK = 2**22  # weights held at a time: 32 MiB
_EXACT = 2.0**30


def summarize(
    header: Mapping[str, Any], records: Sequence[Mapping[str, Any]], *, seed: int = 0, resamples: int = 1000
) -> dict[str, Any]:
    """What an evaluation found, ready for JSON and the same to the last byte for the same records.

    Args:
        header: the settings of the run; `compat` chooses the arithmetic.
        records: one per picture, sorted by index: its questions, or the error that kept it from being read.
        seed: of the bootstrap.
        resamples: draws of the bootstrap; 0 for no intervals.

    Returns:
        header; counts; intervals (how they were made); overall: {metric: {value, low, high}}, a value None
        where no question bears on it (as See accuracy in forced mode), low and high None where fewer than two
        pictures do; groups: [{name, title, rows: [{label, pictures, questions, metrics}]}]; iou: the
        histogram and the precision curve of the targets that exist; skipped: pictures without answers.
    """
    asked = [record for record in records if "error" not in record]
    questions = Questions.of([record for record in asked if record["questions"]])
    groupings = [(g, g.rows(questions)) for g in GROUPINGS]
    members = [np.ones(len(questions), bool), *(member for _, rows in groupings for _, member in rows)]
    bounds = _intervals(questions, members, seed, resamples)
    found = iter(
        {
            "pictures": questions.pictures(member),
            "questions": int(member.sum()),
            "metrics": {
                name: {"value": value, "low": low, "high": high}
                for (name, value), (low, high) in zip(
                    values(questions, member, header.get("compat")).items(), interval, strict=True
                )
            },
        }
        for member, interval in zip(members, bounds, strict=True)
    )
    overall = next(found)["metrics"]
    groups = [
        {"name": g.name, "title": g.title, "rows": [{"label": label} | next(found) for label, _ in rows]}
        for g, rows in groupings
    ]
    existing = int(questions.exists.sum())
    return {
        "header": dict(header),
        "counts": {
            "pictures": len(asked),
            "skipped": len(records) - len(asked),
            "questions": len(questions),
            "existing": existing,
            "absent": len(questions) - existing,
        },
        "intervals": {
            "level": LEVEL,
            "method": "percentile bootstrap over pictures",
            "resamples": resamples,
            "seed": seed,
        },
        "overall": overall,
        "groups": [group for group in groups if group["rows"]],
        "iou": _distribution(questions.iou[questions.exists]),
        "skipped": [
            {key: record.get(key) for key in ("index", "key", "image", "error")}
            for record in records
            if "error" in record
        ],
    }


def values(questions: Questions, member: np.ndarray, compat: Any) -> dict[str, float | None]:
    """The metrics of the chosen questions (bool [n])."""
    metrics = SegmentationMetrics(compat)
    chosen = np.flatnonzero(member)
    # the original rounds after each picture; else sums are exact, and all can be added at once
    keys = questions.picture[chosen] if compat == "read" else questions.said[chosen] >= 0
    for places in _runs(chosen, keys):
        said = questions.said[places]
        metrics.update_counts(
            MaskCounts(*(field[places] for field in questions.counts)),
            pred_exists=None if (said < 0).any() else said.astype(bool),
            target_exists=questions.exists[places],
        )
    result = metrics.result()
    return {name: result[name] for name in METRICS}


def _runs(values: np.ndarray, keys: np.ndarray) -> Iterator[np.ndarray]:
    """The values cut where the keys change."""
    if len(values):
        yield from np.split(values, np.flatnonzero(keys[1:] != keys[:-1]) + 1)


def terms(questions: Questions) -> np.ndarray:
    """What each question adds to the metrics, every one a ratio of two sums; float64 [n, 2 * metrics].

    The numerators' terms come first, then the denominators'.

    IoU is rounded to 2^-30. All terms are then multiples of that and their sums exact in float64, so that an
    interval does not depend on the order in which a machine adds.
    """
    iou = np.round(questions.iou * _EXACT) / _EXACT
    exists, said = questions.exists, questions.said == 1
    asked = questions.said >= 0
    one = np.ones(len(questions))
    pairs = [
        (iou, one),
        (questions.counts.intersection, questions.counts.union),
        (asked & (said == exists), asked),
        (asked & ~said & ~exists, asked & ~exists),
        (asked & said & exists, asked & exists),
        *((exists & (questions.iou >= t), exists) for t in THRESHOLDS),
    ]
    columns = [top for top, _ in pairs] + [bottom for _, bottom in pairs]
    return np.stack(columns, axis=1).astype(np.float64)


def per_picture(questions: Questions, terms: np.ndarray, member: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """The pictures [p] of the chosen questions (bool [n]), and their sums [p, 2 * metrics] of the terms."""
    chosen = np.flatnonzero(member)
    where, starts = np.unique(questions.picture[chosen], return_index=True)
    return where, np.add.reduceat(terms[chosen], starts) if len(starts) else terms[:0]


def draws(pictures: int, resamples: int, seed: int) -> Iterator[np.ndarray]:
    """Blocks of bootstrap weights, float64 [block, pictures]: how often each draw holds each picture."""
    generator = np.random.default_rng(seed)
    block = max(1, _BLOCK // max(1, pictures))
    for start in range(0, resamples, block):
        rows = min(block, resamples - start)
        yield np.stack(
            [
                np.bincount(generator.integers(0, pictures, pictures), minlength=pictures).astype(np.float64)
                for _ in range(rows)
            ]
        )


def divide(sums: np.ndarray) -> np.ndarray:
    """Sums of terms [m, 2 * metrics] to metrics [m, metrics]; NaN where there is nothing to divide by.

    As `SegmentationMetrics` has it, cIoU is 1 for questions whose unions are all empty.
    """
    giou, ciou = METRICS.index("giou"), METRICS.index("ciou")
    tops, bottoms = (half.copy() for half in np.split(sums, 2, axis=1))
    empty = (bottoms[:, ciou] == 0) & (bottoms[:, giou] > 0)
    tops[:, ciou] += empty
    bottoms[:, ciou] += empty
    return np.divide(tops, bottoms, out=np.full(tops.shape, np.nan), where=bottoms > 0)


def percentiles(samples: np.ndarray) -> tuple[float | None, float | None]:
    """The bounds of the interval from the draws [resamples]; draws without any such question do not count."""
    samples = samples[~np.isnan(samples)]
    if not len(samples):
        return None, None
    low, high = np.quantile(samples, [(1 - LEVEL) / 2, (1 + LEVEL) / 2])
    return float(low), float(high)


def _intervals(
    questions: Questions, members: Sequence[np.ndarray], seed: int, resamples: int
) -> list[list[tuple[float | None, float | None]]]:
    """Bounds of every metric for every choice of questions (bool [n])."""
    terms_of_all = terms(questions)
    sums = [per_picture(questions, terms_of_all, member) for member in members]
    samples: list[list[np.ndarray]] = [[] for _ in members]
    pictures = int(questions.picture[-1]) + 1 if len(questions) else 0
    for weights in draws(pictures, resamples, seed) if pictures else ():
        for (where, of_pictures), out in zip(sums, samples, strict=True):
            out.append(divide((weights if len(where) == pictures else weights[:, where]) @ of_pictures))
    found = []
    for (_, of_pictures), blocks in zip(sums, samples, strict=True):
        bearing = (~np.isnan(divide(of_pictures))).sum(axis=0)  # pictures that a metric can be had from
        columns = np.concatenate(blocks).T if blocks else np.zeros((len(METRICS), 0))
        found.append(
            [percentiles(c) if n > 1 else (None, None) for c, n in zip(columns, bearing, strict=True)]
        )
    return found


def _distribution(iou: np.ndarray) -> dict[str, Any]:
    """Histogram of the IoU in twenty bins (the last with 1), and the share that reaches each threshold."""
    edges = [i / 20 for i in range(21)]
    tally = np.histogram(iou, edges)[0]
    reached = [float((iou >= t).mean()) if len(iou) else None for t in edges]
    return {
        "histogram": {"edges": edges, "counts": tally.tolist()},
        "curve": {"thresholds": edges, "shares": reached},
    }
