"""Similarity as Points (SasP): the similarity map's peaks and troughs as SAM point prompts.

One function of (similarity, geometry): jittable, batched by `jax.vmap`, static in shape, so that
one compiled program serves every image size. Source of the behaviour: READ, section "Similarity as
Points", and `similarity_to_points` / `discrete_to_continuous` of its code. Two of its costs are
avoided without changing the answer:

* the padding around CLIP's central square is never chosen, so only the map's own cells are sorted;
* the discrete-to-continuous step weighs every pixel of the image by softmax(map) · exp(-d²). The
  softmax's normaliser cancels, and exp(-d²) is below 2e-11 beyond `WINDOW` pixels, so a window around
  each point is enough, and its map values come from two small matrices instead of a full-size map.
"""

from __future__ import annotations

import math
from typing import NamedTuple

import jax
import jax.numpy as jnp

from read_jax.config import SaspConfig
from read_jax.geometry import CLIP_MAP_SIDE, SaspGeometry, sasp_geometry
from read_jax.models.resize import one_hot_rows, output_taps, through_padding, through_resize

Array = jax.Array

WINDOW = 5
"""Half side, in pixels, of the window that stands for the whole image around a point."""

EXACT = jax.lax.Precision.HIGHEST
"""Chosen pixels depend on the last bits: no TF32 or bf16 passes on accelerators."""

POSITIVE, NEGATIVE, NEUTRAL = 1, 0, -1


class SaspPoints(NamedTuple):
    """Point prompts of one similarity map, (x, y) in original pixels.

    discrete: int32 [P, 2], the chosen pixels; labels: int32 [P], 1 foreground, 0 background,
    -1 neutral; points: float32 [P, 2], the points to prompt with (differentiable when continuous).
    P is 0 when SasP is off.
    """

    discrete: Array
    labels: Array
    points: Array


def points_from_similarity(similarity: Array, height: int, width: int, config: SaspConfig) -> SaspPoints:
    """Points of one similarity map.

    Args:
        similarity: float [N], one value per image token in raster order (N a square number; 576 at
            336 px).
        height: original image height, in pixels.
        width: original image width, in pixels.
        config: SasP settings.

    Raises:
        ValueError: N is not a square number, the grid is too small for the points, or the image is empty.
    """
    count = jnp.shape(similarity)[-1]
    side = math.isqrt(count)
    if side * side != count:
        raise ValueError(f"a similarity map has a square number of values, not {count}.")
    cells = side // config.down_sample
    if config.enabled and config.num_points > max(cells - 2, 0) ** 2:  # padding may crop a cell on every side
        raise ValueError(f"SasP cannot choose {config.num_points} points from a {cells}x{cells} grid.")
    geometry = sasp_geometry(height, width, config, side)
    return _jitted_points(jnp.asarray(similarity), height, width, geometry, config)


def similarity_points(
    similarity: Array, height: Array, width: Array, geometry: SaspGeometry, config: SaspConfig
) -> SaspPoints:
    """`points_from_similarity` with traced sizes; `config` is static. Batch it with `jax.vmap`."""
    if not config.enabled:
        empty = jnp.zeros((0, 2))
        return SaspPoints(empty.astype(jnp.int32), jnp.zeros((0,), jnp.int32), empty)
    side = math.isqrt(similarity.shape[-1])
    similarity = similarity.astype(jnp.float32).reshape(side, side)
    discrete, labels = _choose(jax.lax.stop_gradient(similarity), height, width, geometry, config)
    points = discrete.astype(jnp.float32)
    if config.continuous:
        points = _expected_position(min_max(similarity), discrete, height, width, geometry)
    return SaspPoints(discrete, labels, points)


_jitted_points = jax.jit(similarity_points, static_argnames="config")


def min_max(x: Array) -> Array:
    """Scale to [0, 1] by the smallest and largest value; a constant map becomes 0.5 everywhere.

    (The original divides zero by zero there and fails. At 0.5 all points are neutral, which tell SAM
    nothing: the [SEG] embedding decides alone. Fixed thresholds must enclose 0.5 for that, as published.)
    """
    low, high = jnp.min(x), jnp.max(x)
    span = high - low
    # XLA turns division by a broadcast scalar into multiplication by its reciprocal, which misses the
    # quotient by a bit in one value of four: enough to cross a threshold
    divisor = jax.lax.optimization_barrier(jnp.broadcast_to(jnp.where(span > 0, span, 1.0), x.shape))
    return jnp.where(span > 0, (x - low) / divisor, 0.5)


