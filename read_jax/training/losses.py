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
LANES = 8
"""Float32 numbers in an AVX2 register, with which the original's sums over the vocabulary are made."""


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
    below = logits - jax.lax.stop_gradient(jnp.max(logits, axis=-1, keepdims=True))
    chosen = jnp.take_along_axis(below, jnp.where(counted, targets, 0)[..., None], axis=-1)[..., 0]
    loss = jnp.log(_sum_as_original(jnp.exp(below))) - chosen
    return jnp.sum(jnp.where(counted, loss, 0.0)), jnp.sum(counted).astype(jnp.float32)


@jax.custom_jvp
def _sum_as_original(terms: Array) -> Array:
    """Sum over the last axis; on a CPU rounded as PyTorch's CPU code rounds it.

    A token that is certain but for 1e-5 has the gradient p - 1 = 1/sum - 1: the rounding of the sum becomes a
    hundredth of it, and in a converged model nearly all tokens are of that kind. The original's gradients are
    only reached by adding in its order. Accelerators keep their own sum, which is closer to exact.
    """
    return jax.lax.platform_dependent(terms, cpu=_sum_in_lanes, default=lambda x: jnp.sum(x, axis=-1))


@_sum_as_original.defjvp
def _(primals: tuple[Array], tangents: tuple[Array]) -> tuple[Array, Array]:
    return _sum_as_original(*primals), jnp.sum(tangents[0], axis=-1)


def _sum_in_lanes(terms: Array) -> Array:
    """Sum over the last axis: each lane takes every `LANES`-th element in turn; then halves are added."""
    whole = terms.shape[-1] // LANES * LANES

    def add(i: Array, lanes: Array) -> Array:
        return lanes + jax.lax.dynamic_slice_in_dim(terms, LANES * i, LANES, axis=-1)

    lanes = jnp.zeros_like(terms, shape=(*terms.shape[:-1], LANES))
    if whole:  # a loop, because a reduction has no order: the compiler would cut it into a tree
        lanes = jax.lax.fori_loop(0, whole // LANES, add, lanes, unroll=8)
    lanes = lanes.at[..., : terms.shape[-1] - whole].add(terms[..., whole:])
    while lanes.shape[-1] > 1:
        first, second = jnp.split(lanes, 2, axis=-1)
        lanes = first + second
    return lanes[..., 0]


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


def share_of_cells(masks: Array, sizes: Array, grid: int) -> Array:
    """How much of each cell of CLIP's grid a target covers.

    Args:
        masks: uint8 [B, Q, Hm, Wm], 1 in the target, at the top left of the canvas.
        sizes: int32 [B, 2], height and width of the picture on the canvas.
        grid: cells a side, over the picture's central square, which is what CLIP sees.

    Returns:
        float32 [B, Q, grid * grid], 0 to 1.
    """
    side = jnp.min(sizes, axis=-1)

    def averages(length: Array, canvas: int) -> Array:  # [B, grid, canvas], rows add up to 1
        edges = ((length - side) / 2)[:, None] + side[:, None] * jnp.arange(grid + 1) / grid
        at = jnp.arange(canvas)
        covered = jnp.minimum(at + 1, edges[:, 1:, None]) - jnp.maximum(at, edges[:, :-1, None])
        return jnp.maximum(covered, 0) * (grid / side)[:, None, None]

    rows, columns = (averages(sizes[:, i], masks.shape[2 + i]) for i in (0, 1))
    share = jnp.einsum("bih,bqhw,bjw->bqij", rows, (masks == 1).astype(jnp.float32), columns)
    return share.reshape(*share.shape[:2], -1)


def similarity_loss(similarity: Array, share: Array, width: int) -> Array:
    """How far the similarity map is from pointing at the target: a loss of this project, not the paper's.

    The Kullback-Leibler divergence of softmax(similarity / sqrt(width)) over the cells from the target's
    distribution over them. It teaches grounding directly: the points chosen from the map pass next to no
    gradient on while the map is wrong, which a model that begins from nothing cannot do without.

    Args:
        similarity: float32 [..., N], dot products of states.
        share: [..., N], see `share_of_cells`; targets that cover nothing give 0.
        width: of the states.

    Returns:
        float32 [...].
    """
    total = jnp.sum(share, axis=-1, keepdims=True)
    wanted = share / jnp.maximum(total, 1e-6)
    given = jax.nn.log_softmax(similarity / width**0.5, axis=-1)
    return jnp.sum(wanted * (jnp.log(jnp.maximum(wanted, 1e-9)) - given), axis=-1)
