"""A few updates of a small run on a mesh, in a process with as many devices as it is told to have.

    python -m tests.training.mesh_run RECIPE WORKDIR UPDATES [KEY=VALUE ...]

goes on from the last checkpoint in WORKDIR, if there is one, until UPDATES are done, and leaves there a
checkpoint, state.npz (every leaf of the state by its path, and how far each parameter moved) and report.json.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import jax
import numpy as np

from read_jax.training.checkpoint import FOLDER, Checkpoints, named_leaves
from read_jax.training.config import load_config
from read_jax.training.run import prepare

STATE, REPORT = "state.npz", "report.json"


def start(recipe: Path, workdir: Path, updates: int, *changes: str, devices: int) -> subprocess.Popen:
    """The same as a process of its own, that compiles fast rather than well."""
    environment = os.environ | {
        "JAX_PLATFORMS": "cpu",
        "JAX_DISABLE_MOST_OPTIMIZATIONS": "1",
        # devices that share few cores wait long for one another
        "XLA_FLAGS": f"--xla_force_host_platform_device_count={devices} "
        "--xla_cpu_collective_call_terminate_timeout_seconds=600",
        "PYTHONPATH": str(Path(__file__).parents[2]),
    }
    command = [sys.executable, "-m", "tests.training.mesh_run", str(recipe), str(workdir), str(updates)]
    return subprocess.Popen([*command, *changes], env=environment, stderr=subprocess.PIPE, text=True)


def main(recipe: str, folder: str, updates: str, *changes: str) -> None:
    workdir, config = Path(folder), load_config(recipe, changes)
    run, state = prepare(config, workdir)
    checkpoints = Checkpoints(workdir / FOLDER, config.checkpoints, run.identity, print)
    restored = checkpoints.restore(state)
    if restored:
        state = restored.state
        run.loader.restore(restored.loader)
    began = {name: np.array(leaf) for name, leaf in named_leaves({"moved": state.params}).items()}

    report = {"metrics": [], "temporaries": None}
    program = None
    for update in range(restored.step if restored else 0, int(updates)):
        arrays = jax.device_put(next(run.loader).arrays, run.sharding)
        if program is None:
            program = run.step(update).lower(state, run.frozen, arrays).compile()
            report["temporaries"] = program.memory_analysis().temp_size_in_bytes
        # the same program every time: it would refuse a state that lies elsewhere than the first one did
        state, numbers = program(state, run.frozen, arrays)
        report["metrics"].append({name: float(value) for name, value in numbers.items()})

    leaves = named_leaves(state)
    moved = {
        name: np.asarray(leaf) - began[name] for name, leaf in named_leaves({"moved": state.params}).items()
    }
    np.savez(workdir / STATE, **{name: np.asarray(leaf) for name, leaf in leaves.items()}, **moved)
    report["shards"] = {
        name: leaf.sharding.shard_shape(leaf.shape)
        for name, leaf in {**leaves, **named_leaves(run.frozen)}.items()
    }
    (workdir / REPORT).write_text(json.dumps(report))
    checkpoints.save(int(updates), state, run.loader.state(), last=True)
    checkpoints.close()
    run.loader.close()


if __name__ == "__main__":
    main(*sys.argv[1:])
