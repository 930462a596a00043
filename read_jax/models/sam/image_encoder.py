"""SAM's image encoder: a plain ViT with window and global attention (ViTDet), and a small neck.

Source of the behaviour: segment-anything `modeling/image_encoder.py`; SAM paper, section 3 and
appendix A; the decomposed relative positions are those of MViTv2.

Window blocks and global blocks differ only in the sizes of their relative position tables, so they live
in two stacks of parameters. Their order in depth is compiled once per repetition: in every published
SAM the pattern "several window blocks, one global block" repeats, and a scan goes over its repeats.
"""

from __future__ import annotations

import itertools

import jax
import jax.numpy as jnp
from flax import nnx
from jax.typing import ArrayLike

from read_jax.config import SAM_MEAN, SAM_STD, SamConfig
from read_jax.errors import ConfigError
from read_jax.models.attention import attention
from read_jax.models.layers import DType, gather_layer, gelu, layer_norm, linear, patchify, stack_layers
from read_jax.sharding import constrain

Array = jax.Array

NORM_EPS = 1e-6  # of the blocks, and of the norms over channels (upstream's LayerNorm2d)


def normalize_sam(pixels: ArrayLike, heights: ArrayLike, widths: ArrayLike) -> Array:
    """SAM's input from a resized picture in the top-left corner of a square.

    Args:
        pixels: uint8 [B, side, side, 3] RGB; what lies outside the picture does not matter.
        heights, widths: int [B], the picture's size in the SAM-1024 frame; may be traced.

    Returns:
        float32 [B, side, side, 3], standardised in units of 0..255, and zero outside the picture.
    """
    pixels, heights, widths = jnp.asarray(pixels), jnp.asarray(heights), jnp.asarray(widths)
    x = (pixels.astype(jnp.float32) - jnp.asarray(SAM_MEAN)) / jnp.asarray(SAM_STD)
    rows = jnp.arange(pixels.shape[1]) < heights[:, None]  # [B, side]
    columns = jnp.arange(pixels.shape[2]) < widths[:, None]
    return jnp.where((rows[:, :, None] & columns[:, None, :])[..., None], x, 0.0)


class EncoderAttention(nnx.Module):
    """Self-attention over a square of tokens with decomposed relative positions.

    The bias rel_h[query, key row] + rel_w[query, key column] is a sum over two one-hots of the key. So it
    folds exactly into 2 * size extra channels of queries and keys, and no [T, T] bias is ever stored.
    """

    def __init__(self, config: SamConfig, size: int, *, dtype: DType, param_dtype: DType, rngs: nnx.Rngs):
        width, head_size = config.embed_dim, config.embed_dim // config.num_heads
        self.num_heads = config.num_heads
        self.qkv = linear(width, 3 * width, dtype=dtype, param_dtype=param_dtype, rngs=rngs)
        self.proj = linear(width, width, dtype=dtype, param_dtype=param_dtype, rngs=rngs)
        self.rel_pos_h = nnx.Param(jnp.zeros((2 * size - 1, head_size), param_dtype))
        self.rel_pos_w = nnx.Param(jnp.zeros((2 * size - 1, head_size), param_dtype))

    def __call__(self, x: Array) -> Array:
        """[B, s, s, D] -> [B, s, s, D]; raises `ConfigError` if the tables are for another s."""
        b, size, _, width = x.shape
        qkv = self.qkv(x).reshape(b, size, size, 3, self.num_heads, -1)
        q, k, v = jnp.moveaxis(qkv, 3, 0)  # each [B, s, s, H, K]
        from_rows = jnp.einsum("brcnk,rsk->brcns", q, _relative(self.rel_pos_h[...], size).astype(q.dtype))
        from_columns = jnp.einsum("brcnk,csk->brcns", q, _relative(self.rel_pos_w[...], size).astype(q.dtype))
        here = jnp.eye(size, dtype=k.dtype)
        key_row = jnp.broadcast_to(here[:, None, None, :], (*k.shape[:-1], size))
        key_column = jnp.broadcast_to(here[None, :, None, :], (*k.shape[:-1], size))
        queries = jnp.concatenate([q * q.shape[-1] ** -0.5, from_rows, from_columns], axis=-1)
        keys = jnp.concatenate([k, key_row, key_column], axis=-1)
        queries, keys, v = (y.reshape(b, size * size, *y.shape[3:]) for y in (queries, keys, v))
        out = attention(queries, keys, v, scale=1.0)  # [B, s * s, H, K]
        return self.proj(out.reshape(b, size, size, width))


