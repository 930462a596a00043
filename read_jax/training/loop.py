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
import sys
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from types import FrameType
from typing import Any

import jax
import numpy as np

from read_jax.errors import AGAIN, CheckpointError, ConfigError, ReadJaxError
from read_jax.files import only_writer, write_file
from read_jax.processes import Agreement, from_shares, is_first, leave_the_job, several, wait_for_all
from read_jax.training.checkpoint import Checkpoints
from read_jax.training.config import TrainConfig
from read_jax.training.flops import peak, train_step_flops
from read_jax.training.logs import RunLog, check_log, memory_in_use
from read_jax.training.optimizer import learning_rate
from read_jax.training.run import Run, prepare

_WINDOW = 100  # updates that skipped ones are counted among
_TOLD = 20  # pictures that cannot be used are told one by one; beyond, counted


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
    check_log(config.log)
    try:
        with stop_signal() as stopping, contextlib.ExitStack() as opened:
            if is_first():
                busy = ConfigError(f"another run is writing to {workdir} right now; use another workdir.")
                opened.enter_context(only_writer(workdir, busy))
            outcome = _train(config, workdir, stopping, opened)
        wait_for_all("the end")  # who ends first would take the others along before they have written all
        return outcome
    except Stopped:
        print("told to stop before the first update: there is nothing to save", file=sys.stderr)
        leave_the_job(AGAIN)
        return Outcome(0, True, {})


def _train(config: TrainConfig, workdir: Path, stopping: StopSignal, opened: contextlib.ExitStack) -> Outcome:
    """`train`, where what it opens is closed by the caller."""
    if is_first():
        print("opening the data and loading the model ...", file=sys.stderr)
    run, state = prepare(config, workdir)
    opened.callback(run.loader.close)
    said: list[str] = []
    checkpoints = Checkpoints(workdir / "checkpoints", config.checkpoints, run.identity, said.append)

    def close(kind: type | None, *_: Any) -> None:
        if kind is None or not several():  # alone with an error it would wait for the others, and they for it
            checkpoints.close()

    opened.push(close)
    restored = checkpoints.restore(state)
    step, validated = 0, True
    if restored:
        step, state, validated = restored.step, restored.state, restored.validated
        run.loader.restore(restored.loader)
    if is_first():
        write_file(workdir / "config.json", (json.dumps(config.to_dict(), indent=2) + "\n").encode())
    log = RunLog(workdir, config.log, step, config.total_updates, config.to_dict())
    opened.callback(log.close)
    stopping.only_ask()
    checkpoints.tell(log.say)
    for text in said:
        log.say(text)
    log.say(
        f"going on after {step} updates" if restored else f"{run.description}; {config.total_updates} updates"
    )
    if step < config.total_updates:
        log.say("the first update waits for the compiler, which takes minutes for a large model")
    with contextlib.ExitStack() as ending:  # before the log: there may still be something to say
        ending.push(close)
        ending.callback(run.loader.close)
        try:
            return _updates(config, run, state, step, validated, checkpoints, log, stopping)
        except ReadJaxError as error:
            log.say(f"stopped: {error}")
            raise


def _updates(
    config: TrainConfig,
    run: Run,
    state: Any,
    step: int,
    validated: bool,
    checkpoints: Checkpoints,
    log: RunLog,
    stopping: Callable[[], bool],
) -> Outcome:
    """The loop. `step` is the number of updates done; `state` belongs to it whenever a round begins.

    validated: False when what has to be scored after `step` updates was not.
    """
    watch = _Watch(config, run, log, step)
    total = config.total_updates
    scores: dict[str, float] = {}
    saved = step
    agreed = Agreement()

    def validate() -> bool:
        """Whether it came to its end before it was told to stop."""
        nonlocal scores
        if run.validator is None:
            return True
        averaged = state.params if state.ema is None else state.ema
        found = run.validator(averaged, run.frozen, lambda: agreed(stopping()))
        if found is None:
            return False
        scores, pictures = found
        log.validation(step, scores, pictures)
        return True

    @contextlib.contextmanager
    def keeping() -> Iterator[None]:
        """Before an error goes on, what was done is saved."""
        try:
            yield
        except ReadJaxError:
            watch.flush()
            # saving takes all processes, and the others may have what this one has not
            if step != saved and not several():
                try:
                    checkpoints.save(step, state, run.loader.state(), last=True, validated=validated)
                except CheckpointError as lost:
                    log.say(str(lost))
            raise

    wait_for_all("the first update")
    if not validated:
        with keeping():
            validated = validate()
        if validated:
            checkpoints.scored(step, scores)
    while step < total and validated and not agreed(stopping()):
        # data
        with keeping(), watch.waiting():
            batch = next(run.loader)
            arrays = from_shares(run.sharding, batch.arrays)

        # step
        state, metrics = run.step(step)(state, run.frozen, arrays)
        step += 1

        # log: the update before this one, while this one runs
        watch.follow(step, metrics, batch)

        # validate
        due = step % config.validation.every == 0 or step == total
        if due and run.validator:
            watch.flush()
            validated = False
            with keeping():
                validated = validate()

        # save
        if validated and step % config.checkpoints.every == 0 and step != total:
            watch.flush()  # what is saved is logged too, wherever the run may be killed
            checkpoints.save(step, state, run.loader.state(), scores if due else None)
            saved = step
        checkpoints.poll()
    watch.flush()
    if step != saved or step == total:
        final = scores if step == total and validated else None
        checkpoints.save(step, state, run.loader.state(), final, last=True, validated=validated)
    stopped = step < total or not validated
    log.say(f"told to stop: saved after {step} updates" if stopped else f"finished after {step} updates")
    return Outcome(step, stopped, scores)


