"""`read-jax plan`: what a run will need on machines that are not at hand."""

from __future__ import annotations

import argparse
import json
import math
import os
import sys
from pathlib import Path
from typing import Any

from read_jax.commands.shared import add_config, command

_PATIENCE = "compiling; this takes minutes ..."


def add_plan(commands: Any) -> None:
    """Add `read-jax plan`."""
    parser = command(
        commands,
        "plan",
        _plan,
        "compile training or answering for machines that are not at hand: does it fit, how fast can it be",
        "Compiles the real programs with the TPU's own compiler (pip install 'read-jax[plan]'; neither a TPU "
        "nor weights are needed), or for GPUs with XLA's (READ_JAX_CUDA). That takes minutes. The exit "
        "status is 1 when they do not fit.",
    )
    parser.add_argument(
        "what",
        nargs="?",
        choices=("train", "evaluate", "serve"),
        default="train",
        help="train (default): an update; evaluate: masks for given answers; serve: answers generated too. "
        "The last two are of one group of chips, which share a model (--mesh tensor=N)",
    )
    add_config(parser)
    parser.add_argument(
        "--topology",
        required=True,
        metavar="CHIP:SHAPE",
        help="of one slice, v5e:4x4, v6e:4x4, v5p:2x2x4 ..., or of one node of GPUs: a100:8, h100:8, h200:8",
    )
    parser.add_argument("--slices", type=int, metavar="N", help="several of them (default: the recipe's)")
    parser.add_argument(
        "--mesh",
        metavar="AXIS=N,...",
        help="train: data, fsdp, tensor in every slice (default: what suits by our own count); evaluate, "
        "serve: tensor=N, chips that share a model (1)",
    )
    parser.add_argument(
        "--batch",
        type=_batches,
        metavar="N[,N...]",
        help="pictures of an update (default: the recipe's), several for --search; evaluate, serve: those "
        "answered about together (8)",
    )
    parser.add_argument(
        "--questions", type=int, metavar="N", help="evaluate, serve: about each picture together (default: 4)"
    )
    parser.add_argument(
        "--new-tokens", type=int, metavar="N", help="serve: the longest answer (default: 512)"
    )
    parser.add_argument(
        "--model", metavar="NAME", help="architecture, such as read-7b (default: the recipe's)"
    )
    parser.add_argument(
        "--pictures", type=int, metavar="N", help="of an epoch: then it says how long one takes at least"
    )
    parser.add_argument("--price", type=float, metavar="DOLLARS", help="of a chip for an hour: adds the cost")
    parser.add_argument(
        "--search",
        action="store_true",
        help="rank batch sizes (of --batch), meshes, parts of the batch and remat policies by our own count, "
        "and compile the best",
    )
    parser.add_argument(
        "--save",
        metavar="FILE",
        help="train: keep the executable as PJRT serializes it, for these chips and this libtpu; what it "
        "sends may then not be known",
    )
    parser.add_argument("--json", metavar="FILE", help="write the figures")


def _plan(arguments: argparse.Namespace) -> int:
    from read_jax.errors import ConfigError

    training = arguments.what == "train"
    others = ("questions", "new_tokens") if training else ("slices", "pictures", "price", "search", "save")
    if arguments.what == "evaluate":
        others += ("new_tokens",)
    for name in others:
        if getattr(arguments, name) is not None and getattr(arguments, name) is not False:
            raise ConfigError(f"--{name.replace('_', '-')} says nothing about a plan to {arguments.what}.")
    if arguments.price is not None and arguments.pictures is None:
        raise ConfigError("--price is for an epoch: give its --pictures too.")
    for name in ("pictures", "price"):
        if getattr(arguments, name) is not None and not 0 < getattr(arguments, name) < math.inf:
            raise ConfigError(f"--{name} must be positive, and a number.")
    for file in filter(None, (arguments.json, arguments.save)):  # known before minutes of compiling
        path = Path(file).expanduser().absolute()
        if not path.parent.is_dir():
            raise ConfigError(f"there is no folder for {file}.")
        if path.is_dir() or not os.access(path.parent, os.W_OK):
            raise ConfigError(f"{file} cannot be written: it is a folder, or in one that is read-only.")
    if arguments.batch and len(arguments.batch) > 1 and not arguments.search:
        raise ConfigError("--batch takes several numbers only for a --search.")
    return _plan_training(arguments) if training else _plan_answering(arguments)


_TRIED = 3  # of a search: so many are compiled until one fits


