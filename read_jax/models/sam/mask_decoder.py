"""SAM's mask decoder: prompt tokens and image embedding -> low-resolution masks and their quality.

Source of the behaviour: segment-anything `modeling/mask_decoder.py` and `modeling/transformer.py`;
SAM paper, appendix A "Lightweight mask decoder".
"""

from __future__ import annotations

import itertools

import jax
import jax.numpy as jnp
from flax import nnx

from read_jax.config import SamConfig
from read_jax.models.attention import attention
from read_jax.models.layers import DType, gelu, layer_norm, linear

Array = jax.Array

TOKEN_NORM_EPS = 1e-5
CHANNEL_NORM_EPS = 1e-6  # upstream's LayerNorm2d
CROSS_ATTENTION_DOWNSAMPLE = 2


class DecoderAttention(nnx.Module):
    """Multi-head attention whose inner width is that of its input divided by `downsample`."""

    def __init__(
        self, config: SamConfig, downsample: int, *, dtype: DType, param_dtype: DType, rngs: nnx.Rngs
    ):
        kinds = {"dtype": dtype, "param_dtype": param_dtype, "rngs": rngs}
        width, inner = config.out_chans, config.out_chans // downsample
        self.num_heads = config.decoder_num_heads
        self.q_proj = linear(width, inner, **kinds)
        self.k_proj = linear(width, inner, **kinds)
        self.v_proj = linear(width, inner, **kinds)
        self.out_proj = linear(inner, width, **kinds)

    def __call__(self, q: Array, k: Array, v: Array) -> Array:
        """q [B, T, C], k and v [B, S, C] -> [B, T, C]."""

        def heads(x: Array) -> Array:
            return x.reshape(*x.shape[:2], self.num_heads, -1)  # [B, T, H, K]

        out = attention(heads(self.q_proj(q)), heads(self.k_proj(k)), heads(self.v_proj(v)))
        return self.out_proj(out.reshape(*out.shape[:2], -1))


class DecoderMlp(nnx.Module):
    """Two dense layers with ReLU between them."""

    def __init__(self, config: SamConfig, *, dtype: DType, param_dtype: DType, rngs: nnx.Rngs):
        kinds = {"dtype": dtype, "param_dtype": param_dtype, "rngs": rngs}
        self.lin1 = linear(config.out_chans, config.decoder_mlp_dim, **kinds)
        self.lin2 = linear(config.decoder_mlp_dim, config.out_chans, **kinds)

    def __call__(self, x: Array) -> Array:
        """[..., C] -> [..., C]."""
        return self.lin2(jax.nn.relu(self.lin1(x)))


class TwoWayBlock(nnx.Module):
    """Tokens attend to themselves and to the image, then the image attends to the tokens.

    `first` marks the first block, whose self-attention replaces the tokens and adds no position.
    """

    def __init__(self, config: SamConfig, first: bool, *, dtype: DType, param_dtype: DType, rngs: nnx.Rngs):
        kinds = {"dtype": dtype, "param_dtype": param_dtype, "rngs": rngs}
        self.first = first
        self.self_attn = DecoderAttention(config, 1, **kinds)
        self.norm1 = layer_norm(config.out_chans, TOKEN_NORM_EPS, **kinds)
        self.cross_attn_token_to_image = DecoderAttention(config, CROSS_ATTENTION_DOWNSAMPLE, **kinds)
        self.norm2 = layer_norm(config.out_chans, TOKEN_NORM_EPS, **kinds)
        self.mlp = DecoderMlp(config, **kinds)
        self.norm3 = layer_norm(config.out_chans, TOKEN_NORM_EPS, **kinds)
        self.cross_attn_image_to_token = DecoderAttention(config, CROSS_ATTENTION_DOWNSAMPLE, **kinds)
        self.norm4 = layer_norm(config.out_chans, TOKEN_NORM_EPS, **kinds)

    def __call__(self, tokens: Array, image: Array, token_pe: Array, image_pe: Array) -> tuple[Array, Array]:
        """tokens, token_pe [B, T, C]; image [B, N, C], image_pe [N, C] -> new tokens and image."""
        if self.first:
            tokens = self.self_attn(tokens, tokens, tokens)
        else:
            placed = tokens + token_pe
            tokens = tokens + self.self_attn(placed, placed, tokens)
        tokens = self.norm1(tokens)
        placed_image = image + image_pe
        tokens = self.norm2(tokens + self.cross_attn_token_to_image(tokens + token_pe, placed_image, image))
        tokens = self.norm3(tokens + self.mlp(tokens))
        image = self.norm4(image + self.cross_attn_image_to_token(placed_image, tokens + token_pe, tokens))
        return tokens, image


