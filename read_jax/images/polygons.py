"""Polygons to masks, as the two rasterisers draw them that datasets were annotated and scored with.

`fill_polygon` gives OpenCV's pixels (ReasonSeg), `coco_mask` and `coco_piece_sum` pycocotools' (COCO and the
referring sets). Pixel frame: (x, y), origin at the top-left pixel.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import numpy as np

from read_jax.images.masks import CompactMask, MaskError, rle_to_mask

_FRACTION = 16
"""Bits behind the point in OpenCV's fixed-point x."""
_MAX_OUTLINE = 4_000_000
"""Longest outline, in pixels, that pycocotools is given: it allocates memory for every step along it."""


def fill_polygon(points: np.ndarray, height: int, width: int) -> np.ndarray:
    """The pixels that OpenCV's `polylines` (closed, thickness 1, not anti-aliased) and `fillPoly` draw.

    points: int [n, 2] (x, y) in pixels, n >= 1, within int32; they may lie outside the picture, where nothing
    is drawn. Returns bool [height, width]: the inside by the even-odd rule, and the outline itself, so that
    corners at 2 and 8 give 7 x 7 pixels; one point gives a pixel, two a line.

    Exact to the pixel, including how OpenCV clips lines and rounds edges at the border of the picture
    (imgproc/drawing.cpp: LineIterator, clipLine, FillEdgeCollection).
    """
    points = np.asarray(points)
    if points.ndim != 2 or points.shape[1] != 2 or len(points) == 0:
        raise MaskError(f"a polygon must be points [n, 2], n >= 1, not {list(points.shape)}.")
    if not np.issubdtype(points.dtype, np.integer) or np.abs(points.astype(np.float64)).max() >= 2**31:
        raise MaskError("the points of a polygon must be integers within 32 bits; truncate them first.")
    end = points.astype(np.int64)
    start = np.roll(end, 1, axis=0)
    clipped_start, clipped_end = start.copy(), end.copy()
    visible = np.ones(len(end), bool)
    size = np.array([width, height])
    outside = ((start < 0) | (start >= size) | (end < 0) | (end >= size)).any(axis=1)
    for k in np.flatnonzero(outside):
        a, b, visible[k] = _clip_line(start[k].tolist(), end[k].tolist(), width - 1, height - 1)
        clipped_start[k], clipped_end[k] = a, b

    mask = np.zeros((height, width), bool)
    _fill_inside(mask, start, end, clipped_start, clipped_end)
    _draw_lines(mask, clipped_start[visible], clipped_end[visible])
    return mask


def _clip_line(
    start: list[int], end: list[int], right: int, bottom: int
) -> tuple[list[int], list[int], bool]:
    """The part of a line inside 0..right, 0..bottom, in whole pixels, and whether there is any.

    Vertical sides come second. Each new coordinate is truncated and the next computed from it. A line found
    to miss the picture only half way stays half clipped, and an edge is taken from it nevertheless.
    """
    (x1, y1), (x2, y2) = start, end

    def sideways(x: int) -> int:
        return (x < 0) + 2 * (x > right)

    def upright(y: int) -> int:
        return (y < 0) + 2 * (y > bottom)

    if sideways(x1) & sideways(x2) or upright(y1) & upright(y2):
        return start, end, False
    if side := upright(y1):
        y = 0 if side == 1 else bottom
        x1, y1 = x1 + int(float(y - y1) * (x2 - x1) / (y2 - y1)), y
    if side := upright(y2):
        y = 0 if side == 1 else bottom
        x2, y2 = x2 + int(float(y - y2) * (x2 - x1) / (y2 - y1)), y
    if sideways(x1) & sideways(x2):
        return [x1, y1], [x2, y2], False
    if side := sideways(x1):
        x = 0 if side == 1 else right
        x1, y1 = x, y1 + int(float(x - x1) * (y2 - y1) / (x2 - x1))
    if side := sideways(x2):
        x = 0 if side == 1 else right
        x2, y2 = x, y2 + int(float(x - x2) * (y2 - y1) / (x2 - x1))
    return [x1, y1], [x2, y2], True


