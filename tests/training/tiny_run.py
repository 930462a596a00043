"""A small training run in a process of its own, and what it left behind."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import time
from collections.abc import Callable, Sequence
from pathlib import Path

from read_jax.training.checkpoint import read_meta
from read_jax.training.logs import EXAMPLES, METRICS

PATIENCE = 400
"""Seconds that a run may take on a busy machine."""

RECIPE = """
from ml_collections import ConfigDict
from read_jax.training.config import default_config

def get_config():
    config = default_config()
    config.start.scratch = ConfigDict({scratch!r})
    config.start.vocabulary = 600
    config.data.rates = {{"scenes|train": 1.0}}
    config.data.global_batch = 8
    config.data.questions = 2
    config.data.tokens = 320
    config.data.mask_canvas = (24, 24)
    config.data.workers = 0
    config.trainable = ("lora", "llama.embed_tokens", "sam.mask_decoder", "text_projection")
    config.step.ema_decay = 0.9
    config.step.remat = False
    config.optimizer.total_updates = 6
    config.optimizer.warmup_updates = 1
    config.checkpoints.every = 2
    config.log.every = 1
    config.log.tensorboard = False
    config.dtype = "float32"
    return config
"""
SCRATCH = {
    "llama": {
        "vocab_size": 500,
        "hidden_size": 16,
        "intermediate_size": 16,
        "num_layers": 1,
        "num_heads": 2,
        "num_kv_heads": 2,
        "head_dim": 8,
    },
    "clip": {"hidden_size": 8, "intermediate_size": 8, "num_layers": 2, "num_heads": 2},
    "sam": {
        "embed_dim": 8,
        "depth": 1,
        "num_heads": 2,
        "global_attn_indexes": [0],
        "mlp_dim": 8,
        "image_size": 64,
        "out_chans": 16,
        "decoder_depth": 1,
        "decoder_num_heads": 2,
        "decoder_mlp_dim": 16,
        "iou_head_depth": 2,
        "iou_head_hidden_dim": 16,
    },
    "prompt_dim": 16,
}


def write_recipe(folder: Path) -> Path:
    """The run's recipe as a file."""
    path = folder / "tiny_recipe.py"
    path.write_text(RECIPE.format(scratch=SCRATCH))
    return path


class Command:
    """`read-jax` in a process of its own, that nobody has to wait for: it never outlives `stop`.

    What it says goes to a file: nothing reads while a test waits, and a full pipe would halt it.

    Args:
        arguments: of the command.
        words: file for its standard error.
        cache: folder of compiled programs, shared by the runs of a test.
        devices: simulated ones.
        job: (port, number of processes, index of this one) when it is one of several.
    """

    def __init__(
        self,
        arguments: Sequence[str],
        words: Path,
        cache: Path,
        *,
        devices: int = 1,
        job: tuple[int, int, int] | None = None,
    ) -> None:
        environment = os.environ | {
            "JAX_PLATFORMS": "cpu",
            "JAX_COMPILATION_CACHE_DIR": str(cache),
            "JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS": "0",
            "JAX_PERSISTENT_CACHE_MIN_ENTRY_SIZE_BYTES": "-1",
            "JAX_DISABLE_MOST_OPTIMIZATIONS": "1",  # compiling takes longer than running here
            "XLA_FLAGS": (
                f"--xla_force_host_platform_device_count={devices}"
                # devices wait for each other; on a busy machine longer than XLA expects
                f" --xla_cpu_collective_call_terminate_timeout_seconds={PATIENCE}"
            ),
            "PYTHONPATH": str(Path(__file__).parents[2]),
        }
        command = [sys.executable, "-m", "read_jax.cli", *arguments]
        if job:
            port, processes, process = job
            command += ["--coordinator", f"localhost:{port}", "--processes", str(processes)]
            command += ["--process", str(process)]
        self._words = words
        with open(words, "w") as text:
            self._process = subprocess.Popen(
                command, env=environment, stderr=text, stdout=subprocess.DEVNULL if job else None
            )

    def wait_for(self, condition: Callable[[], bool]) -> None:
        """Until the condition holds, which it does before the run ends."""
        deadline = time.monotonic() + PATIENCE
        while not condition():
            assert self._process.poll() is None, self.said()
            assert time.monotonic() < deadline, f"still not, after {PATIENCE} s: {self.said()}"
            time.sleep(0.001)

    def kill(self) -> None:
        """kill -9."""
        self._process.kill()
        self._process.wait(timeout=PATIENCE)

    def terminate(self) -> int:
        """The exit status, after SIGTERM."""
        self._process.terminate()
        return self._process.wait(timeout=PATIENCE)

    def finish(self) -> None:
        """To its end, which must be a good one."""
        assert self.end() == 0, self.said()

    def end(self, patience: float = PATIENCE) -> int:
        """Its exit status, at its end."""
        return self._process.wait(timeout=patience)

    def said(self) -> str:
        """Its standard error."""
        return self._words.read_text()

    def stop(self) -> None:
        """End it if it still runs."""
        if self._process.poll() is None:
            self.kill()


class Process(Command):
    """`read-jax train` in a process of its own.

    Args:
        recipe: of the run; changes: "key=value" of it.
        workdir: of the run.
        cache, devices, job: as for `Command`.
    """

    def __init__(
        self,
        recipe: Path,
        workdir: Path,
        cache: Path,
        *changes: str,
        devices: int = 1,
        job: tuple[int, int, int] | None = None,
    ) -> None:
        arguments = ["train", "--config", str(recipe), "--workdir", str(workdir)]
        arguments += [f"--config.{change}" for change in changes]
        words = workdir.with_name(f"{workdir.name}.{job[2] if job else 0}.stderr")
        super().__init__(arguments, words, cache, devices=devices, job=job)


def lines(path: Path) -> list[dict]:
    """A JSON-lines file; a torn last line does not count."""
    text = path.read_text() if path.exists() else ""
    return [json.loads(line) for line in text.splitlines(keepends=True) if line.endswith("\n")]


TIMES = {"seconds_per_update", "tokens_per_second", "tflops_per_second", "data_wait_share"}


def results(workdir: Path) -> dict:
    """Everything that two equal runs have in common: checksums of the last state, metrics, examples."""
    last = max((workdir / "checkpoints").iterdir(), key=lambda folder: int(folder.name))
    meta = read_meta(last)
    return {
        "step": meta["step"],
        "loader": meta["loader"],
        "state": meta["checksums"],
        "metrics": [
            {key: value for key, value in line.items() if key not in TIMES}
            for line in lines(workdir / METRICS)
        ],
        "examples": lines(workdir / EXAMPLES),
    }
