"""The training run.

    train(load_config("read_7b_reasonseg"), "runs/7b")

A run belongs to its folder: started there again, it goes on from its last checkpoint, to the bit.

    WORKDIR/config.json      the configuration
    WORKDIR/start/           the new model, when training starts from none
    WORKDIR/checkpoints/     see `read_jax.training.checkpoint`
    WORKDIR/*.jsonl, ...     see `read_jax.training.logs`
"""

from __future__ import annotations

import collections
import contextlib
import dataclasses
import json
import signal
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from types import FrameType
from typing import Any

import jax
import numpy as np

from read_jax.errors import ReadJaxError
from read_jax.files import write_file
from read_jax.processes import Agreement, from_shares, is_first, several, wait_for_all
from read_jax.training.checkpoint import Checkpoints
from read_jax.training.config import TrainConfig
from read_jax.training.flops import peak, train_step_flops
from read_jax.training.logs import RunLog, memory_in_use
from read_jax.training.optimizer import learning_rate
from read_jax.training.run import Run, prepare

AGAIN = 75
"""Exit status of a run that was told to stop and has saved: start it again and it goes on (EX_TEMPFAIL)."""
_WINDOW = 100  # updates that skipped ones are counted among


class TrainingError(ReadJaxError):
    """The training itself went wrong: updates are not finite or explode."""


@dataclasses.dataclass(frozen=True)
class Outcome:
    """How a run ended. updates: done; stopped: by a signal before the end; scores: the last validation's."""

    updates: int
    stopped: bool
    scores: dict[str, float]


def train(config: TrainConfig, workdir: str | Path) -> Outcome:
    """Train until the configuration's last update, or until a signal asks to stop.

    Every update is, in this order: data, step, log, validate, save. What is logged is of the update before,
    so that the device never waits for the host; the state of the data is saved with the parameters it led to.

    Raises:
        ConfigError, CheckpointError, DataError: the run cannot start or go on; what was done until then is
            saved when data fail, unless this is one of several processes.
        TrainingError: too many updates had to be skipped.
    """
    workdir = Path(workdir).expanduser().absolute()
    run, state = prepare(config, workdir)
    if is_first():
        write_file(workdir / "config.json", (json.dumps(config.to_dict(), indent=2) + "\n").encode())
    said: list[str] = []
    checkpoints = Checkpoints(workdir / "checkpoints", config.checkpoints, run.identity, said.append)
    restored = checkpoints.restore(state)
    step = 0
    if restored:
        step, state = restored.step, restored.state
        run.loader.restore(restored.loader)
    log = RunLog(workdir, config.log, step, config.total_updates, config.to_dict())
    checkpoints.tell(log.say)
    for text in said:
        log.say(text)
    log.say(
        f"going on after {step} updates" if restored else f"{run.description}; {config.total_updates} updates"
    )
    try:
        with stop_signal() as stopping:
            return _updates(config, run, state, step, checkpoints, log, stopping)
    except ReadJaxError as error:
        log.say(f"stopped: {error}")
        raise
    finally:
        run.loader.close()
        checkpoints.close()
        log.close()


def _updates(
    config: TrainConfig,
    run: Run,
    state: Any,
    step: int,
    checkpoints: Checkpoints,
    log: RunLog,
    stopping: Callable[[], bool],
) -> Outcome:
    """The loop. `step` is the number of updates done; `state` belongs to it whenever a round begins."""
    watch = _Watch(config, run, log)
    total = config.total_updates
    scores: dict[str, float] = {}
    saved = step
    agreed = Agreement()
    wait_for_all("the first update")
    while step < total and not agreed(stopping()):
        # data
        try:
            with watch.waiting():
                batch = next(run.loader)
                arrays = from_shares(run.sharding, batch.arrays)
        except ReadJaxError:
            watch.flush()
            # saving takes all processes, and the others may have what this one has not
            if step != saved and not several():
                checkpoints.save(step, state, run.loader.state(), last=True)
            raise

        # step
        state, metrics = run.step(step)(state, run.frozen, arrays)
        step += 1

        # log: the update before this one, while this one runs
        watch.follow(step, metrics, batch)

        # validate
        scored: dict[str, float] = {}
        if run.validator and (step % config.validation.every == 0 or step == total):
            watch.flush()
            averaged = state.params if state.ema is None else state.ema
            scores, pictures = run.validator(averaged, run.frozen)
            scored = scores
            log.validation(step, scores, pictures)

        # save
        if step % config.checkpoints.every == 0 and step != total:
            checkpoints.save(step, state, run.loader.state(), scored)
            saved = step
        checkpoints.poll()
    watch.flush()
    if step != saved or step == total:
        checkpoints.save(step, state, run.loader.state(), scores if step == total else None, last=True)
    stopped = step < total
    log.say(f"told to stop: saved after {step} updates" if stopped else f"finished after {step} updates")
    return Outcome(step, stopped, scores)