class _Watch:
    """Follows the updates: numbers one update late, time, and what was skipped."""

    def __init__(self, config: TrainConfig, run: Run, log: RunLog, step: int) -> None:
        self._config, self._run, self._log, self._began = config, run, log, step
        self._pending: tuple[int, dict[str, Any], Any] | None = None
        self._skipped: collections.deque[int] = collections.deque(maxlen=_WINDOW)  # steps, 0 where applied
        self._good = self._told = 0
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
        for key, why in batch.skipped[: max(_TOLD - self._told, 0)]:
            self._log.say(f"update {step}: {key} could not be used ({why}); others took its place")
        self._told += len(batch.skipped)
        before, self._pending = self._pending, (step, metrics, batch)
        if before:
            self._finish(*before)
        else:
            self.restart()  # from the beginning of one update to that of the next

    def flush(self) -> None:
        """Finish with the last update too, which the device then waits for."""
        before, self._pending = self._pending, None
        if before:
            self._finish(*before)
        self.restart()

    def _finish(self, step: int, metrics: dict[str, Any], batch: Any) -> None:
        values = {name: np.asarray(value).item() for name, value in metrics.items()}
        self._log.advance(step)
        self._account(step, values, batch)
        if step % self._config.log.every == 0 or step in (1, self._config.total_updates):
            done = step - 1 - (int(values["skipped"]) - (values["applied"] == 0))  # updates applied before it
            extra = {
                "learning_rate": np.asarray(self._rate(done)).item(),
                "dropped": float(len(batch.dropped)),
                "unusable": float(len(batch.skipped)),
            }
            self._log.train(step, values | extra | self._speed())
        self._check(step, values, batch.keys)

    def _account(self, step: int, values: dict[str, float], batch: Any) -> None:
        masks = int(values["masks"]) if step > self._config.masks_from else 0
        lengths = batch.arrays.lengths
        self._updates += 1
        # the others' shares are about as long
        self._tokens += self._run.shares * (np.sum(lengths) + len(lengths) * len(self._run.prefix_ids))
        self._flops += self._run.shares * train_step_flops(
            self._run.model_config,
            self._config.trainable,
            len(self._run.prefix_ids),
            lengths,
            masks // self._run.shares,
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
            since = f" since it went on after {self._began}" if self._began else ""
            good = f"the last good update was {self._good}" if self._good else f"none was good{since}"
            raise TrainingError(
                f"{len(skipped)} of the latest {len(self._skipped)} updates had to be skipped ({why}); "
                f"{good}. The last batch's pictures: {', '.join(keys)}."
            )


class Stopped(BaseException):
    """SIGTERM came where nothing would be lost by it."""


class StopSignal:
    """Whether SIGTERM or Ctrl-C asked to stop: called, it tells.

    Until `only_ask`, they stop at once: SIGTERM by `Stopped`. So does a second Ctrl-C afterwards.
    """

    def __init__(self) -> None:
        self._asked, self._at_once = threading.Event(), True

    def __call__(self) -> bool:
        return self._asked.is_set()

    def only_ask(self) -> None:
        """From now on the program looks itself, where it can stop."""
        self._at_once = False

    def raised(self, number: int, frame: FrameType | None) -> None:
        """The handler."""
        if number == signal.SIGINT and (self._at_once or self._asked.is_set()):
            raise KeyboardInterrupt
        if self._at_once:
            raise Stopped
        self._asked.set()


@contextlib.contextmanager
def stop_signal() -> Iterator[StopSignal]:
    """SIGTERM and Ctrl-C are handled by what this gives, in the main thread."""
    asked = StopSignal()
    if threading.current_thread() is not threading.main_thread():
        yield asked
        return
    before = {number: signal.signal(number, asked.raised) for number in (signal.SIGTERM, signal.SIGINT)}
    try:
        yield asked
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)
