"""LLaMA decoder over a shared prefix, with a key/value cache.

Rows are laid out [B, Q, T]: B images, Q questions about each, T tokens. The prefix (system prompt and
image) is the same for all questions about an image; its keys and values are computed once, carry no Q
axis, and every question attends to them beside its own tokens.

Source of the behaviour: transformers' LlamaModel (rotary positions in half-split layout, RMSNorm and
softmax in float32, grouped-query heads).
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx

from read_jax.config import LlamaConfig
from read_jax.models.attention import Packed, attention, packed_attention, prefix_attention
from read_jax.models.layers import DType, float32_rms_norm, linear, scan_layers, stack_layers
from read_jax.sharding import constrain

Array = jax.Array


class KeyValues(NamedTuple):
    """Keys and values of all layers: [L, B, Q, C, G, K], or [L, B, S, G, K] for a shared prefix."""

    keys: Array
    values: Array


def rotary_angles(positions: Array, head_dim: int, theta: float) -> tuple[Array, Array]:
    """Cosine and sine [..., T, 1, K/2] (float32) of the rotary angles at integer positions [..., T]."""
    # constants found in double precision: an error here is multiplied by the position
    frequencies = theta ** -(np.arange(0, head_dim, 2) / head_dim)
    angles = positions[..., None, None].astype(jnp.float32) * frequencies.astype(np.float32)
    return jnp.cos(angles), jnp.sin(angles)


def apply_rotary(x: Array, cos: Array, sin: Array) -> Array:
    """Rotate [..., T, H, K]; the pairs are (i, i + K/2), as in the Hugging Face layout."""
    first, second = jnp.split(x.astype(jnp.float32), 2, axis=-1)
    rotated = jnp.concatenate([first * cos - second * sin, second * cos + first * sin], axis=-1)
    return rotated.astype(x.dtype)


class RmsNorm(nnx.Module):
    """Root-mean-square norm with a learned scale."""

    def __init__(self, size: int, eps: float, *, param_dtype: DType):
        self.eps = eps
        self.scale = nnx.Param(jnp.ones((size,), param_dtype))

    def __call__(self, x: Array) -> Array:
        """[..., D] -> [..., D]."""
        return float32_rms_norm(x, self.scale[...], self.eps)


class LlamaAttention(nnx.Module):
    """Projections of the causal self-attention; grouped-query when num_kv_heads < num_heads."""

    def __init__(self, config: LlamaConfig, *, dtype: DType, param_dtype: DType, rngs: nnx.Rngs):
        self.head_dim = config.head_dim
        kinds = {"bias": False, "dtype": dtype, "param_dtype": param_dtype, "rngs": rngs}
        width, own = config.hidden_size, config.num_heads * config.head_dim
        shared = config.num_kv_heads * config.head_dim
        self.q_proj = linear(width, own, **kinds)
        self.k_proj = linear(width, shared, **kinds)
        self.v_proj = linear(width, shared, **kinds)
        self.o_proj = linear(own, width, **kinds)

    def project(
        self, x: Array, cos: Array, sin: Array, dropout_key: Array | None = None
    ) -> tuple[Array, Array, Array]:
        """[B, Q, T, D] -> rotated queries [B, Q, T, H, K], rotated keys and values [B, Q, T, G, K]."""
        keys = _split_key(dropout_key, 3)

        def heads(y: Array) -> Array:
            return y.reshape(*y.shape[:-1], -1, self.head_dim)

        q = apply_rotary(heads(self.q_proj(x, dropout_key=keys[0])), cos, sin)
        k = apply_rotary(heads(self.k_proj(x, dropout_key=keys[1])), cos, sin)
        return q, k, heads(self.v_proj(x, dropout_key=keys[2]))

    def output(self, x: Array, dropout_key: Array | None = None) -> Array:
        """[B, Q, T, H, K] -> [B, Q, T, D]."""
        return self.o_proj(x.reshape(*x.shape[:-2], -1), dropout_key=dropout_key)


class LlamaMlp(nnx.Module):
    """SwiGLU."""

    def __init__(self, config: LlamaConfig, *, dtype: DType, param_dtype: DType, rngs: nnx.Rngs):
        kinds = {"bias": False, "dtype": dtype, "param_dtype": param_dtype, "rngs": rngs}
        self.gate_proj = linear(config.hidden_size, config.intermediate_size, **kinds)
        self.up_proj = linear(config.hidden_size, config.intermediate_size, **kinds)
        self.down_proj = linear(config.intermediate_size, config.hidden_size, **kinds)

    def __call__(self, x: Array, dropout_key: Array | None = None) -> Array:
        """[..., D] -> [..., D]; the key is for the dropout of adapters."""
        keys = _split_key(dropout_key, 3)
        hidden = jax.nn.silu(self.gate_proj(x, dropout_key=keys[0])) * self.up_proj(x, dropout_key=keys[1])
        return self.down_proj(hidden, dropout_key=keys[2])


class LlamaLayer(nnx.Module):
    """One decoder layer; the attention between its projections is the caller's."""

    def __init__(self, config: LlamaConfig, *, dtype: DType, param_dtype: DType, rngs: nnx.Rngs):
        kinds = {"dtype": dtype, "param_dtype": param_dtype, "rngs": rngs}
        self.input_norm = RmsNorm(config.hidden_size, config.rms_norm_eps, param_dtype=param_dtype)
        self.attn = LlamaAttention(config, **kinds)
        self.post_norm = RmsNorm(config.hidden_size, config.rms_norm_eps, param_dtype=param_dtype)
        self.mlp = LlamaMlp(config, **kinds)


