"""The training objective: one packed batch through the whole model, to its losses.

The questions about a picture share system prompt and image, so the prefix goes through the language model
once and every question attends to it: the same losses and gradients as separate sequences, without the
repeated work. Frozen parts need no special care: gradients are taken of the trainable leaves alone, and
nothing is kept for the backward pass of what does not depend on them.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from read_jax.config import Config
from read_jax.data.packing import Batch
from read_jax.errors import ConfigError
from read_jax.geometry import ImageGeometry
from read_jax.models.read import ImageFeatures, MaskPrediction, Read
from read_jax.models.sam.postprocess import mask_logits
from read_jax.sharding import constrain
from read_jax.text.targets import IGNORE_INDEX
from read_jax.training.losses import (
    COUNT_EPS,
    MaskLosses,
    mask_losses,
    share_of_cells,
    similarity_loss,
    token_cross_entropy,
)

Array = jax.Array


@dataclasses.dataclass(frozen=True)
class LossWeights(Config):
    """Factors of the losses in the total (the paper's: 1, 2, 0.5 and none of the others).

    Attributes:
        ce, bce, dice, focal: as in `read_jax.training.losses`.
        similarity: the [SEG] state learns to resemble the image tokens of its target; see `similarity_loss`.
        first_token: extra weight of the first token of every answer, where it is decided to affirm or deny;
            answers that affirm and answers that deny count half each, however many there are.
    """

    ce: float = 1.0
    bce: float = 2.0
    dice: float = 0.5
    focal: float = 0.0
    similarity: float = 0.0
    first_token: float = 0.0

    def __post_init__(self) -> None:
        if any(not 0 <= value < math.inf for value in dataclasses.astuple(self)):
            raise ConfigError(f"loss weights must not be negative, nor infinite: {self}.")
        if not any(dataclasses.astuple(self)):
            raise ConfigError("all loss weights are zero: there is nothing to learn.")

    @property
    def of_masks(self) -> bool:
        """Whether masks have to be predicted."""
        return bool(self.bce or self.dice or self.focal)

    def without_masks(self) -> LossWeights:
        """The same without the losses of masks."""
        return dataclasses.replace(self, bce=0.0, dice=0.0, focal=0.0)


class Counts(NamedTuple):
    """What the sums of a batch are divided by, float32 scalars.

    tokens: that are supervised; answers; denials: the answers where what is asked for is not there; masks.
    """

    tokens: Array
    answers: Array
    denials: Array
    masks: Array


class Losses(NamedTuple):
    """Weighted losses (float32 scalars); total is their sum."""

    total: Array
    ce: Array
    bce: Array
    dice: Array
    focal: Array
    similarity: Array
    first_token: Array


def count(batch: Batch) -> Counts:
    """The denominators of a whole batch, however it is cut into micro-batches."""
    targets = targets_of(batch)
    masks = batch.has_mask & batch.valid[:, None]
    denied = ~batch.exists[..., None]
    begins = first_tokens(targets) != IGNORE_INDEX
    kinds = targets != IGNORE_INDEX, begins, begins & denied, masks
    return Counts(*(jnp.sum(kind).astype(jnp.float32) for kind in kinds))


class Forward(NamedTuple):
    """A batch up to the language model's final states.

    features: of the pictures; prefix_states: [B, S, D]; states: [B, Q, T, D] of the questions' tokens.
    """

    features: ImageFeatures
    prefix_states: Array
    states: Array


class Turns(NamedTuple):
    """How `map_pictures` takes the pictures: its last two arguments."""

    abreast: int
    recompute: bool


class PictureMasks(NamedTuple):
    """The masks of one picture's questions.

    prediction: with a leading [Q]; logits: float32 [Q, Hm, Wm] on the batch's canvas; valid: bool
    [Q, Hm, Wm], the pixels that are judged: inside the picture and not to be ignored.
    """

    prediction: MaskPrediction
    logits: Array
    valid: Array


def forward(
    model: Read,
    batch: Batch,
    prefix_ids: Any,
    image_start: int,
    *,
    features: ImageFeatures | None = None,
    dropout_key: Array | None = None,
    remat: bool | Callable[..., bool] = False,
) -> Forward:
    """Encoders, shared prefix and questions of a batch; arguments as for `objective`."""
    if features is None:
        features = picture_features(model, batch)
    features = ImageFeatures(*(constrain(x, "batch") for x in features))
    prefix = model.embed_prefix(jnp.asarray(prefix_ids), features.image_tokens, image_start)
    ids = jnp.asarray(batch.question_ids)
    # looked up by width, as the table lies, and then brought to the pictures; gradients go the same way back.
    # In two steps: from both axes at once the compiler would gather all pictures of a group whole
    x = constrain(model.llama.embed(constrain(ids, "looked_up")), "looked_up", None, None, "table")
    x = constrain(x, "looked_up", None, None, "embed")
    states = model.llama.with_prefix(prefix, constrain(x, "batch"), remat=remat, dropout_key=dropout_key)
    return Forward(features, *states)


def picture_features(model: Read, batch: Batch) -> ImageFeatures:
    """What the encoders say of a batch's pictures: computed from the pixels, or as the batch brings it.

    What is brought is before the projector, which may learn.
    """
    known, geometry = batch.features, batch.geometry
    if not known:
        pixels = jnp.asarray(batch.clip_pixels), jnp.asarray(batch.sam_pixels)
        return model.encode_images(*pixels, geometry.sam_height, geometry.sam_width)
    clip_features = jnp.asarray(known.clip_features).astype(model.clip.dtype)
    image_embedding = jnp.asarray(known.image_embedding).astype(model.sam.image_encoder.dtype)
    return ImageFeatures(clip_features, model.projector(clip_features), image_embedding)


def objective(
    model: Read,
    batch: Batch,
    counts: Counts,
    prefix_ids: Any,
    image_start: int,
    weights: LossWeights,
    *,
    features: ImageFeatures | None = None,
    dropout_key: Array | None = None,
    remat: bool | Callable[..., bool] = True,
    abreast: int = 1,
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
        remat: recompute the language model's activations in the backward pass, see `scan_layers`; unless it
            is False, also those of every picture's logits and masks.
        abreast: see `map_pictures`.
    """
    out = forward(
        model, batch, prefix_ids, image_start, features=features, dropout_key=dropout_key, remat=remat
    )
    targets, turns = targets_of(batch), Turns(abreast, remat is not False)
    bce = dice = focal = similarity = first_token = jnp.float32(0)
    ce = text_loss(model, out.states, batch, counts, turns)
    if weights.first_token:
        affirmed = jnp.asarray(batch.exists)[..., None]
        for chosen, number in (affirmed, counts.answers - counts.denials), (~affirmed, counts.denials):
            begins = jnp.where(chosen, first_tokens(targets), IGNORE_INDEX)
            first_token += _text_loss_sum(model, out.states, begins, turns) / jnp.maximum(number, 1.0) / 2
    if weights.of_masks:
        masks = _mask_loss_sums(model, out, batch, image_start, turns)
        bce, dice, focal = (value / (counts.masks + COUNT_EPS) for value in masks)
    if weights.similarity:
        similarity = _similarity_loss_sum(model, out, batch, image_start) / (counts.masks + COUNT_EPS)
    losses = (ce, bce, dice, focal, similarity, first_token)
    # a weight of zero leaves the loss out of the program, not only out of the sum
    parts = [
        w * x if w else jnp.float32(0) for w, x in zip(dataclasses.astuple(weights), losses, strict=True)
    ]
    return Losses(jnp.sum(jnp.stack(parts)), *parts)


def text_loss(model: Read, states: Array, batch: Batch, counts: Counts, turns: Turns) -> Array:
    """The mean cross-entropy of the answers' tokens, a float32 scalar.

    states: [B, Q, T, D], final ones of the questions' tokens; counts: see `objective`.
    """
    return _text_loss_sum(model, states, targets_of(batch), turns) / jnp.maximum(counts.tokens, 1.0)


def map_pictures(function: Callable[[Any], Any], xs: Any, abreast: int = 1, recompute: bool = True) -> Any:
    """`function` of every picture (pytree with a leading [B]), `abreast` of them at a time.

    Those at a time lie B / abreast apart, so that with as many as devices share the batch, every device has
    one of its own in each turn. recompute: what the function would keep for the backward pass is computed
    again there.
    """
    mapped = jax.vmap(jax.checkpoint(function) if recompute else function)

    def deal(x: Any) -> Array:
        size, *rest = jnp.shape(x)
        return constrain(jnp.reshape(x, (abreast, size // abreast, *rest)).swapaxes(0, 1), None, "batch")

    turns = jax.tree.map(deal, xs)
    out = jax.lax.map(mapped, turns)
    # sizes are said: with points off, theirs is zero, of which no other follows
    return jax.tree.map(lambda x: x.swapaxes(0, 1).reshape(x.shape[0] * x.shape[1], *x.shape[2:]), out)


def picture_masks(
    model: Read, out: Forward, batch: Batch, image_start: int
) -> tuple[Callable[[Any], PictureMasks], Any]:
    """(function, pytree) for `map_pictures`: the masks of each picture's questions."""
    questions = batch.has_mask.shape[1]
    seg_states, image_states = _compared_states(out, batch, image_start)

    def of_picture(args: tuple[Array, Array, Array, ImageGeometry, Array, Array]) -> PictureMasks:
        seg, image, embedding, geometry, size, target = args

        def rows(x: Array) -> Array:  # the picture's, for each of its questions
            return jnp.broadcast_to(x, (questions, *jnp.shape(x)))

        prediction = model.predict_masks(seg, rows(image), rows(embedding), jax.tree.map(rows, geometry))
        height, width = (jnp.arange(n) for n in target.shape[-2:])
        at_size = geometry._replace(height=size[0], width=size[1])
        logits = mask_logits(prediction.low_res_masks, at_size, height, width)
        inside = (height < size[0])[:, None] & (width < size[1])
        return PictureMasks(prediction, logits, inside & (target != 255))

    embedding = out.features.image_embedding
    return of_picture, (seg_states, image_states, embedding, batch.geometry, batch.mask_size, batch.masks)


def first_tokens(targets: Any) -> Array:
    """Targets [..., T], with `IGNORE_INDEX` everywhere but at the first token of every answer."""
    targets = jnp.asarray(targets)
    before = jnp.pad(
        targets[..., :-1], [(0, 0)] * (targets.ndim - 1) + [(1, 0)], constant_values=IGNORE_INDEX
    )
    return jnp.where(before == IGNORE_INDEX, targets, IGNORE_INDEX)


def targets_of(batch: Batch) -> Array:
    """What the state at each place but the last is to predict, int32 [B, Q, T - 1]."""
    return jnp.where(batch.valid[:, None, None], batch.labels, IGNORE_INDEX)[..., 1:]


def _compared_states(out: Forward, batch: Batch, image_start: int) -> tuple[Array, Array]:
    """The states that predict [SEG], [B, Q, D], and those of the image tokens, [B, N, D]."""
    tokens = out.features.image_tokens.shape[1]
    seg_at = jnp.asarray(batch.seg_at)
    seg_states = jnp.take_along_axis(out.states, seg_at[..., None, None], axis=2)[:, :, 0]
    return seg_states, out.prefix_states[:, image_start : image_start + tokens]


def _text_loss_sum(model: Read, states: Array, targets: Array, turns: Turns) -> Array:
    """Summed cross-entropy of the targets [B, Q, T - 1] of states [B, Q, T, D]."""

    def of_picture(args: tuple[Array, Array]) -> Array:
        return token_cross_entropy(model.llama.logits(args[0]), args[1])[0]

    # a few pictures' logits at a time: [B, Q, T, V] never exists
    return jnp.sum(map_pictures(of_picture, (states[:, :, :-1], targets), *turns))


def _similarity_loss_sum(model: Read, out: Forward, batch: Batch, image_start: int) -> Array:
    """Sum of `similarity_loss` over the rows that have a mask."""
    seg_states, image_states = _compared_states(out, batch, image_start)
    similarity = jnp.einsum("bnd,bqd->bqn", image_states, seg_states, preferred_element_type=jnp.float32)
    masks, sizes = jnp.asarray(batch.masks), jnp.asarray(batch.mask_size)
    share = share_of_cells(masks, sizes, model.config.clip.grid_size)
    similarity = similarity[..., -share.shape[-1] :]  # the class token, where there is one, is no cell
    per_mask = similarity_loss(similarity, share, seg_states.shape[-1])
    return jnp.sum(jnp.where(batch.has_mask & batch.valid[:, None], per_mask, 0.0))


def _mask_loss_sums(model: Read, out: Forward, batch: Batch, image_start: int, turns: Turns) -> MaskLosses:
    """Sums of the mask losses over the rows that have a mask."""
    masks_of, pictures = picture_masks(model, out, batch, image_start)

    def of_picture(args: Any) -> MaskLosses:
        masks = masks_of(args)
        return mask_losses(masks.logits, args[-1] == 1, masks.valid)

    per_mask = map_pictures(of_picture, pictures, *turns)
    counted = batch.has_mask & batch.valid[:, None]
    # where, not times: a row without a mask may hold anything
    return MaskLosses(*(jnp.sum(jnp.where(counted, value, 0.0)) for value in per_mask))
