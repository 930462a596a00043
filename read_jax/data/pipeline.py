"""Batches for training and evaluation, made by Grain worker processes; resumable on any number of hosts.

    loader = TrainingLoader(load_mixture("reasonseg", data_dir), Packer(config, tokenizer), global_batch=16,
                            host_index=jax.process_index(), host_count=jax.process_count(), workers=8)
    for batch in loader:              # HostBatch; never ends
        step(batch.arrays)
        save(loader.state())          # small, JSON
    loader.restore(state)             # goes on with the batch after the last one handed out

Global step s is made of the examples s*G to s*G + G - 1, and every host takes its own contiguous share: any
number of hosts that divides G, with any number of workers, sees the same batches.

Workers are fresh processes that import the main module: a script that uses them needs the usual
`if __name__ == "__main__":`. Batches come through shared memory (/dev/shm).
"""

from __future__ import annotations

import collections
import dataclasses
from collections.abc import Mapping
from typing import Any, NamedTuple

import numpy as np

from read_jax.data.features import FeatureStore
from read_jax.data.item import Source
from read_jax.data.loader import ENDLESS, Loader, Notes
from read_jax.data.mixture import Mixture, Sample, Skipped
from read_jax.data.packing import Batch, PackedExample, Packer, evaluation_sample
from read_jax.errors import DataError, ReadJaxError

MAX_BAD_SHARE = 0.05
"""Share of pictures that may be unusable before a run stops."""
_WINDOW, _FEWEST = 2000, 100
"""The share is taken over so many of the latest draws of a training run, once there are the fewest."""
_LARGEST_TASK = 8


@dataclasses.dataclass(frozen=True)
class _TrainingTask:
    """Task t of a host: `size` consecutive examples of the mixture."""

    mixture: Mixture
    packer: Packer
    global_batch: int
    first: int  # of the host, within a global step
    size: int
    per_step: int
    features: FeatureStore | None

    def __call__(self, t: int) -> tuple[Batch, Notes]:
        step, part = divmod(t, self.per_step)
        start = step * self.global_batch + self.first + part * self.size
        examples, notes = [], Notes()
        for k in range(start, start + self.size):
            example, skipped = self._draw(k)
            examples.append(example)
            notes.add(example.key, example, skipped)
        return self.packer.batch(examples), notes

    def _draw(self, k: int) -> tuple[PackedExample, tuple[Skipped, ...]]:
        store = self.features
        if store is None:
            return self.mixture.draw(k, self.packer.pack)

        def pack(sample: Sample) -> PackedExample:
            store.check_usable(sample.key)  # what could not be looked at then is skipped now
            return self.packer.pack(sample)

        example, skipped = self.mixture.draw(k, pack, look=False)
        # not within the draw: a picture that the store lacks is no reason to draw another
        return dataclasses.replace(example, features=store[example.key]), skipped


class Unit(NamedTuple):
    """What one place of an evaluation batch holds: Q questions of an item, from `first` on."""

    item: int
    first: int


@dataclasses.dataclass(frozen=True)
class _EvaluationTask:
    """Task t of a host: its share of global step t."""

    source: Source
    packer: Packer
    units: list[Unit]
    shares: np.ndarray

    def __call__(self, t: int) -> tuple[Batch, Notes]:
        examples, notes = [], Notes()
        for place in self.shares[t]:
            example, key, skipped = None, "", ()
            if place >= 0:
                unit = self.units[place]
                key = f"{self.source.name}:{unit.item}#{unit.first}"
                try:
                    item = self.source[unit.item]
                    key = f"{self.source.name}:{item.key}#{unit.first}"
                    count = self.packer.limits.questions
                    example = self.packer.pack(evaluation_sample(item, self.source.name, unit.first, count))
                except ReadJaxError as error:
                    skipped = (Skipped(key, str(error)),)
            examples.append(example)
            notes.add(key if example else "", example, skipped)
        return self.packer.batch(examples), notes