def _plan_training(arguments: argparse.Namespace) -> int:
    from read_jax.errors import ConfigError
    from read_jax.files import write_file
    from read_jax.planning.plan import make_plan, nearest_parts, search, suggested_mesh
    from read_jax.planning.programs import architecture, set_up
    from read_jax.planning.tables import candidates_table, plan_text
    from read_jax.training.config import load_config

    changes = list(arguments.changes)
    if arguments.batch:
        changes.append(f"data.global_batch={arguments.batch[0]}")
    placed = _mesh_changes(arguments.mesh, arguments.slices)
    changed = [change.partition("=")[0] for change in (*changes, *placed)]
    parted = "step.micro_batches" in changed
    # how many parts the recipe has was chosen for another machine
    config = load_config(arguments.config, [*changes, *placed, *([] if parted else ["step.micro_batches=1"])])
    setup = set_up(config, architecture(config, arguments.model))
    mesh = config.mesh
    if not arguments.search and not any(key in changed for key in ("mesh.data", "mesh.fsdp", "mesh.tensor")):
        mesh = suggested_mesh(setup, arguments.topology, mesh.slices)
        print(f"no --mesh was given; by our own count this one suits: {_in_words(mesh)}", file=sys.stderr)
    if not arguments.search and not parted:
        wanted = load_config(arguments.config, arguments.changes).step.micro_batches
        setup = setup.with_step(micro_batches=nearest_parts(setup, arguments.topology, mesh, wanted))
        print(f"parts of the batch (step.micro_batches): {setup.config.step.micro_batches}", file=sys.stderr)
    if arguments.search:
        if arguments.mesh:
            raise ConfigError("--search looks for the mesh: leave --mesh away.")
        found = search(setup, arguments.topology, mesh.slices, arguments.batch or ())
        print(candidates_table(found))
        if not found or not found[0].fits:
            print("fits: no (by the estimate, none of them; nothing was compiled)")
            return 1
    else:
        found = []
    tried = [(c.mesh, c.applied(setup)) for c in found if c.fits]
    plan = None
    for place, stepped in tried[:_TRIED] or [(mesh, setup)]:
        if plan is not None:
            print("the compiler finds that it does not fit; trying the next", file=sys.stderr)
        print(_PATIENCE, file=sys.stderr)
        plan = make_plan(stepped, arguments.topology, place, serialize=bool(arguments.save))
        if plan.fits:
            break
    assert plan is not None
    print(plan_text(plan, pictures=arguments.pictures, price=arguments.price))
    _write_json(arguments.json, plan.to_dict())
    if arguments.save and plan.serialized:
        write_file(Path(arguments.save).expanduser(), plan.serialized)
    return 0 if plan.fits else 1


def _in_words(mesh: Any) -> str:
    return ",".join(f"{axis}={getattr(mesh, axis)}" for axis in ("data", "fsdp", "tensor"))


def _plan_answering(arguments: argparse.Namespace) -> int:
    from read_jax.planning.inference import Load, plan_inference
    from read_jax.planning.programs import architecture
    from read_jax.planning.tables import inference_text
    from read_jax.training.config import load_config

    config = load_config(arguments.config, arguments.changes)
    group = _group(arguments.mesh)
    asked = {
        "pictures": arguments.batch and arguments.batch[0],
        "questions": arguments.questions,
        "new_tokens": arguments.new_tokens,
    }
    load = Load(**{name: value for name, value in asked.items() if value is not None})
    model = architecture(config, arguments.model)
    model = model.replace(sasp=config.start.sasp_config(model.sasp))
    print(_PATIENCE, file=sys.stderr)
    plan = plan_inference(model, arguments.topology, arguments.what, group, load)
    print(inference_text(plan))
    _write_json(arguments.json, plan.to_dict())
    return 0 if plan.fits else 1


def _batches(text: str) -> tuple[int, ...]:
    """Of "16,32"."""
    parts = text.split(",")
    if not all(part.isdecimal() and int(part) > 0 for part in parts):
        raise argparse.ArgumentTypeError(f"{text!r} are not numbers of pictures, such as 16 or 16,32,64.")
    return tuple(map(int, parts))


def _write_json(path: str | None, data: dict[str, Any]) -> None:
    from read_jax.files import write_file

    if path:
        write_file(Path(path).expanduser(), (json.dumps(data, indent=2) + "\n").encode())


def _group(mesh: str | None) -> int:
    """Chips that share a model, of "tensor=N", other axes being 1; raises `ConfigError` for another mesh."""
    from read_jax.errors import ConfigError

    sizes: dict[str, str] = {}
    for part in mesh.split(",") if mesh else ():
        axis, _, size = part.partition("=")
        sizes[axis] = size
    tensor = sizes.pop("tensor", "1")
    if not tensor.isdecimal() or int(tensor) < 1 or any(size != "1" for size in sizes.values()):
        raise ConfigError(f"to answer, chips share a model by --mesh tensor=N, not {mesh}.")
    if not set(sizes) <= {"data", "fsdp"}:
        raise ConfigError(f"--mesh {mesh}: the axes are data, fsdp and tensor.")
    return int(tensor)


def _mesh_changes(mesh: str | None, slices: int | None) -> list[str]:
    """As changes of the configuration."""
    from read_jax.errors import ConfigError

    changes = [] if mesh is None else [f"mesh.{part}" for part in mesh.split(",")]
    axes = [part.partition("=")[0] for part in changes]
    if len(set(axes)) < len(axes):
        raise ConfigError(f"--mesh {mesh} says twice how many one of its axes has.")
    if mesh is not None and not any(part.startswith("mesh.data=") for part in changes):
        changes.append("mesh.data=-1")
    return changes + ([f"mesh.slices={slices}"] if slices is not None else [])