def _draw_lines(mask: np.ndarray, start: np.ndarray, end: np.ndarray) -> None:
    """Bresenham's lines between points [n, 2] inside the mask, from left to right as OpenCV draws them."""
    backwards = end[:, :1] < start[:, :1]
    start, end = np.where(backwards, end, start), np.where(backwards, start, end)
    delta = np.abs(end - start)
    steps = delta.max(axis=1)  # along the longer axis, the minor one follows
    minor = delta.min(axis=1)
    steep = delta[:, 1] > delta[:, 0]
    direction = np.where(end < start, -1, 1)

    line, i = _ranges(steps + 1)
    length = np.maximum(steps, 1)[line]
    across = (2 * minor[line] * i + length - 1) // (2 * length)  # rounded, a half down
    along = np.where(steep[line, None], np.stack([across, i], 1), np.stack([i, across], 1))
    pixels = start[line] + direction[line] * along
    mask[pixels[:, 1], pixels[:, 0]] = True


def _fill_inside(
    mask: np.ndarray,
    start: np.ndarray,
    end: np.ndarray,
    clipped_start: np.ndarray,
    clipped_end: np.ndarray,
) -> None:
    """Fill between the 1st and 2nd, 3rd and 4th, ... edge that crosses each row.

    An edge belongs to the rows from its upper end to above its lower end. Its slope is that of the clipped
    line, where clipping left it one, truncated to the fixed point, so that long edges drift.
    """
    height, width = mask.shape
    sloped = start[:, 1] != end[:, 1]
    start, end, clipped_start, clipped_end = (
        points[sloped] for points in (start, end, clipped_start, clipped_end)
    )
    level = clipped_start[:, 1] == clipped_end[:, 1]
    from_y = np.where(level, start[:, 1], clipped_start[:, 1])
    to_y = np.where(level, end[:, 1], clipped_end[:, 1])
    from_x, to_x = clipped_start[:, 0] << _FRACTION, clipped_end[:, 0] << _FRACTION
    rise, run = to_y - from_y, to_x - from_x
    slope = np.sign(run) * np.sign(rise) * (np.abs(run) // np.abs(rise))
    down = start[:, 1] < end[:, 1]
    top, bottom = np.where(down, start[:, 1], end[:, 1]), np.where(down, end[:, 1], start[:, 1])
    anchor_y, anchor_x = np.where(down, from_y, to_y), np.where(down, from_x, to_x)

    first = np.maximum(top, 0)
    edge, i = _ranges(np.maximum(np.minimum(bottom, height) - first, 0))
    if not edge.size:
        return
    row = first[edge] + i
    x = anchor_x[edge] + (row - anchor_y[edge]) * slope[edge]
    order = np.lexsort((x, row))
    row, x = row[order][::2], x[order]
    # every row is crossed an even number of times, as the polygon is closed; whole pixels between two edges
    left, right = -(-x[::2] >> _FRACTION), x[1::2] >> _FRACTION
    shown = (left < width) & (right >= 0) & (left <= right)
    row, left, right = row[shown], np.maximum(left[shown], 0), np.minimum(right[shown], width - 1)

    if not row.size:
        return
    y0, x0 = row.min(), left.min()
    changes = np.zeros((row.max() - y0 + 1, right.max() - x0 + 2), np.int32)
    np.add.at(changes, (row - y0, left - x0), 1)
    np.add.at(changes, (row - y0, right - x0 + 1), -1)
    inside = np.cumsum(changes, axis=1)[:, :-1] > 0
    mask[y0 : y0 + inside.shape[0], x0 : x0 + inside.shape[1]] |= inside


def _ranges(counts: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """For counts [2, 3]: which range each element belongs to [0 0 1 1 1], and its place [0 1 0 1 2]."""
    owner = np.repeat(np.arange(len(counts)), counts)
    return owner, np.arange(len(owner)) - np.repeat(np.cumsum(counts) - counts, counts)


def coco_mask(segmentation: Any, height: int, width: int) -> CompactMask:
    """A COCO `segmentation` as a mask of 0 and 1: the union of its pieces, as pycocotools' `annToMask`.

    segmentation: a list of polygons (flat x, y, x, y, ...), a list of RLE mappings, or one RLE mapping;
    compressed or not. Polygons are clipped to the picture; an empty list is an empty mask.

    Raises `MaskError` when it is malformed, of another size, or lies outside the picture altogether.
    """
    pieces = _pieces(segmentation, height, width)
    if not pieces:
        return CompactMask(height, width)
    coco = _pycocotools()
    merged = coco.merge(pieces)
    if not coco.area(merged):
        return CompactMask(height, width)
    return CompactMask(height, width, ((1, merged["counts"].decode("ascii")),))


def coco_piece_sum(segmentation: Any, height: int, width: int) -> np.ndarray:
    """How many pieces of a COCO `segmentation` cover each pixel, uint8 [height, width].

    What the original takes for the masks of the referring sets: 2 where two pieces overlap. Arguments and
    errors as for `coco_mask`.
    """
    out = np.zeros((height, width), np.uint8)
    for piece in _pieces(segmentation, height, width):
        out += rle_to_mask(piece)
    return out


def _pycocotools() -> Any:
    from pycocotools import mask  # compiled extension, only needed here

    return mask


def _pieces(segmentation: Any, height: int, width: int) -> list[dict[str, Any]]:
    """Checked pieces as compressed RLEs: pycocotools trusts what it is given."""
    coco = _pycocotools()
    if isinstance(segmentation, Mapping):
        segmentation = [segmentation]
    if not isinstance(segmentation, list | tuple):
        what = type(segmentation).__name__
        raise MaskError(f"a segmentation must be a list of polygons or of RLE masks, not {what}.")
    pieces, polygons = [], []
    for piece in segmentation:
        if isinstance(piece, Mapping):
            mask = rle_to_mask(piece)
            if mask.shape != (height, width):
                raise MaskError(
                    f"an RLE mask of {mask.shape[0]}x{mask.shape[1]} pixels (height x width) does not fit "
                    f"its picture of {height}x{width}."
                )
            pieces.append(coco.encode(np.asfortranarray(mask, np.uint8)))
        else:
            polygons.append(_flat_polygon(piece))
    if polygons and not pieces and not any(_reaches(p, height, width) for p in polygons):
        x, y = polygons[0][0], polygons[0][1]
        raise MaskError(
            f"the segmentation lies outside its picture of {height}x{width}, near ({x:g}, {y:g})."
        )
    for polygon in polygons:
        pieces += coco.frPyObjects([polygon.tolist()], height, width)
    return pieces


def _flat_polygon(piece: Any) -> np.ndarray:
    """float64 [2 n] of a polygon's x, y, x, y, ..."""
    if not isinstance(piece, np.ndarray):
        if not isinstance(piece, list | tuple) or not all(type(v) in (int, float) for v in piece):
            raise MaskError(
                "a polygon must be a flat list of numbers x, y, x, y, ...; it holds something else."
            )
    elif piece.ndim != 1 or piece.dtype.kind not in "iuf":
        raise MaskError(f"a polygon must be numbers [2 n], not {piece.dtype} {list(piece.shape)}.")
    if len(piece) < 6 or len(piece) % 2:
        raise MaskError(
            f"a polygon of {len(piece)} numbers; it must have an even number of them, at least 6."
        )
    try:
        flat = np.asarray(piece, np.float64)
    except OverflowError:
        flat = np.array([np.inf])
    if not np.isfinite(flat).all():
        raise MaskError("a polygon holds a coordinate that is not a finite number.")
    points = flat.reshape(-1, 2)
    if np.abs(points - np.roll(points, 1, axis=0)).max(axis=1).sum() > _MAX_OUTLINE:
        raise MaskError(f"a polygon's outline is absurdly long (over {_MAX_OUTLINE:,} pixels).")
    return flat


def _reaches(flat: np.ndarray, height: int, width: int) -> bool:
    """Whether the box around a polygon touches the picture."""
    x, y = flat[::2], flat[1::2]
    return bool(x.min() <= width and x.max() >= 0 and y.min() <= height and y.max() >= 0)
