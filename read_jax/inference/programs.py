"""The compiled programs of inference, and the host arrays that go into them.

Encode, prefix, generate, gather, predict and tile answer questions; teacher_force stands in for generate
where the answers are given; logits serves tracing. All have static shapes: image height and width are traced,
so a new image size compiles nothing; questions, answers and batches are padded to a few bucket sizes.
"""

from __future__ import annotations

from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from jax.sharding import Mesh, NamedSharding

from read_jax.geometry import ImageGeometry
from read_jax.inference.generation import Generated, generate
from read_jax.models.read import ImageFeatures, MaskPrediction, Prefix, Read
from read_jax.models.sam.postprocess import mask_logits
from read_jax.sharding import on_mesh

Array = jax.Array

TILE = 1024
"""Side of the square of mask pixels that one call of the tile program computes."""


def bucket(count: int, smallest: int = 1) -> int:
    """The next power of two, at least `smallest`: a few shapes serve every count."""
    return max(smallest, 1 << max(count - 1, 0).bit_length())


class Programs:
    """Jitted stages of one model.

    Args:
        graphdef: the `Read` module's structure.
        params: its parameters.
        end_id: the token that ends an answer.
        exact: float32 products in float32 on accelerators too (no TF32 or bf16 passes).
    """

    def __init__(self, graphdef: Any, params: Any, *, end_id: int, exact: bool):
        self.params = params
        mesh = _mesh(params)
        precision = "highest" if exact else "default"

        def program(stage: Any, **options: Any) -> Any:
            def run(params: Any, *args: Any, **kwargs: Any) -> Any:
                with jax.default_matmul_precision(precision):
                    return stage(nnx.merge(graphdef, params), *args, **kwargs)

            return jax.jit(run if mesh is None else on_mesh(run, mesh), **options)

        def answer(
            model: Read,
            prefix: Prefix,
            ids: Array,
            lengths: Array,
            max_new: Array,
            capacity: int,
            sampling: Any,
        ) -> Generated:
            return generate(
                model.llama,
                prefix.key_values,
                ids,
                lengths,
                max_new=max_new,
                capacity=capacity,
                end_id=end_id,
                sampling=sampling,
            )

        self._encode = program(partial(Read.encode_images, sam_one_by_one=True))
        self._prefix = program(Read.encode_prefix, static_argnums=3)
        self._generate = program(answer, static_argnums=5)
        self._gather = jax.jit(partial(_gather), static_argnums=(5, 6))
        self._predict = program(Read.predict_masks)
        self._teacher_force = program(_teacher_force)
        self._logits = program(lambda model, states: model.llama.logits(states))
        self._tile = jax.jit(partial(_tile))  # partial: a cache of its own, not one for all models

    def compilations(self) -> dict[str, int]:
        """How many times each program has been compiled."""
        names = ("encode", "prefix", "generate", "gather", "predict", "teacher_force", "logits", "tile")
        return {name: getattr(self, f"_{name}")._cache_size() for name in names}

    def lower(self, stage: str, *args: Any) -> jax.stages.Lowered:
        """A stage over abstract arguments, behind those that `Programs` has: to compile, not to run.

        stage: "encode", "prefix", "generate", "predict" or "teacher_force", with the arguments of the stage
        itself (of `Read`, of `generate`).
        """
        return getattr(self, f"_{stage}").lower(self.params, *args)

    def encode(
        self, clip_pixels: np.ndarray, sam_pixels: np.ndarray, geometry: ImageGeometry
    ) -> ImageFeatures:
        """Both encoders over uint8 pictures [B, ...]."""
        return self._encode(self.params, clip_pixels, sam_pixels, geometry.sam_height, geometry.sam_width)

    def prefix(self, ids: np.ndarray, image_tokens: Array, image_start: int) -> Prefix:
        """The language model over the shared prefix [S] of B images."""
        return self._prefix(self.params, ids, image_tokens, image_start)

    def generate(
        self,
        prefix: Prefix,
        ids: np.ndarray,
        lengths: np.ndarray,
        max_new: int | np.ndarray,
        sampling: tuple[float, float, np.ndarray] | None = None,
    ) -> Generated:
        """Answers to questions [B, Q, T] of at most `max_new` tokens (of all, or [B, Q] of each).

        `sampling` is (temperature, top_p, seeds [B, Q]).
        """
        limits = np.broadcast_to(np.asarray(max_new, np.int32), lengths.shape)
        capacity = bucket(int(limits.max()), 32)
        traced = sampling and (np.float32(sampling[0]), np.float32(sampling[1]), sampling[2])
        return self._generate(self.params, prefix, ids, lengths, limits, capacity, traced)

    def teacher_force(self, prefix: Prefix, ids: np.ndarray) -> Array:
        """Final states [B, Q, T, D] of given tokens [B, Q, T] after the prefixes of B images."""
        return self._teacher_force(self.params, prefix, ids)

    def logits(self, states: Array) -> Array:
        """Logits [..., V] of final states [..., D]: of every position, so for few of them."""
        return self._logits(self.params, states)

    def predict(
        self,
        states: Array,
        at: np.ndarray,
        prefix: Prefix,
        features: ImageFeatures,
        geometry: ImageGeometry,
        image_start: int,
    ) -> MaskPrediction:
        """Points and low-resolution masks for [SEG] tokens.

        Args:
            states: [B, Q, N, D] states among which the [SEG] states are.
            at: int [R, 3] (image, question, token) of each [SEG] state.
            prefix, features, geometry: of the B images.
            image_start: position of the first image token in the prefix.
        """
        rows = np.zeros((bucket(len(at)), 3), np.int32)
        rows[: len(at)] = at
        # apart from the prediction, whose long compilation then depends on the number of rows alone
        inputs = self._gather(
            states,
            rows,
            prefix.states,
            features.image_embedding,
            geometry,
            image_start,
            features.image_tokens.shape[1],
        )
        return self._predict(self.params, *inputs)

    def mask(self, low_res: Array, geometry: ImageGeometry) -> np.ndarray:
        """One low-resolution mask at the original size: float32 logits [h, w] on the host."""
        height, width = int(geometry.height), int(geometry.width)
        tiles = {
            (y, x): self._tile(low_res, geometry, np.int32(y), np.int32(x))
            for y in range(0, height, TILE)
            for x in range(0, width, TILE)
        }
        out = np.empty((height, width), np.float32)
        for (y, x), tile in tiles.items():
            part = out[y : y + TILE, x : x + TILE]
            part[:] = np.asarray(tile)[: part.shape[0], : part.shape[1]]
        return out


