"""The two pictures the networks see: CLIP's central square and SAM's padded square, as uint8.

Normalisation to float happens on the device (a quarter of the bytes to copy); the host versions here say
what it must give. Frames are described in `read_jax.geometry`.
"""

from __future__ import annotations

import functools

import numpy as np
from PIL import Image

from read_jax.config import CLIP_MEAN, CLIP_STD, SAM_MEAN, SAM_STD
from read_jax.errors import ImageError
from read_jax.geometry import sam_input_size

_MAX_RESIZED = 1 << 24
"""Pictures that would grow beyond this many pixels are not: their central part is computed directly."""


def clip_crop(image: np.ndarray, size: int = 336) -> np.ndarray:
    """What CLIP sees: shortest edge to `size` (bicubic), then the central square; uint8 [size, size, 3].

    image: uint8 [h, w, 3]. Original frame -> CLIP frame. Sizes and offsets are those of transformers'
    CLIPImageProcessor (the longer edge is truncated, not rounded). A picture so long that its resized
    version would not fit in memory gives the same pixels without building it.
    """
    height, width = _check(image)
    short, long = min(height, width), max(height, width)
    resized = int(size * long / short)  # of the longer edge; never below `size`, so the crop needs no padding
    new_h, new_w = (size, resized) if height <= width else (resized, size)
    top, left = (new_h - size) // 2, (new_w - size) // 2
    if short < size and new_h * new_w > _MAX_RESIZED:
        return _resized_part(image, (new_h, new_w), (top, left), size)
    whole = Image.fromarray(image).resize((new_w, new_h), Image.Resampling.BICUBIC)
    return np.array(whole.crop((left, top, left + size, top + size)))


def sam_resize(image: np.ndarray, side: int = 1024) -> tuple[np.ndarray, tuple[int, int]]:
    """What SAM sees: longer edge to `side` (bilinear), zeros on the right and bottom.

    image: uint8 [h, w, 3]. Returns (uint8 [side, side, 3], (h, w) of the picture in it). Original frame ->
    SAM frame (segment-anything's ResizeLongestSide). The original pads after normalising: `normalize_sam`
    puts zeros there again.
    """
    height, width = _check(image)
    new_h, new_w = sam_input_size(height, width, side)
    padded = np.zeros((side, side, 3), np.uint8)
    resized = Image.fromarray(image).resize((new_w, new_h), Image.Resampling.BILINEAR)
    padded[:new_h, :new_w] = np.asarray(resized)
    return padded, (new_h, new_w)


def normalize_clip(crop: np.ndarray) -> np.ndarray:
    """uint8 [h, w, 3] -> float32 [h, w, 3], CLIP's input: (x / 255 - mean) / std."""
    return _standardise(crop.astype(np.float32) / np.float32(255), CLIP_MEAN, CLIP_STD)


def normalize_sam(padded: np.ndarray, height: int, width: int) -> np.ndarray:
    """uint8 [side, side, 3] -> float32, SAM's input: (x - mean) / std inside height x width, zero outside."""
    out = np.zeros(padded.shape, np.float32)
    out[:height, :width] = _standardise(padded[:height, :width].astype(np.float32), SAM_MEAN, SAM_STD)
    return out


def _standardise(x: np.ndarray, mean: tuple[float, ...], std: tuple[float, ...]) -> np.ndarray:
    return (x - np.asarray(mean, np.float32)) / np.asarray(std, np.float32)


def _check(image: np.ndarray) -> tuple[int, int]:
    if not isinstance(image, np.ndarray) or image.dtype != np.uint8 or image.ndim != 3 or image.shape[2] != 3:
        what = f"{image.dtype} {list(image.shape)}" if isinstance(image, np.ndarray) else type(image).__name__
        raise ImageError(f"preprocessing wants a uint8 [h, w, 3] array, not {what}; read_image makes one.")
    if 0 in image.shape:
        raise ImageError(f"the image has no pixels ({list(image.shape)}).")
    return image.shape[0], image.shape[1]


def _resized_part(image: np.ndarray, full: tuple[int, int], corner: tuple[int, int], size: int) -> np.ndarray:
    """`size` x `size` pixels at `corner` of the picture enlarged to `full`, without making the rest.

    Equal bit for bit to Pillow's resize and crop, whose arithmetic this is: columns, then rows; weights
    with 22 fractional bits; each pass ends in uint8.
    """
    first_row, row_weights = _weights(image.shape[0], full[0], corner[0], size)
    first_col, col_weights = _weights(image.shape[1], full[1], corner[1], size)
    rows, cols = row_weights.shape[1], col_weights.shape[1]
    part = image[first_row : first_row + rows, first_col : first_col + cols].astype(np.float64)
    part = _round(np.einsum("xw,hwc->hxc", col_weights, part, optimize=True))
    return _round(np.einsum("yh,hxc->yxc", row_weights, part, optimize=True)).astype(np.uint8)


def _round(sums: np.ndarray) -> np.ndarray:
    """Fixed-point sums (whole numbers below 2**53, so float64 is exact) to pixel values."""
    return np.clip(np.floor((sums + (1 << 21)) / (1 << 22)), 0, 255)


@functools.lru_cache(maxsize=8)
def _weights(source: int, target: int, start: int, count: int) -> tuple[int, np.ndarray]:
    """Bicubic weights of the target pixels start .. start + count - 1 along one axis, target >= source.

    Returns (first source pixel, float64 [count, source pixels used]); whole numbers, 22 fractional bits.
    """
    centers = (np.arange(start, start + count) + 0.5) * (source / target)
    lows = np.maximum((centers - 1.5).astype(np.int64), 0)  # two pixels to either side
    highs = np.minimum((centers + 2.5).astype(np.int64), source)
    first, last = int(lows.min()), int(highs.max())
    places = np.arange(first, last)
    weights = _cubic(places - centers[:, None] + 0.5)
    weights[(places < lows[:, None]) | (places >= highs[:, None])] = 0.0
    weights /= weights.sum(axis=1, keepdims=True)
    return first, np.trunc(weights * (1 << 22) + np.copysign(0.5, weights))


def _cubic(x: np.ndarray) -> np.ndarray:
    """Keys' cubic convolution kernel with a = -0.5."""
    x = np.abs(x)
    near = (1.5 * x - 2.5) * x * x + 1.0
    far = ((-0.5 * x + 2.5) * x - 4.0) * x + 2.0
    return np.where(x < 1.0, near, np.where(x < 2.0, far, 0.0))
