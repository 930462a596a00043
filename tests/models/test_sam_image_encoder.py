"""The image encoder against segment-anything's, over drawn geometries."""

from __future__ import annotations

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import torch
from flax import nnx

from read_jax.config import SamConfig
from read_jax.errors import ConfigError
from read_jax.models.sam.image_encoder import (
    EncoderAttention,
    ImageEncoder,
    block_pattern,
    join_windows,
    normalize_sam,
    split_windows,
)
from tests.models import segment_anything_reference as reference
from tests.models.parameters import assert_close


def small_config(**changes) -> SamConfig:
    """A small SAM on a 16x16 grid with 7-windows, which do not divide it."""
    values = {
        "embed_dim": 32,
        "depth": 4,
        "num_heads": 4,
        "global_attn_indexes": (1, 3),
        "mlp_dim": 64,
        "image_size": 256,
        "window_size": 7,
        "out_chans": 32,
    }
    return SamConfig(**{**values, **changes})


def drawn_config(seed: int) -> SamConfig:
    """A random geometry: depth, heads, width, window, choice of global blocks, image and patch size."""
    rng = np.random.default_rng(seed)
    depth, heads = int(rng.integers(1, 7)), int(rng.choice([2, 3, 4]))
    width = heads * int(rng.choice([4, 8, 20]))
    patch = int(rng.choice([8, 16, 32]))
    return small_config(
        embed_dim=width,
        depth=depth,
        num_heads=heads,
        global_attn_indexes=tuple(int(i) for i in np.flatnonzero(rng.random(depth) < 0.4)),
        mlp_dim=width * int(rng.choice([2, 4])),
        image_size=patch * int(rng.integers(6, 17)),
        patch_size=patch,
        window_size=int(rng.choice([4, 5, 7, 14])),
        out_chans=int(rng.choice([16, 48])),
    )


def check_parity(config: SamConfig, seed: int, batch: int = 2) -> None:
    sam = reference.reference_sam(config, seed)
    weights = reference.read_state_dict(sam.state_dict())
    ours = reference.fill(ImageEncoder, config, reference.image_encoder_arrays(weights, config))
    side = config.image_size
    pixels = np.random.default_rng(seed).standard_normal((batch, side, side, 3)).astype(np.float32)
    with torch.no_grad():
        theirs = sam.image_encoder(torch.from_numpy(pixels).permute(0, 3, 1, 2)).permute(0, 2, 3, 1)
    graphdef, state = nnx.split(ours)
    embedding = jax.jit(lambda s, x: nnx.merge(graphdef, s)(x))(state, pixels)
    assert_close(embedding, theirs)


@pytest.mark.parametrize("seed", range(5))
def test_drawn_geometry_equals_segment_anything(seed):
    check_parity(drawn_config(seed), seed)


@pytest.mark.parametrize("global_blocks", [(), (0, 1, 2, 3), (0,), (1, 2)])
def test_any_choice_of_global_blocks_equals_segment_anything(global_blocks):
    check_parity(small_config(global_attn_indexes=global_blocks), 7, batch=1)


def test_pattern_of_vit_h_is_compiled_once():
    pattern, repeats = block_pattern(SamConfig.preset("vit_h"))
    assert (pattern, repeats) == ([False] * 7 + [True], 4)


@pytest.mark.parametrize(("grid", "window"), [(16, 7), (14, 7), (5, 14)])
def test_joining_undoes_splitting_into_windows(grid, window):
    x = jnp.arange(2.0 * grid * grid * 3).reshape(2, grid, grid, 3)
    np.testing.assert_array_equal(join_windows(split_windows(x, window), 2, grid), x)


def test_normalised_input_is_zero_outside_the_picture_and_standardised_inside():
    pixels = np.random.default_rng(0).integers(0, 256, (2, 8, 8, 3), dtype=np.uint8)
    out = np.asarray(normalize_sam(jnp.asarray(pixels), jnp.array([5, 8]), jnp.array([8, 3])))
    mean = torch.tensor([123.675, 116.28, 103.53])
    std = torch.tensor([58.395, 57.12, 57.375])
    expected = ((torch.from_numpy(pixels) - mean) / std).numpy()
    np.testing.assert_allclose(out[0, :5], expected[0, :5], rtol=1e-6)
    np.testing.assert_allclose(out[1, :, :3], expected[1, :, :3], rtol=1e-6)
    assert not out[0, 5:].any() and not out[1, :, 3:].any()


def test_other_image_size_is_refused_with_both_sizes_named():
    encoder = nnx.eval_shape(lambda: ImageEncoder(small_config(), rngs=nnx.Rngs(0)))
    with pytest.raises(ConfigError, match=r"256, 256, 3\], not \[1, 128, 128, 3\]"):
        encoder(jnp.zeros((1, 128, 128, 3)))


def test_relative_table_of_another_size_is_refused():
    kinds = {"dtype": jnp.float32, "param_dtype": jnp.float32}
    attention = nnx.eval_shape(lambda: EncoderAttention(small_config(), 14, rngs=nnx.Rngs(0), **kinds))
    graphdef, state = nnx.split(attention)
    with pytest.raises(ConfigError, match="27 rows does not fit attention over 7x7"):
        jax.eval_shape(lambda s, x: nnx.merge(graphdef, s)(x), state, jnp.zeros((1, 7, 7, 32)))


def test_storage_and_compute_types_are_honoured():
    config = small_config()
    shapes = nnx.eval_shape(
        lambda: ImageEncoder(config, dtype=jnp.bfloat16, param_dtype=jnp.bfloat16, rngs=nnx.Rngs(0))
    )
    assert {leaf.dtype for leaf in jax.tree.leaves(nnx.state(shapes))} == {jnp.dtype(jnp.bfloat16)}
    graphdef, state = nnx.split(shapes)
    out = jax.eval_shape(lambda s, x: nnx.merge(graphdef, s)(x), state, jnp.zeros((1, 256, 256, 3)))
    assert (out.shape, out.dtype) == ((1, 16, 16, 32), jnp.bfloat16)
