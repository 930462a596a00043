"""The training objective: one packed batch through the whole model, to its losses.

The questions about a picture share system prompt and image, so the prefix goes through the language model
once and every question attends to it: the same losses and gradients as separate sequences, without the
repeated work. Frozen parts need no special care: gradients are taken of the trainable leaves alone, and
nothing is kept for the backward pass of what does not depend on them.
"""

from __future__ import annotations

import dataclasses
from typing import NamedTuple

import jax
import jax.numpy as jnp

from read_jax.data.packing import Batch
from read_jax.errors import ConfigError
from read_jax.geometry import ImageGeometry
from read_jax.models.read import ImageFeatures, Prefix, Read
from read_jax.models.sam.postprocess import mask_logits
from read_jax.text.targets import IGNORE_INDEX
from read_jax.training.losses import COUNT_EPS, MaskLosses, mask_losses, token_cross_entropy

Array = jax.Array


@dataclasses.dataclass(frozen=True)
class LossWeights:
    """Factors of the losses in the total (the paper's: 1, 2, 0.5 and no focal loss)."""

    ce: float = 1.0
    bce: float = 2.0
    dice: float = 0.5
    focal: float = 0.0

    def __post_init__(self) -> None:
        if any(not value >= 0 for value in dataclasses.astuple(self)):
            raise ConfigError(f"loss weights must not be negative: {self}.")


class Counts(NamedTuple):
    """What the sums of a batch are divided by: supervised tokens and masks, float32 scalars."""

    tokens: Array
    masks: Array


class Losses(NamedTuple):
    """Weighted losses (float32 scalars); total is their sum."""

    total: Array
    ce: Array
    bce: Array
    dice: Array
    focal: Array


def count(batch: Batch) -> Counts:
    """The denominators of a whole batch, however it is cut into micro-batches."""
    supervised = (batch.labels[..., 1:] != IGNORE_INDEX) & batch.valid[:, None, None]
    masks = batch.has_mask & batch.valid[:, None]
    return Counts(jnp.sum(supervised).astype(jnp.float32), jnp.sum(masks).astype(jnp.float32))


def objective(
    model: Read,
    batch: Batch,
    counts: Counts,
    prefix_ids: Array,
    image_start: int,
    weights: LossWeights,
    *,
    features: ImageFeatures | None = None,
    dropout_key: Array | None = None,
    remat: bool = True,
) -> Losses:
    """The part of the loss that a batch, or a micro-batch of it, contributes.

    Args:
        model: with or without adapters.
        batch: B pictures, Q questions each.
        counts: of the whole batch; parts then add up to the loss of the whole.
        prefix_ids: int32 [S] tokens before every question, image positions expanded.
        image_start: position of the first image token in it (static).
        weights: of the losses.
        features: of the pictures, when they are known already.
        dropout_key: for the adapters' dropout; None drops nothing.
        remat: recompute the language model's activations in the backward pass.
    """
    if features is None:
        geometry = batch.geometry
        features = model.encode_images(
            batch.clip_pixels, batch.sam_pixels, geometry.sam_height, geometry.sam_width
        )
    keys = (None, None) if dropout_key is None else jax.random.split(dropout_key)
    prefix = model.encode_prefix(
        jnp.asarray(prefix_ids), features.image_tokens, image_start, remat=remat, dropout_key=keys[0]
    )
    ids = batch.question_ids
    positions = jnp.broadcast_to(prefix.states.shape[1] + jnp.arange(ids.shape[-1]), ids.shape)
    states, _ = model.llama(
        model.llama.embed(ids), positions, prefix=prefix.key_values, remat=remat, dropout_key=keys[1]
    )
    ce = _text_loss(model, states, batch) / jnp.maximum(counts.tokens, 1.0)
    masks = _mask_loss_sums(model, states, prefix, features, batch, image_start)
    bce, dice, focal = (value / (counts.masks + COUNT_EPS) for value in masks)
    parts = (weights.ce * ce, weights.bce * bce, weights.dice * dice, weights.focal * focal)
    return Losses(sum(parts, jnp.float32(0)), *parts)


def _text_loss(model: Read, states: Array, batch: Batch) -> Array:
    """Summed cross-entropy of the supervised tokens of states [B, Q, T, D]."""
    targets = jnp.where(batch.valid[:, None, None], batch.labels, IGNORE_INDEX)[..., 1:]

    def of_picture(args: tuple[Array, Array]) -> Array:
        return token_cross_entropy(model.llama.logits(args[0]), args[1])[0]

    # one picture's logits at a time, computed again in the backward pass: [B, Q, T, V] never exists
    return jnp.sum(jax.lax.map(jax.checkpoint(of_picture), (states[:, :, :-1], targets)))


def _mask_loss_sums(
    model: Read, states: Array, prefix: Prefix, features: ImageFeatures, batch: Batch, image_start: int
) -> MaskLosses:
    """Sums of the mask losses over the rows that have a mask."""
    questions = batch.has_mask.shape[1]
    tokens = features.image_tokens.shape[1]
    image_states = prefix.states[:, image_start : image_start + tokens]
    seg_states = jnp.take_along_axis(states, batch.seg_at[..., None, None], axis=2)[:, :, 0]  # [B, Q, D]

    def of_picture(args: tuple[Array, Array, Array, ImageGeometry, Array, Array]) -> MaskLosses:
        seg, image, embedding, geometry, size, target = args

        def rows(x: Array) -> Array:  # the picture's, for each of its questions
            return jnp.broadcast_to(x, (questions, *jnp.shape(x)))

        low_res = model.predict_masks(
            seg, rows(image), rows(embedding), jax.tree.map(rows, geometry)
        ).low_res_masks
        height, width = (jnp.arange(n) for n in target.shape[-2:])
        at_size = geometry._replace(height=size[0], width=size[1])
        logits = mask_logits(low_res, at_size, height, width)
        inside = (height < size[0])[:, None] & (width < size[1])
        return mask_losses(logits, target == 1, inside & (target != 255))

    per_mask = jax.lax.map(
        jax.checkpoint(of_picture),
        (seg_states, image_states, features.image_embedding, batch.geometry, batch.mask_size, batch.masks),
    )
    counted = batch.has_mask & batch.valid[:, None]
    # where, not times: a row without a mask may hold anything
    return MaskLosses(*(jnp.sum(jnp.where(counted, value, 0.0)) for value in per_mask))