def _mesh(params: Any) -> Mesh | None:
    """The mesh on which the parameters lie; None where they are merely on a device."""
    sharding = getattr(jax.tree.leaves(params)[0], "sharding", None)
    if not isinstance(sharding, NamedSharding):
        return None
    assert isinstance(sharding.mesh, Mesh)
    return sharding.mesh


def _gather(
    states: Array,
    at: Array,
    prefix_states: Array,
    image_embedding: Array,
    geometry: ImageGeometry,
    image_start: int,
    image_tokens: int,
) -> tuple[Array, Array, Array, ImageGeometry]:
    """The inputs of `Read.predict_masks` for the rows `at` [R, 3]."""
    image, question, token = at.T
    image_states = prefix_states[:, image_start : image_start + image_tokens]
    return (
        states[image, question, token],
        image_states[image],
        image_embedding[image],
        jax.tree.map(lambda field: jnp.asarray(field)[image], geometry),
    )


def _teacher_force(model: Read, prefix: Prefix, ids: Array) -> Array:
    start = prefix.states.shape[1]
    positions = jnp.broadcast_to(start + jnp.arange(ids.shape[-1]), ids.shape)
    states, _ = model.llama(model.llama.embed(ids), positions, prefix=prefix.key_values)
    return states


def _tile(low_res: Array, geometry: ImageGeometry, top: Array, left: Array) -> Array:
    span = jnp.arange(TILE)
    return mask_logits(low_res, geometry, top + span, left + span)
