"""CLIP's vision transformer, up to the hidden state that LLaVA reads.

Source of the behaviour: transformers' CLIPVisionModel and LLaVA's CLIPVisionTower. Layers after the
selected hidden state are neither stored nor run.
"""

from __future__ import annotations

import jax
import jax.numpy as jnp
from flax import nnx
from jax.typing import ArrayLike

from read_jax.config import CLIP_MEAN, CLIP_STD, ClipVisionConfig
from read_jax.models.attention import attention
from read_jax.models.layers import (
    DType,
    gelu,
    layer_norm,
    linear,
    patchify,
    quick_gelu,
    scan_layers,
    stack_layers,
)
from read_jax.sharding import constrain

Array = jax.Array


def normalize_clip(pixels: ArrayLike) -> Array:
    """uint8 pixels [B, h, w, 3] -> float32, in [0, 1] and then standardised with CLIP's mean and std."""
    x = jnp.asarray(pixels).astype(jnp.float32) / 255.0
    return (x - jnp.asarray(CLIP_MEAN, jnp.float32)) / jnp.asarray(CLIP_STD, jnp.float32)


class ClipAttention(nnx.Module):
    """Multi-head self-attention with biases."""

    def __init__(self, config: ClipVisionConfig, *, dtype: DType, param_dtype: DType, rngs: nnx.Rngs):
        self.num_heads = config.num_heads

        def projection() -> nnx.Linear:
            size = config.hidden_size
            return linear(size, size, dtype=dtype, param_dtype=param_dtype, rngs=rngs)

        self.q_proj = projection()
        self.k_proj = projection()
        self.v_proj = projection()
        self.out_proj = projection()

    def __call__(self, x: Array) -> Array:
        """[B, T, D] -> [B, T, D]."""

        def heads(y: Array) -> Array:
            return y.reshape(*y.shape[:2], self.num_heads, -1)  # [B, T, H, K]

        out = attention(heads(self.q_proj(x)), heads(self.k_proj(x)), heads(self.v_proj(x)))
        return self.out_proj(out.reshape(x.shape))


class ClipMlp(nnx.Module):
    """Two dense layers with CLIP's activation between them."""

    def __init__(self, config: ClipVisionConfig, *, dtype: DType, param_dtype: DType, rngs: nnx.Rngs):
        kinds = {"dtype": dtype, "param_dtype": param_dtype, "rngs": rngs}
        self.activation = {"quick_gelu": quick_gelu, "gelu": gelu}[config.hidden_act]
        self.fc1 = linear(config.hidden_size, config.intermediate_size, **kinds)
        self.fc2 = linear(config.intermediate_size, config.hidden_size, **kinds)

    def __call__(self, x: Array) -> Array:
        """[B, T, D] -> [B, T, D]."""
        return self.fc2(self.activation(self.fc1(x)))


class ClipLayer(nnx.Module):
    """Pre-norm transformer layer."""

    def __init__(self, config: ClipVisionConfig, *, dtype: DType, param_dtype: DType, rngs: nnx.Rngs):
        kinds = {"dtype": dtype, "param_dtype": param_dtype, "rngs": rngs}
        self.norm1 = layer_norm(config.hidden_size, config.layer_norm_eps, **kinds)
        self.attn = ClipAttention(config, **kinds)
        self.norm2 = layer_norm(config.hidden_size, config.layer_norm_eps, **kinds)
        self.mlp = ClipMlp(config, **kinds)

    def __call__(self, x: Array) -> Array:
        """[B, T, D] -> [B, T, D]."""
        x = x + self.attn(self.norm1(x))
        return x + self.mlp(self.norm2(x))


class ClipVision(nnx.Module):
    """The vision tower: pixels to the features of one hidden state."""

    def __init__(
        self,
        config: ClipVisionConfig,
        *,
        dtype: DType = jnp.float32,
        param_dtype: DType = jnp.float32,
        rngs: nnx.Rngs,
    ):
        kinds = {"dtype": dtype, "param_dtype": param_dtype}
        self.config = config
        self.dtype = dtype
        normal = nnx.initializers.normal(0.02)
        size, patch = config.hidden_size, config.patch_size
        self.patch_embed = linear(3 * patch**2, size, bias=False, **kinds, rngs=rngs)
        self.class_embed = nnx.Param(normal(rngs.params(), (size,), param_dtype))
        self.position_embed = nnx.Param(normal(rngs.params(), (config.grid_size**2 + 1, size), param_dtype))
        self.pre_norm = layer_norm(size, config.layer_norm_eps, **kinds, rngs=rngs)
        self.layers = (
            stack_layers(lambda r: ClipLayer(config, **kinds, rngs=r), config.used_layers, rngs)
            if config.used_layers
            else None
        )

    def __call__(self, pixels: Array) -> Array:
        """Normalised pixels [B, h, w, 3] -> features [B, N, D] of the selected hidden state."""
        patches = patchify(pixels, self.config.patch_size)  # [B, g, g, p*p*3]
        x = self.patch_embed(patches.reshape(patches.shape[0], -1, patches.shape[-1]).astype(self.dtype))
        first = jnp.broadcast_to(self.class_embed[...].astype(x.dtype), (x.shape[0], 1, x.shape[-1]))
        x = jnp.concatenate([first, x], axis=1) + self.position_embed[...].astype(x.dtype)
        x = self.pre_norm(x)
        if self.layers is not None:
            x, _ = scan_layers(self.layers, x, lambda layer, y, _: (layer(constrain(y, "batch")), None))
        return x[:, 1:] if self.config.select_feature == "patch" else x