class _Watch:
    """Follows the updates: numbers one update late, time, and what was skipped."""

    def __init__(self, config: TrainConfig, run: Run, log: RunLog) -> None:
        self._config, self._run, self._log = config, run, log
        self._pending: tuple[int, dict[str, Any], Any] | None = None
        self._skipped: collections.deque[int] = collections.deque(maxlen=_WINDOW)  # steps, 0 where applied
        self._bad: list[str] = []
        self._good = 0
        self._rate = learning_rate(config.optimizer)
        self._peak = peak(jax.devices()[0].device_kind)
        self.restart()

    @contextlib.contextmanager
    def waiting(self) -> Iterator[None]:
        """Time in here is spent waiting for data."""
        start = time.perf_counter()
        yield
        self._waited += time.perf_counter() - start

    def restart(self) -> None:
        """Measure from now on: what came between was no training."""
        self._start, self._waited = time.perf_counter(), 0.0
        self._updates = self._tokens = self._flops = 0.0

    def follow(self, step: int, metrics: dict[str, Any], batch: Any) -> None:
        """Take note of an update just begun, and finish with the one before it."""
        self._log.used(step, batch.keys)
        before, self._pending = self._pending, (step, metrics, batch)
        if before:
            self._finish(*before)
        else:
            self.restart()  # from the beginning of one update to that of the next

    def flush(self) -> None:
        """Finish with the last update too; how long it took is not known."""
        self.restart()
        before, self._pending = self._pending, None
        if before:
            self._finish(*before)

    def _finish(self, step: int, metrics: dict[str, Any], batch: Any) -> None:
        values = {name: np.asarray(value).item() for name, value in metrics.items()}
        self._log.advance(step)
        if self._pending:
            self._account(values, batch)
        self._check(step, values, batch.keys)
        if step % self._config.log.every == 0 or step in (1, self._config.total_updates):
            done = step - 1 - (int(values["skipped"]) - (values["applied"] == 0))  # updates applied before it
            extra = {
                "learning_rate": np.asarray(self._rate(done)).item(),
                "dropped": float(len(batch.dropped)),
            }
            self._log.train(step, values | extra | self._speed())

    def _account(self, values: dict[str, float], batch: Any) -> None:
        lengths = batch.arrays.lengths
        self._updates += 1
        # the others' shares are about as long
        self._tokens += jax.process_count() * (np.sum(lengths) + len(lengths) * len(self._run.prefix_ids))
        self._flops += jax.process_count() * train_step_flops(
            self._run.model_config,
            self._config.trainable,
            len(self._run.prefix_ids),
            lengths,
            int(values["masks"]) // jax.process_count(),
            encoders=not self._config.data.features,
        )

    def _speed(self) -> dict[str, float]:
        """Since the last time."""
        seconds = time.perf_counter() - self._start
        if not self._updates:
            return {}
        speed = {
            "seconds_per_update": seconds / self._updates,
            "tokens_per_second": self._tokens / seconds,
            "tflops_per_second": self._flops / seconds / 1e12,
            "data_wait_share": self._waited / seconds,
        }
        if self._peak:
            speed["mfu"] = self._flops / seconds / (self._peak * jax.device_count())
        self.restart()
        return speed | memory_in_use(jax.local_devices())

    def _check(self, step: int, values: dict[str, float], keys: tuple[str, ...]) -> None:
        """Stop when too many of the latest updates were skipped."""
        if values["applied"]:
            self._skipped.append(0)
            self._good = step
            return
        self._skipped.append(step)
        skipped = [number for number in self._skipped if number]
        why = f"loss {values['total']:.4g}, gradient norm {values['gradient_norm']:.4g}"
        self._log.say(f"update {step} was skipped ({why}); its pictures: {', '.join(keys)}")
        if len(skipped) >= self._config.max_skipped:
            good = f"the last good update was {self._good}" if self._good else "none was good since the start"
            raise TrainingError(
                f"{len(skipped)} of the latest {len(self._skipped)} updates had to be skipped ({why}); "
                f"{good}. The last batch's pictures: {', '.join(keys)}."
            )


@contextlib.contextmanager
def stop_signal() -> Iterator[Callable[[], bool]]:
    """SIGTERM and Ctrl-C only raise a flag, which the function tells; a second Ctrl-C interrupts at once."""
    flag = threading.Event()

    def raised(number: int, frame: FrameType | None) -> None:
        if flag.is_set() and number == signal.SIGINT:
            raise KeyboardInterrupt
        flag.set()

    if threading.current_thread() is not threading.main_thread():
        yield flag.is_set
        return
    before = {number: signal.signal(number, raised) for number in (signal.SIGTERM, signal.SIGINT)}
    try:
        yield flag.is_set
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)
