"""All pictures of some sources once, without questions, as the vision encoders take them."""

from __future__ import annotations

import bisect
import dataclasses
import hashlib
import itertools
from collections.abc import Sequence
from typing import Any, NamedTuple, cast

import numpy as np

from read_jax.config import ReadConfig
from read_jax.data.features import DIGEST_BYTES
from read_jax.data.item import Source
from read_jax.data.loader import Loader, Notes
from read_jax.data.mixture import Skipped, picture
from read_jax.data.packing import Batch
from read_jax.errors import ReadJaxError
from read_jax.images.preprocess import clip_crop, sam_resize


class Pictures(NamedTuple):
    """Pictures as the encoders take them.

    clip_pixels, sam_pixels: as in `Batch`. sam_size: int32 [B, 2], height and width of the picture in
    sam_pixels. digest: uint8 [B, 16].
    """

    clip_pixels: np.ndarray
    sam_pixels: np.ndarray
    sam_size: np.ndarray
    digest: np.ndarray


class PictureLoader(Loader):
    """The pictures of all items once, in order, without questions; `arrays` are `Pictures`.

    Args:
        sources: in the order of the card.
        config: of the model.
        spans: items of every step, counted through all sources.
        workers, buffer, max_bad_share: as for `TrainingLoader`.
    """

    def __init__(
        self,
        sources: Sequence[Source],
        config: ReadConfig,
        spans: list[range],
        workers: int,
        buffer: int,
        max_bad_share: float,
    ) -> None:
        self._picture_task = task = _PictureTask(
            tuple(sources), config.clip.image_size, config.sam.image_size, spans
        )
        super().__init__(task, 1, len(spans), workers, buffer)
        self._max_bad_share, self._items = max_bad_share, sum(map(len, spans))

    def fingerprint(self) -> dict[str, Any]:
        """The sources."""
        return {"sources": {source.name: len(source) for source in self._picture_task.sources}}

    def _check_share(self, per_example: list[tuple[Skipped, ...]]) -> None:
        if self.skipped_count > self._max_bad_share * self._items:
            raise self.too_many(self.skipped_count, self._items, self._max_bad_share)

    def _task_bytes(self) -> int:
        task = self._picture_task
        return max(map(len, task.spans), default=0) * 3 * (task.clip_size**2 + task.sam_size**2)


@dataclasses.dataclass(frozen=True)
class _PictureTask:
    sources: tuple[Source, ...]
    clip_size: int
    sam_size: int
    spans: list[range]

    def __call__(self, t: int) -> tuple[Batch, Notes]:
        count, clip, sam = len(self.spans[t]), self.clip_size, self.sam_size
        arrays = Pictures(
            np.zeros((count, clip, clip, 3), np.uint8),
            np.zeros((count, sam, sam, 3), np.uint8),
            np.ones((count, 2), np.int32),
            np.zeros((count, DIGEST_BYTES), np.uint8),
        )
        notes = Notes()
        ends = list(itertools.accumulate(len(source) for source in self.sources))
        for row, place in enumerate(self.spans[t]):
            at = bisect.bisect_right(ends, place)
            source, index = self.sources[at], place - (ends[at - 1] if at else 0)
            key, skipped = f"{source.name}:{index}", ()
            try:
                item = source[index]
                key = f"{source.name}:{item.key}"
                image = picture(item)
                arrays.clip_pixels[row] = clip_crop(image, clip)
                arrays.sam_pixels[row], arrays.sam_size[row] = sam_resize(image, sam)
                arrays.digest[row] = _digest(*(array[row] for array in arrays[:3]))
            except ReadJaxError as error:
                skipped = (Skipped(key, str(error)),)
            notes.add(key, None, skipped)
        return cast(Batch, arrays), notes  # a Loader hands on whatever arrays a task makes


def _digest(*arrays: np.ndarray) -> np.ndarray:
    hashed = hashlib.blake2b(digest_size=DIGEST_BYTES)
    for array in arrays:
        hashed.update(np.ascontiguousarray(array).data)
    return np.frombuffer(hashed.digest(), np.uint8)
