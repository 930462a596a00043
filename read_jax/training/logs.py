"""What a training run writes down, and its progress bar.

All of it lies in the run's folder:

    metrics.jsonl     one line per logged step, and per validation
    examples.jsonl    one line per step: the pictures it was made of
    log.txt           what happened, in words
    pictures/         answers of the validation
    tensorboard/      the same numbers and pictures

Of several processes the first writes all of it, and each of the others its own metrics-00001.jsonl,
examples-00001.jsonl (its share of the pictures) and log-00001.txt.
"""

from __future__ import annotations

import contextlib
import datetime
import importlib.util
import json
import math
import secrets
import sys
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import jax
import numpy as np

from read_jax.errors import ConfigError
from read_jax.files import write_file
from read_jax.processes import is_first
from read_jax.training.config import LogConfig
from read_jax.training.validation import Picture, save_pictures

METRICS, EXAMPLES, LOG, PICTURES = "metrics.jsonl", "examples.jsonl", "log.txt", "pictures"


class RunLog:
    """Writes what happens; lines are on the disk when a call returns.

    A disk that is full ends no training: what could not be written is told once, and kept to be written when
    there is room again.

    Args:
        workdir: where to.
        config: what else to write.
        step: updates done; what an earlier run wrote beyond them is dropped, it will happen again.
        total: updates to do, for the progress bar.
        settings: of the run, told to Weights & Biases.
    """

    def __init__(
        self, workdir: Path, config: LogConfig, step: int, total: int, settings: Mapping[str, Any]
    ) -> None:
        from tqdm import tqdm

        check_log(config)
        self._workdir, self._told = workdir, False
        metrics, examples, words = (_own(name) for name in (METRICS, EXAMPLES, LOG))
        for name in (metrics, examples):
            rewind(workdir / name, step)
        for path in _of_processes_gone(workdir) if is_first() else ():
            rewind(path, step)
        self._metrics = open(workdir / metrics, "a", encoding="utf-8")  # noqa: SIM115
        self._examples = open(workdir / examples, "a", encoding="utf-8")  # noqa: SIM115
        self._words = open(workdir / words, "a", encoding="utf-8")  # noqa: SIM115
        self._events: Any = None
        self._wandb: Any = None
        if config.tensorboard and is_first():
            from tensorboardX import SummaryWriter

            self._events = SummaryWriter(str(workdir / "tensorboard"), purge_step=step + 1)
        if config.wandb and is_first():
            self._wandb = _start_wandb(workdir, config.wandb, settings)
        self._bar = tqdm(
            desc="training",
            unit="update",
            initial=step,
            total=total,
            file=sys.stderr,
            disable=None if is_first() else True,
        )

    def say(self, text: str) -> None:
        """A line for people, on the screen and in log.txt."""
        stamp = datetime.datetime.now().astimezone().isoformat(timespec="seconds")
        self._line(self._words, f"{stamp} {text}")
        if is_first():
            self._bar.write(text, file=sys.stderr)

    def used(self, step: int, keys: Sequence[str]) -> None:
        """The pictures that update `step` is made of."""
        self._line(self._examples, json.dumps({"step": step, "examples": list(keys)}))

    def advance(self, step: int) -> None:
        """The progress bar."""
        self._bar.update(step - self._bar.n)

    def train(self, step: int, metrics: Mapping[str, float]) -> None:
        """The numbers of update `step`."""
        self._line(self._metrics, json.dumps({"step": step, **_plain(metrics)}))
        self._bar.set_postfix_str(f"loss {metrics['total']:.4f}", refresh=False)
        self._scalars("train", step, metrics)

    def validation(self, step: int, scores: Mapping[str, float], pictures: list[Picture]) -> None:
        """The scores after `step` updates."""
        self._line(self._metrics, json.dumps({"step": step, "validation": _plain(scores)}))
        if is_first():
            with self._tolerant():
                save_pictures(self._workdir / PICTURES / f"{step:07d}", pictures)
        self._scalars("validation", step, scores)
        with self._tolerant():
            for picture in pictures if self._events else ():
                self._events.add_image(picture.name, picture.pixels, step, dataformats="HWC")
        if self._wandb and pictures:
            from wandb import Image  # type: ignore[import-not-found]

            shown = {f"validation/{picture.name}": Image(picture.pixels) for picture in pictures}
            self._wandb.log(shown, step=step)
        shown = ", ".join(f"{name} {value:.4f}" for name, value in scores.items() if name != "masks")
        self.say(f"after {step} updates: {shown}")

    def close(self) -> None:
        """Write out everything."""
        self._bar.close()
        for part in (self._events, self._metrics, self._examples, self._words):
            if part:
                with self._tolerant():
                    part.close()
        if self._wandb:
            self._wandb.finish()

    def _scalars(self, group: str, step: int, values: Mapping[str, float]) -> None:
        if self._events:
            with self._tolerant():
                for name, value in values.items():
                    self._events.add_scalar(f"{group}/{name}", value, step)
                self._events.flush()
        if self._wandb:
            self._wandb.log({f"{group}/{name}": value for name, value in values.items()}, step=step)

    def _line(self, file: Any, text: str) -> None:
        with self._tolerant():
            file.write(f"{text}\n")
            file.flush()

    @contextlib.contextmanager
    def _tolerant(self) -> Iterator[None]:
        """Storage that fails in here is told of, the first time."""
        try:
            yield
        except OSError as error:
            if not self._told:
                reason = error.strerror or str(error)
                warning = f"logs in {self._workdir} cannot be written ({reason}); the training goes on"
                self._bar.write(warning, file=sys.stderr)
            self._told = True


