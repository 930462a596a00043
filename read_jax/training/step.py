"""The train step: one compiled program from a batch to updated parameters."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Sequence
from typing import Any, Literal, NamedTuple

import jax
import jax.numpy as jnp
import optax
from flax import nnx

from read_jax.config import Config
from read_jax.data.packing import Batch
from read_jax.errors import ConfigError
from read_jax.models.layers import LoraParam
from read_jax.models.read import ImageFeatures, Read
from read_jax.sharding import constrain, constrain_parameters
from read_jax.training.objective import Counts, Losses, LossWeights, count, objective

Array = jax.Array

TRAINABLE = ("lora", "llama.embed_tokens", "llama.lm_head", "sam.mask_decoder", "text_projection")
"""What READ trains; everything else stays frozen."""


class TrainState(NamedTuple):
    """Everything an update changes.

    step: int32, batches seen; params: the trainable leaves, float32; opt_state: optax's; ema: moving
    average of params, or None; skipped: int32, updates left out because they were not finite or exploded.
    """

    step: Array
    params: Any
    opt_state: Any
    ema: Any
    skipped: Array


@dataclasses.dataclass(frozen=True)
class StepConfig(Config):
    """How a batch becomes an update.

    Attributes:
        micro_batches: parts the batch is cut into, one after the other through the model; same result, but
            for what the adapters' dropout draws.
        remat: recompute the language model's activations in the backward pass: all of them (True), none
            (False), or all but the results of its weights' matrix products ("dots").
        ema_decay: of the moving average of the parameters, or (1 + n) / (10 + n) after n updates if that is
            less; 0 keeps none.
        max_gradient_norm: an update whose gradient norm, before clipping, exceeds it is skipped, as one that
            is not finite; inf for no limit.
        seed: of the adapters' dropout.
    """

    micro_batches: int = 1
    remat: bool | Literal["dots"] = True
    ema_decay: float = 0.0
    max_gradient_norm: float = 1e4
    seed: int = 0

    def __post_init__(self) -> None:
        self._require_positive("micro_batches", "max_gradient_norm")
        self._require(0 <= self.ema_decay < 1, f"ema_decay must be in [0, 1), not {self.ema_decay}.")
        self._require(0 <= self.seed < 2**32, f"seed must be in [0, 2**32), not {self.seed}.")

    @property
    def remat_policy(self) -> bool | Callable[..., bool]:
        """As `scan_layers` takes it."""
        if self.remat == "dots":
            return jax.checkpoint_policies.dots_with_no_batch_dims_saveable
        return self.remat


def is_trainable(names: Sequence[str]) -> Callable[[tuple[Any, ...], Any], bool]:
    """A filter for `nnx.split`: leaves under one of the dotted names, "lora" for adapters, "all" for all."""

    def chosen(path: tuple[Any, ...], value: Any) -> bool:
        return is_chosen(names, ".".join(map(str, path)), isinstance(value, LoraParam))

    return chosen


def is_chosen(names: Sequence[str], path: str, adapter: bool = False) -> bool:
    """Whether the leaf at a dotted path is among the trainable names."""
    if "all" in names or (adapter and "lora" in names):
        return True
    return any(f"{path}.".startswith(f"{name}.") for name in names)


def split_model(model: Read, names: Sequence[str] = TRAINABLE) -> tuple[Any, Any, Any]:
    """(graphdef, trainable leaves, frozen leaves).

    Raises `ConfigError` when a name matches nothing in the model.
    """
    graphdef, trainable, frozen = nnx.split(model, is_trainable(names), ...)
    leaves = nnx.to_flat_state(trainable)
    tied = {"llama.lm_head"} if model.config.llama.tie_word_embeddings else set()  # the embeddings are it
    for name in set(names) - tied:
        found = any(
            is_chosen((name,), ".".join(map(str, path)), isinstance(leaf, LoraParam)) for path, leaf in leaves
        )
        if not found:
            raise ConfigError(f"nothing in the model is named {name!r}; it cannot be trained.")
    return graphdef, trainable, frozen


def init_state(params: Any, optimizer: optax.GradientTransformation, config: StepConfig) -> TrainState:
    """The state before the first update."""
    ema = jax.tree.map(jnp.copy, params) if config.ema_decay else None
    # two zeros: buffers of a donated state must not be the same
    return TrainState(jnp.zeros((), jnp.int32), params, optimizer.init(params), ema, jnp.zeros((), jnp.int32))


def make_gradients(
    graphdef: Any,
    prefix_ids: Any,
    image_start: int,
    weights: LossWeights,
    config: StepConfig,
    abreast: int = 1,
) -> Callable[..., tuple[Any, Losses, Counts]]:
    """The function (params, frozen, batch, key, features=None) -> (gradients, losses, counts).

    key: for the adapters' dropout. features: `ImageFeatures` of the batch, when they are known already.
    abreast: devices that share the batch; see `map_pictures`.
    """

    def loss_of(
        params: Any, frozen: Any, part: tuple[Batch, ImageFeatures | None], counts: Counts, key: Array
    ) -> tuple[Array, Losses]:
        model = nnx.merge(graphdef, params, frozen, copy=True)
        losses = objective(
            model,
            part[0],
            counts,
            prefix_ids,
            image_start,
            weights,
            features=part[1],
            dropout_key=key,
            remat=config.remat_policy,
            abreast=abreast,
        )
        return losses.total, losses

    def gradients_of(
        params: Any, frozen: Any, batch: Batch, key: Array, features: ImageFeatures | None = None
    ) -> tuple[Any, Losses, Counts]:
        counts = count(batch)

        def cut(x: Array) -> Array:
            # part k holds every K-th picture: where devices share the batch, all have work in every part
            x = jnp.reshape(x, (-1, config.micro_batches, *jnp.shape(x)[1:])).swapaxes(0, 1)
            return constrain(x, None, "batch")

        def accumulate(sums: Any, xs: tuple[Any, Array]) -> tuple[Any, None]:
            (_, losses), gradients = jax.value_and_grad(loss_of, has_aux=True)(
                params, frozen, xs[0], counts, xs[1]
            )
            gradients, losses = jax.tree.map(jnp.add, sums, (gradients, losses))
            return (constrain_parameters(gradients), losses), None

        parts = jax.tree.map(cut, (batch, features))
        keys = jax.random.split(key, config.micro_batches)
        zeros = (
            constrain_parameters(jax.tree.map(jnp.zeros_like, params)),
            Losses(*[jnp.float32(0)] * len(Losses._fields)),
        )
        (gradients, losses), _ = jax.lax.scan(accumulate, zeros, (parts, keys))
        return gradients, losses, counts

    return gradients_of


def make_train_step(
    graphdef: Any,
    optimizer: optax.GradientTransformation,
    prefix_ids: Any,
    image_start: int,
    weights: LossWeights,
    config: StepConfig,
    abreast: int = 1,
) -> Callable[..., tuple[TrainState, dict[str, Array]]]:
    """The function (state, frozen leaves, batch, features=None) -> (state, metrics), to be jitted.

    Metrics are scalars: the losses, norms of gradients, updates and parameters, tokens and masks that
    counted, whether the update was applied, and how many were skipped so far. An update that is not finite or
    exploded changes nothing but `step` and `skipped`. abreast: as for `make_gradients`.
    """
    base_key = jax.random.key(config.seed)
    gradients_of = make_gradients(graphdef, prefix_ids, image_start, weights, config, abreast)

    def train_step(
        state: TrainState, frozen: Any, batch: Batch, features: ImageFeatures | None = None
    ) -> tuple[TrainState, dict[str, Array]]:
        key = jax.random.fold_in(base_key, state.step)
        gradients, losses, counts = gradients_of(state.params, frozen, batch, key, features)
        norm = optax.tree.norm(gradients)
        updates, opt_state = optimizer.update(gradients, state.opt_state, state.params)
        moved = optax.tree.norm(updates)
        finite = jnp.isfinite(losses.total) & jnp.isfinite(norm) & jnp.isfinite(moved)
        applied = finite & (norm <= config.max_gradient_norm)
        params = optax.apply_updates(state.params, updates)
        ema = state.ema
        if ema is not None:
            done = (state.step - state.skipped).astype(jnp.float32)
            # at first a shorter average: the parameters it began from are soon worth nothing
            decay = jnp.minimum(config.ema_decay, (1 + done) / (10 + done))
            ema = jax.tree.map(lambda a, p: decay * a + (1 - decay) * p, ema, params)

        def keep(new: Any, old: Any) -> Any:
            return jax.tree.map(lambda n, o: jnp.where(applied, n, o), new, old)

        after = TrainState(
            state.step + 1,
            keep(params, state.params),
            keep(opt_state, state.opt_state),
            keep(ema, state.ema),
            state.skipped + ~applied,
        )
        metrics = losses._asdict() | {
            "gradient_norm": norm,
            "update_norm": moved,
            "parameter_norm": optax.tree.norm(after.params),
            "tokens": counts.tokens,
            "masks": counts.masks,
            "applied": applied.astype(jnp.float32),
            "skipped": after.skipped,
        }
        return after, metrics

    return train_step
