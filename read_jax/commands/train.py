"""`read-jax train`: a training run; `cache`: the encoders once for all of it; `merge`: its model folder."""

from __future__ import annotations

import argparse
import json
from typing import Any

from read_jax.commands.shared import Progress, add_config, add_processes, command, join_processes
from read_jax.errors import AGAIN


def add_train(commands: Any) -> None:
    """Add `read-jax train`."""
    parser = command(
        commands,
        "train",
        _train,
        "train a model",
        "Started again with the same folder, a run goes on from its last checkpoint. Told to stop (SIGTERM "
        "or Ctrl-C) it saves and exits with status 75: start it again.",
    )
    add_config(parser)
    parser.add_argument("--workdir", required=True, metavar="DIR", help="folder of the run")
    parser.add_argument(
        "--show",
        action="store_true",
        help="print every setting, as changed, and do nothing else",
    )
    parser.set_defaults(memory="larger step.micro_batches, step.remat=True, or more devices in mesh.fsdp")
    add_processes(parser)


def add_cache(commands: Any) -> None:
    """Add `read-jax cache`."""
    parser = command(
        commands,
        "cache",
        _cache,
        "run the frozen vision encoders once over all training pictures",
        "Training with --config.data.features=DIR then runs no encoder and decodes no picture. Started again "
        "with the same folder, it goes on where it was.",
    )
    add_config(parser)
    parser.add_argument("--output", required=True, metavar="DIR", help="folder of what is kept")


def add_merge(commands: Any) -> None:
    """Add `read-jax merge`."""
    parser = command(
        commands,
        "merge",
        _merge,
        "make a model folder of a training run's checkpoint",
        "Merges the low-rank adapters. The folder works like one made by read-jax convert.",
    )
    parser.add_argument("workdir", metavar="WORKDIR", help="folder of the run")
    parser.add_argument("--output", required=True, metavar="MODEL_DIR", help="model folder to write")
    which = parser.add_mutually_exclusive_group()
    which.add_argument(
        "--step", type=int, metavar="N", help="checkpoint after N updates (default: the newest)"
    )
    which.add_argument(
        "--best",
        action="store_true",
        help="the checkpoint with the best validation, see checkpoints.best, and the parameters it was of",
    )
    parser.add_argument(
        "--average",
        action="store_true",
        help="take the moving average of the parameters, which is what validation scores where one is kept",
    )
    parser.add_argument(
        "--dtype", choices=("float32", "bfloat16"), help="type to store (default: as the start is)"
    )
    parser.add_argument("--base", metavar="DIR", help="where the model folder is that training started from")
    parser.add_argument("--overwrite", action="store_true", help="replace MODEL_DIR if it exists")


def _train(arguments: argparse.Namespace) -> int:
    from read_jax.training.config import load_config
    from read_jax.training.loop import train

    config = load_config(arguments.config, arguments.changes)
    if arguments.show:
        print(json.dumps(config.to_dict(), indent=2))
        return 0
    join_processes(arguments)
    outcome = train(config, arguments.workdir)
    return AGAIN if outcome.stopped else 0


def _cache(arguments: argparse.Namespace) -> None:
    from read_jax.training.config import load_config
    from read_jax.training.features import cache
    from read_jax.training.run import make_mixture

    config = load_config(arguments.config, arguments.changes)
    mixture = make_mixture(config.data)
    with Progress("encoding", " images") as progress:
        cached = cache(config, mixture, arguments.output, say=progress.say, progress=progress)
    print(cached)


def _merge(arguments: argparse.Namespace) -> None:
    from read_jax.training.finish import finish

    record = finish(
        arguments.workdir,
        arguments.output,
        step=arguments.step,
        best=arguments.best,
        average=arguments.average,
        dtype=arguments.dtype,
        base=arguments.base,
        overwrite=arguments.overwrite,
    )
    print(f"{arguments.output}: {record.parameters:,} parameters, {record.dtype}, {record.fingerprint}")
