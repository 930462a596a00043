"""The train step: one compiled program from a batch to updated parameters."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax
from flax import nnx

from read_jax.data.packing import Batch
from read_jax.errors import ConfigError
from read_jax.models.layers import LoraParam
from read_jax.models.read import Read
from read_jax.training.objective import Losses, LossWeights, count, objective

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
class StepConfig:
    """How a batch becomes an update.

    Attributes:
        micro_batches: parts the batch is cut into, one after the other through the model; same result.
        remat: recompute the language model's activations in the backward pass.
        ema_decay: of the moving average of the parameters; 0 keeps none.
        max_gradient_norm: an update whose gradient norm exceeds it is skipped, as one that is not finite.
        seed: of the adapters' dropout.
    """

    micro_batches: int = 1
    remat: bool = True
    ema_decay: float = 0.0
    max_gradient_norm: float = float("inf")
    seed: int = 0


def is_trainable(names: Sequence[str]) -> Callable[[tuple[Any, ...], Any], bool]:
    """A filter for `nnx.split`: leaves under one of the dotted names, "lora" for adapters, "all" for all."""

    def chosen(path: tuple[Any, ...], value: Any) -> bool:
        if "lora" in names and isinstance(value, LoraParam):
            return True
        dotted = ".".join(map(str, path)) + "."
        return "all" in names or any(dotted.startswith(f"{name}.") for name in names)

    return chosen


def split_model(model: Read, names: Sequence[str] = TRAINABLE) -> tuple[Any, Any, Any]:
    """(graphdef, trainable leaves, frozen leaves).

    Raises `ConfigError` when a name matches nothing in the model.
    """
    graphdef, trainable, frozen = nnx.split(model, is_trainable(names), ...)
    paths = [".".join(map(str, path)) + "." for path, _ in nnx.to_flat_state(trainable)]
    for name in set(names) - {"all", "lora"}:
        if not any(path.startswith(f"{name}.") for path in paths):
            raise ConfigError(f"nothing in the model is named {name!r}; it cannot be trained.")
    return graphdef, trainable, frozen


def init_state(params: Any, optimizer: optax.GradientTransformation, config: StepConfig) -> TrainState:
    """The state before the first update."""
    zero = jnp.zeros((), jnp.int32)
    ema = jax.tree.map(jnp.copy, params) if config.ema_decay else None
    return TrainState(zero, params, optimizer.init(params), ema, zero)


def make_train_step(
    graphdef: Any,
    optimizer: optax.GradientTransformation,
    prefix_ids: Any,
    image_start: int,
    weights: LossWeights,
    config: StepConfig,
) -> Callable[[TrainState, Any, Batch], tuple[TrainState, dict[str, Array]]]:
    """The function (state, frozen leaves, batch) -> (state, metrics), to be jitted by the caller.

    Metrics are float32 scalars: the losses, norms of gradients, updates and parameters, tokens and masks
    that counted, and whether the update was applied.
    """
    base_key = jax.random.key(config.seed)

    def losses_of(params: Any, frozen: Any, part: Batch, counts: Any, key: Array) -> tuple[Array, Losses]:
        model = nnx.merge(graphdef, params, frozen, copy=True)
        losses = objective(
            model, part, counts, prefix_ids, image_start, weights, dropout_key=key, remat=config.remat
        )
        return losses.total, losses

    def train_step(state: TrainState, frozen: Any, batch: Batch) -> tuple[TrainState, dict[str, Array]]:
        counts = count(batch)
        parts = jax.tree.map(lambda x: x.reshape(config.micro_batches, -1, *x.shape[1:]), batch)
        keys = jax.random.split(jax.random.fold_in(base_key, state.step), config.micro_batches)

        def accumulate(sums: Any, xs: tuple[Batch, Array]) -> tuple[Any, None]:
            (_, losses), gradients = jax.value_and_grad(losses_of, has_aux=True)(
                state.params, frozen, xs[0], counts, xs[1]
            )
            return jax.tree.map(jnp.add, sums, (gradients, losses)), None

        zeros = jax.tree.map(jnp.zeros_like, state.params), Losses(*[jnp.float32(0)] * len(Losses._fields))
        (gradients, losses), _ = jax.lax.scan(accumulate, zeros, (parts, keys))
        norm = optax.tree.norm(gradients)
        updates, opt_state = optimizer.update(gradients, state.opt_state, state.params)
        applied = jnp.isfinite(losses.total) & jnp.isfinite(norm) & (norm <= config.max_gradient_norm)
        params = optax.apply_updates(state.params, updates)
        ema = state.ema
        if ema is not None:
            ema = jax.tree.map(lambda a, p: config.ema_decay * a + (1 - config.ema_decay) * p, ema, params)

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
            "update_norm": optax.tree.norm(updates),
            "parameter_norm": optax.tree.norm(after.params),
            "tokens": counts.tokens,
            "masks": counts.masks,
            "applied": applied.astype(jnp.float32),
        }
        return after, metrics

    return train_step