def _relative(table: Array, size: int) -> Array:
    """Entries [query, key, K] of a table of 2 * size - 1 offsets, query minus key."""
    if table.shape[0] != 2 * size - 1:
        raise ConfigError(
            f"a relative position table of {table.shape[0]} rows does not fit attention over {size}x{size} "
            f"tokens, which needs {2 * size - 1}; use the image size that the checkpoint was trained at."
        )
    position = jnp.arange(size)
    return table[position[:, None] - position[None, :] + size - 1]


class EncoderMlp(nnx.Module):
    """Two dense layers with GELU between them."""

    def __init__(self, config: SamConfig, *, dtype: DType, param_dtype: DType, rngs: nnx.Rngs):
        width, hidden = config.embed_dim, config.mlp_dim
        self.lin1 = linear(width, hidden, dtype=dtype, param_dtype=param_dtype, rngs=rngs)
        self.lin2 = linear(hidden, width, dtype=dtype, param_dtype=param_dtype, rngs=rngs)

    def __call__(self, x: Array) -> Array:
        """[..., D] -> [..., D]."""
        return self.lin2(gelu(self.lin1(x)))


class EncoderBlock(nnx.Module):
    """Pre-norm transformer block; `window` is the side of its attention windows, None for global."""

    def __init__(
        self, config: SamConfig, window: int | None, *, dtype: DType, param_dtype: DType, rngs: nnx.Rngs
    ):
        self.window = window
        kinds = {"dtype": dtype, "param_dtype": param_dtype, "rngs": rngs}
        self.norm1 = layer_norm(config.embed_dim, NORM_EPS, **kinds)
        self.attn = EncoderAttention(config, window or config.grid_size, **kinds)
        self.norm2 = layer_norm(config.embed_dim, NORM_EPS, **kinds)
        self.mlp = EncoderMlp(config, **kinds)

    def __call__(self, x: Array) -> Array:
        """[B, g, g, D] -> [B, g, g, D]."""
        y = self.norm1(x)
        if self.window is None:
            y = self.attn(y)
        else:
            y = join_windows(self.attn(split_windows(y, self.window)), x.shape[0], x.shape[1])
        x = x + y
        return x + self.mlp(self.norm2(x))


