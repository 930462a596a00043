"""The one door through which every attention of the project goes.

The implementation here is the plain one, in jax.numpy: the reference that any kernel must equal. A TPU's
splash attention takes its place where sequences are long (SAM's global layers, LLaMA's training); the
environment variable READ_JAX_ATTENTION chooses otherwise (`IMPLEMENTATIONS`). Scores and softmax are float32
whatever the inputs are.

Shapes: B batch, Q questions per image, T queries, S and C keys, N tokens of self-attention, H query heads, G
key/value heads (H a multiple of G), K head size.
"""

from __future__ import annotations

import functools
import os

import jax
import jax.numpy as jnp

from read_jax.errors import ConfigError
from read_jax.models.kernels import Packed, cudnn_attention, cudnn_channels, splash_attention

Array = jax.Array

IMPLEMENTATIONS = ("auto", "plain", "splash", "splash-interpreted", "cudnn")
"""Values of READ_JAX_ATTENTION. auto: splash on TPUs, plain elsewhere; splash-interpreted: that kernel
without a TPU, slowly; cudnn: NVIDIA's, in bfloat16, not yet tried on a GPU, whose heads are wide enough for
SAM's global layers from Hopper on."""

SPLASH = {"splash": False, "splash-interpreted": True}
"""Those that are splash attention, and whether it is interpreted."""

KERNEL_FROM = 512
"""Tokens of a packed sequence from which a kernel is worth its padding."""

WHOLE_FROM = 1024
"""The same where all tokens see each other: SAM's 4096, not CLIP's 577, whose heads devices share."""

BLOCKED_FROM = 2**22
"""Scores per head from which a CPU computes them block by block (a 64x64 grid has four times as many)."""

QUERY_BLOCK = 256
"""Queries of one block: 256 x 4096 float32 scores are 4 MB and stay in the cache."""


def attention(
    q: Array, k: Array, v: Array, *, mask: Array | None = None, scale: float | None = None
) -> Array:
    """Softmax attention with grouped-query heads.

    Args:
        q: [B, T, H, K] queries.
        k: [B, S, G, K] keys.
        v: [B, S, G, V] values; V may differ from K.
        mask: bool, broadcastable to [B, H, T, S]; True where a query may look.
        scale: factor on the scores, K ** -0.5 when None.

    Returns:
        [B, T, H, V] in the type of `v`.

    Raises `ConfigError` when READ_JAX_ATTENTION names no implementation.
    """
    chosen = _implementation(q, WHOLE_FROM)
    whole = mask is None and q.shape[1] == k.shape[1]
    if chosen in SPLASH and whole:
        return splash_attention(q, k, v, scale=scale, interpret=SPLASH[chosen])
    if chosen == "cudnn" and whole and v.shape[-1] <= q.shape[-1] <= cudnn_channels():
        return cudnn_attention(q, k, v, scale=scale)
    if mask is None and q.shape[1] * k.shape[1] >= BLOCKED_FROM and q.shape[1] % QUERY_BLOCK == 0:
        blocked, plain = (functools.partial(f, scale=scale) for f in (_blocked, _plain))
        return jax.lax.platform_dependent(q, k, v, cpu=blocked, default=plain)
    return _plain(q, k, v, mask=mask, scale=scale)


def packed_attention(q: Array, k: Array, v: Array, layout: Packed) -> Array:
    """Self-attention of a prefix with questions behind it, all causal: each question sees the prefix and
    itself.

    Args:
        q: [B, N, H, K]; k, v: [B, N, G, K]; N is `layout.tokens`.
        layout: how the tokens are divided.

    Returns:
        [B, N, H, K].

    Raises `ConfigError` as `attention`.
    """
    chosen = _implementation(q, KERNEL_FROM)
    if chosen in SPLASH:
        return splash_attention(q, k, v, layout=layout, shared_heads=True, interpret=SPLASH[chosen])
    if chosen == "cudnn" and q.shape[-1] <= cudnn_channels():
        return cudnn_attention(q, k, v, layout)
    first, rows = layout.prefix, (layout.questions, layout.length)

    def causal(n: int) -> Array:
        return jnp.tril(jnp.ones((n, n), bool))

    of_prefix = _plain(q[:, :first], k[:, :first], v[:, :first], mask=causal(first), scale=None)
    if not layout.questions:
        return of_prefix
    own = [x[:, first:].reshape(x.shape[0], *rows, *x.shape[2:]) for x in (q, k, v)]
    mask = jnp.broadcast_to(causal(layout.length), (q.shape[0], *rows, layout.length))
    of_rows = prefix_attention(own[0], k[:, :first], v[:, :first], own[1], own[2], mask=mask)
    return jnp.concatenate([of_prefix, of_rows.reshape(q.shape[0], -1, *of_rows.shape[3:])], axis=1)


