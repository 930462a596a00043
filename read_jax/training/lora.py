"""Low-rank adapters (LoRA) on the language model: adding, naming and merging them.

The update of an adapted weight W is `scale * A @ B` with scale = alpha / rank, A drawn as PEFT draws it
(Kaiming-uniform) and B zero, so that training starts from the base model.
"""

from __future__ import annotations

import dataclasses
import math

import jax
import jax.numpy as jnp
from flax import nnx

from read_jax.config import Config
from read_jax.errors import ConfigError
from read_jax.models.layers import Linear
from read_jax.models.llama import Llama

ATTENTION, MLP = ("q_proj", "k_proj", "v_proj", "o_proj"), ("gate_proj", "up_proj", "down_proj")
TARGETS = (*ATTENTION, *MLP)


@dataclasses.dataclass(frozen=True)
class LoraConfig(Config):
    """Which projections of the language model's layers are adapted, and how.

    The original: rank 8 from SESAME, 64 from scratch, alpha twice the rank, dropout 0.05, on q and v.
    """

    rank: int = 8
    alpha: float = 16.0
    dropout: float = 0.05
    targets: tuple[str, ...] = ("q_proj", "v_proj")

    def __post_init__(self) -> None:
        if self.rank < 1:
            raise ConfigError(f"the rank of LoRA must be at least 1, not {self.rank}.")
        if not 0 < self.alpha < math.inf:
            raise ConfigError(f"the alpha of LoRA must be a positive number, not {self.alpha}.")
        if not 0 <= self.dropout < 1:
            raise ConfigError(f"the dropout of LoRA must be at least 0 and below 1, not {self.dropout}.")
        wrong = sorted(set(self.targets) - set(TARGETS))
        if wrong or not self.targets:
            raise ConfigError(f"LoRA adapts {', '.join(TARGETS)}, not {', '.join(wrong) or 'nothing'}.")

    @property
    def scale(self) -> float:
        """The factor of A @ B."""
        return self.alpha / self.rank


def adapted_layer(llama: Llama, target: str) -> Linear:
    """The projection of that name, of all layers in one stack."""
    return getattr(llama.layers.attn if target in ATTENTION else llama.layers.mlp, target)


def add_adapters(llama: Llama, config: LoraConfig, rngs: nnx.Rngs) -> None:
    """Give the targeted projections of every layer a float32 adapter, in place."""
    for target in config.targets:
        layer = adapted_layer(llama, target)
        layers, inputs, outputs = layer.kernel[...].shape
        bound = 1 / math.sqrt(inputs)
        a = jax.random.uniform(rngs.params(), (layers, inputs, config.rank), jnp.float32, -bound, bound)
        b = jnp.zeros((layers, config.rank, outputs), jnp.float32)
        layer.adapt(a, b, scale=config.scale, dropout=config.dropout)