def split_windows(x: Array, window: int) -> Array:
    """[B, g, g, D] -> [B * n * n, window, window, D], zero-padded on the right and bottom.

    The padding tokens take part in attention, as upstream.
    """
    b, grid, _, width = x.shape
    n = -(-grid // window)
    pad = n * window - grid
    x = jnp.pad(x, ((0, 0), (0, pad), (0, pad), (0, 0)))
    x = x.reshape(b, n, window, n, window, width).swapaxes(2, 3)
    return x.reshape(b * n * n, window, window, width)


def join_windows(x: Array, batch: int, grid: int) -> Array:
    """The inverse of `split_windows`: -> [batch, grid, grid, D], padding dropped."""
    window, width = x.shape[1], x.shape[3]
    n = -(-grid // window)
    x = x.reshape(batch, n, n, window, window, width).swapaxes(2, 3)
    return x.reshape(batch, n * window, n * window, width)[:, :grid, :grid]


class Neck(nnx.Module):
    """Brings the encoder's width to that of the prompts: 1x1 and 3x3 convolutions, each with a norm."""

    def __init__(self, config: SamConfig, *, dtype: DType, param_dtype: DType, rngs: nnx.Rngs):
        kinds = {"dtype": dtype, "param_dtype": param_dtype, "rngs": rngs}
        width, out = config.embed_dim, config.out_chans
        self.conv1 = linear(width, out, bias=False, **kinds)
        self.norm1 = layer_norm(out, NORM_EPS, **kinds)
        self.conv2 = nnx.Conv(out, out, kernel_size=(3, 3), padding=1, use_bias=False, **kinds)
        self.norm2 = layer_norm(out, NORM_EPS, **kinds)

    def __call__(self, x: Array) -> Array:
        """[B, g, g, D] -> [B, g, g, C]."""
        return self.norm2(self.conv2(self.norm1(self.conv1(x))))


class ImageEncoder(nnx.Module):
    """Image -> image embedding, of any depth, width and choice of global blocks."""

    def __init__(
        self,
        config: SamConfig,
        *,
        dtype: DType = jnp.float32,
        param_dtype: DType = jnp.float32,
        rngs: nnx.Rngs,
    ):
        kinds = {"dtype": dtype, "param_dtype": param_dtype}
        self.config, self.dtype = config, dtype
        grid, width = config.grid_size, config.embed_dim
        self.patch_embed = linear(config.patch_size**2 * 3, width, rngs=rngs, **kinds)
        self.position_embed = nnx.Param(jnp.zeros((grid, grid, width), param_dtype))

        def stack(window: int | None, count: int) -> EncoderBlock | None:
            def make(block_rngs: nnx.Rngs) -> EncoderBlock:
                return EncoderBlock(config, window, rngs=block_rngs, **kinds)

            return stack_layers(make, count, rngs) if count else None

        num_global = len(set(config.global_attn_indexes))
        self.window_blocks = stack(config.window_size, config.depth - num_global)
        self.global_blocks = stack(None, num_global)
        self.neck = Neck(config, rngs=rngs, **kinds)

    def __call__(self, pixels: Array) -> Array:
        """Image embedding.

        Args:
            pixels: [B, side, side, 3], from `normalize_sam`; side is the configuration's image_size.

        Returns:
            [B, g, g, C] with g = side / patch_size, in the compute type.
        """
        side = self.config.image_size
        if pixels.shape[1:] != (side, side, 3):
            raise ConfigError(f"this SAM takes pixels [B, {side}, {side}, 3], not {list(pixels.shape)}.")
        x = self.patch_embed(patchify(pixels.astype(self.dtype), self.config.patch_size))
        x = x + self.position_embed[...].astype(self.dtype)
        return self.neck(self._blocks(x))

    def _blocks(self, x: Array) -> Array:
        """All blocks in order of depth: a scan over the repeats of the pattern of block kinds."""
        pattern, repeats = block_pattern(self.config)

        def repeat(x: Array, r: Array) -> tuple[Array, None]:
            done = {kind: r * pattern.count(kind) for kind in (False, True)}  # blocks of each kind so far
            for is_global, run in itertools.groupby(pattern):
                length = len(list(run))
                stack = self.global_blocks if is_global else self.window_blocks
                assert stack is not None
                indices = done[is_global] + jnp.arange(length)

                def block(x: Array, i: Array, stack: EncoderBlock = stack) -> tuple[Array, None]:
                    return gather_layer(stack, i)(constrain(x, "batch")), None

                x, _ = jax.lax.scan(block, x, indices)
                done[is_global] += length
            return x, None

        return jax.lax.scan(repeat, x, jnp.arange(repeats))[0]


def block_pattern(config: SamConfig) -> tuple[list[bool], int]:
    """The shortest pattern of block kinds (True: global) that gives all blocks, and its repeats."""
    kinds = [i in config.global_attn_indexes for i in range(config.depth)]
    for length in range(1, config.depth + 1):
        repeats, rest = divmod(config.depth, length)
        if rest == 0 and kinds == kinds[:length] * repeats:
            return kinds[:length], repeats
    return [], 0  # no blocks at all
