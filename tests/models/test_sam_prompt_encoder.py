"""The prompt encoder against segment-anything's, and READ's text rule against the original's numbers."""

from __future__ import annotations

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import torch
from flax import nnx

from read_jax.config import SamConfig
from read_jax.models.sam.prompt_encoder import PromptEncoder
from tests.models import segment_anything_reference as reference
from tests.models.parameters import assert_close

CONFIG = SamConfig(16, 1, 2, (0,), 16, image_size=256, out_chans=32, mask_in_chans=8)
PROMPTS = ("points", "boxes", "masks")


@pytest.fixture(scope="module")
def pair():
    """Ours and theirs, with the same random weights."""
    sam = reference.reference_sam(CONFIG, 3)
    arrays = reference.prompt_encoder_arrays(reference.read_state_dict(sam.state_dict()))
    return reference.fill(PromptEncoder, CONFIG, arrays), sam.prompt_encoder


@pytest.mark.parametrize(
    "given", [(), ("points",), ("boxes",), ("masks",), ("points", "boxes"), PROMPTS], ids="+".join
)
def test_prompts_equal_segment_anything(pair, given):
    rng = np.random.default_rng(len(given))
    points = rng.uniform(-5, 261, (3, 6, 2)).astype(np.float32)
    labels = rng.integers(-1, 2, (3, 6))
    boxes = rng.uniform(0, 256, (3, 4)).astype(np.float32)
    masks = rng.standard_normal((3, 64, 64, 1)).astype(np.float32)
    ours, theirs = pair
    sparse, dense = ours(
        points=points if "points" in given else None,
        labels=labels if "points" in given else None,
        boxes=boxes if "boxes" in given else None,
        masks=masks if "masks" in given else None,
    )
    with torch.no_grad():
        expected_sparse, expected_dense = theirs(
            points=(torch.from_numpy(points), torch.from_numpy(labels)) if "points" in given else None,
            boxes=torch.from_numpy(boxes) if "boxes" in given else None,
            masks=torch.from_numpy(masks).permute(0, 3, 1, 2) if "masks" in given else None,
        )
    assert_close(dense, expected_dense.permute(0, 2, 3, 1))
    if expected_sparse.shape[1]:
        assert_close(sparse, expected_sparse)
    else:
        assert sparse.shape == tuple(expected_sparse.shape)


def test_dense_position_code_equals_segment_anything(pair):
    ours, theirs = pair
    assert_close(ours.dense_pe(), theirs.get_dense_pe()[0].permute(1, 2, 0))


def test_neutral_points_carry_neither_position_nor_gradient(pair):
    encoder, _ = pair
    labels = jnp.array([[1, -1]])

    @jax.jit
    def tokens(points):
        return encoder(points=points, labels=labels)[0]

    near, far = jnp.array([[[10.0, 20.0], [30.0, 40.0]]]), jnp.array([[[10.0, 20.0], [200.0, 90.0]]])
    np.testing.assert_array_equal(tokens(near), tokens(far))
    gradient = jax.jit(jax.grad(lambda p: jnp.sum(tokens(p) ** 3)))(near)
    assert np.abs(gradient[0, 0]).min() > 0
    assert not np.asarray(gradient[0, 1]).any()


def test_points_without_labels_are_refused(pair):
    with pytest.raises(ValueError, match="come together"):
        pair[0](points=jnp.zeros((1, 2, 2)))


def test_frequencies_stay_float32_in_a_bfloat16_model():
    encoder = PromptEncoder(CONFIG, dtype=jnp.bfloat16, param_dtype=jnp.bfloat16, rngs=nnx.Rngs(0))
    assert encoder.gaussian_matrix.dtype == jnp.float32
    assert encoder.no_mask_embed.dtype == jnp.bfloat16
    assert encoder.dense_pe().dtype == jnp.bfloat16


@pytest.fixture(scope="module")
def original(goldens):
    """Our prompt encoder with the reference model's weights, and the original's own numbers."""
    state = torch.load(goldens / "tiny-a" / "sam_tiny.pth", weights_only=True)
    weights = reference.read_state_dict(state)
    encoder = reference.fill(
        PromptEncoder, reference.infer_config(weights), reference.prompt_encoder_arrays(weights)
    )
    return encoder, np.load(goldens / "unit" / "prompt_encoder.npz")


@pytest.mark.parametrize("case", range(6))
def test_points_and_text_equal_the_original(original, case):
    encoder, z = original
    sparse, dense = encoder(
        points=z[f"c{case}_points"], labels=z[f"c{case}_labels"], text=z[f"c{case}_text_embeds"]
    )
    assert_close(sparse, z[f"c{case}_sparse"])
    b, c, h, w = z[f"c{case}_dense_shape"]
    assert dense.shape == (b, h, w, c)
    np.testing.assert_array_equal(dense, np.broadcast_to(z[f"c{case}_dense_vector"], dense.shape))


def test_text_alone_equals_the_original(original):
    encoder, z = original
    np.testing.assert_array_equal(encoder(text=z["textonly_text_embeds"])[0], z["textonly_sparse"])


def test_boxes_equal_the_original(original):
    encoder, z = original
    assert_close(encoder(boxes=z["box_boxes"])[0], z["box_sparse"])


def test_masks_equal_the_original(original):
    encoder, z = original
    text = z["textonly_text_embeds"][:1]
    sparse, dense = encoder(masks=z["mask_masks"].astype(np.float32).transpose(0, 2, 3, 1), text=text)
    assert_close(dense[:, ::4, ::4], z["mask_dense_sub4"].transpose(0, 2, 3, 1))
    assert_close(sparse, z["mask_sparse"])


def test_dense_position_code_equals_the_original(original):
    encoder, z = original
    assert_close(encoder.dense_pe()[::4, ::4], z["dense_pe_sub4"].transpose(1, 2, 0))
