"""AdamW, clipping and learning-rate schedules as READ is trained with, in optax."""

from __future__ import annotations

import dataclasses
import math
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax

from read_jax.config import Config
from read_jax.errors import ConfigError

OPTIMIZERS = ("adamw", "muon")
SCHEDULES = ("linear", "deepspeed", "constant")


@dataclasses.dataclass(frozen=True)
class OptimizerConfig(Config):
    """How parameters are updated.

    Attributes:
        name: "adamw", as READ is trained; or "muon", for new models: matrices move by their orthogonalised
            momentum, at the size of AdamW's steps, and the rest by AdamW with Nesterov's momentum.
        learning_rate: the peak.
        schedule: "linear": linear warm-up from zero, then linear decay to zero at `total_updates`;
            "deepspeed": what DeepSpeed 0.10.3 makes of it, one update at the full rate, then the linear
            schedule one update late, its warm-up at least two updates; "constant": warm-up, then the peak.
        warmup_updates, total_updates: in optimizer updates.
        b1, b2, eps, weight_decay: of AdamW.
        clip_norm: global norm that gradients are scaled down to.
    """

    name: str = "adamw"
    learning_rate: float = 3e-4
    schedule: str = "linear"
    warmup_updates: int = 100
    total_updates: int = 5000
    b1: float = 0.9
    b2: float = 0.95
    eps: float = 1e-8
    weight_decay: float = 0.0
    clip_norm: float = 1.0

    def __post_init__(self) -> None:
        if self.name not in OPTIMIZERS:
            raise ConfigError(f"name must be one of {', '.join(OPTIMIZERS)}, not {self.name!r}.")
        if self.schedule not in SCHEDULES:
            raise ConfigError(f"schedule must be one of {', '.join(SCHEDULES)}, not {self.schedule!r}.")
        if not 0 <= self.warmup_updates < self.total_updates:
            raise ConfigError(
                f"warmup_updates ({self.warmup_updates}) must lie between 0 and total_updates "
                f"({self.total_updates})."
            )
        for name in ("learning_rate", "clip_norm", "eps"):
            if not getattr(self, name) > 0:
                raise ConfigError(f"{name} must be positive, not {getattr(self, name)}.")
        for name in ("learning_rate", "eps"):
            if not math.isfinite(getattr(self, name)):
                raise ConfigError(f"{name} must be a finite number, not {getattr(self, name)}.")
        for name in ("b1", "b2"):
            if not 0 <= getattr(self, name) < 1:
                raise ConfigError(f"{name} must be at least 0 and below 1, not {getattr(self, name)}.")
        if not 0 <= self.weight_decay < math.inf:
            raise ConfigError(f"weight_decay must be a number of at least 0, not {self.weight_decay}.")


def learning_rate(config: OptimizerConfig) -> optax.Schedule:
    """The learning rate of update k = 0, 1, ...; traced or not."""
    warmup, total = config.warmup_updates, config.total_updates
    if config.schedule == "deepspeed":
        warmup = max(warmup, 2)

    def linear(update: Any) -> jax.Array:
        update = jnp.asarray(update, jnp.float32)
        rising = update / max(warmup, 1)
        falling = 1.0 if config.schedule == "constant" else (total - update) / max(total - warmup, 1)
        return config.learning_rate * jnp.clip(jnp.where(update < warmup, rising, falling), 0.0, 1.0)

    def deepspeed(update: Any) -> jax.Array:
        # its scheduler leaves the rate alone until the first update is done
        update = jnp.asarray(update)
        return jnp.where(update == 0, config.learning_rate, linear(jnp.maximum(update - 1, 0)))

    return deepspeed if config.schedule == "deepspeed" else linear


class ClipState(NamedTuple):
    """The global gradient norm before clipping."""

    norm: jax.Array


def clip_by_global_norm(limit: float) -> optax.GradientTransformation:
    """Scale gradients by min(1, limit / (norm + 1e-6)), as PyTorch's clip_grad_norm_; keeps the norm."""

    def init(params: Any) -> ClipState:
        return ClipState(jnp.zeros((), jnp.float32))

    def update(updates: Any, state: Any, params: Any = None) -> tuple[Any, ClipState]:
        norm = optax.tree.norm(updates)
        factor = jnp.minimum(1.0, limit / (norm + 1e-6))
        return jax.tree.map(lambda g: (g * factor).astype(g.dtype), updates), ClipState(norm)

    return optax.GradientTransformation(init, update)


def make_optimizer(config: OptimizerConfig) -> optax.GradientTransformation:
    """Clipping, then AdamW or Muon with the schedule; one `update` is one optimizer update."""
    rate = learning_rate(config)
    if config.name == "muon":
        move = optax.contrib.muon(
            rate,
            eps=config.eps,
            weight_decay=config.weight_decay,
            adam_b1=config.b1,
            adam_b2=config.b2,
            adam_weight_decay=config.weight_decay,
            muon_weight_dimension_numbers=_matrices,
            consistent_rms=0.2,  # as large as an AdamW step usually is
        )
    else:
        move = optax.adamw(rate, b1=config.b1, b2=config.b2, eps=config.eps, weight_decay=config.weight_decay)
    return optax.chain(clip_by_global_norm(config.clip_norm), move)


def _matrices(params: Any) -> Any:
    """Which axes of which parameters are matrices for Muon: the kernels of linear layers, stacked or not.

    Not embeddings and the language-model head, whose rows are words that move on their own.
    """

    def axes(path: Any, leaf: Any) -> Any:
        name = jax.tree_util.keystr(path)
        is_matrix = "kernel" in name and leaf.ndim in (2, 3) and "lm_head" not in name
        return optax.contrib.MuonDimensionNumbers(-2, -1) if is_matrix else None

    return jax.tree.map_with_path(axes, params)