class Llama(nnx.Module):
    """Embeddings, decoder layers, final norm and language-model head."""

    def __init__(
        self,
        config: LlamaConfig,
        *,
        dtype: DType = jnp.float32,
        param_dtype: DType = jnp.float32,
        rngs: nnx.Rngs,
    ):
        kinds = {"dtype": dtype, "param_dtype": param_dtype}
        self.config = config
        self.embed_tokens = nnx.Embed(config.vocab_size, config.hidden_size, **kinds, rngs=rngs)
        self.layers = stack_layers(lambda r: LlamaLayer(config, **kinds, rngs=r), config.num_layers, rngs)
        self.norm = RmsNorm(config.hidden_size, config.rms_norm_eps, param_dtype=param_dtype)
        if not config.tie_word_embeddings:
            self.lm_head = linear(config.hidden_size, config.vocab_size, bias=False, **kinds, rngs=rngs)

    def embed(self, ids: Array) -> Array:
        """Token ids [...] -> embeddings [..., D]."""
        return self.embed_tokens(ids)

    def logits(self, states: Array) -> Array:
        """Final states [..., D] -> float32 logits [..., V], accumulated and kept in float32.

        (In bfloat16 the original rounds them, which makes ties between the likeliest tokens.)
        """
        if self.config.tie_word_embeddings:
            head, product = self.embed_tokens.embedding[...], "...d,vd->...v"
        else:
            head, product = self.lm_head.kernel[...], "...d,dv->...v"
        return jnp.einsum(product, states, head.astype(states.dtype), preferred_element_type=jnp.float32)

    def __call__(
        self,
        x: Array,
        positions: Array,
        *,
        prefix: KeyValues | None = None,
        remat: bool | Callable[..., bool] = False,
        dropout_key: Array | None = None,
    ) -> tuple[Array, KeyValues]:
        """Causal forward pass over whole rows.

        Args:
            x: [B, Q, T, D] input embeddings.
            positions: [B, Q, T] rotary positions.
            prefix: keys and values [L, B, S, G, K] that every row sees before its own tokens.
            remat: as for `scan_layers`.
            dropout_key: for the dropout of low-rank adapters; None drops nothing.

        Returns:
            States after the final norm [B, Q, T, D], and the rows' own keys and values
            [L, B, Q, T, G, K].
        """
        cos, sin = rotary_angles(positions, self.config.head_dim, self.config.rope_theta)
        causal = jnp.tril(jnp.ones((x.shape[2], x.shape[2]), bool))
        causal = jnp.broadcast_to(causal, (*x.shape[:3], x.shape[2]))
        keys = None if dropout_key is None else jax.random.split(dropout_key, self.config.num_layers)

        def body(layer: LlamaLayer, x: Array, xs: tuple[KeyValues | None, Array | None]) -> Any:
            prefix, key = xs
            x, drop = constrain(x, "batch"), _split_key(key, 2)
            q, k, v = layer.attn.project(layer.input_norm(x), cos, sin, drop[0])
            if prefix is not None:
                out = prefix_attention(q, prefix.keys, prefix.values, k, v, mask=causal)
            else:
                rows = [y.reshape(-1, *y.shape[2:]) for y in (q, k, v)]
                out = packed_attention(rows[0], rows[1], rows[2], Packed(x.shape[2])).reshape(q.shape)
            return self._finish(layer, x, out, drop[1]), KeyValues(k, v)

        x, own = scan_layers(self.layers, x, body, (prefix, keys), remat=remat)
        return self.norm(x), own

    def with_prefix(
        self,
        prefix: Array,
        x: Array,
        *,
        remat: bool | Callable[..., bool] = False,
        dropout_key: Array | None = None,
    ) -> tuple[Array, Array]:
        """A prefix and the rows behind it in one pass: equal to one after the other.

        Each layer's weights are used once for all tokens, and where devices share them, gathered once. No
        keys and values outlive their layer.

        Args:
            prefix: [B, S, D] input embeddings, at positions 0 to S - 1.
            x: [B, Q, T, D] those of the rows, whose positions go on from there.
            remat, dropout_key: as for `__call__`.

        Returns:
            States after the final norm, [B, S, D] and [B, Q, T, D].
        """
        (images, first), (questions, length) = prefix.shape[:2], x.shape[1:3]
        positions = jnp.concatenate([jnp.arange(first), jnp.tile(first + jnp.arange(length), questions)])
        cos, sin = rotary_angles(positions, self.config.head_dim, self.config.rope_theta)
        layout = Packed(first, questions, length)
        keys = None if dropout_key is None else jax.random.split(dropout_key, self.config.num_layers)

        def body(layer: LlamaLayer, x: Array, key: Array | None) -> tuple[Array, None]:
            x, drop = constrain(x, "batch"), _split_key(key, 2)
            q, k, v = layer.attn.project(layer.input_norm(x), cos, sin, drop[0])
            return self._finish(layer, x, packed_attention(q, k, v, layout), drop[1]), None

        joined = jnp.concatenate([prefix, x.reshape(images, questions * length, -1)], axis=1)
        joined, _ = scan_layers(self.layers, joined, body, keys, remat=remat)
        joined = self.norm(joined)
        return joined[:, :first], joined[:, first:].reshape(images, questions, length, -1)

    def extend(
        self, x: Array, positions: Array, cache: KeyValues, slots: Array, *, prefix: KeyValues | None = None
    ) -> tuple[Array, KeyValues]:
        """Forward pass of T further tokens per row, written into a cache.

        Args:
            x: [B, Q, T, D] input embeddings.
            positions: [B, Q, T] rotary positions.
            cache: the rows' own keys and values [L, B, Q, C, G, K]; slots before `slots` are filled.
            slots: [B, Q] the first slot each row writes; its tokens take slots, slots + 1, ...
            prefix: as in `__call__`.

        Returns:
            States after the final norm [B, Q, T, D], and the cache with the new tokens.
        """
        cos, sin = rotary_angles(positions, self.config.head_dim, self.config.rope_theta)
        written = slots[..., None] + jnp.arange(x.shape[2])  # [B, Q, T]
        visible = jnp.arange(cache.keys.shape[3]) <= written[..., None]  # [B, Q, T, C]
        rows = jnp.arange(x.shape[0])[:, None, None], jnp.arange(x.shape[1])[None, :, None]

        def body(
            layer: LlamaLayer, carry: tuple[Array, KeyValues], xs: tuple[Array, KeyValues | None]
        ) -> tuple[tuple[Array, KeyValues], None]:
            (x, cache), (index, prefix) = carry, xs
            q, k, v = layer.attn.project(layer.input_norm(x), cos, sin)
            # the cache is carried and written in place: only the new tokens' slots move
            cache = KeyValues(
                cache.keys.at[index, *rows, written].set(k.astype(cache.keys.dtype)),
                cache.values.at[index, *rows, written].set(v.astype(cache.values.dtype)),
            )
            out = _attend(q, cache.keys[index], cache.values[index], prefix, visible)
            return (self._finish(layer, x, out), cache), None

        indices = jnp.arange(self.config.num_layers)
        (x, cache), _ = scan_layers(self.layers, (x, cache), body, (indices, prefix))
        return self.norm(x), cache

    def empty_cache(self, images: int, questions: int, slots: int, dtype: DType) -> KeyValues:
        """A cache of zeros for `images` x `questions` rows of `slots` tokens."""
        c = self.config
        shape = (c.num_layers, images, questions, slots, c.num_kv_heads, c.head_dim)
        return KeyValues(jnp.zeros(shape, dtype), jnp.zeros(shape, dtype))

    @staticmethod
    def _finish(layer: LlamaLayer, x: Array, attended: Array, dropout_key: Array | None = None) -> Array:
        drop = _split_key(dropout_key, 2)
        x = x + layer.attn.output(attended, drop[0])
        return x + layer.mlp(layer.post_norm(x), drop[1])


def _split_key(key: Array | None, number: int) -> Any:
    """So many random keys of one, or so many None."""
    return [None] * number if key is None else jax.random.split(key, number)


def _attend(q: Array, k: Array, v: Array, prefix: KeyValues | None, mask: Array) -> Array:
    """Attention of rows [B, Q, T, H, K] to cached keys [B, Q, C, G, K] (mask [B, Q, T, C]) and the prefix."""
    if prefix is not None:
        return prefix_attention(q, prefix.keys, prefix.values, k, v, mask=mask)
    return jax.vmap(lambda q, k, v, m: attention(q, k, v, mask=m[:, None]))(q, k, v, mask)