def _choose(
    similarity: Array, height: Array, width: Array, g: SaspGeometry, config: SaspConfig
) -> tuple[Array, Array]:
    """The chosen pixels [P, 2] and their labels [P], most decisive first.

    Positives by falling value, then negatives by rising value, then neutrals in raster order.
    """
    side = similarity.shape[0]
    cells = side // config.down_sample
    if cells != side:
        resize = one_hot_rows(through_resize(output_taps(jnp.arange(cells)), side, cells), side)
        similarity = jnp.einsum("ai,ij,bj->ab", resize, similarity, resize, precision=EXACT)
    value = min_max(similarity)  # [c, c], before any padding or cropping
    if config.threshold == "fixed":
        high, low = config.t_pos, config.t_neg
    else:
        mean, deviation = jnp.mean(value), jnp.std(value)
        margin = jnp.where(deviation > 0, config.epsilon * deviation, 1.0)  # constant: all neutral
        high, low = mean + margin, mean - margin

    index = jnp.arange(cells * cells)
    value = value.reshape(-1)
    row, column = index // cells + g.pad_y, index % cells + g.pad_x  # cells of the padded grid
    kept = (row >= 0) & (row < g.grid_height) & (column >= 0) & (column < g.grid_width)
    positive, negative = value >= high, value <= low
    group = jnp.where(kept, jnp.where(positive, 0, jnp.where(negative, 1, 2)), 3)
    key = jnp.where(positive, -value, jnp.where(negative, value, 0.0))
    order = jnp.lexsort((key, group))[: config.num_points]

    x = _cell_centre(column[order], g.step_x, width)
    y = _cell_centre(row[order], g.step_y, height)
    labels = jnp.asarray([POSITIVE, NEGATIVE, NEUTRAL, NEUTRAL], jnp.int32)[group[order]]
    return jnp.stack([x, y], axis=-1), labels


def _cell_centre(cell: Array, step: Array, size: Array) -> Array:
    """Pixel under a cell's centre; float32 throughout, as the original: doubles give other pixels."""
    centre = (cell.astype(jnp.float32) + 0.5) * step
    return jnp.minimum(centre, (size - 1).astype(jnp.float32)).astype(jnp.int32)


def _expected_position(value: Array, discrete: Array, height: Array, width: Array, g: SaspGeometry) -> Array:
    """Expectation of (x, y) under exp(map) · exp(-d²) around each chosen pixel: float32 [P, 2].

    The map is resized to CLIP's 336 px, zero-padded to the image's proportions, then resized to the
    image; each axis of that chain is one small matrix.
    """
    offsets = jnp.arange(-WINDOW, WINDOW + 1)
    x = discrete[:, 0, None] + offsets  # [P, O]
    y = discrete[:, 1, None] + offsets

    columns = _map_rows(x, width, g.map_width, g.map_pad_x, value.shape[1])  # [P, O, side]
    rows = _map_rows(y, height, g.map_height, g.map_pad_y, value.shape[0])
    window = jnp.einsum("pri,ij,pcj->prc", rows, value, columns, precision=EXACT)  # [P, O, O]

    near = jnp.exp(-jnp.square(offsets).astype(jnp.float32))
    weight_x = jnp.where((x >= 0) & (x < width), near, 0.0)
    weight_y = jnp.where((y >= 0) & (y < height), near, 0.0)
    weight = jnp.exp(window) * weight_y[:, :, None] * weight_x[:, None, :]
    total = jnp.sum(weight, axis=(1, 2))
    shift_x = jnp.sum(weight * offsets, axis=(1, 2)) / total
    shift_y = jnp.sum(weight * offsets[:, None], axis=(1, 2)) / total
    return discrete.astype(jnp.float32) + jnp.stack([shift_x, shift_y], axis=-1)


def _map_rows(pixels: Array, size: Array, map_size: Array, pad: Array, side: int) -> Array:
    """Weights [..., side] of the similarity map's rows (or columns) at original pixels [...]."""
    taps = through_resize(output_taps(pixels), map_size, size)
    taps = through_padding(taps, pad, CLIP_MAP_SIDE)
    return one_hot_rows(through_resize(taps, side, CLIP_MAP_SIDE), side)
