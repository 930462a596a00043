"""Two runs side by side, paired: the same questions, and how sure it is that one is better."""

from __future__ import annotations

import dataclasses
import itertools
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from read_jax.errors import DataError
from read_jax.evaluation.groups import Questions
from read_jax.evaluation.journal import read_records
from read_jax.evaluation.summary import LEVEL, METRICS, divide, draws, per_picture, percentiles, terms, values
from read_jax.evaluation.wording import METRIC_NAMES, flat, number, percent, plural, shown

TIE = 0.01
"""IoUs at most this far apart are a tie: a pixel at the border is no victory."""
_MOST_CHANGED = 10
_PHRASE = 60  # characters of a phrase in the table


@dataclasses.dataclass(frozen=True)
class Difference:
    """A metric of both runs (fractions, None without a value), a minus b, and the interval of that."""

    a: float | None
    b: float | None
    difference: float | None
    low: float | None
    high: float | None

    @property
    def clear(self) -> bool:
        """Whether the interval excludes that there is no difference."""
        return self.low is not None and self.high is not None and (self.low > 0 or self.high < 0)


@dataclasses.dataclass(frozen=True)
class Change:
    """A question that the runs answered differently, with the IoU of either."""

    key: str
    image: str | None
    phrase: str
    a: float
    b: float


@dataclasses.dataclass(frozen=True)
class Comparison:
    """What `compare` found; its text is a table for the terminal.

    Attributes:
        folders: of run a and run b.
        dataset: what both answered.
        settings: (name, of a, of b) of every setting that differs.
        pictures, questions: that both answered, on which everything here is computed.
        only_a, only_b: questions that only one of them has.
        metrics: by name.
        wins, ties, losses: questions that a answered better, equally well (IoUs within `TIE`), worse.
        changed: the questions that changed most, the largest change first.
        seed, resamples: of the bootstrap.
    """

    folders: tuple[str, str]
    dataset: str
    settings: Sequence[tuple[str, str, str]]
    pictures: int
    questions: int
    only_a: int
    only_b: int
    metrics: Mapping[str, Difference]
    wins: int
    ties: int
    losses: int
    changed: Sequence[Change]
    seed: int
    resamples: int

    def __str__(self) -> str:
        return "\n".join(_lines(self))


def check_comparable(folder: str | Path, dataset: str) -> None:
    """Before a long run: raises `DataError` unless the folder holds an evaluation on that dataset."""
    header, _ = read_records(folder)
    if header.get("dataset") != dataset:
        raise DataError(
            f"{folder} was evaluated on {header.get('dataset')!r}, not on {dataset!r}: the two cannot be "
            "compared."
        )


def compare(
    folder_a: str | Path, folder_b: str | Path, *, seed: int = 0, resamples: int = 1000
) -> Comparison:
    """Compare two evaluated runs on the questions that both answered.

    Questions are the same when picture, object, position and text are. The intervals come from drawing
    pictures, as in `summarize`, with the same draw for both runs.

    Raises:
        DataError: a folder without an evaluation, different datasets, or no question in common.
    """
    (header_a, records_a), (header_b, records_b) = read_records(folder_a), read_records(folder_b)
    if header_a.get("dataset") != header_b.get("dataset"):
        raise DataError(
            f"{folder_a} was evaluated on {header_a.get('dataset')!r}, {folder_b} on "
            f"{header_b.get('dataset')!r}: runs on different datasets cannot be compared."
        )
    asked_a, asked_b = _answers(records_a), _answers(records_b)
    common = [identity for identity in asked_a if identity in asked_b]
    if not common:
        raise DataError(
            f"{folder_a} ({plural(len(asked_a), 'question')}) and {folder_b} "
            f"({plural(len(asked_b), 'question')}) have no question in common; was the dataset changed "
            "between the runs?"
        )
    a, b = _columns(asked_a, common), _columns(asked_b, common)
    change = a.iou - b.iou
    return Comparison(
        folders=(str(folder_a), str(folder_b)),
        dataset=str(header_a.get("dataset")),
        settings=_different(header_a, header_b),
        pictures=len(np.unique(a.picture)),
        questions=len(common),
        only_a=len(asked_a) - len(common),
        only_b=len(asked_b) - len(common),
        metrics=_differences(a, b, header_a.get("compat"), header_b.get("compat"), seed, resamples),
        wins=int((change > TIE).sum()),
        ties=int((np.abs(change) <= TIE).sum()),
        losses=int((change < -TIE).sum()),
        changed=_most_changed([asked_a[identity] for identity in common], a.iou, b.iou),
        seed=seed,
        resamples=resamples,
    )


Identity = tuple[str, Any, Any, int, str]
"""Of a question: key of its picture, ref_id, sent_id, its position there, and the text asked about."""
Answers = dict[Identity, tuple[Mapping[str, Any], Mapping[str, Any]]]
"""The record of a question's picture, and its own."""


