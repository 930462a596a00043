"""Memory of loading READ-7B's weights, randomly filled, onto eight simulated devices.

    python -m tests.benchmarks.loading --output DIR [--layers 32] [--processes 2]

Makes a model folder of READ-7B's shapes with so many of LLaMA's layers (bfloat16; kept for the next call),
then starts processes that load it, each onto its part of eight CPU devices, whose memory is the process's
own. Says what each holds when all is there, and the most it held meanwhile; ends with 1 where that is more
than 1.3 times its shards.
"""

from __future__ import annotations

import argparse
import dataclasses
import json
import os
import socket
import subprocess
import sys
import threading
import time
from pathlib import Path

import numpy as np

DEVICES = 8
LIMIT = 1.3


def make(folder: Path, layers: int) -> None:
    """The model folder, unless it is there."""
    import ml_dtypes

    from read_jax.config import ReadConfig
    from read_jax.weights.checkpoint import is_model_folder
    from read_jax.weights.model import save_model

    if is_model_folder(folder):
        return
    model = ReadConfig.preset("read-7b")
    model = model.replace(llama=dataclasses.replace(model.llama, num_layers=layers))
    noise = (0.02 * np.random.default_rng(0).standard_normal(1 << 24)).astype(ml_dtypes.bfloat16)

    def read(row):
        return np.resize(noise, row.slice_shape)

    save_model(folder, model, "bfloat16", {"kind": "random"}, read, lambda path: path.mkdir())


def anonymous() -> int:
    """Bytes of this process that are no file's."""
    status = Path("/proc/self/status").read_text()
    return 1024 * int(next(line.split()[1] for line in status.splitlines() if line.startswith("RssAnon")))


def load(folder: Path, processes: int, rank: int, address: str) -> None:
    """One process: its figures as a line of JSON."""
    import jax

    if processes > 1:
        jax.distributed.initialize(address, processes, rank)
    from read_jax.sharding import MeshConfig, make_mesh, parameter_shardings
    from read_jax.weights.checkpoint import load_config, load_params, model_leaves

    config = load_config(folder)
    mesh = make_mesh(MeshConfig(fsdp=DEVICES))
    places = parameter_shardings(config, {p: leaf.shape for p, leaf in model_leaves(config).items()}, mesh)
    before, peak, done = anonymous(), 0, threading.Event()

    def watch() -> None:
        nonlocal peak
        while not done.wait(0.02):
            peak = max(peak, anonymous())

    watcher = threading.Thread(target=watch)
    watcher.start()
    began = time.perf_counter()
    params = jax.block_until_ready(load_params(folder, shardings=places))
    seconds = time.perf_counter() - began
    done.set()
    watcher.join()
    leaves = jax.tree.leaves(params)
    shards = sum(shard.data.nbytes for leaf in leaves for shard in leaf.addressable_shards)
    whole = sum(leaf.nbytes for leaf in leaves)
    print(json.dumps({"shards": shards, "whole": whole, "peak": peak - before, "seconds": seconds}))


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--output", type=Path, required=True, help="where the model folder is made")
    parser.add_argument("--layers", type=int, default=32, help="of LLaMA; READ-7B has 32: 16 GB")
    parser.add_argument("--processes", type=int, default=2)
    parser.add_argument("--rank", type=int, help=argparse.SUPPRESS)
    parser.add_argument("--address", help=argparse.SUPPRESS)
    options = parser.parse_args()
    folder = options.output / f"layers-{options.layers}"
    if options.rank is not None:
        load(folder, options.processes, options.rank, options.address)
        return
    options.output.mkdir(parents=True, exist_ok=True)
    make(folder, options.layers)
    with socket.socket() as taken:
        taken.bind(("localhost", 0))
        port = taken.getsockname()[1]
    each = DEVICES // options.processes
    environment = os.environ | {
        "JAX_PLATFORMS": "cpu",
        "XLA_FLAGS": f"--xla_force_host_platform_device_count={each}",
    }
    command = [sys.executable, "-m", "tests.benchmarks.loading", "--output", str(options.output)]
    command += ["--layers", str(options.layers), "--processes", str(options.processes)]
    command += ["--address", f"localhost:{port}", "--rank"]
    running = [
        subprocess.Popen([*command, str(rank)], env=environment, stdout=subprocess.PIPE, text=True)
        for rank in range(options.processes)
    ]
    worst = 0.0
    for rank, process in enumerate(running):
        said, _ = process.communicate()
        if process.returncode:
            sys.exit(f"process {rank} ended with {process.returncode}")
        found = json.loads(said.splitlines()[-1])
        ratio = found["peak"] / found["shards"]
        worst = max(worst, ratio)
        print(
            f"process {rank}: {found['shards'] / 1e9:.2f} GB of {found['whole'] / 1e9:.2f} GB in its shards, "
            f"{found['peak'] / 1e9:.2f} GB at the most ({ratio:.2f} times), {found['seconds']:.0f} s"
        )
    sys.exit(worst > LIMIT)


if __name__ == "__main__":
    main()
