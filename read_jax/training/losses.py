"""The losses of READ: next-token cross-entropy, and BCE, Dice and focal loss of masks.

All in float32, over static shapes: what does not count (other tokens, pixels beyond a picture or
ignored, rows without a mask) is weighted with zero, and the sums are divided by what counts. Source:
LISA's and READ's training losses, with their normalisation.
"""

from __future__ import annotations

from typing import NamedTuple

import jax
import jax.numpy as jnp

from read_jax.text.targets import IGNORE_INDEX

Array = jax.Array

DICE_SCALE = 1000.0
"""Dice sums are divided by it before `DICE_EPS` is added: the epsilon acts like 1e-3 of a pixel."""
DICE_EPS = 1e-6
FOCAL_ALPHA, FOCAL_GAMMA = 0.25, 2.0
COUNT_EPS = 1e-8


class MaskLosses(NamedTuple):
    """One value per mask, each an average over the mask's valid pixels (dice: of the whole mask)."""

    bce: Array
    dice: Array
    focal: Array


def token_cross_entropy(logits: Array, targets: Array) -> tuple[Array, Array]:
    """Summed negative log-likelihood of targets, and their number.

    Args:
        logits: [..., V] that predict the targets (already shifted).
        targets: int [...], `IGNORE_INDEX` where nothing is to be learned.

    Returns:
        (sum, count), float32 scalars: the loss is sum / count over the whole batch, as the original's
        mean over all supervised tokens.
    """
    counted = targets != IGNORE_INDEX
    logits = logits.astype(jnp.float32)
    chosen = jnp.take_along_axis(logits, jnp.where(counted, targets, 0)[..., None], axis=-1)[..., 0]
    loss = jax.nn.logsumexp(logits, axis=-1) - chosen
    return jnp.sum(jnp.where(counted, loss, 0.0)), jnp.sum(counted).astype(jnp.float32)


def mask_losses(logits: Array, targets: Array, valid: Array) -> MaskLosses:
    """BCE, Dice and focal loss of each mask.

    Args:
        logits: [..., h, w].
        targets: [..., h, w], 0 or 1.
        valid: bool [..., h, w], the pixels that count: inside the picture and not ignored.

    Returns:
        float32 [...] each; 0, 0 and 0 for a mask without valid pixels.
    """
    logits, targets = logits.astype(jnp.float32), targets.astype(jnp.float32)
    weights = valid.astype(jnp.float32)
    pixels = jnp.maximum(jnp.sum(weights, axis=(-2, -1)), 1.0)

    def mean(x: Array) -> Array:
        return jnp.sum(x * weights, axis=(-2, -1)) / pixels

    cross_entropy = jnp.maximum(logits, 0) - logits * targets + jnp.log1p(jnp.exp(-jnp.abs(logits)))
    probability = jax.nn.sigmoid(logits)
    right = probability * targets + (1 - probability) * (1 - targets)
    alpha = FOCAL_ALPHA * targets + (1 - FOCAL_ALPHA) * (1 - targets)
    focal = alpha * cross_entropy * (1 - right) ** FOCAL_GAMMA

    def total(x: Array) -> Array:
        return jnp.sum(x * (weights / DICE_SCALE), axis=(-2, -1))

    overlap = 2 * total(probability * targets)
    dice = 1 - (overlap + DICE_EPS) / (total(probability) + total(targets) + DICE_EPS)
    return MaskLosses(mean(cross_entropy), dice, mean(focal))


def mean_over_masks(values: Array, counts: Array, number: Array | None = None) -> Array:
    """Sum of the values [R] of the rows that count (bool [R]) over their number (or `number`)."""
    weights = counts.astype(jnp.float32)
    number = jnp.sum(weights) if number is None else number
    return jnp.sum(values * weights) / (number + COUNT_EPS)
