"""Small pieces every network of the project shares: constructors of standard layers, stacks of layers.

A stack keeps the parameters of equal layers in one array per leaf with a leading [L] axis and runs
them with `jax.lax.scan`, so that compile time and the number of saved arrays stay flat in depth.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, TypeVar

import jax
import jax.numpy as jnp
from flax import nnx

Array = jax.Array
DType = Any
Layer = TypeVar("Layer", bound=nnx.Module)
Carry = TypeVar("Carry")


class LoraParam(nnx.Param):
    """A factor of a low-rank update: its own type, so that it can be told from the frozen weight."""


class Linear(nnx.Linear):
    """A dense layer, kernel [in, out]; once `adapt`ed, with a low-rank update x -> scale * drop(x) A B."""

    lora_scale: float = 0.0
    lora_dropout: float = 0.0

    def adapt(self, a: Array, b: Array, *, scale: float, dropout: float) -> None:
        """Add the factors a [..., in, r] and b [..., r, out]; leading axes as the kernel's, for a stack."""
        self.lora_a, self.lora_b = LoraParam(a), LoraParam(b)
        self.lora_scale, self.lora_dropout = scale, dropout

    def __call__(self, inputs: Array, *, dropout_key: Array | None = None) -> Array:
        """[..., in] -> [..., out]; without a key nothing is dropped."""
        out = super().__call__(inputs)
        if not hasattr(self, "lora_a"):
            return out
        x = inputs.astype(out.dtype)
        if dropout_key is not None and self.lora_dropout:
            kept = jax.random.bernoulli(dropout_key, 1 - self.lora_dropout, x.shape)
            x = jnp.where(kept, x / (1 - self.lora_dropout), 0)
        low = x @ self.lora_a[...].astype(out.dtype)
        return out + self.lora_scale * (low @ self.lora_b[...].astype(out.dtype))


def linear(
    in_features: int,
    out_features: int,
    *,
    bias: bool = True,
    dtype: DType,
    param_dtype: DType,
    rngs: nnx.Rngs,
) -> Linear:
    """A dense layer, kernel [in, out]."""
    return Linear(in_features, out_features, use_bias=bias, dtype=dtype, param_dtype=param_dtype, rngs=rngs)


def layer_norm(size: int, eps: float, *, dtype: DType, param_dtype: DType, rngs: nnx.Rngs) -> nnx.LayerNorm:
    """LayerNorm over the last axis; float32 statistics by the two-pass formula, as PyTorch's."""
    return nnx.LayerNorm(
        size, epsilon=eps, use_fast_variance=False, dtype=dtype, param_dtype=param_dtype, rngs=rngs
    )


def quick_gelu(x: Array) -> Array:
    """CLIP's approximation of GELU, x * sigmoid(1.702 x)."""
    return x * jax.nn.sigmoid(1.702 * x)


def gelu(x: Array) -> Array:
    """GELU by the error function (PyTorch's default)."""
    return jax.nn.gelu(x, approximate=False)


def patchify(pixels: Array, size: int) -> Array:
    """Cut [B, h, w, c] into patches [B, h/size, w/size, size * size * c] (row, column, channel)."""
    b, h, w, c = pixels.shape
    x = pixels.reshape(b, h // size, size, w // size, size, c)
    return x.transpose(0, 1, 3, 2, 4, 5).reshape(b, h // size, w // size, size * size * c)


def stack_layers(make: Callable[[nnx.Rngs], Layer], count: int, rngs: nnx.Rngs) -> Layer:
    """`count` layers made by `make`, as one module whose every leaf has a leading [count] axis."""
    return nnx.split_rngs(splits=count)(nnx.vmap(make))(rngs)


def scan_layers(
    layers: nnx.Module,
    carry: Carry,
    body: Callable[[Any, Carry, Any], tuple[Carry, Any]],
    xs: Any = None,
    *,
    remat: bool | Callable[..., bool] = False,
) -> tuple[Carry, Any]:
    """Run a stack in order: `carry, y = body(layer, carry, x)` for every layer.

    Args:
        layers: a module made by `stack_layers`.
        carry: what flows from layer to layer.
        body: one layer's step.
        xs: pytree with a leading [L] axis, one slice per layer.
        remat: recompute the layer's activations in the backward pass; a policy of
            `jax.checkpoint_policies` names those that are kept instead.

    Returns:
        The last carry, and the `y` of all layers stacked.
    """
    graphdef, params = nnx.split(layers)

    def step(carry: Carry, slices: tuple[Any, Any]) -> tuple[Carry, Any]:
        layer_params, x = slices
        # copy: a merged module must not alias the outer trace's variables, or grad would refuse it
        return body(nnx.merge(graphdef, layer_params, copy=True), carry, x)

    if remat:
        step = jax.checkpoint(step, policy=remat if callable(remat) else None)
    return jax.lax.scan(step, carry, (params, xs))


def gather_layer(layers: nnx.Module, index: Array) -> Any:
    """Layer `index` (traced) of a stack, without copying the rest."""
    graphdef, params = nnx.split(layers)
    return nnx.merge(
        graphdef,
        jax.tree.map(lambda p: jax.lax.dynamic_index_in_dim(p, index, keepdims=False), params),
        copy=True,
    )


def float32_rms_norm(x: Array, scale: Array, eps: float) -> Array:
    """RMSNorm with float32 statistics, returned in the type of `x` (as LLaMA's)."""
    x32 = x.astype(jnp.float32)
    normed = x32 * jax.lax.rsqrt(jnp.mean(jnp.square(x32), axis=-1, keepdims=True) + eps)
    return scale.astype(x.dtype) * normed.astype(x.dtype)