def _own(name: str) -> str:
    """The file of that name of this process: of the first, the name itself."""
    path = Path(name)
    return name if is_first() else f"{path.stem}-{jax.process_index():05d}{path.suffix}"


def _of_processes_gone(workdir: Path) -> list[Path]:
    """Files of an earlier start on more processes than there are now."""
    numbered = [
        path for name in (METRICS, EXAMPLES) for path in workdir.glob(f"{Path(name).stem}-?????.jsonl")
    ]
    return [path for path in numbered if int(path.stem[-5:]) >= jax.process_count()]


def rewind(path: Path, step: int) -> None:
    """Drop the lines of a JSON-lines file that are of later steps, or torn by a crash."""
    if not path.is_file():
        return
    kept = []
    for line in path.read_bytes().splitlines(keepends=True):
        with contextlib.suppress(ValueError, KeyError, TypeError):
            if json.loads(line)["step"] <= step and line.endswith(b"\n"):
                kept.append(line)
    write_file(path, b"".join(kept))


def _plain(values: Mapping[str, float]) -> dict[str, float | None]:
    """Ready for JSON: None for what is not a finite number."""
    return {k: (float(v) if math.isfinite(v) else None) for k, v in values.items()}


def check_log(config: LogConfig) -> None:
    """Raise `ConfigError` when something is missing that the logs are to be written with."""
    if config.wandb and importlib.util.find_spec("wandb") is None:
        raise ConfigError("log.wandb is set, but wandb is not installed: pip install wandb")


def _start_wandb(workdir: Path, project: str, settings: Mapping[str, Any]) -> Any:
    import wandb  # type: ignore[import-not-found]

    record = workdir / "wandb_id.txt"
    if not record.is_file():
        write_file(record, secrets.token_hex(4).encode())
    try:
        return wandb.init(
            project=project, id=record.read_text(), resume="allow", dir=str(workdir), config=dict(settings)
        )
    except wandb.Error as error:  # no account, no network, ...
        line = (str(error).strip() or type(error).__name__).splitlines()[0]
        raise ConfigError(
            f"Weights & Biases could not start for log.wandb={project!r}: {line}. Set WANDB_MODE=offline, or "
            "leave log.wandb empty."
        ) from error


def memory_in_use(devices: Sequence[Any]) -> dict[str, float]:
    """GB in use and at most, of the fullest device; nothing where it is not known."""
    stats = [s for s in (device.memory_stats() for device in devices) if s]
    names = {"bytes_in_use": "memory_gb", "peak_bytes_in_use": "peak_memory_gb"}
    return {
        ours: float(np.max([s[theirs] for s in stats])) / 1e9
        for theirs, ours in names.items()
        if stats and all(theirs in s for s in stats)
    }
