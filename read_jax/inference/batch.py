"""Pictures and questions on their way through the device together."""

from __future__ import annotations

import dataclasses
import time
from collections.abc import Sequence
from typing import Any, NamedTuple

import jax
import numpy as np

from read_jax.geometry import ImageGeometry
from read_jax.inference.programs import bucket
from read_jax.models.read import ImageFeatures, Prefix


@dataclasses.dataclass(frozen=True)
class PreparedImage:
    """A decoded picture in the forms the encoders take."""

    clip_pixels: np.ndarray  # uint8 [336, 336, 3]
    sam_pixels: np.ndarray  # uint8 [1024, 1024, 3]
    geometry: ImageGeometry


@dataclasses.dataclass(frozen=True)
class Batch:
    """Pictures that went through the encoders together, and the length and layout of their prefix."""

    images: Sequence[PreparedImage]
    features: ImageFeatures
    prefix: Prefix
    prefix_length: int
    image_start: int
    clock: Clock


class Answer(NamedTuple):
    """An answer to question `question` about picture `image` of a batch.

    seg: which of its row's states predict a [SEG].
    """

    image: int
    question: int
    text: str
    output_ids: np.ndarray
    seg: np.ndarray


def token_rows(tokens: Sequence[Sequence[np.ndarray]]) -> tuple[np.ndarray, np.ndarray]:
    """Token rows by picture, padded to buckets: ids int32 [B, Q, T] and lengths [B, Q], 0 for no row."""
    shape = bucket(len(tokens)), bucket(max(map(len, tokens)))
    longest = max(len(row) for group in tokens for row in group)
    ids, lengths = np.zeros((*shape, bucket(longest, 32)), np.int32), np.zeros(shape, np.int32)
    for b, group in enumerate(tokens):
        for q, row in enumerate(group):
            ids[b, q, : len(row)] = row
            lengths[b, q] = len(row)
    return ids, lengths


class Clock:
    """Seconds between laps; a lap waits for the arrays it names."""

    def __init__(self) -> None:
        self.laps: dict[str, float] = {}
        self._since = time.perf_counter()

    def lap(self, name: str, arrays: Any) -> None:
        jax.block_until_ready(arrays)
        now = time.perf_counter()
        self.laps[name], self._since = now - self._since, now
