"""Masks as COCO run-length encoding, checked before it is expanded."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from typing import Any

import numpy as np

from read_jax.errors import ReadJaxError
from read_jax.images.decode import MAX_PIXELS


class MaskError(ReadJaxError):
    """A mask, or its run-length encoding, is malformed."""


@dataclasses.dataclass(frozen=True)
class CompactMask:
    """A label image [height, width] of a few values as one run-length encoding per value; 0 elsewhere.

    What a dataset's targets travel as (1 target, 255 ignore) until pixels are needed: kilobytes instead of
    megabytes.
    """

    height: int
    width: int
    planes: tuple[tuple[int, str], ...] = ()
    """(value, COCO's compressed counts) of each value present."""

    @classmethod
    def encode(cls, mask: np.ndarray) -> CompactMask:
        """From bool or uint8 [h, w]."""
        mask = np.asarray(mask)
        values = [1] if mask.dtype == bool else [int(v) for v in np.unique(mask) if v]
        planes = tuple((v, mask_to_rle(mask == v)["counts"]) for v in values)
        return cls(int(mask.shape[0]), int(mask.shape[1]), planes)

    def decode(self) -> np.ndarray:
        """uint8 [h, w]; raises `MaskError` when the encoding is damaged."""
        out = np.zeros((self.height, self.width), np.uint8)
        for value, counts in self.planes:
            out[rle_to_mask({"size": [self.height, self.width], "counts": counts})] = value
        return out


def mask_to_rle(mask: np.ndarray) -> dict[str, Any]:
    """A mask, bool or 0/1 [h, w], as COCO's compressed RLE {"size": [h, w], "counts": str} (JSON-ready).

    Raises `MaskError` when it is not a two-dimensional mask with pixels.
    """
    from pycocotools import mask as coco  # compiled extension, only needed here

    mask = np.asarray(mask)
    if mask.ndim != 2 or 0 in mask.shape:
        raise MaskError(f"a mask must be [h, w] with pixels, not {list(mask.shape)}.")
    if mask.dtype != bool and not np.isin(mask, (0, 1)).all():
        raise MaskError("a mask must be boolean or hold only 0 and 1; threshold it first.")
    rle = coco.encode(np.asfortranarray(mask, np.uint8))
    counts = rle["counts"]
    counts = counts if isinstance(counts, str) else counts.decode("ascii")
    return {"size": [int(s) for s in mask.shape], "counts": counts}


def rle_to_mask(rle: Mapping[str, Any]) -> np.ndarray:
    """COCO RLE, compressed (counts str or bytes) or not (list of runs), as bool [h, w].

    Raises `MaskError` when it is malformed: COCO's own decoder would trust the runs and read or write
    beyond the mask.
    """
    if not isinstance(rle, Mapping) or not {"size", "counts"} <= rle.keys():
        raise MaskError("an RLE mask must be a mapping with 'size' and 'counts'.")
    height, width = _size(rle["size"])
    counts = rle["counts"]
    if isinstance(counts, str | bytes):
        runs = _runs(counts)
    else:
        runs = np.asarray(counts)
        if runs.ndim != 1 or not (np.issubdtype(runs.dtype, np.integer) or runs.size == 0):
            raise MaskError("the counts of an RLE mask must be a string or a list of integers.")
    if runs.size and (runs.min() < 0 or runs.max() > height * width):
        raise MaskError(
            f"an RLE mask of {height}x{width} pixels has an impossible run (negative or too long)."
        )
    total = int(runs.sum())
    if total != height * width:
        raise MaskError(
            f"the runs of an RLE mask cover {total} pixels, its size {height}x{width} has {height * width}."
        )
    values = np.arange(runs.size) % 2 == 1  # runs alternate, zeros first
    return np.repeat(values, runs).reshape(width, height).T.copy()


def _size(size: Any) -> tuple[int, int]:
    ok = isinstance(size, list | tuple | np.ndarray) and len(size) == 2
    if not ok or not all(isinstance(s, int | np.integer) and not isinstance(s, bool) and s > 0 for s in size):
        raise MaskError(f"the size of an RLE mask must be [height, width], not {size!r}.")
    if int(size[0]) * int(size[1]) > MAX_PIXELS:
        raise MaskError(f"an RLE mask of {size[0]}x{size[1]} pixels is too large (at most {MAX_PIXELS:,}).")
    return int(size[0]), int(size[1])


def _runs(counts: str | bytes) -> np.ndarray:
    """Run lengths of COCO's counts string.

    A number takes one character per 5 bits, low bits first, 48 added; bit 5 says that more follow, the
    highest bit of the last is the sign. From the fourth number on they are differences to two before.
    """
    try:
        data = counts.encode("ascii") if isinstance(counts, str) else counts
    except UnicodeEncodeError:
        raise MaskError("the counts of an RLE mask hold characters that no encoder writes.") from None
    codes = np.frombuffer(data, np.uint8).astype(np.int64) - 48
    if codes.size == 0:
        return codes
    if codes.min() < 0 or codes.max() > 63:
        raise MaskError("the counts of an RLE mask hold characters that no encoder writes.")
    ends = np.flatnonzero(codes & 32 == 0)
    if ends.size == 0 or ends[-1] != codes.size - 1:
        raise MaskError("the counts of an RLE mask stop in the middle of a number; the string was cut.")
    starts = np.concatenate([[0], ends[:-1] + 1])
    lengths = ends - starts + 1
    if lengths.max() > 7:  # 35 bits: beyond any size allowed here
        raise MaskError("the counts of an RLE mask hold an impossible run.")
    shifts = 5 * (np.arange(codes.size) - np.repeat(starts, lengths))
    numbers = np.add.reduceat((codes & 31) << shifts, starts)
    numbers -= ((codes[ends] & 16) != 0).astype(np.int64) << (5 * lengths)
    numbers[1::2] = np.cumsum(numbers[1::2])
    numbers[2::2] = np.cumsum(numbers[2::2])
    return numbers
