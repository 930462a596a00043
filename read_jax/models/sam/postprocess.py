"""SAM's low-resolution masks at the original size of the image, in two matrix products.

Upstream (segment-anything `Sam.postprocess_masks`, READ in float32): 256 -> 1024 bilinear, crop to the
picture inside the padded square, bilinear to the original size. Every step is linear and separable, so
`mask = rows @ low_res @ columnsᵀ`.
"""

from __future__ import annotations

import jax
import jax.numpy as jnp
from jax.typing import ArrayLike

from read_jax.geometry import ImageGeometry
from read_jax.models.resize import one_hot_rows, output_taps, through_resize

LOW_RES_STRIDE = 4
"""Pixels of SAM's input frame per pixel of a low-resolution mask."""


def mask_rows(positions: ArrayLike, sam_size: ArrayLike, size: ArrayLike, low_res_size: int) -> jax.Array:
    """The matrix [T, low_res_size] that takes one axis of a low-resolution mask to output positions.

    Args:
        positions: output pixels [T] along this axis (original frame); may be traced.
        sam_size: extent of the picture along this axis in the SAM-1024 frame; may be traced.
        size: extent of the picture along this axis in the original frame; may be traced.
        low_res_size: extent of the low-resolution mask, 256 for SAM.
    """
    taps = through_resize(output_taps(positions), sam_size, size)
    taps = through_resize(taps, low_res_size, LOW_RES_STRIDE * low_res_size)
    return one_hot_rows(taps, low_res_size)


def mask_logits(
    low_res: jax.Array, geometry: ImageGeometry, rows: ArrayLike, columns: ArrayLike
) -> jax.Array:
    """Mask logits at chosen pixels of the original image.

    Args:
        low_res: [..., 256, 256] low-resolution logits (4 x SAM's grid), all of one image.
        geometry: of that image (scalars; `jax.vmap` over a batch of images).
        rows: row indices [T] in the original frame; may be traced, so that one program of fixed tile
            size serves every image and every tile.
        columns: column indices [S] in the original frame.

    Returns:
        float32 [..., T, S]. Positions beyond the image repeat its edge; mask them.
    """
    size = low_res.shape[-1]
    vertical = mask_rows(rows, geometry.sam_height, geometry.height, size)  # [T, 256]
    horizontal = mask_rows(columns, geometry.sam_width, geometry.width, size)  # [S, 256]
    # float32 products: the sign of a logit decides a pixel.
    half = jnp.einsum("th,...hw->...tw", vertical, low_res.astype(jnp.float32), precision="highest")
    return jnp.einsum("...tw,sw->...ts", half, horizontal, precision="highest")
