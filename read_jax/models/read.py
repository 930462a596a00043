"""READ: CLIP and LLaMA answer, the [SEG] state and its similarity map prompt SAM.

    pixels -> CLIP -> projector -> LLaMA -> state that predicts [SEG] -> similarity -> SasP -> SAM

Pure device code in three stages, each jittable and batched, meant to be called separately because
their batches differ: images (encoders and shared prefix), questions (the decoder), and [SEG] rows
(points and masks). Image sizes arrive as traced `ImageGeometry`. LISA and SESAME are the same model
with SasP off. Source of the behaviour: READ's `READForCausalLM`.
"""

from __future__ import annotations

from typing import NamedTuple

import jax
import jax.numpy as jnp
from flax import nnx

from read_jax.config import ReadConfig
from read_jax.geometry import ImageGeometry
from read_jax.models.clip import ClipVision, normalize_clip
from read_jax.models.layers import DType, gelu, linear
from read_jax.models.llama import KeyValues, Llama
from read_jax.models.sam import Sam
from read_jax.models.sam.image_encoder import normalize_sam
from read_jax.models.sasp import SaspPoints, similarity_points

Array = jax.Array


class ImageFeatures(NamedTuple):
    """What the encoders say of a batch of images.

    clip_features: [B, N, Dc]; image_tokens: [B, N, D], the projected features; image_embedding:
    [B, g, g, C], SAM's.
    """

    clip_features: Array
    image_tokens: Array
    image_embedding: Array


class Prefix(NamedTuple):
    """The part of the sequence that all questions about an image share.

    states: [B, S, D] final hidden states; key_values: [L, B, S, G, K].
    """

    states: Array
    key_values: KeyValues


class MaskPrediction(NamedTuple):
    """SAM's answer for R [SEG] tokens, with every intermediate stage.

    pred_embedding: [R, C]; similarity: float32 [R, N]; points: `SaspPoints` with a leading [R];
    point_coords: [R, P, 2] in the SAM-1024 frame; sparse_embeddings: [R, tokens, C];
    dense_embedding: [C], the dense prompt (without a mask prompt it is constant over rows and grid);
    low_res_masks: [R, 4g, 4g]; iou: [R].
    """

    pred_embedding: Array
    similarity: Array
    points: SaspPoints
    point_coords: Array
    sparse_embeddings: Array
    dense_embedding: Array
    low_res_masks: Array
    iou: Array


class Projector(nnx.Module):
    """LLaVA's multimodal projector: one linear layer, or N of them with GELU between."""

    def __init__(self, config: ReadConfig, *, dtype: DType, param_dtype: DType, rngs: nnx.Rngs):
        out = config.llama.hidden_size
        inputs = [config.clip.hidden_size, *[out] * (config.projector_depth - 1)]
        self.layers = nnx.List(
            linear(size, out, dtype=dtype, param_dtype=param_dtype, rngs=rngs) for size in inputs
        )

    def __call__(self, x: Array) -> Array:
        """[B, N, Dc] -> [B, N, D]."""
        for i, layer in enumerate(self.layers):
            x = layer(gelu(x) if i else x)
        return x


class TextProjection(nnx.Module):
    """Projects a [SEG] state to SAM's prompt width (READ's `text_hidden_fcs`)."""

    def __init__(self, config: ReadConfig, *, dtype: DType, param_dtype: DType, rngs: nnx.Rngs):
        kinds = {"dtype": dtype, "param_dtype": param_dtype, "rngs": rngs}
        self.fc1 = linear(config.llama.hidden_size, config.llama.hidden_size, **kinds)
        self.fc2 = linear(config.llama.hidden_size, config.prompt_dim, **kinds)

    def __call__(self, x: Array) -> Array:
        """[..., D] -> [..., C]."""
        return self.fc2(jax.nn.relu(self.fc1(x)))


