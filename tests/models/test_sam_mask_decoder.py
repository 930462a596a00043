"""The mask decoder against segment-anything's, over drawn geometries."""

from __future__ import annotations

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import torch
from flax import nnx

from read_jax.config import SamConfig
from read_jax.models.sam import Sam
from read_jax.models.sam.mask_decoder import MaskDecoder
from tests.models import segment_anything_reference as reference
from tests.models.parameters import assert_close


def config(**changes) -> SamConfig:
    values = {
        "image_size": 128,
        "out_chans": 64,
        "decoder_mlp_dim": 96,
        "iou_head_hidden_dim": 48,
    }
    return SamConfig(16, 1, 2, (0,), 16, **{**values, **changes})


CONFIGS = [
    config(),
    config(out_chans=32, decoder_num_heads=4, decoder_depth=3, num_mask_tokens=3, iou_head_depth=2),
    config(decoder_depth=1, num_mask_tokens=5, image_size=96),
]


def inputs(config: SamConfig, prompts: int, seed: int = 0) -> list[np.ndarray]:
    """image [1, g, g, C], image_pe [g, g, C], sparse [Q, 5, C], dense [Q, g, g, C]."""
    rng = np.random.default_rng(seed)
    g, c = config.grid_size, config.out_chans
    shapes = [(1, g, g, c), (g, g, c), (prompts, 5, c), (prompts, g, g, c)]
    return [rng.standard_normal(shape).astype(np.float32) for shape in shapes]


def pair(config: SamConfig, seed: int = 5):
    sam = reference.reference_sam(config, seed)
    weights = reference.read_state_dict(sam.state_dict())
    return reference.fill(
        MaskDecoder, config, reference.mask_decoder_arrays(weights, config)
    ), sam.mask_decoder


@pytest.mark.parametrize("multimask", [False, True], ids=["single", "multimask"])
@pytest.mark.parametrize("config", CONFIGS, ids=["default", "deep", "shallow"])
def test_masks_and_quality_equal_segment_anything(config, multimask):
    ours, theirs = pair(config)
    image, pe, sparse, dense = inputs(config, prompts=3)
    graphdef, state = nnx.split(ours)

    @jax.jit
    def decode(state, image, pe, sparse, dense):
        return nnx.merge(graphdef, state)(image, pe, sparse, dense, multimask=multimask)

    masks, iou = decode(state, np.broadcast_to(image, dense.shape), pe, sparse, dense)
    first = torch.from_numpy
    with torch.no_grad():
        expected_masks, expected_iou = theirs(
            image_embeddings=first(image).permute(0, 3, 1, 2),
            image_pe=first(pe)[None].permute(0, 3, 1, 2),
            sparse_prompt_embeddings=first(sparse),
            dense_prompt_embeddings=first(dense).permute(0, 3, 1, 2),
            multimask_output=multimask,
        )
    assert_close(masks, expected_masks)
    assert_close(iou, expected_iou)


def test_prompts_sharing_an_image_under_vmap_equal_a_batch():
    ours, _ = pair(CONFIGS[0])
    image, pe, sparse, dense = inputs(CONFIGS[0], prompts=3)
    graphdef, state = nnx.split(ours)

    def decode(image, sparse, dense):
        return nnx.merge(graphdef, state)(image, pe, sparse, dense)

    images, denses = (np.broadcast_to(x[:1], dense.shape) for x in (image, dense))
    batched = jax.jit(decode)(images, sparse, denses)
    shared = jax.jit(jax.vmap(decode, in_axes=(None, 0, None)))(image, sparse[:, None], dense[:1])
    for one, other in zip(shared, batched, strict=True):
        assert_close(one[:, 0], other)


def test_single_mask_gives_no_gradient_to_the_other_hypernetworks():
    ours, _ = pair(CONFIGS[0])
    arguments = inputs(CONFIGS[0], prompts=1)
    graphdef, state = nnx.split(ours)

    @jax.jit
    @jax.grad
    def gradient_of_masks(state):
        return jnp.sum(nnx.merge(graphdef, state, copy=True)(*arguments)[0] ** 2)

    gradient = gradient_of_masks(state)
    kernel = np.asarray(gradient["hypernetworks"]["layers"][0]["kernel"][...])
    assert np.abs(kernel[0]).max() > 0
    assert not kernel[1:].any()


def test_bfloat16_model_still_returns_float32_masks_and_quality():
    kinds = {"dtype": jnp.bfloat16, "param_dtype": jnp.bfloat16}
    sam = nnx.eval_shape(lambda: Sam(CONFIGS[0], **kinds, rngs=nnx.Rngs(0)))
    graphdef, state = nnx.split(sam.mask_decoder)
    arguments = inputs(CONFIGS[0], prompts=1)
    masks, iou = jax.eval_shape(lambda s: nnx.merge(graphdef, s)(*arguments), state)
    assert (masks.shape, masks.dtype) == ((1, 1, 32, 32), jnp.float32)
    assert (iou.shape, iou.dtype) == ((1, 1), jnp.float32)
