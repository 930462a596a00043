"""Inputs for benchmarks: full batches and random weights, where no checkpoint and no dataset is at hand."""

from __future__ import annotations

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from read_jax.config import ReadConfig
from read_jax.data.packing import Limits, batch_examples
from read_jax.geometry import image_geometry, stack_geometries
from read_jax.models.read import ImageFeatures


def example(
    config: ReadConfig,
    pictures: int,
    questions: int,
    tokens: int,
    canvas: tuple[int, int] = (256, 256),
) -> Any:
    """A full batch: every question has its tokens and its mask."""
    limits = Limits(questions, tokens, canvas)
    batch = batch_examples([None] * pictures, config, limits)
    random = np.random.default_rng(0)
    ids = random.integers(3, config.llama.vocab_size, batch.question_ids.shape).astype(np.int32)
    geometry = image_geometry(*canvas, config.sasp, config.clip.grid_size, config.sam.image_size)
    return batch._replace(
        question_ids=ids,
        labels=np.where(np.arange(tokens) >= tokens - 16, ids, -100).astype(np.int32),
        lengths=np.full_like(batch.lengths, tokens),
        seg_at=np.full_like(batch.seg_at, tokens - 4),
        has_mask=np.ones_like(batch.has_mask),
        masks=(random.random(batch.masks.shape) < 0.2).astype(np.uint8),
        mask_size=np.broadcast_to(np.int32(canvas), batch.mask_size.shape).copy(),
        geometry=stack_geometries([geometry] * pictures),
        valid=np.ones_like(batch.valid),
    )


def features_of(config: ReadConfig, pictures: int, dtype: Any = jnp.float32) -> ImageFeatures:
    """What the encoders would have said, abstract."""
    n = config.clip.num_image_tokens
    grid = config.sam.grid_size
    return ImageFeatures(
        jax.ShapeDtypeStruct((pictures, n, config.clip.hidden_size), dtype),
        jax.ShapeDtypeStruct((pictures, n, config.llama.hidden_size), dtype),
        jax.ShapeDtypeStruct((pictures, grid, grid, config.sam.out_chans), dtype),
    )


def filled(tree: Any) -> Any:
    """Random numbers for abstract arrays, made where they belong; whole numbers are zero."""

    def fill(leaf: Any, key: jax.Array) -> jax.Array:
        def values(key: jax.Array) -> jax.Array:
            if not jnp.issubdtype(leaf.dtype, jnp.floating):
                return jnp.zeros(leaf.shape, leaf.dtype)
            return (0.02 * jax.random.normal(key, leaf.shape, jnp.bfloat16)).astype(leaf.dtype)

        return jax.jit(values, out_shardings=leaf.sharding)(key)

    leaves, structure = jax.tree.flatten(tree)
    keys = jax.random.split(jax.random.key(0), len(leaves))
    return jax.tree.unflatten(structure, [fill(*pair) for pair in zip(leaves, keys, strict=True)])
