"""SAM's prompt encoder: points, boxes, masks and READ's text embedding -> prompt tokens.

Source of the behaviour: segment-anything `modeling/prompt_encoder.py`, and READ's (LISA's) addition of
text embeddings as the last prompt tokens. Coordinates are (x, y) in the SAM-1024 frame, pixel centres
at .0.
"""

from __future__ import annotations

import jax
import jax.numpy as jnp
from flax import nnx

from read_jax.config import SamConfig
from read_jax.models.layers import DType, gelu, layer_norm, linear, patchify

Array = jax.Array

BACKGROUND, FOREGROUND, TOP_LEFT, BOTTOM_RIGHT = range(4)  # rows of `point_embeddings`


class MaskDownscaling(nnx.Module):
    """A mask prompt brought down to the grid: 2x2 stride 2 convolutions as space-to-depth and dense."""

    def __init__(self, config: SamConfig, *, dtype: DType, param_dtype: DType, rngs: nnx.Rngs):
        kinds = {"dtype": dtype, "param_dtype": param_dtype, "rngs": rngs}
        narrow, wide = config.mask_in_chans // 4, config.mask_in_chans
        self.conv1 = linear(2 * 2 * 1, narrow, **kinds)
        self.norm1 = layer_norm(narrow, 1e-6, **kinds)
        self.conv2 = linear(2 * 2 * narrow, wide, **kinds)
        self.norm2 = layer_norm(wide, 1e-6, **kinds)
        self.conv3 = linear(wide, config.out_chans, **kinds)

    def __call__(self, masks: Array) -> Array:
        """[B, 4g, 4g, 1] -> [B, g, g, C]."""
        x = gelu(self.norm1(self.conv1(patchify(masks, 2))))
        x = gelu(self.norm2(self.conv2(patchify(x, 2))))
        return self.conv3(x)


class PromptEncoder(nnx.Module):
    """Prompts -> sparse tokens and a dense map, for SAM's mask decoder."""

    def __init__(
        self,
        config: SamConfig,
        *,
        dtype: DType = jnp.float32,
        param_dtype: DType = jnp.float32,
        rngs: nnx.Rngs,
    ):
        self.config, self.dtype = config, dtype
        width = config.out_chans

        def table(*shape: int) -> nnx.Param:
            return nnx.Param(nnx.initializers.normal(1.0)(rngs.params(), shape, param_dtype))

        # float32 by default: it multiplies coordinates into phases of tens of radians (a bfloat16
        # checkpoint brings its own, already rounded by whoever saved it).
        frequencies = nnx.initializers.normal(1.0)(rngs.params(), (2, width // 2), jnp.float32)
        self.gaussian_matrix = nnx.Param(frequencies)
        self.point_embeddings = table(4, width)
        self.not_a_point_embed = table(width)
        self.no_mask_embed = table(width)
        self.mask_downscaling = MaskDownscaling(config, dtype=dtype, param_dtype=param_dtype, rngs=rngs)

    def __call__(
        self,
        points: Array | None = None,
        labels: Array | None = None,
        boxes: Array | None = None,
        masks: Array | None = None,
        text: Array | None = None,
    ) -> tuple[Array, Array]:
        """Encode the prompts that are given; which ones are is static.

        Args:
            points: [B, P, 2] (x, y) in the SAM-1024 frame; differentiable.
            labels: int [B, P], with `points`: 1 foreground, 0 background, -1 neutral. A neutral point
                loses its position and becomes the same "not a point" token as padding.
            boxes: [B, 4] as (x0, y0, x1, y1) in the SAM-1024 frame.
            masks: [B, 4g, 4g, 1] low-resolution logits of an earlier prediction.
            text: [B, S, C] embeddings of [SEG].

        Returns:
            sparse [B, tokens, C]: points, one padding token (only with points and no box), two box
                corners, then text; and dense [B, g, g, C].
        """
        tokens: list[Array] = []
        batch = 1
        if (points is None) != (labels is None):
            raise ValueError("points and labels come together: one of them is missing.")
        if points is not None and labels is not None:
            batch = points.shape[0]
            tokens.append(self._points(points, labels))
            if boxes is None:
                tokens.append(jnp.broadcast_to(self._cast(self.not_a_point_embed), (batch, 1, self._width)))
        if boxes is not None:
            batch = boxes.shape[0]
            tokens.append(self._boxes(boxes))
        if text is not None:
            batch = text.shape[0]
            tokens.append(text.astype(self.dtype))
        if masks is not None:
            batch = masks.shape[0]
            dense = self.mask_downscaling(masks.astype(self.dtype))
        else:
            grid = self.config.grid_size
            dense = jnp.broadcast_to(self._cast(self.no_mask_embed), (batch, grid, grid, self._width))
        empty = jnp.zeros((batch, 0, self._width), self.dtype)
        return jnp.concatenate([empty, *tokens], axis=1), dense

    def dense_pe(self) -> Array:
        """Position code of every cell of the image embedding, [g, g, C] in the compute type."""
        centres = (jnp.arange(self.config.grid_size, dtype=jnp.float32) + 0.5) / self.config.grid_size
        x, y = jnp.meshgrid(centres, centres)
        return self._position(x, y).astype(self.dtype)

    @property
    def _width(self) -> int:
        return self.config.out_chans

    def _cast(self, table: nnx.Param) -> Array:
        return table[...].astype(self.dtype)

    def _points(self, points: Array, labels: Array) -> Array:
        kinds = self._cast(self.point_embeddings)
        position = self._position_of_pixels(points)
        labels = labels[..., None]
        added = jnp.where(labels == 0, kinds[BACKGROUND], jnp.where(labels == 1, kinds[FOREGROUND], 0))
        return jnp.where(labels == -1, self._cast(self.not_a_point_embed), position + added)

    def _boxes(self, boxes: Array) -> Array:
        corners = boxes.reshape(-1, 2, 2)
        kinds = self._cast(self.point_embeddings)
        return self._position_of_pixels(corners) + kinds[TOP_LEFT : BOTTOM_RIGHT + 1]

    def _position_of_pixels(self, points: Array) -> Array:
        """Code [..., C] of SAM-1024 coordinates [..., 2]; half a pixel leads to the pixel's centre."""
        unit = (points.astype(jnp.float32) + 0.5) / self.config.image_size
        return self._position(unit[..., 0], unit[..., 1]).astype(self.dtype)

    def _position(self, x: Array, y: Array) -> Array:
        """Random Fourier features, float32 [..., C], of coordinates within [0, 1]."""
        gx, gy = self.gaussian_matrix[...].astype(jnp.float32)
        # Not a matrix product: an accelerator would round the phases to its fast format.
        phase = 2 * jnp.pi * ((2 * x - 1)[..., None] * gx + (2 * y - 1)[..., None] * gy)
        return jnp.concatenate([jnp.sin(phase), jnp.cos(phase)], axis=-1)