def prefix_attention(q: Array, prefix_k: Array, prefix_v: Array, k: Array, v: Array, *, mask: Array) -> Array:
    """Attention of several question rows to one shared prefix and to their own tokens.

    Equal to attention over the concatenated keys, but the prefix is read once per image and never
    copied per question.

    Args:
        q: [B, Q, T, H, K] queries.
        prefix_k, prefix_v: [B, S, G, K], shared by the Q questions; every query sees all of it.
        k, v: [B, Q, C, G, K] the questions' own keys and values.
        mask: bool [B, Q, T, C]; True where a query may look among its own keys.

    Returns:
        [B, Q, T, H, K].
    """
    b, questions, t, h, size = q.shape
    s = prefix_k.shape[1]
    folded = q.reshape(b, questions * t, h, size)
    prefix_scores = _scores(folded, prefix_k, None).reshape(b, h, questions, t, s)
    prefix_scores = prefix_scores.swapaxes(1, 2)  # [B, Q, H, T, S]
    own_scores = jax.vmap(_scores, in_axes=(0, 0, None))(q, k, None)  # [B, Q, H, T, C]
    own_scores = jnp.where(mask[:, :, None], own_scores, -jnp.inf)
    weights = jax.nn.softmax(jnp.concatenate([prefix_scores, own_scores], axis=-1), axis=-1)
    prefix_weights = weights[..., :s].swapaxes(1, 2).reshape(b, h, questions * t, s)
    from_prefix = _weigh(prefix_weights, prefix_v).reshape(b, questions, t, h, -1)
    return from_prefix + jax.vmap(_weigh)(weights[..., s:], v)


def _implementation(q: Array, least: int) -> str:
    """Of `IMPLEMENTATIONS`, that for queries [B, T, H, K] on the platform that is traced for: below `least`
    of them the plain one. Never "auto"."""
    chosen = os.environ.get("READ_JAX_ATTENTION", "auto")
    if chosen not in IMPLEMENTATIONS:
        known = ", ".join(IMPLEMENTATIONS)
        raise ConfigError(f"READ_JAX_ATTENTION is {chosen!r}; it can be one of: {known}.")
    if q.shape[1] < least:
        return "plain"
    if chosen != "auto":
        return chosen
    mesh = jax.sharding.get_abstract_mesh()
    device = None if mesh.empty else mesh.abstract_device
    platform = jax.default_backend() if device is None else device.platform
    return "splash" if platform == "tpu" else "plain"


def _plain(q: Array, k: Array, v: Array, *, mask: Array | None = None, scale: float | None) -> Array:
    """All scores at once."""
    scores = _scores(q, k, scale)  # [B, H, T, S]
    if mask is not None:
        scores = jnp.where(mask, scores, -jnp.inf)
    return _weigh(jax.nn.softmax(scores, axis=-1), v)


def _blocked(q: Array, k: Array, v: Array, *, scale: float | None) -> Array:
    """One head and one block of queries at a time, for a CPU: the scores never leave its cache."""
    b, t, h, size = q.shape
    queries = (q * (size**-0.5 if scale is None else scale)).swapaxes(1, 2)
    queries = queries.reshape(b * h, t // QUERY_BLOCK, QUERY_BLOCK, size)

    def per_head(x: Array) -> Array:  # [B, S, G, K] -> [B * H, S, K]
        return jnp.repeat(x, h // x.shape[2], axis=2).swapaxes(1, 2).reshape(b * h, x.shape[1], -1)

    def head(operands: tuple[Array, Array, Array]) -> Array:
        queries, keys, values = operands

        def block(x: Array) -> Array:
            scores = jnp.einsum("tk,sk->ts", x, keys, preferred_element_type=jnp.float32)
            weights = jnp.exp(scores - scores.max(axis=-1, keepdims=True))
            out = jnp.einsum("ts,sv->tv", weights.astype(values.dtype), values)
            return (out / weights.sum(axis=-1, keepdims=True)).astype(values.dtype)

        return jax.lax.map(block, queries)

    out = jax.lax.map(head, (queries, per_head(k), per_head(v)))
    return out.reshape(b, h, t, -1).swapaxes(1, 2)


def _scores(q: Array, k: Array, scale: float | None) -> Array:
    """Scaled dot products [B, H, T, S] in float32."""
    b, t, h, size = q.shape
    groups = k.shape[2]
    q = q * (size**-0.5 if scale is None else scale)
    q = q.reshape(b, t, groups, h // groups, size)
    scores = jnp.einsum("btgrk,bsgk->bgrts", q, k, preferred_element_type=jnp.float32)
    return scores.reshape(b, h, t, k.shape[1])


def _weigh(weights: Array, v: Array) -> Array:
    """Sum of the values by weights [B, H, T, S] -> [B, T, H, V]."""
    b, h, t, s = weights.shape
    groups = v.shape[2]
    weights = weights.astype(v.dtype).reshape(b, groups, h // groups, t, s)
    return jnp.einsum("bgrts,bsgv->btgrv", weights, v).reshape(b, t, h, v.shape[-1])
