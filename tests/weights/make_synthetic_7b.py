"""A READ-7B-shaped checkpoint of random bfloat16 weights (about 15 GB), and what converting it costs.

    python -m tests.weights.make_synthetic_7b FOLDER            # make FOLDER/read-7b and FOLDER/clip
    python -m tests.weights.make_synthetic_7b FOLDER --measure  # ... convert, copy for comparison, delete

Needs 15 GB for the checkpoint and, to measure, twice that again.
"""

from __future__ import annotations

import argparse
import json
import shutil
import subprocess
import sys
import time
from pathlib import Path

import ml_dtypes
import numpy as np

from read_jax.weights.export import write_safetensors, write_torch
from tests.weights.manifests import load_manifest
from tests.weights.synthetic import write_tokenizer

SHARD_BYTES = 10_000_000_000
CONFIG = {
    "architectures": ["READForCausalLM"],
    "hidden_size": 4096,
    "intermediate_size": 11008,
    "max_position_embeddings": 4096,
    "mm_projector_type": "mlp2x_gelu",
    "mm_use_im_start_end": True,
    "mm_vision_select_feature": "patch",
    "mm_vision_select_layer": -2,
    "mm_vision_tower": "openai/clip-vit-large-patch14-336",
    "model_type": "llava",
    "num_attention_heads": 32,
    "num_hidden_layers": 32,
    "num_key_value_heads": 32,
    "rms_norm_eps": 1e-5,
    "torch_dtype": "bfloat16",
    "vocab_size": 32003,
}
CLIP = {
    "hidden_size": 1024,
    "image_size": 336,
    "intermediate_size": 4096,
    "model_type": "clip_vision_model",
    "num_attention_heads": 16,
    "num_hidden_layers": 24,
    "patch_size": 14,
}


def _entries(name: str) -> dict:
    """Random tensors of a manifest: each its own shift of one block of noise, made when written."""
    noise = np.random.default_rng(0).standard_normal(1 << 24, np.float32)
    entries = {}
    for number, (key, spec) in enumerate(load_manifest(name).items()):
        dtype = np.dtype(ml_dtypes.bfloat16 if spec.dtype == "bfloat16" else spec.dtype)

        def read(
            shape: tuple = spec.shape, dtype: np.dtype = dtype, shift: int = number * 7919
        ) -> np.ndarray:
            return np.resize(np.roll(noise, shift).astype(dtype), shape)

        entries[key] = (spec.shape, dtype, read)
    return entries


def make(folder: Path, format: str = "bin") -> tuple[Path, Path]:
    """Write folder/read-7b (two shards with an index) and folder/clip; returns both paths."""
    source, clip = folder / "read-7b", folder / "clip"
    for path, config in ((source, CONFIG), (clip, CLIP)):
        path.mkdir(parents=True)
        (path / "config.json").write_text(json.dumps(config))
    write_tokenizer(source)
    write_safetensors(clip / "model.safetensors", _entries("clip_vit_large_patch14_336_vision"))
    entries = _entries("read_sesame_7b")
    write, stem = (write_torch, "pytorch_model") if format == "bin" else (write_safetensors, "model")
    shards: list[dict] = [{}]
    size = 0
    for key, entry in entries.items():
        size += int(np.prod(entry[0])) * entry[1].itemsize
        if size > SHARD_BYTES:
            shards.append({})
            size = 0
        shards[-1][key] = entry
    weight_map = {}
    for number, shard in enumerate(shards, start=1):
        name = f"{stem}-{number:05d}-of-{len(shards):05d}.{format}"
        write(source / name, shard)
        weight_map.update(dict.fromkeys(shard, name))
    (source / f"{stem}.{format}.index.json").write_text(
        json.dumps({"metadata": {}, "weight_map": weight_map})
    )
    return source, clip


_RUN = """
import json, sys, time
start = time.monotonic()
from read_jax.weights import convert
summary = convert(sys.argv[1], sys.argv[2], sys.argv[3], sasp=sys.argv[4])
seconds = time.monotonic() - start
print(json.dumps({"seconds": seconds, "own_peak": summary.peak_memory, "bytes": summary.bytes}))
"""


def measure(source: Path, clip: Path, output: Path, sasp: str = "7b") -> dict:
    """Convert in a process of its own, watching its anonymous memory from outside."""
    command = [sys.executable, "-c", _RUN, str(source), str(clip), str(output), sasp]
    with subprocess.Popen(command, stdout=subprocess.PIPE, text=True) as process:
        peak = 0
        while process.poll() is None:
            status = Path(f"/proc/{process.pid}/status").read_text()
            for line in status.splitlines():
                if line.startswith("RssAnon:"):
                    peak = max(peak, int(line.split()[1]) * 1024)
            time.sleep(0.02)
        assert process.stdout is not None
        output_text = process.stdout.read()
    if process.returncode:
        raise RuntimeError(f"the conversion failed with {process.returncode}: {output_text}")
    return {**json.loads(output_text), "anonymous_peak": peak}


def copy_seconds(source: Path, target: Path) -> float:
    """How long `cp -r` takes for the same bytes."""
    start = time.monotonic()
    subprocess.run(["cp", "-r", str(source), str(target)], check=True, timeout=3600)
    return time.monotonic() - start


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("folder", type=Path)
    parser.add_argument("--format", choices=("bin", "safetensors"), default="bin")
    parser.add_argument(
        "--measure", action="store_true", help="convert, copy, print the figures, delete everything"
    )
    arguments = parser.parse_args()
    source, clip = make(arguments.folder, arguments.format)
    if not arguments.measure:
        return
    try:
        figures = measure(source, clip, arguments.folder / "model")
        shutil.rmtree(arguments.folder / "model")
        figures["copy_seconds"] = copy_seconds(source, arguments.folder / "copy")
        print(json.dumps(figures, indent=1))
    finally:
        shutil.rmtree(arguments.folder)


if __name__ == "__main__":
    main()
