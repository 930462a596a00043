"""Runs tasks in Grain worker processes, in order, and remembers where it stands."""

from __future__ import annotations

import atexit
import collections
import dataclasses
import multiprocessing
import os
import shutil
import signal
import threading
import time
import weakref
from abc import abstractmethod
from collections.abc import Callable, Iterator, Mapping
from typing import Any, Self

import numpy as np

from read_jax.data.mixture import Skipped
from read_jax.data.packing import Batch, PackedExample
from read_jax.errors import DataError, DataWorkerError

ENDLESS = 1 << 48
"""Number of steps of a training run, to Grain."""
_REMEMBERED = 1000
_INLINE = 1 << 10
"""Bytes of the smallest array that a worker hands over in shared memory."""


@dataclasses.dataclass(frozen=True, eq=False)
class HostBatch:
    """One host's share of a global step.

    step: its number. arrays: ready for the device. keys: "SOURCE:ITEM" of every example, in evaluation with
    "#" and the number of the first question; "" for padding. skipped: pictures that could not be used, and
    dropped: examples that lost a question, each with the reason.
    """

    step: int
    arrays: Batch
    keys: tuple[str, ...]
    skipped: tuple[Skipped, ...]
    dropped: tuple[Skipped, ...]


class Notes:
    """What belongs to a task beside arrays. Not a tuple: Grain would look for arrays in it."""

    def __init__(self) -> None:
        self.keys: list[str] = []
        self.skipped: list[tuple[Skipped, ...]] = []  # per example
        self.dropped: list[Skipped] = []

    def add(self, key: str, example: PackedExample | None, skipped: tuple[Skipped, ...]) -> None:
        self.keys.append(key)
        self.skipped.append(skipped)
        if example is not None:
            self.dropped += [Skipped(key, reason) for reason in example.dropped]


Task = Callable[[int], tuple[Batch, Notes]]


class Loader(Iterator[HostBatch]):
    """Runs tasks in order and hands out batches; counts what had to be skipped.

    Attributes:
        step: number of the next batch.
        skipped: the latest pictures that could not be used, with reasons; skipped_count: how many there were.
    """

    def __init__(self, task: Task, per_step: int, steps: int, workers: int, buffer: int) -> None:
        if workers < 0 or buffer < 1:
            raise DataError(f"workers must be at least 0 and buffer at least 1, not {workers} and {buffer}.")
        self._task, self._per_step, self._steps = task, per_step, steps
        self._workers, self._buffer = workers, buffer
        self._running: list[Any] = []  # Grain's iterator, once started
        weakref.finalize(self, _stop, self._running).atexit = False
        self.step = 0
        self.skipped: collections.deque[Skipped] = collections.deque(maxlen=_REMEMBERED)
        self.skipped_count = 0

    def __iter__(self) -> Self:
        return self

    def __next__(self) -> HostBatch:
        """The next batch.

        Raises:
            DataError: too many pictures cannot be used, what a worker raised, or (`DataWorkerError`) that one
                died; asked once more, the loader makes the same batch with new workers.
            StopIteration: an evaluation is complete.
        """
        if self.step >= self._steps:
            self.close()
            raise StopIteration
        try:
            if not self._running:
                self._running.append(self._start())
            parts = [next(self._running[0]) for _ in range(self._per_step)]
        except BaseException as error:  # an interrupt too: no worker outlives it
            self.close()
            if isinstance(error, RuntimeError) and "terminated unexpectedly" in str(error):  # Grain's words
                raise DataWorkerError(
                    f"a process that reads the data died before batch {self.step}. The system kills those "
                    "that take too much memory; use fewer workers, or a smaller buffer."
                ) from error
            raise
        notes = [part[1] for part in parts]
        per_example = [skipped for note in notes for skipped in note.skipped]
        batch = HostBatch(
            self.step,
            _together([part[0] for part in parts], self._workers > 0),
            tuple(key for note in notes for key in note.keys),
            tuple(one for skipped in per_example for one in skipped),
            tuple(one for note in notes for one in note.dropped),
        )
        self.skipped.extend(batch.skipped)
        self.skipped_count += len(batch.skipped)
        try:
            self._check_share(per_example)
        except DataError:
            self.close()
            raise
        self.step += 1
        return batch

    @abstractmethod
    def _check_share(self, per_example: list[tuple[Skipped, ...]]) -> None:
        """Raise `DataError` when too many pictures of late could not be used."""

    def too_many(self, bad: int, of: int, share: float) -> DataError:
        """That so many pictures could not be used; it names the last of this loader's own."""
        listed = "; ".join(f"{key}: {reason}" for key, reason in list(self.skipped)[-3:])
        return DataError(
            f"{bad} of {of} pictures could not be used, more than the allowed share of {share:g}."
            + (f" The last ones: {listed}" if listed else "")
        )

    @abstractmethod
    def fingerprint(self) -> dict[str, Any]:
        """What determines the batches, ready for JSON."""

    def state(self) -> dict[str, Any]:
        """Where the loader stands, ready for JSON: the batches handed out, not those prepared ahead."""
        return {"step": self.step, **self.fingerprint()}

    def restore(self, state: Mapping[str, Any]) -> None:
        """Go on after the last batch that was handed out when `state` was taken.

        Raises `DataError` naming what differs when the state is of other data.
        """
        if not isinstance(state, Mapping) or not isinstance(state.get("step"), int) or state["step"] < 0:
            raise DataError("this is not the state of a data loader: it has no step.")
        theirs = {key: value for key, value in state.items() if key != "step"}
        differences = list(_differences(theirs, self.fingerprint()))
        if differences:
            raise DataError(
                f"the saved state belongs to other data: {'; '.join(differences[:5])}. Continue with the "
                "same data and settings, or start anew."
            )
        self.close()
        self.step = state["step"]

    def close(self) -> None:
        """Stop the workers. The loader may go on later; it then starts new ones."""
        _stop(self._running)

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *unused: object) -> None:
        self.close()

    def _start(self) -> Any:
        """Grain's iterator over the tasks from the present step on."""
        import grain  # brings jax, which whoever only reads datasets does not need
        from absl import flags

        if not flags.FLAGS.is_parsed():  # Grain reads absl's flags, which only absl's own programs parse
            flags.FLAGS.mark_as_parsed()
        tasks = _Range(self._task, self.step * self._per_step, self._steps * self._per_step)
        dataset = grain.MapDataset.source(tasks).to_iter_dataset(grain.ReadOptions(0, 0))  # no threads
        # what goes through a pipe must be little enough to be written at once: the rest of a message that a
        # worker was killed in the middle of would be waited for without end
        options = grain.experimental.DatasetOptions(min_shm_size=_INLINE)
        dataset = grain.experimental.WithOptionsIterDataset(dataset, options)
        if self._workers:
            self._check_shared_memory()
            atexit.register(_stop_at_exit, self._running)  # before Grain's own end, which is noisy
            dataset = dataset.mp_prefetch(
                grain.MultiprocessingOptions(self._workers, self._buffer), worker_init_fn=_begin_worker
            )
        return iter(dataset)

    @abstractmethod
    def _task_bytes(self) -> int:
        """Bytes of the arrays of one task, roughly."""

    def _check_shared_memory(self) -> None:
        """Refuse before a worker dies of a full /dev/shm (64 MB in a container by default) without a word."""
        if not os.path.isdir("/dev/shm"):
            return
        free = shutil.disk_usage("/dev/shm").free
        needed = (
            self._task_bytes() * self._workers * (2 * self._buffer + 1)
        )  # waiting at both ends, and in work
        if needed > free:
            raise DataError(
                f"/dev/shm has {free >> 20} MB free, but {self._workers} workers need about {needed >> 20} "
                "MB to hand their batches over. Give the container more (docker run --shm-size), or use "
                "fewer workers."
            )


