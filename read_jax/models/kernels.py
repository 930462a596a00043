"""Attention by kernels that keep the scores on the chip: splash attention of TPUs, cuDNN's of NVIDIA's GPUs.

Only `models/attention.py` calls them, and each must equal its plain implementation. A mask is known while
tracing: splash attention leaves out the blocks in which nothing is visible.
"""

from __future__ import annotations

import dataclasses
import functools
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from read_jax.sharding import spec

Array = jax.Array

LANES = 128
"""Of a TPU's registers: channels and tokens come in multiples of it."""

_CUDNN_STEP = 8
"""cuDNN takes heads whose channels are a multiple of it."""

BLOCKS = (512, 384, 256)
"""Tokens of a block, best first: smaller ones leave the matrix units waiting."""


@dataclasses.dataclass(frozen=True)
class Packed:
    """Which tokens see which, in a prefix with questions behind it: all is causal, a question sees the
    prefix and itself.

    prefix: tokens of the prefix; questions, length: how many questions there are, of how many tokens.
    """

    prefix: int
    questions: int = 0
    length: int = 0

    @property
    def tokens(self) -> int:
        """Of the whole sequence."""
        return self.prefix + self.questions * self.length

    def visible(self, size: int | None = None) -> np.ndarray:
        """bool [query, key], padded to `size` tokens; what is added sees itself, and nothing else sees it."""
        size = self.tokens if size is None else size
        at = np.arange(size)
        owner = np.where(at < self.prefix, -1, (at - self.prefix) // max(self.length, 1))
        owner = np.where(at >= self.tokens, size + at, owner)  # each for itself
        seen = at[:, None] >= at[None, :]
        to_prefix = (owner[None, :] == -1) & (at[:, None] < self.tokens)
        return seen & (to_prefix | (owner[:, None] == owner[None, :]))


def padded_size(tokens: int) -> tuple[int, int]:
    """(size, block): the tokens filled up to whole blocks, with the least filling, then in large blocks."""
    sizes = [(-(-tokens // block) * block, -block) for block in BLOCKS]
    size, block = min(sizes)
    return size, -block


def splash_attention(
    q: Array,
    k: Array,
    v: Array,
    *,
    layout: Packed | None = None,
    scale: float | None = None,
    shared_heads: bool = False,
    interpret: bool = False,
) -> Array:
    """Self-attention by JAX's splash attention kernel for TPUs (its gradient is a kernel too).

    Under a mesh (see `read_jax.sharding.on_mesh`) every device attends for its own pictures and heads: the
    compiler cannot divide such a kernel.

    Args:
        q: [B, N, H, K]; k: [B, N, G, K]; v: [B, N, G, V].
        layout: which tokens see which; None: all.
        scale: factor on the scores, K ** -0.5 when None.
        shared_heads: the mesh's tensor axis shares H and G, instead of repeating the work.
        interpret: without a TPU, slowly.

    Returns:
        [B, N, H, V] in the type of `v`.
    """
    channels = v.shape[-1]
    q = q * jnp.asarray(q.shape[-1] ** -0.5 if scale is None else scale, q.dtype)
    names = ("batch", None, "heads" if shared_heads else None)

    def own(q: Array, k: Array, v: Array) -> Array:
        tokens = q.shape[1]
        size, block = padded_size(tokens)
        kernel = _splash(layout or tokens, q.shape[2], size, block, interpret)
        q, k, v = (_padded(x, size) for x in (q, k, v))
        return jax.vmap(kernel)(q, k, v).swapaxes(1, 2)[:, :tokens, :, :channels]

    mesh = jax.sharding.get_abstract_mesh()
    if not mesh.empty and mesh.size > 1:
        place = spec(names, mesh)
        own = jax.shard_map(own, mesh=mesh, in_specs=(place,) * 3, out_specs=place, check_vma=False)
    return own(q, k, v)


def cudnn_channels() -> int:
    """The most channels of a head that cuDNN takes on this process's GPUs: twice as many from Hopper on."""
    capability = getattr(jax.local_devices()[0], "compute_capability", "0.0")
    return 256 if int(capability.partition(".")[0]) >= 9 else 128


def cudnn_attention(
    q: Array, k: Array, v: Array, layout: Packed | None = None, *, scale: float | None = None
) -> Array:
    """Self-attention by cuDNN's kernel, which the compiler divides among devices itself.

    q: [B, N, H, K]; k: [B, N, G, K]; v: [B, N, G, V], V at most K; bfloat16 or float16, K at most
    `cudnn_channels`. layout: which tokens see which; None: all see all. scale: on the scores, K ** -0.5 when
    None.

    Returns [B, N, H, V].
    """
    tokens, channels = q.shape[1], q.shape[3]
    # with a mask it trains on even lengths alone
    size = -(-tokens // LANES) * LANES if layout else tokens
    width = -(-channels // _CUDNN_STEP) * _CUDNN_STEP

    def filled(x: Array) -> Array:
        return jnp.pad(x, ((0, 0), (0, size - tokens), (0, 0), (0, width - x.shape[3])))

    out = jax.nn.dot_product_attention(
        *(filled(x) for x in (q, k, v)),
        mask=jnp.asarray(layout.visible(size)[None, None]) if layout else None,
        scale=channels**-0.5 if scale is None else scale,
        implementation="cudnn",
    )
    return out[:, :tokens, :, : v.shape[3]]


@functools.lru_cache(maxsize=16)
def _splash(layout: Packed | int, heads: int, size: int, block: int, interpret: bool) -> Any:
    """The kernel [H, N, K] -> [H, N, V] for a layout, or for so many tokens that all see each other."""
    # imported here: only TPUs need it, and it is experimental
    from jax.experimental.pallas.ops.tpu import splash_attention as splash

    if isinstance(layout, int) and layout == size:
        mask = splash.FullMask((size, size))
    elif isinstance(layout, int):
        filling = np.arange(size) >= layout
        mask = splash.NumpyMask(np.broadcast_to(~filling, (size, size)) | np.eye(size, dtype=bool))
    else:
        mask = splash.NumpyMask(layout.visible(size))
    blocks = splash.BlockSizes(
        block_q=block,
        block_kv=block,
        block_q_dkv=block,
        block_kv_dkv=block,
        block_q_dq=block,
        block_kv_dq=block,
    )
    with jax.ensure_compile_time_eval():
        kernel = splash.make_splash_mha(
            splash.MultiHeadMask([mask] * heads),
            block_sizes=blocks,
            head_shards=1,
            q_seq_shards=1,
            interpret=interpret,
        )
        return jax.tree.map(np.asarray, kernel)


def _padded(x: Array, size: int) -> Array:
    """[B, N, H, K] -> [B, H, size, K'] with K' a multiple of the lanes, filled with zeros."""
    channels = -x.shape[-1] % LANES
    return jnp.pad(x, ((0, 0), (0, size - x.shape[1]), (0, 0), (0, channels))).swapaxes(1, 2)
