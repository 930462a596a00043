"""The questions of an evaluation as columns, and the groups its report looks at."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import numpy as np

from read_jax.evaluation.metrics import MaskCounts

WORD_BINS = ((1, 2), (3, 5), (6, 10), (11, 20), (21, None))
"""Words of the text, from and to."""
AREA_BOUNDS = (32**2, 96**2)
"""COCO's bounds between small, medium and large, in pixels of the target at the picture's own size."""
SHARE_BOUNDS = (0.01, 0.1)
"""The same as shares of the picture: they mean the same thing for pictures of any size."""
MOST_NAMES = 40
"""Rows of a group whose names the dataset chooses."""


@dataclasses.dataclass(frozen=True, eq=False)
class Questions:
    """The questions of all pictures in columns of n, those of a picture next to each other.

    picture: int64, its position among the records; counts: pixels; iou: float64; exists: bool; said: int8,
    whether the answer says so, -1 when it was not asked to; rows: the records the columns came from.
    """

    picture: np.ndarray
    counts: MaskCounts
    iou: np.ndarray
    exists: np.ndarray
    said: np.ndarray
    rows: Sequence[Mapping[str, Any]]
    sizes: np.ndarray
    """int64, pixels of the picture."""

    @classmethod
    def of(cls, records: Sequence[Mapping[str, Any]]) -> Questions:
        """From the records of pictures that have answers."""
        rows = [question for record in records for question in record["questions"]]
        per_picture = [len(record["questions"]) for record in records]

        def column(key: str) -> np.ndarray:
            return np.array([row[key] for row in rows], np.int64)

        counted = MaskCounts(
            *map(column, ("intersection", "union", "target_pixels", "pred_pixels", "valid_pixels"))
        )
        said = [row["pred_exists"] for row in rows]
        return cls(
            picture=np.repeat(np.arange(len(records)), per_picture),
            counts=counted,
            iou=counted.iou(),
            exists=np.array([row["exists"] for row in rows], bool),
            said=np.array([-1 if answer is None else answer for answer in said], np.int8),
            rows=rows,
            sizes=np.repeat([int(r["height"]) * int(r["width"]) for r in records], per_picture),
        )

    def __len__(self) -> int:
        return len(self.rows)

    def pictures(self, member: np.ndarray) -> int:
        """How many pictures the chosen questions (bool [n]) are about."""
        return len(np.unique(self.picture[member]))


Labelled = list[tuple[str, np.ndarray]]


def _by_sentence(questions: Questions) -> Labelled:
    sentence = np.array([bool(row.get("is_sentence")) for row in questions.rows], bool)
    return _present([("short phrase", ~sentence), ("whole sentence", sentence)])


def _by_words(questions: Questions) -> Labelled:
    words = np.array([max(1, len(row["phrase"].split())) for row in questions.rows], np.int64)
    return _present(
        [
            (
                f"{low} or more" if high is None else f"{low} to {high}",
                (words >= low) & (words <= (math.inf if high is None else high)),
            )
            for low, high in WORD_BINS
        ]
    )


def _by_area(questions: Questions) -> Labelled:
    return _sized(
        questions,
        questions.counts.target,
        AREA_BOUNDS,
        ("small: below 32² pixels", "medium: below 96²", "large: 96² and more"),
    )


def _by_share(questions: Questions) -> Labelled:
    return _sized(
        questions,
        questions.counts.target / np.maximum(questions.sizes, 1),
        SHARE_BOUNDS,
        ("below 1%", "1 to 10%", "10% and more"),
    )


def _sized(
    questions: Questions, size: np.ndarray, bounds: tuple[float, ...], names: Sequence[str]
) -> Labelled:
    """By size, where there is a target to have one."""
    bin_ = np.searchsorted(bounds, size, side="right")
    there = questions.exists & (questions.counts.target > 0)
    return _present([(name, there & (bin_ == i)) for i, name in enumerate(names)])


def _by_presence(questions: Questions) -> Labelled:
    return _present([("target exists", questions.exists), ("target is absent", ~questions.exists)])


def _by_kind(questions: Questions) -> Labelled:
    return _named([[row["kind"]] if row.get("kind") else [] for row in questions.rows])


def _by_tag(questions: Questions) -> Labelled:
    return _named([list(row.get("tags") or ()) for row in questions.rows])


def _named(labels: Sequence[Sequence[str]]) -> Labelled:
    """By names of the dataset's own; all but the most frequent together when there are too many to show."""
    places: dict[str, list[int]] = {}
    for place, several in enumerate(labels):
        for name in {str(label) for label in several}:
            places.setdefault(name, []).append(place)
    names = sorted(places, key=lambda name: (-len(places[name]), name))
    rest = names[MOST_NAMES:]
    rows = [(name, places[name]) for name in sorted(names[:MOST_NAMES])]
    if rest:
        rows.append((f"{len(rest)} others", [place for name in rest for place in places[name]]))
    found = []
    for name, chosen in rows:
        member = np.zeros(len(labels), bool)
        member[chosen] = True
        found.append((name, member))
    return found


def _present(rows: Labelled) -> Labelled:
    return [(label, member) for label, member in rows if member.any()]


@dataclasses.dataclass(frozen=True)
class Grouping:
    """One way to group questions: `rows` gives (label, bool [n]) of every group that has a member."""

    name: str
    title: str
    rows: Callable[[Questions], Labelled]


GROUPINGS = (
    Grouping("presence", "By presence of the target", _by_presence),
    Grouping("query", "By form of the query", _by_sentence),
    Grouping("words", "By length of the query, in words", _by_words),
    Grouping("area", "By size of the target, in pixels", _by_area),
    Grouping("share", "By share of the picture that the target covers", _by_share),
    Grouping("kind", "By kind of question", _by_kind),
    Grouping("tag", "By tag", _by_tag),
)