class _Range:
    """Tasks start .. stop - 1 as Grain's random-access source."""

    def __init__(self, task: Task, start: int, stop: int) -> None:
        self._task, self._start, self._stop = task, start, stop

    def __len__(self) -> int:
        return self._stop - self._start

    def __getitem__(self, index: Any) -> tuple[Batch, Notes]:
        return self._task(self._start + int(index))


def _stop(running: list[Any]) -> None:
    while running:
        running.pop().close()


def _stop_at_exit(running: list[Any]) -> None:
    if running:
        _stop(running)
        time.sleep(0.2)  # a thread of Grain's still frees the last shared arrays


def _begin_worker(index: int, count: int) -> None:
    """Leave Ctrl-C to the main process, and end when it dies."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    parent = multiprocessing.parent_process()

    def watch() -> None:
        if parent is not None:
            parent.join()
            os._exit(1)

    threading.Thread(target=watch, daemon=True).start()


def _together(parts: list[Batch], shared: bool) -> Batch:
    """The parts one after the other. Out of shared memory, whose lifetime is not the caller's to mind."""
    if len(parts) == 1 and not shared:
        return parts[0]
    return _map_arrays(lambda *arrays: np.concatenate([a.view(np.ndarray) for a in arrays]), *parts)


def _map_arrays(function: Callable[..., np.ndarray], *trees: Any) -> Any:
    """The function over the arrays of equal nested named tuples."""
    if not isinstance(trees[0], tuple):
        return function(*trees)
    return type(trees[0])(*(_map_arrays(function, *fields) for fields in zip(*trees, strict=True)))


def _differences(theirs: Any, ours: Any, where: str = "") -> Iterator[str]:
    """Where two JSON values differ, in words."""
    if isinstance(theirs, Mapping) and isinstance(ours, Mapping):
        for key in dict.fromkeys((*theirs, *ours)):
            path = f"{where} {key}".strip()
            if key not in ours:
                yield f"{path} was in the saved run and is not here"
            elif key not in theirs:
                yield f"{path} is new"
            else:
                yield from _differences(theirs[key], ours[key], path)
    elif theirs != ours:
        yield f"{where} was {theirs!r} and is {ours!r}"
