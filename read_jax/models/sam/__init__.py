"""Segment Anything: image encoder, prompt encoder and mask decoder (arXiv:2304.02643)."""

from __future__ import annotations

import jax.numpy as jnp
from flax import nnx

from read_jax.config import SamConfig
from read_jax.models.layers import DType
from read_jax.models.sam.image_encoder import ImageEncoder, normalize_sam
from read_jax.models.sam.mask_decoder import MaskDecoder
from read_jax.models.sam.postprocess import mask_logits
from read_jax.models.sam.prompt_encoder import PromptEncoder

__all__ = ["ImageEncoder", "MaskDecoder", "PromptEncoder", "Sam", "mask_logits", "normalize_sam"]


class Sam(nnx.Module):
    """The three networks of SAM; its callers run them one by one, the image encoder once per image."""

    def __init__(
        self,
        config: SamConfig,
        *,
        dtype: DType = jnp.float32,
        param_dtype: DType = jnp.float32,
        rngs: nnx.Rngs,
    ):
        kinds = {"dtype": dtype, "param_dtype": param_dtype, "rngs": rngs}
        self.image_encoder = ImageEncoder(config, **kinds)
        self.prompt_encoder = PromptEncoder(config, **kinds)
        self.mask_decoder = MaskDecoder(config, **kinds)
