"""The programs at the published sizes, by abstract shapes: no weights, no memory, nothing computed."""

from __future__ import annotations

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from read_jax.config import READ_PRESETS, ReadConfig
from read_jax.geometry import image_geometry, stack_geometries
from read_jax.inference.generation import generate
from read_jax.models.read import Read

IMAGES, QUESTIONS, START, ROWS, NEW = 2, 4, 35, 3, 512


@pytest.mark.parametrize("name", READ_PRESETS)
def test_every_stage_traces_from_pixels_to_masks(name):
    config = ReadConfig.preset(name)
    make = nnx.eval_shape(
        lambda: Read(config, dtype=jnp.bfloat16, param_dtype=jnp.bfloat16, rngs=nnx.Rngs(0))
    )
    graphdef, params = nnx.split(make)
    size, count = config.clip.image_size, config.clip.num_image_tokens
    geometry = stack_geometries([image_geometry(480, 640, config.sasp, config.clip.grid_size)] * ROWS)

    def answer(params):
        model = nnx.merge(graphdef, params)
        side = jnp.full((IMAGES,), 1024)
        features = model.encode_images(
            jnp.zeros((IMAGES, size, size, 3), jnp.uint8),
            jnp.zeros((IMAGES, 1024, 1024, 3), jnp.uint8),
            side,
            side,
        )
        prefix = model.encode_prefix(jnp.zeros(START + 1 + count, jnp.int32), features.image_tokens, START)
        limits = jnp.full((IMAGES, QUESTIONS), NEW)
        generated = generate(
            model.llama,
            prefix.key_values,
            jnp.zeros((IMAGES, QUESTIONS, 32), jnp.int32),
            limits,
            max_new=limits,
            capacity=NEW,
            end_id=2,
        )
        image_states = prefix.states[jnp.zeros(ROWS, int), START : START + count]
        embedding = features.image_embedding[jnp.zeros(ROWS, int)]
        return generated, model.predict_masks(
            generated.states[0, :ROWS, 0], image_states, embedding, geometry
        )

    generated, masks = jax.eval_shape(answer, params)
    points = config.sasp.num_points if config.sasp.enabled else 0
    assert generated.states.shape == (IMAGES, QUESTIONS, NEW, config.llama.hidden_size)
    assert generated.states.dtype == jnp.bfloat16
    assert masks.similarity.shape == (ROWS, count)
    assert masks.similarity.dtype == np.float32
    assert masks.points.points.shape == (ROWS, points, 2)
    assert masks.sparse_embeddings.shape == (ROWS, points + 2 if points else 1, 256)
    assert masks.low_res_masks.shape == (ROWS, 256, 256)
