"""Bilinear resizing as small matrices, built on the device from traced sizes.

Resizing one axis is linear, so a chain of resizes, crops and paddings is one matrix `rows [T, size]`
with `rows @ image` the wanted rows. The sizes may be traced (one compiled program serves every image
size), only the number of rows asked for and the size of the source are static, and the result is
differentiable in the image.

Such a matrix is built backwards: begin with the wanted output positions, follow them through the
chain from the last step to the first, then spread the weights over the source axis:

    taps = output_taps(jnp.arange(height))
    taps = through_resize(taps, sam_height, height)     # cropped frame -> output
    taps = through_resize(taps, 256, 1024)              # low resolution -> SAM-1024
    rows = one_hot_rows(taps, 256)                      # [height, 256]

Cropping the end of an axis needs no step: the positions beyond the crop are just never asked for.
The convention is that of torch's `interpolate(mode="bilinear", align_corners=False)`, no antialias.
"""

from __future__ import annotations

from typing import NamedTuple

import jax
import jax.numpy as jnp
from jax.typing import ArrayLike


class Taps(NamedTuple):
    """For each output position, the K source positions it reads and their weights.

    positions: int32 [..., T, K]; weights: float32 [..., T, K]. Positions are in the frame of whatever the
    taps have been followed back to; a weight of zero reads nothing.
    """

    positions: jax.Array
    weights: jax.Array


def bilinear_taps(
    dst: ArrayLike, in_size: ArrayLike, out_size: ArrayLike
) -> tuple[jax.Array, jax.Array, jax.Array]:
    """The two neighbours that an output position of a bilinear resize reads.

    Args:
        dst: output positions (pixel centres at .0), any shape, integer or float; may be traced.
        in_size: pixels along the axis before resizing; may be traced.
        out_size: pixels along the axis after resizing; may be traced.

    Returns:
        (i0, i1, w1), each of the shape of `dst`: the value is `(1 - w1) * x[i0] + w1 * x[i1]`.
        i0 and i1 are int32 and always within [0, in_size); w1 is float32 within [0, 1].
    """
    in_size = jnp.asarray(in_size)
    scale = in_size.astype(jnp.float32) / jnp.asarray(out_size).astype(jnp.float32)
    src = (jnp.asarray(dst).astype(jnp.float32) + 0.5) * scale - 0.5
    src = jnp.maximum(src, 0.0)
    last = in_size.astype(jnp.int32) - 1
    i0 = jnp.minimum(jnp.floor(src).astype(jnp.int32), last)
    i1 = jnp.minimum(i0 + 1, last)
    w1 = jnp.minimum(src - i0.astype(jnp.float32), 1.0)  # > 1 only for positions beyond the output
    return i0, i1, w1


def output_taps(dst: ArrayLike) -> Taps:
    """Taps that read the output positions `dst` [..., T] themselves: the start of a chain."""
    index = jnp.asarray(dst).astype(jnp.int32)[..., None]
    return Taps(index, jnp.ones(index.shape, jnp.float32))


def through_resize(taps: Taps, in_size: ArrayLike, out_size: ArrayLike) -> Taps:
    """Follow taps on the output of a bilinear resize back to its input; K doubles."""
    i0, i1, w1 = bilinear_taps(taps.positions, in_size, out_size)
    return Taps(
        jnp.concatenate([i0, i1], axis=-1),
        jnp.concatenate([taps.weights * (1.0 - w1), taps.weights * w1], axis=-1),
    )


def through_padding(taps: Taps, pad: ArrayLike, size: ArrayLike) -> Taps:
    """Follow taps on a zero-padded axis back to the axis of `size` before padding.

    Position t of the padded frame is `t - pad` before it (a negative `pad` crops the start);
    positions outside [0, size) read zeros.
    """
    index = taps.positions - pad
    inside = (index >= 0) & (index < size)
    return Taps(jnp.where(inside, index, 0), jnp.where(inside, taps.weights, 0.0))


def one_hot_rows(taps: Taps, size: int) -> jax.Array:
    """Spread the weights over the source axis: float32 rows [..., T, size] (`size` is static).

    The K one-hots are added one after the other, so nothing larger than the result is made.
    """
    position = jnp.arange(size, dtype=jnp.int32)
    rows = jnp.zeros((*taps.positions.shape[:-1], size), jnp.float32)
    for k in range(taps.positions.shape[-1]):
        rows = rows + jnp.where(taps.positions[..., k, None] == position, taps.weights[..., k, None], 0.0)
    return rows
