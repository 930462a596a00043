"""SAM as a whole against the original's numbers of the small reference model."""

from __future__ import annotations

import json

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import torch
from flax import nnx
from PIL import Image

from read_jax.config import SaspConfig
from read_jax.geometry import image_geometry, sam_input_size
from read_jax.models.sam import Sam, mask_logits, normalize_sam
from tests.models import segment_anything_reference as reference
from tests.models.parameters import assert_close

SAMPLES = ["s0", "s1", "s4"]
BUCKET = 1024


@pytest.fixture(scope="module")
def sam(goldens):
    """The reference model's SAM, its geometry inferred from its tensors."""
    weights = reference.read_state_dict(torch.load(goldens / "tiny-a" / "sam_tiny.pth", weights_only=True))
    config = reference.infer_config(weights)
    arrays = {f"image_encoder.{k}": v for k, v in reference.image_encoder_arrays(weights, config).items()}
    arrays |= {f"prompt_encoder.{k}": v for k, v in reference.prompt_encoder_arrays(weights).items()}
    arrays |= {f"mask_decoder.{k}": v for k, v in reference.mask_decoder_arrays(weights, config).items()}
    return reference.fill(Sam, config, arrays)


@nnx.jit
def encode_image(sam, pixels, height, width):
    normalised = normalize_sam(pixels, height, width)
    return normalised, sam.image_encoder(normalised)


@nnx.jit
def encode_prompts(sam, points, labels, text):
    return sam.prompt_encoder(points, labels, text=text)


@nnx.jit
def decode(sam, embeddings, sparse, dense):
    return sam.mask_decoder(embeddings, sam.prompt_encoder.dense_pe(), sparse, dense)


@jax.jit
def whole_mask(low_res, geometry):
    """Logits in a bucket large enough for every sample here."""
    return mask_logits(low_res, geometry, jnp.arange(BUCKET), jnp.arange(BUCKET))


@pytest.mark.parametrize("sample", SAMPLES)
def test_picture_to_masks_equals_the_original(goldens, sam, sample):
    z = np.load(goldens / "tiny-a" / "goldens" / f"{sample}.npz")
    index = json.loads((goldens / "tiny-a" / "goldens" / "index.json").read_text())
    picture = Image.open(goldens / "tiny-a" / index["samples"][sample]["image"]).convert("RGB")
    height, width = sam_input_size(picture.height, picture.width)
    assert (height, width) == tuple(z["sam_input_hw"])
    pixels = np.zeros((1, 1024, 1024, 3), np.uint8)
    pixels[0, :height, :width] = picture.resize((width, height), Image.Resampling.BILINEAR)

    normalised, embedding = encode_image(sam, pixels, jnp.array([height]), jnp.array([width]))
    assert_close(normalised[0, ::8, ::8], z["sam_input_sub8"].transpose(1, 2, 0), 1e-5)
    assert_close(embedding[0, ::4, ::4], z["image_embedding_sub4"].transpose(1, 2, 0))

    text = z["pred_embedding"][:, None]
    sparse, dense = encode_prompts(sam, z["point_coords_1024"], z["points_labels"], text)
    assert_close(sparse, z["sparse_embeddings"])
    np.testing.assert_array_equal(
        dense[:, 0, 0], np.broadcast_to(z["dense_embedding_vector"], dense[:, 0, 0].shape)
    )

    low_res, iou = decode(sam, jnp.broadcast_to(embedding, dense.shape), z["sparse_embeddings"], dense)
    assert_close(low_res[:, 0], z["low_res_masks"])
    assert_close(iou, z["iou_pred"])

    geometry = image_geometry(picture.height, picture.width, SaspConfig())
    logits = np.asarray(whole_mask(low_res[:, 0], geometry))[:, : picture.height, : picture.width]
    assert_close(logits[:, ::4, ::4], z["mask_logits_sub4"])
    masks = np.unpackbits(z["mask_packed"])[: np.prod(z["mask_shape"])].reshape(z["mask_shape"]).astype(bool)
    ours = logits > 0
    assert (ours & masks).sum() >= 0.999 * (ours | masks).sum()