class TwoWayTransformer(nnx.Module):
    """The decoder's transformer between prompt tokens and image tokens."""

    def __init__(self, config: SamConfig, *, dtype: DType, param_dtype: DType, rngs: nnx.Rngs):
        kinds = {"dtype": dtype, "param_dtype": param_dtype, "rngs": rngs}
        self.layers = nnx.List([TwoWayBlock(config, i == 0, **kinds) for i in range(config.decoder_depth)])
        self.final_attn_token_to_image = DecoderAttention(config, CROSS_ATTENTION_DOWNSAMPLE, **kinds)
        self.norm_final_attn = layer_norm(config.out_chans, TOKEN_NORM_EPS, **kinds)

    def __call__(self, tokens: Array, image: Array, image_pe: Array) -> tuple[Array, Array]:
        """tokens [B, T, C] (also their own positions), image [B, N, C], image_pe [N, C] -> both, updated."""
        token_pe = tokens
        for layer in self.layers:
            tokens, image = layer(tokens, image, token_pe, image_pe)
        looked = self.final_attn_token_to_image(tokens + token_pe, image + image_pe, image)
        return self.norm_final_attn(tokens + looked), image


class Doubling(nnx.Module):
    """A 2x2 transposed convolution of stride 2: every pixel becomes 2x2 pixels, without overlap."""

    def __init__(self, width: int, out: int, *, dtype: DType, param_dtype: DType, rngs: nnx.Rngs):
        init = nnx.initializers.lecun_normal(in_axis=0, out_axis=3)
        self.dtype = dtype
        self.kernel = nnx.Param(init(rngs.params(), (width, 2, 2, out), param_dtype))
        self.bias = nnx.Param(jnp.zeros((out,), param_dtype))

    def __call__(self, x: Array) -> Array:
        """[B, h, w, C] -> [B, 2h, 2w, out]."""
        b, h, w, _ = x.shape
        x = jnp.einsum("bhwc,crso->bhrwso", x, self.kernel[...].astype(self.dtype))
        return x.reshape(b, 2 * h, 2 * w, -1) + self.bias[...].astype(self.dtype)


