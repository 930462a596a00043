"""A small training run in a process of its own, and what it left behind."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

from read_jax.training.checkpoint import read_meta
from read_jax.training.logs import EXAMPLES, METRICS

RECIPE = """
from ml_collections import ConfigDict
from read_jax.training.config import default_config

def get_config():
    config = default_config()
    config.start.scratch = ConfigDict({scratch!r})
    config.start.vocabulary = 500
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


def start(recipe: Path, workdir: Path, cache: Path, *changes: str, devices: int = 1) -> subprocess.Popen:
    """`read-jax train` in a process of its own. cache: compiled programs, shared by the runs of a test."""
    environment = os.environ | {
        "JAX_PLATFORMS": "cpu",
        "JAX_COMPILATION_CACHE_DIR": str(cache),
        "JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS": "0",
        "XLA_FLAGS": f"--xla_force_host_platform_device_count={devices}",
        "PYTHONPATH": str(Path(__file__).parents[2]),
    }
    command = [
        sys.executable,
        "-m",
        "read_jax.cli",
        "train",
        "--config",
        str(recipe),
        "--workdir",
        str(workdir),
    ]
    return subprocess.Popen(
        [*command, *(f"--config.{change}" for change in changes)],
        env=environment,
        stderr=subprocess.PIPE,
        text=True,
    )


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
