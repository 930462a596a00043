"""gIoU, cIoU, See accuracy, N-acc, T-acc and precision at IoU thresholds. Plain numpy.

Everything is computed from five integers per mask (`MaskCounts`), so that counts written down during a long
evaluation give the same results as the pixels they came from.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any, NamedTuple

import numpy as np

from read_jax.data.item import Compat
from read_jax.errors import DataError

IGNORE = 255
"""Value of target pixels that are not judged."""
THRESHOLDS = (0.5, 0.6, 0.7, 0.8, 0.9)
"""IoU from which on a mask counts as found, for precision@t."""


class MaskCounts(NamedTuple):
    """Pixels of k masks, each field int64 [k]; pixels to be ignored are in none of them.

    intersection, union: of prediction and target; target, predicted: of each alone; valid: all judged.
    """

    intersection: np.ndarray
    union: np.ndarray
    target: np.ndarray
    predicted: np.ndarray
    valid: np.ndarray

    def iou(self) -> np.ndarray:
        """float64 [k]; 1 where prediction and target are both empty."""
        union = np.asarray(self.union, np.float64)
        return np.where(union > 0, np.asarray(self.intersection) / np.maximum(union, 1), 1.0)


def counts(pred: np.ndarray, target: np.ndarray, compat: Compat = None) -> MaskCounts:
    """Count the pixels of k predicted masks against their targets.

    Args:
        pred: bool [k, h, w] (integers 0 and 1 pass).
        target: uint8 [k, h, w]: 255 is not judged, any other value but 0 is target.
        compat: with "read" only the value 1 is target. Others, from overlapping pieces that were summed, are
            in no class: they cannot be hit, and a prediction there is wrong (the original's `histc` bins).

    Raises:
        DataError: shapes that differ, or values that are no masks.
    """
    pred, target = _check_pred(pred), _check_target(target)
    if pred.shape != target.shape:
        raise DataError(
            f"predicted masks {list(pred.shape)} and targets {list(target.shape)} must have one shape "
            "[k, h, w]; predictions belong at the size of the dataset's masks."
        )
    valid = target != IGNORE
    wanted = target == 1 if compat == "read" else (target != 0) & valid
    given = pred & valid
    axes = (1, 2)
    hit, asked, found = ((wanted & given).sum(axes), wanted.sum(axes), given.sum(axes))
    return MaskCounts(hit, asked + found - hit, asked, found, valid.sum(axes))


class SegmentationMetrics:
    """Accumulates the metrics of referring and reasoning segmentation, picture by picture.

    gIoU is the mean of the masks' IoUs, 1 where prediction and target are both empty; cIoU is the sum of all
    intersections over the sum of all unions. precision@t is the share of the masks of things that exist with
    an IoU of at least t. See accuracy is the share of questions whose thing was rightly said to be there or
    not; N-acc and T-acc are the same among things that do not exist, and that do. The last three need
    `pred_exists`. Order does not matter: sums are exact.

    Args:
        compat: "read" for the original's arithmetic: gIoU and cIoU of its `validate` with float32 sums and
            epsilons; cIoU of its `run_eval`, with integer sums, when every picture came with `pred_exists`;
            targets as `counts` describes. There the order of the pictures decides the last digits.
    """

    def __init__(self, compat: Compat = None):
        if compat not in (None, "read"):
            raise DataError(f"compat must be None or 'read', not {compat!r}.")
        self.compat: Compat = compat
        self._images = 0
        self._masks = 0
        self._ious: list[float] = []
        self._found: list[float] = []  # IoU of those that exist
        self._intersection = 0
        self._union = 0
        self._answers = np.zeros((2, 2), np.int64)  # [exists, said to exist]
        self._original = _OriginalSums()

    def update(
        self,
        pred: np.ndarray,
        target: np.ndarray,
        pred_exists: Sequence[bool] | np.ndarray | None = None,
        target_exists: Sequence[bool] | np.ndarray | None = None,
    ) -> None:
        """Add one picture's masks, one per question.

        Args:
            pred: bool [k, h, w] predicted masks, all False where nothing was found.
            target: uint8 [k, h, w], 255 to ignore.
            pred_exists: [k] whether the answer says that the thing is there.
            target_exists: [k] whether it is; default: its mask has a pixel.

        Raises:
            DataError: shapes or lengths that disagree, or values that are no masks. (With compat "read" a
                surplus of masks on either side is dropped, as the original does; its mean over a picture's
                masks still divides by the number of targets.)
        """
        masks = None
        if self.compat == "read" and np.ndim(pred) == np.ndim(target) == 3:
            masks, both = len(target), min(len(pred), len(target))
            pred, target = pred[:both], target[:both]
        self.update_counts(counts(pred, target, self.compat), pred_exists, target_exists, masks=masks)

    def update_counts(
        self,
        counted: MaskCounts,
        pred_exists: Sequence[bool] | np.ndarray | None = None,
        target_exists: Sequence[bool] | np.ndarray | None = None,
        *,
        masks: int | None = None,
    ) -> None:
        """Add one picture's masks by what `counts` found; `masks`: how many targets it has, if more."""
        counted = MaskCounts(*(np.asarray(field, np.int64).reshape(-1) for field in counted))
        k = len(counted.union)
        masks = k if masks is None else masks
        exists = _flags(target_exists, "target_exists", masks)
        if exists is None:
            exists = np.zeros(masks, bool)
            exists[:k] = counted.target > 0
        said = _flags(pred_exists, "pred_exists", masks)
        if not masks:
            return
        ious = counted.iou()
        self._images += 1
        self._masks += masks
        self._ious += ious.tolist()
        self._found += ious[exists[:k]].tolist()
        self._intersection += int(counted.intersection.sum())
        self._union += int(counted.union.sum())
        if said is not None:
            np.add.at(self._answers, (exists.astype(int), said.astype(int)), 1)
        self._original.add(counted, masks)

    def result(self) -> dict[str, Any]:
        """The metrics as fractions, and the counts behind them; None for what nothing was given for."""
        giou = math.fsum(self._ious) / len(self._ious) if self._ious else None
        ciou = (self._intersection / self._union if self._union else 1.0) if self._ious else None
        (absent_right, absent_wrong), (present_wrong, present_right) = self._answers.tolist()
        questions = int(self._answers.sum())
        if self.compat == "read" and self._masks:
            giou, ciou = self._original.giou(self._masks), self._original.ciou()
            if questions == self._masks:
                ciou = float(np.float32(self._intersection) / np.float32(self._union + 1e-10))
        return {
            "giou": giou,
            "ciou": ciou,
            "see_accuracy": _share(absent_right + present_right, questions),
            "n_acc": _share(absent_right, absent_right + absent_wrong),
            "t_acc": _share(present_right, present_wrong + present_right),
            **{
                f"precision@{t}": _share(sum(x >= t for x in self._found), len(self._found))
                for t in THRESHOLDS
            },
            "images": self._images,
            "masks": self._masks,
            "existing": len(self._found),
            "answers": questions,
            "intersection": self._intersection,
            "union": self._union,
        }


class _OriginalSums:
    """The arithmetic of READ's `validate`: float32 throughout, running sums included."""

    def __init__(self) -> None:
        self._iou = self._intersection = self._union = np.float32(0)

    def add(self, counted: MaskCounts, masks: int) -> None:
        """One picture: its mean IoU over `masks` masks, weighted by their number."""
        intersections, unions = (np.asarray(x, np.float32) for x in (counted.intersection, counted.union))
        ious, intersection, union = np.float32(0), np.float32(0), np.float32(0)
        for i, u in zip(intersections, unions, strict=True):
            ious += i / (u + np.float32(1e-5)) + np.float32(u == 0)
            intersection += i
            union += u
        self._iou += ious / np.float32(masks) * np.float32(masks)
        self._intersection += intersection
        self._union += union

    def giou(self, masks: int) -> float:
        return float(self._iou / np.float32(masks + 1e-5))

    def ciou(self) -> float:
        return float(self._intersection / (self._union + np.float32(1e-10)))


def _share(part: int, whole: int) -> float | None:
    return part / whole if whole else None


def _flags(values: Sequence[bool] | np.ndarray | None, name: str, count: int) -> np.ndarray | None:
    if values is None:
        return None
    flags = np.asarray(values)
    if flags.size == 0:
        flags = flags.astype(bool)
    if flags.shape != (count,) or not (flags.dtype == bool or np.isin(flags, (0, 1)).all()):
        raise DataError(f"{name} must hold True or False for each of the {count} masks, not {values!r}.")
    return flags.astype(bool)


def _check_pred(pred: np.ndarray) -> np.ndarray:
    pred = np.asarray(pred)
    if pred.dtype == bool:
        return pred
    if not np.issubdtype(pred.dtype, np.integer) or not np.isin(pred, (0, 1)).all():
        raise DataError(
            f"predicted masks must be boolean, not {pred.dtype} of other values; of logits give logits > 0."
        )
    return pred.astype(bool)


def _check_target(target: np.ndarray) -> np.ndarray:
    target = np.asarray(target)
    if target.ndim != 3:
        raise DataError(f"targets must be [k, h, w], not {list(target.shape)}.")
    if target.dtype in (bool, np.uint8):
        return target
    if not np.issubdtype(target.dtype, np.integer) or ((target < 0) | (target > IGNORE)).any():
        raise DataError(
            f"targets must be uint8 (1 target, {IGNORE} ignore), not {target.dtype} of other values."
        )
    return target.astype(np.uint8)
