"""Masks at the original size: against torch's chain of resizes, and against the original's numbers."""

from __future__ import annotations

import types

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import torch

from read_jax.config import SaspConfig
from read_jax.geometry import image_geometry, sam_input_size, stack_geometries
from read_jax.models.sam.postprocess import mask_logits
from tests.models import segment_anything_reference as reference
from tests.models.parameters import assert_close

TILE = 128
SIZES = [(1, 1), (30000, 10), (10, 30000), (1, 4000), (37, 53), (480, 640), (1024, 1024), (2003, 1201)]

tile = jax.jit(mask_logits)


def geometry_of(height: int, width: int):
    return image_geometry(height, width, SaspConfig())


def all_logits(low_res: np.ndarray, height: int, width: int) -> np.ndarray:
    """The whole mask in one tile of a bucketed size, as a caller would do it."""
    rows = np.arange(-(-height // TILE) * TILE)
    columns = np.arange(-(-width // TILE) * TILE)
    return np.asarray(tile(low_res, geometry_of(height, width), rows, columns))[..., :height, :width]


def torch_logits(low_res: torch.Tensor, height: int, width: int) -> torch.Tensor:
    """segment-anything's own `postprocess_masks`, for masks [N, 256, 256]."""
    sam = types.SimpleNamespace(image_encoder=types.SimpleNamespace(img_size=1024))  # all that it reads
    postprocess = reference.modeling().Sam.postprocess_masks
    return postprocess(sam, low_res[None], sam_input_size(height, width), (height, width))[0]


@pytest.mark.parametrize(("height", "width"), SIZES)
def test_logits_equal_segment_anything_at_any_size(height, width):
    low_res = np.random.default_rng(height).standard_normal((1, 256, 256)).astype(np.float32) * 10
    expected = torch_logits(torch.from_numpy(low_res), height, width)
    assert_close(all_logits(low_res, height, width), expected)


def test_one_compiled_tile_serves_every_size_and_place():
    low_res = np.random.default_rng(0).standard_normal((256, 256)).astype(np.float32)
    program = jax.jit(lambda *arguments: mask_logits(*arguments))
    for height, width, top, left in [(333, 500, 0, 0), (1500, 2000, 700, 1800), (90, 120, 40, 100)]:
        rows, columns = top + np.arange(32), left + np.arange(20)
        whole = torch_logits(torch.from_numpy(low_res[None]), height, width)[0]
        assert_close(
            program(low_res, geometry_of(height, width), rows, columns),
            whole[top : top + 32, left : left + 20],
        )
    assert program._cache_size() == 1


def test_geometry_may_be_batched_with_vmap():
    low_res = np.random.default_rng(1).standard_normal((2, 3, 256, 256)).astype(np.float32)
    sizes = [(333, 500), (64, 31)]
    rows, columns = np.arange(31), np.arange(30)
    batched = jax.jit(jax.vmap(mask_logits, in_axes=(0, 0, None, None)))(
        low_res, stack_geometries([geometry_of(*s) for s in sizes]), rows, columns
    )
    for one, masks, size in zip(batched, low_res, sizes, strict=True):
        assert_close(one, tile(masks, geometry_of(*size), rows, columns), 1e-6)


def test_gradient_of_the_low_resolution_mask_equals_torchs():
    low_res = np.random.default_rng(2).standard_normal((1, 256, 256)).astype(np.float32)
    geometry = geometry_of(60, 90)
    rows, columns = np.arange(60), np.arange(90)

    @jax.jit
    @jax.grad
    def ours(masks):
        return jnp.sum(jax.nn.sigmoid(mask_logits(masks, geometry, rows, columns)))

    theirs = torch.from_numpy(low_res).requires_grad_()
    torch_logits(theirs, 60, 90).sigmoid().sum().backward()
    assert theirs.grad is not None
    assert_close(ours(low_res), theirs.grad)


@pytest.mark.parametrize("case", range(10))
def test_logits_and_mask_equal_the_original(goldens, case):
    z = np.load(goldens / "unit" / "postprocess_masks.npz")
    name = f"c{case:02d}"
    height, width = (int(n) for n in z[f"{name}_original_hw"])
    assert sam_input_size(height, width) == tuple(z[f"{name}_input_hw"])
    logits = all_logits(z[f"{name}_low_res"], height, width)
    assert_close(logits[::4, ::4], z[f"{name}_logits_sub4"])
    assert_close(logits[-1], z[f"{name}_logits_last_row"])
    assert_close(logits[:, -1], z[f"{name}_logits_last_col"])
    mask = np.unpackbits(z[f"{name}_mask_packed"])[: height * width].reshape(height, width)
    np.testing.assert_array_equal(logits > 0, mask)