class Read(nnx.Module):
    """The whole model.

    Args:
        config: the architecture.
        dtype: type of the computation; norms, softmax, similarity and points are float32 regardless.
        param_dtype: type the parameters are stored in.
        rngs: source of the initial parameters.
    """

    def __init__(
        self,
        config: ReadConfig,
        *,
        dtype: DType = jnp.float32,
        param_dtype: DType = jnp.float32,
        rngs: nnx.Rngs,
    ):
        kinds = {"dtype": dtype, "param_dtype": param_dtype, "rngs": rngs}
        self.config = config
        self.clip = ClipVision(config.clip, **kinds)
        self.projector = Projector(config, **kinds)
        self.llama = Llama(config.llama, **kinds)
        self.text_projection = TextProjection(config, **kinds)
        self.sam = Sam(config.sam, **kinds)

    def encode_images(
        self,
        clip_pixels: Array,
        sam_pixels: Array,
        sam_heights: Array,
        sam_widths: Array,
        *,
        sam_one_by_one: bool = False,
    ) -> ImageFeatures:
        """Run both vision encoders.

        Args:
            clip_pixels: uint8 [B, 336, 336, 3], the resized central square.
            sam_pixels: uint8 [B, 1024, 1024, 3], resized, padded on the right and bottom.
            sam_heights, sam_widths: [B] the part of `sam_pixels` that is picture.
            sam_one_by_one: SAM's encoder takes the pictures in turn: one fills an accelerator, and a
                batch would hold the scores of its global attention (1 GB a picture for ViT-H) at once.
        """
        sam_input = normalize_sam(sam_pixels, sam_heights, sam_widths)
        if sam_one_by_one:
            image_embedding = jax.lax.map(lambda x: self.sam.image_encoder(x[None])[0], sam_input)
        else:
            image_embedding = self.sam.image_encoder(sam_input)
        clip_features = self.clip(normalize_clip(clip_pixels))
        return ImageFeatures(clip_features, self.projector(clip_features), image_embedding)

    def embed_prefix(self, ids: Array, image_tokens: Array, image_start: int) -> Array:
        """What the language model takes of the prefix [B, S, D]; arguments as for `encode_prefix`."""
        batch, count = image_tokens.shape[:2]
        stop = image_start + count
        text = self.llama.embed(ids.at[image_start:stop].set(0))
        text = jnp.broadcast_to(text, (batch, *text.shape))
        return text.at[:, image_start:stop].set(image_tokens.astype(text.dtype))

    def encode_prefix(self, ids: Array, image_tokens: Array, image_start: int) -> Prefix:
        """Run the language model over the prefix.

        Args:
            ids: int [S] token ids with the image placeholder already expanded to N positions.
            image_tokens: [B, N, D].
            image_start: position of the first image token in `ids` (static).
        """
        x = self.embed_prefix(ids, image_tokens, image_start)
        positions = jnp.broadcast_to(jnp.arange(ids.shape[0]), (len(x), 1, ids.shape[0]))
        states, own = self.llama(x[:, None], positions)
        return Prefix(states[:, 0], KeyValues(own.keys[:, :, 0], own.values[:, :, 0]))

    def predict_masks(
        self, seg_states: Array, image_states: Array, image_embedding: Array, geometry: ImageGeometry
    ) -> MaskPrediction:
        """From [SEG] states to low-resolution masks.

        Args:
            seg_states: [R, D] final states that predict a [SEG].
            image_states: [R, N, D] final states of the image tokens of each row's image.
            image_embedding: [R, g, g, C] SAM's embedding of each row's image.
            geometry: each row's image size, every field [R].
        """
        sasp = self.config.sasp
        pred_embedding = self.text_projection(seg_states)
        # READ's "surgery" weights are a softmax over one text token, i.e. 1: a plain dot product
        similarity = jnp.einsum(
            "rnd,rd->rn",
            image_states,
            seg_states,
            preferred_element_type=jnp.float32,
            precision=jax.lax.Precision.HIGHEST,
        )
        points = jax.vmap(lambda s, h, w, g: similarity_points(s, h, w, g, sasp))(
            similarity, geometry.height, geometry.width, geometry.sasp
        )
        scale = jnp.stack([geometry.scale_x, geometry.scale_y], axis=-1)  # [R, 2]
        coords = points.points * scale[:, None]
        sparse, dense = self.sam.prompt_encoder(
            points=coords if sasp.enabled else None,
            labels=points.labels if sasp.enabled else None,
            text=pred_embedding[:, None],
        )
        low_res, iou = self.sam.mask_decoder(
            image_embedding, self.sam.prompt_encoder.dense_pe(), sparse, dense
        )
        return MaskPrediction(
            pred_embedding, similarity, points, coords, sparse, dense[0, 0, 0], low_res[:, 0], iou[:, 0]
        )