def _answers(records: Sequence[Mapping[str, Any]]) -> Answers:
    return {
        (record["key"], question["ref_id"], question["sent_id"], number, question["phrase"]): (
            record,
            question,
        )
        for record in records
        for number, question in enumerate(record.get("questions", ()))
    }


def _columns(answers: Answers, chosen: Sequence[Identity]) -> Questions:
    """The chosen questions in their order, in which those of a picture are next to each other."""
    return Questions.of(
        [
            {**answers[group[0]][0], "questions": [answers[identity][1] for identity in group]}
            for _, members in itertools.groupby(chosen, key=lambda identity: identity[0])
            for group in [list(members)]
        ]
    )


def _differences(
    a: Questions, b: Questions, compat_a: Any, compat_b: Any, seed: int, resamples: int
) -> dict[str, Difference]:
    everything = np.ones(len(a), bool)
    sums = [per_picture(run, terms(run), everything)[1] for run in (a, b)]
    blocks = [
        divide(weights @ sums[0]) - divide(weights @ sums[1])
        for weights in draws(len(sums[0]), resamples, seed)
    ]
    samples = np.concatenate(blocks) if blocks else np.zeros((0, len(METRICS)))
    bearing = (~np.isnan(divide(sums[0]) - divide(sums[1]))).sum(axis=0)
    of_a, of_b = values(a, everything, compat_a), values(b, everything, compat_b)
    found = {}
    for column, name in enumerate(METRICS):
        x, y = of_a[name], of_b[name]
        low, high = percentiles(samples[:, column]) if bearing[column] > 1 else (None, None)
        found[name] = Difference(x, y, None if x is None or y is None else x - y, low, high)
    return found


def _different(a: Mapping[str, Any], b: Mapping[str, Any]) -> list[tuple[str, str, str]]:
    of_a, of_b = dict(flat(a)), dict(flat(b))
    return [
        (name, of_a.get(name, "–"), of_b.get(name, "–"))
        for name in {**of_a, **of_b}
        if of_a.get(name) != of_b.get(name)
    ]


def _most_changed(
    questions: Sequence[tuple[Mapping[str, Any], Mapping[str, Any]]], a: np.ndarray, b: np.ndarray
) -> list[Change]:
    order = np.argsort(-np.abs(a - b), kind="stable")[:_MOST_CHANGED]
    return [
        Change(record["key"], record["image"], question["phrase"], float(a[place]), float(b[place]))
        for place in order.tolist()
        if a[place] != b[place]
        for record, question in [questions[place]]
    ]


def _lines(found: Comparison) -> list[str]:
    """The table; what comes from the data is made harmless for a terminal."""
    both = f"{plural(found.questions, 'question')} about {plural(found.pictures, 'picture')}"
    lines = [
        "",
        f"{_line(found.dataset)}: {both}, answered by both",
        f"  a  {_line(found.folders[0])}",
        f"  b  {_line(found.folders[1])}",
    ]
    if found.only_a or found.only_b:
        lines.append(f"  left out: {number(found.only_a)} only in a, {number(found.only_b)} only in b")
    lines += [f"  {_line(name)}: {_line(x)} in a, {_line(y)} in b" for name, x, y in found.settings]
    rows = [("", "a", "b", "a - b", f"{100 * LEVEL:.0f}% interval", "")]
    for name, entry in found.metrics.items():
        if entry.a is None and entry.b is None:
            continue
        bounds = "–" if entry.low is None else f"{_signed(entry.low)} to {_signed(entry.high)}"
        rows.append(
            (
                METRIC_NAMES[name],
                percent(entry.a),
                percent(entry.b),
                _signed(entry.difference),
                bounds,
                "*" if entry.clear else "",
            )
        )
    widths = [max(len(row[column]) for row in rows) for column in range(len(rows[0]))]
    lines.append("")
    for name, *cells in rows:
        cells = [cell.rjust(width) for cell, width in zip(cells, widths[1:], strict=True)]
        lines.append("  ".join([f"  {name.ljust(widths[0])}", *cells]).rstrip())
    lines += [
        "",
        "  In percent; * the interval excludes 0 (paired bootstrap over pictures, "
        f"{number(found.resamples)} draws).",
        f"  By IoU a is better on {number(found.wins)}, worse on {number(found.losses)}, equal (within "
        f"{TIE}) on {number(found.ties)}.",
    ]
    if found.changed:
        lines += ["", "  Changed most:", "       a       b"]
        lines += [
            f"  {percent(c.a):>6}  {percent(c.b):>6}  {_line(c.image or c.key)}: {_line(c.phrase, _PHRASE)}"
            for c in found.changed
        ]
    return lines


def _signed(value: float | None) -> str:
    return "–" if value is None else f"{round(100 * value, 2) + 0.0:+.2f}"  # no minus before zero


def _line(text: str, most: int = 200) -> str:
    text = " ".join(shown(text).split())
    return text if len(text) <= most else text[: most - 2] + " …"
