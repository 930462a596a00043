"""Drawing a scene: the picture, and for every pixel the thing it belongs to.

Everything is counted in whole 64ths of a pixel (frame: pixel (column, row) is the square from (64·column,
64·row) to (64·column + 64, 64·row + 64)), so that every machine draws the same bytes. A pixel is looked at in
4x4 samples, each in the middle of a sixteenth of it; a sample belongs to the front-most thing that covers it.

    colour of a pixel   the average of its samples
    mask of a thing     the pixels of which at least half of the samples belong to it; a pixel that two things
                        halve belongs to the one in front
"""

from __future__ import annotations

import math
from typing import TYPE_CHECKING

import numpy as np

from read_jax.data.scenes.shapes import BODY, LIGHT, OUTLINES, Piece

if TYPE_CHECKING:
    from read_jax.data.scenes.world import Scene, Thing

SUBPIXELS = 64
SAMPLES = 4  # per side of a pixel
_STEP = SUBPIXELS // SAMPLES
NOTHING = 255
"""Label of the pixels of the background."""


def draw(scene: Scene) -> tuple[np.ndarray, np.ndarray]:
    """The picture, uint8 [h, w, 3] RGB, and the labels, uint8 [h, w]: index of the thing or `NOTHING`."""
    height, width = scene.height, scene.width
    owner = np.zeros((height * SAMPLES, width * SAMPLES), np.uint8)  # 0 background, else 1 + 3·index + tone
    stencils = []
    for index, thing in enumerate(scene.things):
        top, left, tones = stencil(thing, height, width)
        region = owner[_samples(top, left, tones)]
        np.copyto(region, (tones + np.uint8(3 * index)), where=tones > 0)
        stencils.append((top, left, tones))

    paper = _background(scene)  # int16 [3, h, w]
    total = paper * np.int16(SAMPLES**2)  # sums of samples: at most 16 · 255
    labels = np.full((height, width), NOTHING, np.uint8)
    for index, (thing, (top, left, tones)) in enumerate(zip(scene.things, stencils, strict=True)):
        part = owner[_samples(top, left, tones)]
        rows, columns = tones.shape[0] // SAMPLES, tones.shape[1] // SAMPLES
        window = np.s_[top : top + rows, left : left + columns]
        covered = np.zeros((rows, columns), np.int16)
        for tone, colour in enumerate(_tones(thing.rgb)):
            count = _per_pixel(part == 1 + 3 * index + tone)
            for channel in range(3):
                total[channel][window] += count * (np.int16(colour[channel]) - paper[channel][window])
            covered += count
        labels[window][2 * covered >= SAMPLES**2] = index
    image = ((total + SAMPLES**2 // 2) // SAMPLES**2).astype(np.uint8)
    return np.ascontiguousarray(image.transpose(1, 2, 0)), labels


def stencil(thing: Thing, height: int, width: int) -> tuple[int, int, np.ndarray]:
    """A thing alone: (top, left, tones uint8 [4·rows, 4·columns]), top and left in pixels.

    A tone is 0 where the thing does not cover the sample, else 1 + the tone's number.
    """
    reach = thing.extent * 3 // 4  # the box's corners when turned
    left = max(0, (thing.x - reach) // SUBPIXELS)
    top = max(0, (thing.y - reach) // SUBPIXELS)
    right = min(width, (thing.x + reach) // SUBPIXELS + 1)
    bottom = min(height, (thing.y + reach) // SUBPIXELS + 1)
    xs = np.arange(left * SAMPLES, right * SAMPLES, dtype=np.int64) * _STEP + _STEP // 2 - thing.x
    ys = np.arange(top * SAMPLES, bottom * SAMPLES, dtype=np.int64) * _STEP + _STEP // 2 - thing.y
    tones = np.zeros((ys.size, xs.size), np.uint8)
    for piece in OUTLINES[thing.shape]:
        inside = _inside(piece, thing, xs, ys)
        if piece.action == "paint":
            inside &= tones > 0
        tones[inside] = 0 if piece.action == "cut" else 1 + piece.tone
    if thing.pattern != "plain":
        tones[_pattern(thing, xs, ys) & (tones == 1 + BODY)] = 1 + LIGHT
    return top, left, tones


def _samples(top: int, left: int, tones: np.ndarray) -> tuple[slice, slice]:
    rows, columns = tones.shape
    return np.s_[top * SAMPLES : top * SAMPLES + rows, left * SAMPLES : left * SAMPLES + columns]


def _per_pixel(samples: np.ndarray) -> np.ndarray:
    """How many of each pixel's samples hold; int16 [rows, columns]."""
    wide = samples.view(np.uint8)
    tall = sum(wide[:, k::SAMPLES] for k in range(1, SAMPLES)) + wide[:, ::SAMPLES]
    return (sum(tall[k::SAMPLES] for k in range(1, SAMPLES)) + tall[::SAMPLES]).astype(np.int16)


def _inside(piece: Piece, thing: Thing, xs: np.ndarray, ys: np.ndarray) -> np.ndarray:
    """Which samples (relative to the thing's centre) the piece covers; bool [ys, xs]."""
    corners = [_placed(point, thing) for point in piece.points]
    if len(corners) > 1:
        return inside_polygon(corners, xs, ys)
    (x, y), (rx, ry) = corners[0], (round(r * thing.extent) for r in piece.radii)
    return ((ys - y) * rx)[:, None] ** 2 + ((xs - x) * ry)[None] ** 2 <= (rx * ry) ** 2


def _placed(point: tuple[float, float], thing: Thing) -> tuple[int, int]:
    """A point of the outline: mirrored, turned clockwise, scaled; whole 64ths of a pixel."""
    x, y = (-point[0] if thing.mirrored else point[0]), point[1]
    s, c = math.sin(math.radians(thing.angle)), math.cos(math.radians(thing.angle))
    return round((x * c - y * s) * thing.extent), round((x * s + y * c) * thing.extent)


def inside_polygon(corners: list[tuple[int, int]], xs: np.ndarray, ys: np.ndarray) -> np.ndarray:
    """Which points of the grid ys x xs (ascending int64) lie in the polygon, by the even-odd rule.

    A point is inside when an odd number of edges crosses the half line to its right; exact in integers.
    """
    inside = np.zeros((ys.size, xs.size), bool)
    for (x0, y0), (x1, y1) in zip(corners, corners[1:] + corners[:1], strict=True):
        if y0 == y1:
            continue
        if y0 > y1:
            x0, y0, x1, y1 = x1, y1, x0, y0
        rows = slice(*np.searchsorted(ys, (y0, y1)))  # those with y0 <= y < y1
        crossing = x0 * (y1 - y0) + (ys[rows] - y0) * (x1 - x0)  # times (y1 - y0)
        inside[rows] ^= (xs * (y1 - y0))[None] < crossing[:, None]
    return inside


def _pattern(thing: Thing, xs: np.ndarray, ys: np.ndarray) -> np.ndarray:
    """Where the pattern shows its lighter tone; bool [ys, xs]."""
    if thing.pattern == "striped":
        period = thing.extent * 2 // 7
        return (xs[None] + ys[:, None]) % period < period // 2
    period = thing.extent // 4
    x, y = (xs % period - period // 2) ** 2, (ys % period - period // 2) ** 2
    return y[:, None] + x[None] <= (period * 3 // 10) ** 2


def _tones(rgb: tuple[int, int, int]) -> tuple[tuple[int, ...], ...]:
    """The thing's colour, a lighter and a darker one."""
    return rgb, tuple(v + (255 - v) * 9 // 20 for v in rgb), tuple(v * 7 // 10 for v in rgb)


def _background(scene: Scene) -> np.ndarray:
    """The scene's few colours spread smoothly over the picture; int16 [3, h, w]."""
    grid = np.array(scene.background, np.int32).transpose(2, 0, 1)  # [3, rows, columns]
    tall = _stretch(grid.swapaxes(1, 2), scene.height).swapaxes(1, 2)
    return _stretch(tall, scene.width).astype(np.int16)


def _stretch(grid: np.ndarray, size: int) -> np.ndarray:
    """The last axis to that many, by straight lines between its entries, ends on ends."""
    count = grid.shape[-1]
    if count == 1:
        return np.repeat(grid, size, axis=-1)
    place = np.arange(size, dtype=np.int32) * 256 * (count - 1) // (size - 1)
    cell = np.minimum(place >> 8, count - 2)
    part = place - (cell << 8)
    return (grid[..., cell] * (256 - part) + grid[..., cell + 1] * part) >> 8


def hidden_share(front: Thing, back: Thing, height: int, width: int) -> float:
    """How much of the thing at the back the one in front hides, 0 to 1."""
    top, left, seen = stencil(back, height, width)
    upper, start, cover = stencil(front, height, width)
    whole = np.zeros((height * SAMPLES, width * SAMPLES), bool)
    whole[_samples(upper, start, cover)] = cover > 0
    hidden = whole[_samples(top, left, seen)] & (seen > 0)
    return float(hidden.sum() / (seen > 0).sum())