class Upscaling(nnx.Module):
    """The image embedding at four times the resolution and an eighth of the width."""

    def __init__(self, config: SamConfig, *, dtype: DType, param_dtype: DType, rngs: nnx.Rngs):
        kinds = {"dtype": dtype, "param_dtype": param_dtype, "rngs": rngs}
        width = config.out_chans
        self.conv1 = Doubling(width, width // 4, **kinds)
        self.norm = layer_norm(width // 4, CHANNEL_NORM_EPS, **kinds)
        self.conv2 = Doubling(width // 4, width // 8, **kinds)

    def __call__(self, image: Array) -> Array:
        """[B, g, g, C] -> [B, 4g, 4g, C/8]."""
        return gelu(self.conv2(gelu(self.norm(self.conv1(image)))))


class HeadLinear(nnx.Module):
    """One dense layer for each of several heads, kernel [heads, in, out]."""

    def __init__(self, heads: int, width: int, out: int, *, dtype: DType, param_dtype: DType, rngs: nnx.Rngs):
        init = nnx.initializers.lecun_normal(batch_axis=0)
        self.dtype = dtype
        self.kernel = nnx.Param(init(rngs.params(), (heads, width, out), param_dtype))
        self.bias = nnx.Param(jnp.zeros((heads, out), param_dtype))

    def __call__(self, x: Array, heads: slice) -> Array:
        """[B, M, in] -> [B, M, out] for the M heads of the slice."""
        kernel, bias = self.kernel[heads].astype(self.dtype), self.bias[heads].astype(self.dtype)
        return jnp.einsum("bmi,mio->bmo", x, kernel) + bias


class Hypernetworks(nnx.Module):
    """For each mask token, an MLP that turns it into the weights of its mask's linear classifier."""

    def __init__(self, config: SamConfig, *, dtype: DType, param_dtype: DType, rngs: nnx.Rngs):
        kinds = {"dtype": dtype, "param_dtype": param_dtype, "rngs": rngs}
        heads, width = config.num_mask_tokens, config.out_chans
        outs = (width, width, width // 8)
        self.layers = nnx.List([HeadLinear(heads, width, out, **kinds) for out in outs])

    def __call__(self, tokens: Array, heads: slice) -> Array:
        """[B, M, C] -> [B, M, C/8] for the M mask tokens of the slice."""
        *hidden, last = self.layers
        for layer in hidden:
            tokens = jax.nn.relu(layer(tokens, heads))
        return last(tokens, heads)


class IouHead(nnx.Module):
    """MLP that estimates each mask's IoU with the truth."""

    def __init__(self, config: SamConfig, *, dtype: DType, param_dtype: DType, rngs: nnx.Rngs):
        kinds = {"dtype": dtype, "param_dtype": param_dtype, "rngs": rngs}
        hidden = [config.iou_head_hidden_dim] * (config.iou_head_depth - 1)
        sizes = [config.out_chans, *hidden, config.num_mask_tokens]
        self.layers = nnx.List([linear(i, o, **kinds) for i, o in itertools.pairwise(sizes)])

    def __call__(self, token: Array) -> Array:
        """[B, C] -> [B, number of mask tokens]."""
        *hidden, last = self.layers
        for layer in hidden:
            token = jax.nn.relu(layer(token))
        return last(token)


class MaskDecoder(nnx.Module):
    """Low-resolution masks from an image embedding and prompts."""

    def __init__(
        self,
        config: SamConfig,
        *,
        dtype: DType = jnp.float32,
        param_dtype: DType = jnp.float32,
        rngs: nnx.Rngs,
    ):
        kinds = {"dtype": dtype, "param_dtype": param_dtype, "rngs": rngs}
        init = nnx.initializers.normal(1.0)
        self.config, self.dtype = config, dtype
        self.iou_token = nnx.Param(init(rngs.params(), (1, config.out_chans), param_dtype))
        self.mask_tokens = nnx.Param(
            init(rngs.params(), (config.num_mask_tokens, config.out_chans), param_dtype)
        )
        self.transformer = TwoWayTransformer(config, **kinds)
        self.upscaling = Upscaling(config, **kinds)
        self.hypernetworks = Hypernetworks(config, **kinds)
        self.iou_head = IouHead(config, **kinds)

    def __call__(
        self, image_embedding: Array, image_pe: Array, sparse: Array, dense: Array, multimask: bool = False
    ) -> tuple[Array, Array]:
        """Predict masks. The prompts of one image can share its embedding: `jax.vmap` over `sparse`
        alone keeps what does not depend on the prompt (the first projections of the image) unbatched.

        Args:
            image_embedding: [B, g, g, C] from the image encoder.
            image_pe: [g, g, C] from `PromptEncoder.dense_pe`.
            sparse: [B, S, C] prompt tokens; the text embedding is among them.
            dense: [B, g, g, C] dense prompt.
            multimask: False gives the one mask of mask token 0 (READ's choice); True gives the masks of
                the other tokens, SAM's answers to an ambiguous prompt. Static.

        Returns:
            low_res_masks [B, M, 4g, 4g] float32 logits and iou [B, M] float32 estimates, M the number
            of masks.
        """
        wanted = slice(1, self.config.num_mask_tokens) if multimask else slice(0, 1)
        b, grid, _, width = image_embedding.shape
        own = jnp.concatenate([self.iou_token[...], self.mask_tokens[...]]).astype(self.dtype)
        own = jnp.broadcast_to(own, (sparse.shape[0], *own.shape))
        tokens = jnp.concatenate([own, sparse.astype(self.dtype)], axis=1)  # [B, 1 + masks + S, C]
        image = (image_embedding.astype(self.dtype) + dense.astype(self.dtype)).reshape(b, grid * grid, width)
        tokens, image = self.transformer(tokens, image, image_pe.astype(self.dtype).reshape(-1, width))
        mask_tokens = tokens[:, 1 : 1 + self.config.num_mask_tokens]
        classifiers = self.hypernetworks(mask_tokens[:, wanted], wanted)  # [B, M, C/8]
        pixels = self.upscaling(image.reshape(b, grid, grid, width))  # [B, 4g, 4g, C/8]
        masks = jnp.einsum("bmc,bhwc->bmhw", classifiers, pixels, preferred_element_type=jnp.float32)
        return masks, self.iou_head(tokens[:, 0])[:, wanted].astype(jnp.float32)
