"""Coordinate frames of one image, computed exactly on the host.

Frames, all (x, y) with the origin at the top-left and pixel centres at .0 as in SAM:

* original: pixels of the picture as the user gave it;
* SAM-1024: the picture scaled so that its longer side is 1024, before padding to a square;
* CLIP-336: the central square that CLIP sees;
* grid: the cells of a similarity map (24x24 at 336 px), raster order.

The original decides grid sizes and paddings with Python's doubles and truncation, which float32 on a
device cannot reproduce; so these integers are found here, and travel to the device as traced scalars:
one compiled program then serves every image size. Plain numpy, nothing here touches a device.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, NamedTuple

import numpy as np

from read_jax.config import SaspConfig

CLIP_MAP_SIDE = 336
"""Side of the full-size similarity map that the discrete-to-continuous step reads (READ fixes it)."""

Scalar = Any
"""A numpy scalar on the host; inside jit the same field is a traced array (batched under vmap)."""


class SaspGeometry(NamedTuple):
    """Where a similarity map lies in the image (READ's `similarity_to_points`).

    grid_*: size of the padded grid that points are chosen from, in cells; pad_*: cells added on the
    top/left (negative: cropped); step_*: original pixels per cell; map_*: size of the padded
    CLIP-336 map; map_pad_*: its padding on the top/left.
    """

    grid_height: Scalar
    grid_width: Scalar
    pad_y: Scalar
    pad_x: Scalar
    step_y: Scalar
    step_x: Scalar
    map_height: Scalar
    map_width: Scalar
    map_pad_y: Scalar
    map_pad_x: Scalar


class ImageGeometry(NamedTuple):
    """Everything the device needs to know of an image's size.

    height, width: original pixels; sam_height, sam_width: the same picture in the SAM-1024 frame;
    scale_x, scale_y: factors from the original frame to SAM-1024.
    """

    height: Scalar
    width: Scalar
    sam_height: Scalar
    sam_width: Scalar
    scale_y: Scalar
    scale_x: Scalar
    sasp: SaspGeometry


def sam_input_size(height: int, width: int, side: int = 1024) -> tuple[int, int]:
    """(height, width) after scaling the longer side to `side`: segment-anything's ResizeLongestSide.

    Doubles, rounded half up as there; never below one pixel (it would round a very thin side to 0).
    """
    scale = side * 1.0 / max(height, width)
    return max(int(height * scale + 0.5), 1), max(int(width * scale + 0.5), 1)


def padded_size(height: int, width: int, side: int) -> tuple[int, int, int, int]:
    """(rows, columns, top, left) of a square map of `side` cells padded to the image's proportions.

    CLIP sees the central square, so the longer side of the image extends beyond the map. The doubles,
    the truncation and the floor division are the original's and checkpoints were trained with them:
    `int(s * (side / s))` is `side - 1` for some s, the padding then is -1 and crops a cell on each side.
    """
    scale = side / min(height, width)
    pad_y = (int(height * scale) - side) // 2
    pad_x = (int(width * scale) - side) // 2
    return side + 2 * pad_y, side + 2 * pad_x, pad_y, pad_x


def sasp_geometry(height: int, width: int, config: SaspConfig, side: int = 24) -> SaspGeometry:
    """Geometry of the similarity map (`side` x `side` cells) of an image of this size.

    Raises:
        ValueError: the image has no pixels.
    """
    _require_pixels(height, width)
    rows, columns, pad_y, pad_x = padded_size(height, width, side // config.down_sample)
    map_height, map_width, map_pad_y, map_pad_x = padded_size(height, width, CLIP_MAP_SIDE)
    return SaspGeometry(
        np.int32(rows),
        np.int32(columns),
        np.int32(pad_y),
        np.int32(pad_x),
        np.float32(height / rows),
        np.float32(width / columns),
        np.int32(map_height),
        np.int32(map_width),
        np.int32(map_pad_y),
        np.int32(map_pad_x),
    )


def image_geometry(
    height: int, width: int, config: SaspConfig, side: int = 24, sam_side: int = 1024
) -> ImageGeometry:
    """Geometry of an image of `height` x `width` original pixels.

    Raises:
        ValueError: the image has no pixels.
    """
    _require_pixels(height, width)
    sam_height, sam_width = sam_input_size(height, width, sam_side)
    return ImageGeometry(
        np.int32(height),
        np.int32(width),
        np.int32(sam_height),
        np.int32(sam_width),
        np.float32(sam_height / height),
        np.float32(sam_width / width),
        sasp_geometry(height, width, config, side),
    )


def stack_geometries(geometries: Sequence[ImageGeometry]) -> ImageGeometry:
    """Batch geometries: every field becomes an array with a leading batch axis."""

    def stack(parts: Sequence[Any]) -> list[np.ndarray]:
        return [np.stack(column) for column in zip(*parts, strict=True)]

    sasp = SaspGeometry._make(stack([g.sasp for g in geometries]))
    return ImageGeometry._make([*stack([g[:-1] for g in geometries]), sasp])


def _require_pixels(height: int, width: int) -> None:
    if height < 1 or width < 1:
        raise ValueError(f"an image of {height}x{width} pixels has no geometry.")
