"""Time and memory from a picture to masks, at a model's true shapes with random weights.

    python -m tests.benchmarks.question --model read-7b --dtype bfloat16
    python -m tests.benchmarks.question --model small --questions 7 --new-tokens 24

No checkpoint is needed: arithmetic costs the same whatever the weights say. Every question gets exactly
`--new-tokens` tokens, and the state of one of them in the middle stands for [SEG]. "small" is a model of
40 million parameters that a laptop's processor runs; the others are the published sizes. Prints one JSON
object; times are the median of `--repeat` runs after one that compiles.
"""

from __future__ import annotations

import argparse
import json
import statistics
import time
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx

from read_jax.config import READ_PRESETS, ClipVisionConfig, LlamaConfig, ReadConfig, SamConfig, SaspConfig
from read_jax.geometry import image_geometry, stack_geometries
from read_jax.inference.programs import Programs, bucket
from read_jax.models.read import Read

PREFIX_TEXT, IMAGE_START, QUESTION = 36, 35, 24
"""Tokens of the system prompt with <im_start> and <im_end>, where the image begins, tokens of a question."""


def small_config() -> ReadConfig:
    """40 million parameters: every part present, small enough for a processor."""
    return ReadConfig(
        LlamaConfig(803, 512, 1376, 8, 8, 8, 64, 1e-5, max_position_embeddings=4096),
        ClipVisionConfig(256, 1024, 6, 8),
        SamConfig(192, 6, 6, (2, 5), 768),
        SaspConfig.preset("7b"),
    )


def random_params(config: ReadConfig, dtype: Any) -> tuple[Any, Any, int]:
    """The model's structure, random parameters made on the device, and their number."""
    model = nnx.eval_shape(lambda: Read(config, dtype=dtype, param_dtype=dtype, rngs=nnx.Rngs(0)))
    graphdef, abstract = nnx.split(model)
    leaves, tree = jax.tree.flatten(abstract)

    def fill(key: jax.Array, shape: tuple[int, ...], kind: Any) -> jax.Array:
        return (0.02 * jax.random.normal(key, shape, kind)).astype(kind)

    make = jax.jit(fill, static_argnums=(1, 2))
    keys = jax.random.split(jax.random.key(0), len(leaves))
    filled = [make(key, leaf.shape, leaf.dtype) for key, leaf in zip(keys, leaves, strict=True)]
    return graphdef, jax.tree.unflatten(tree, filled), sum(leaf.size for leaf in leaves)


def measure(
    config: ReadConfig, dtype: str, questions: int, new_tokens: int, size: tuple[int, int], repeat: int
) -> dict[str, Any]:
    """Seconds per stage, and bytes, for one picture with `questions` questions asked together."""
    kind = jnp.dtype(dtype)
    graphdef, params, count = random_params(config, kind)
    programs = Programs(graphdef, params, end_id=-1, exact=kind == jnp.float32)
    rng = np.random.default_rng(0)
    tokens, side = config.clip.num_image_tokens, config.clip.image_size
    clip_pixels = rng.integers(0, 256, (1, side, side, 3), np.uint8)
    sam_pixels = rng.integers(0, 256, (1, config.sam.image_size, config.sam.image_size, 3), np.uint8)
    geometry = image_geometry(*size, config.sasp, config.clip.grid_size, config.sam.image_size)
    batch = stack_geometries([geometry])
    prefix_ids = rng.integers(3, config.llama.vocab_size, PREFIX_TEXT + tokens).astype(np.int32)
    rows = bucket(questions)
    ids = rng.integers(3, config.llama.vocab_size, (1, rows, bucket(QUESTION, 32))).astype(np.int32)
    lengths = np.where(np.arange(rows) < questions, QUESTION, 0).astype(np.int32)[None]
    at = np.stack([np.zeros(questions), np.arange(questions), np.full(questions, new_tokens // 2)], 1).astype(
        np.int32
    )

    seconds: dict[str, list[float]] = {}

    def timed(name: str, stage: Callable[..., Any], *args: Any) -> Any:
        start = time.perf_counter()
        out = jax.block_until_ready(stage(*args))
        seconds.setdefault(name, []).append(time.perf_counter() - start)
        return out

    def masks(low_res: jax.Array) -> list[np.ndarray]:
        return [programs.mask(low_res[i], geometry) > 0 for i in range(questions)]

    for _ in range(repeat + 1):
        features = timed("encoders", programs.encode, clip_pixels, sam_pixels, batch)
        prefix = timed("prefix", programs.prefix, prefix_ids, features.image_tokens, IMAGE_START)
        generated = timed("generate", programs.generate, prefix, ids, lengths, new_tokens)
        predicted = timed(
            "points_and_masks", programs.predict, generated.states, at, prefix, features, batch, IMAGE_START
        )
        assert len(timed("full_size", masks, predicted.low_res_masks)) == questions
        assert np.isfinite(np.asarray(predicted.low_res_masks, np.float32)).all()

    stages = {name: statistics.median(runs[1:]) for name, runs in seconds.items()}
    total = sum(stages.values())
    memory = jax.devices()[0].memory_stats() or {}
    return {
        "device": jax.devices()[0].device_kind,
        "jax": jax.__version__,
        "dtype": dtype,
        "parameters": count,
        "parameter_bytes": count * kind.itemsize,
        "peak_bytes_in_use": memory.get("peak_bytes_in_use"),
        "questions": questions,
        "new_tokens": new_tokens,
        "image_hw": size,
        "seconds_with_compilation": sum(runs[0] for runs in seconds.values()),
        "seconds": {name: round(value, 4) for name, value in stages.items()},
        "seconds_to_masks": round(total, 4),
        "seconds_per_question": round(total / questions, 4),
        "compilations": programs.compilations(),
    }


def main() -> None:
    """Parse, measure, print."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--model", choices=("small", *READ_PRESETS), default="small")
    parser.add_argument("--dtype", choices=("float32", "bfloat16"), default="float32")
    parser.add_argument("--questions", type=int, default=1)
    parser.add_argument("--new-tokens", type=int, default=24)
    parser.add_argument("--height", type=int, default=480)
    parser.add_argument("--width", type=int, default=640)
    parser.add_argument("--repeat", type=int, default=3)
    a = parser.parse_args()
    config = small_config() if a.model == "small" else ReadConfig.preset(a.model)
    figures = measure(config, a.dtype, a.questions, a.new_tokens, (a.height, a.width), a.repeat)
    print(json.dumps({"model": a.model, **figures}, indent=1))


if __name__ == "__main__":
    main()
