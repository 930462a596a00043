"""Which questions of an evaluation are worth a look, and their pictures."""

from __future__ import annotations

import dataclasses
import io
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any

import numpy as np
from PIL import Image

from read_jax.data.item import Item
from read_jax.errors import ReadJaxError
from read_jax.images.drawing import draw_comparison
from read_jax.images.masks import rle_to_mask

_SIDE = 560  # pixels of the longer side of a picture in the report
_DETAIL_BELOW = 1 / 3  # of the picture's height and width: smaller things get a picture of their own
_DETAIL_SIDE = 280  # at least, small cut-outs are enlarged


@dataclasses.dataclass(frozen=True, eq=False)
class Case:
    """One question of one picture.

    Attributes:
        index: position of the picture in its dataset.
        key, image: the picture's name there, and its path (None when drawn).
        number: position of the question among those of the picture.
        question: the record of the question.
        iou: its intersection over union.
    """

    index: int
    key: str
    image: str | None
    number: int
    question: Mapping[str, Any]
    iou: float


@dataclasses.dataclass(frozen=True)
class Cases:
    """What the report pictures, each list worst (or best) first and at most one question per picture.

    Of few pictures at most half are shown among the worst and half among the best.

    Attributes:
        worst: lowest IoU of those whose target is there and that were answered with a mask.
        best: highest IoU of the same.
        hallucinated: answered with a mask though the target is absent.
        missed: answered without a mask though the target is there.
        hallucinated_count, missed_count: how many of these there are in all.
    """

    worst: Sequence[Case]
    best: Sequence[Case]
    hallucinated: Sequence[Case]
    missed: Sequence[Case]
    hallucinated_count: int
    missed_count: int


@dataclasses.dataclass(frozen=True)
class Figure:
    """A small picture, encoded: `caption` says in words what it shows."""

    jpeg: bytes
    width: int
    height: int
    caption: str


def choose_cases(cases: Iterable[Case], each: int = 9, mistakes: int = 6) -> Cases:
    """The `each` worst and best questions, and `mistakes` of either kind of false-premise mistake."""
    cases = list(cases)
    answered = [c for c in cases if c.question["exists"] and c.question["pred_exists"] is not False]
    ranked = sorted(answered, key=lambda c: (c.iou, -c.question["union"], c.index, c.number))
    pictures = len({c.index for c in ranked})
    worst = _one_per_picture(ranked, min(each, (pictures + 1) // 2))
    rest = [c for c in reversed(ranked) if c not in worst]
    wrong = [c for c in cases if not c.question["exists"] and c.question["pred_exists"]]
    missed = [c for c in cases if c.question["exists"] and c.question["pred_exists"] is False]
    return Cases(
        worst=worst,
        best=_one_per_picture(rest, min(each, pictures // 2)),
        hallucinated=_one_per_picture(_largest(wrong, "pred_pixels"), mistakes),
        missed=_one_per_picture(_largest(missed, "target_pixels"), mistakes),
        hallucinated_count=len(wrong),
        missed_count=len(missed),
    )


def picture(case: Case, load_item: Callable[[int], Item]) -> list[Figure]:
    """The answer over the target, whole and, where both are small, close up.

    Raises `ReadJaxError` or `OSError` when the picture cannot be loaded any more, or is another one now.
    """
    item = load_item(case.index)
    if item.key != case.key or case.number >= len(item.queries):
        raise ReadJaxError("the dataset has changed since the run.")
    image = item.load_image()
    target = item.compact_mask(case.number).decode()
    rle = case.question["mask"]
    answer = np.zeros(target.shape, bool) if rle is None else rle_to_mask(rle)
    if not image.shape[:2] == target.shape == answer.shape:
        raise ReadJaxError("its size has changed since the run.")
    figures = [_figure(image, answer, target, "Whole picture")]
    box = _close_up(answer | (target == 1))
    if box:
        figures.append(_figure(image[box], answer[box], target[box], "Close-up"))
    return figures


def _one_per_picture(cases: Iterable[Case], most: int) -> list[Case]:
    chosen: dict[int, Case] = {}
    for case in cases:
        if len(chosen) == most:
            break
        chosen.setdefault(case.index, case)
    return list(chosen.values())


def _largest(cases: Iterable[Case], key: str) -> list[Case]:
    return sorted(cases, key=lambda c: (-c.question[key], c.index, c.number))


def _close_up(mask: np.ndarray) -> tuple[slice, slice] | None:
    """The surroundings of a mask that is small in its picture; None when it is large or empty."""
    box = []
    for axis, length in enumerate(mask.shape):
        places = np.flatnonzero(mask.any(axis=1 - axis))
        if places.size == 0:
            return None
        start, stop = int(places[0]), int(places[-1]) + 1
        if stop - start > length * _DETAIL_BELOW:
            return None
        box.append((start, stop, length))
    margin = max(8, *((stop - start) // 2 for start, stop, _ in box))
    rows, columns = (slice(max(0, a - margin), min(n, b + margin)) for a, b, n in box)
    return rows, columns


def _figure(image: np.ndarray, answer: np.ndarray, target: np.ndarray, what: str) -> Figure:
    """Shrunk first and drawn then: lines keep their width, and a huge picture costs what a small one does."""
    height, width = image.shape[:2]
    scale = min(1.0, _SIDE / max(height, width))
    if what == "Close-up":
        scale = min(_SIDE, max(_DETAIL_SIDE, max(height, width))) / max(height, width)
    size = max(1, round(width * scale)), max(1, round(height * scale))
    small = np.asarray(Image.fromarray(image).resize(size, Image.Resampling.BICUBIC, reducing_gap=3.0))
    labels = np.zeros(small.shape[:2], np.uint8)
    labels[_resized(target == 255, size)] = 255
    labels[_resized((target != 0) & (target != 255), size)] = 1
    drawn = draw_comparison(small, _resized(answer, size), labels)
    buffer = io.BytesIO()
    Image.fromarray(drawn).save(buffer, format="JPEG", quality=82, optimize=True)
    return Figure(buffer.getvalue(), *size, what)


def _resized(mask: np.ndarray, size: tuple[int, int]) -> np.ndarray:
    """A mask at (width, height); what is thinner than a pixel there stays visible."""
    grey = Image.fromarray(mask.astype(np.uint8) * 255).resize(size, Image.Resampling.BOX)
    share = np.asarray(grey)
    half = share >= 128
    return half if half.any() else share > 0