class TrainingLoader(Loader):
    """Endless batches of a mixture."""

    def __init__(
        self,
        mixture: Mixture,
        packer: Packer,
        global_batch: int,
        *,
        host_index: int = 0,
        host_count: int = 1,
        workers: int = 0,
        buffer: int = 2,
        task_examples: int | None = None,
        max_bad_share: float = MAX_BAD_SHARE,
        features: FeatureStore | None = None,
    ) -> None:
        """Nothing is read before the first batch is asked for.

        Args:
            mixture, packer: what to draw, and the shapes to make of it.
            global_batch: examples of a step over all hosts; a multiple of host_count.
            host_index, host_count: which share to make.
            workers: processes that decode and preprocess; 0: this process does.
            buffer: tasks each worker prepares ahead.
            task_examples: examples a worker makes at a time, a divisor of the host's share; default: the
                largest up to 8.
            max_bad_share: stop when a larger share of the latest draws could not be used.
            features: what the encoders say of the pictures; the same examples then, without pixels.

        Raises:
            DataError: an argument is out of its range.
        """
        share = _host_share(global_batch, host_index, host_count)
        size = task_examples or max(n for n in range(1, min(share, _LARGEST_TASK) + 1) if share % n == 0)
        if size < 1 or share % size:
            raise DataError(f"tasks of {size} examples do not divide a host's share of {share}.")
        if mixture.questions_per_image > packer.limits.questions:
            raise DataError(
                f"the mixture gives up to {mixture.questions_per_image} questions per picture, the batches "
                f"hold {packer.limits.questions}; make both equal."
            )
        first = host_index * share
        task = _TrainingTask(mixture, packer, global_batch, first, size, share // size, features)
        super().__init__(task, share // size, ENDLESS, workers, buffer)
        self._mixture, self._packer, self._global_batch, self._size = mixture, packer, global_batch, size
        self._max_bad_share, self._features = max_bad_share, features
        self._recent: collections.deque[int] = collections.deque(maxlen=_WINDOW)  # failures per example

    def fingerprint(self) -> dict[str, Any]:
        """The mixture's, and the batch size."""
        return {"global_batch": self._global_batch, **self._mixture.fingerprint()}

    def restore(self, state: Mapping[str, Any]) -> None:
        """As in the base class."""
        super().restore(state)
        self._recent.clear()

    def _check_share(self, per_example: list[tuple[Skipped, ...]]) -> None:
        self._recent.extend(len(skipped) for skipped in per_example)
        bad = sum(self._recent)
        draws = bad + len(self._recent)
        if draws >= _FEWEST and bad > self._max_bad_share * draws:
            raise self.too_many(bad, draws, self._max_bad_share)

    def _task_bytes(self) -> int:
        return self._size * _example_bytes(self._packer, self._features)


class EvaluationLoader(Loader):
    """Every question of a source exactly once, teacher-forced with the fixed templates, then the end.

    A picture with more questions than a batch holds takes several places. The last batch is filled with
    padding (valid False), never with repetitions; all hosts get the same number of batches.
    """

    def __init__(
        self,
        source: Source,
        packer: Packer,
        global_batch: int,
        *,
        host_index: int = 0,
        host_count: int = 1,
        workers: int = 0,
        buffer: int = 2,
        max_bad_share: float = MAX_BAD_SHARE,
    ) -> None:
        """Looks at every item once for its number of questions. Arguments as for `TrainingLoader`."""
        self._units = _units(source, packer.limits.questions)
        shares = evaluation_shares(len(self._units), global_batch, host_index, host_count)
        super().__init__(
            _EvaluationTask(source, packer, self._units, shares), 1, len(shares), workers, buffer
        )
        self._source, self._packer, self._global_batch = source, packer, global_batch
        self._own, self._share = int((shares >= 0).sum()), shares.shape[1]
        self._max_bad_share = max_bad_share

    def __len__(self) -> int:
        """Number of batches."""
        return self._steps

    @property
    def places(self) -> int:
        """Of all hosts' batches, those that are not padding."""
        return len(self._units)

    def fingerprint(self) -> dict[str, Any]:
        """The source, and how it is cut."""
        return {
            "global_batch": self._global_batch,
            "source": self._source.name,
            "compat": self._source.compat,
            "pictures": len(self._source),
            "places": len(self._units),
            "questions": self._packer.limits.questions,
        }

    def restore(self, state: Mapping[str, Any]) -> None:
        """As for every loader; what could not be used is counted anew."""
        super().restore(state)
        self.skipped.clear()
        self.skipped_count = 0

    def _check_share(self, per_example: list[tuple[Skipped, ...]]) -> None:
        if self.skipped_count > self._max_bad_share * self._own:
            raise self.too_many(self.skipped_count, self._own, self._max_bad_share)

    def _task_bytes(self) -> int:
        return self._share * _example_bytes(self._packer)


def evaluation_shares(length: int, global_batch: int, host_index: int = 0, host_count: int = 1) -> np.ndarray:
    """Which of 0 .. length - 1 a host evaluates in each step: int64 [steps, global_batch / host_count].

    -1 is padding, at the end only. Over all hosts every number occurs exactly once. Raises `DataError`
    unless host_count divides global_batch.
    """
    share = _host_share(global_batch, host_index, host_count)
    steps = -(-length // global_batch)
    places = np.arange(steps * global_batch).reshape(steps, host_count, share)[:, host_index]
    return np.where(places < length, places, -1)


def _units(source: Source, questions: int) -> list[Unit]:
    units = []
    for i in range(len(source)):
        try:
            count = len(source[i].queries)
        except ReadJaxError:  # reported when its turn comes
            count = 1
        units += [Unit(i, first) for first in range(0, count, questions)]
    return units


def _host_share(global_batch: int, host_index: int, host_count: int) -> int:
    if host_count < 1 or not 0 <= host_index < host_count:
        raise DataError(f"there is no host {host_index} among {host_count}.")
    if global_batch < 1 or global_batch % host_count:
        raise DataError(f"a batch of {global_batch} cannot be shared evenly by {host_count} hosts.")
    return global_batch // host_count


def _example_bytes(packer: Packer, features: FeatureStore | None = None) -> int:
    limits, config = packer.limits, packer.config
    canvas = limits.mask_canvas[0] * limits.mask_canvas[1]
    pixels = 3 * (config.clip.image_size**2 + config.sam.image_size**2)
    pictures = features.card.record_bytes if features else pixels
    return pictures + limits.questions * (canvas + 8 * limits.tokens)
