"""`read-jax convert`, `export` and `inspect`: checkpoints in and out."""

from __future__ import annotations

import argparse
import contextlib
import sys
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from read_jax.commands.shared import Progress, command
from read_jax.config import SASP_PRESETS
from read_jax.errors import ConfigError


def add_convert(commands: Any) -> None:
    parser = command(
        commands,
        "convert",
        _convert,
        "turn a published PyTorch checkpoint into a model folder",
        "Takes READ, SESAME and LISA checkpoints, or plain LLaVA-1.5 together with --sam as the starting "
        "point of training. The checkpoint is streamed: memory stays small, whatever its size.",
    )
    parser.add_argument("source", metavar="SOURCE", help="checkpoint folder, or its Hugging Face id")
    parser.add_argument(
        "--vision-tower",
        required=True,
        metavar="DIR",
        help="folder of the CLIP that the checkpoint was trained with, or its Hugging Face id",
    )
    parser.add_argument("--output", required=True, metavar="MODEL_DIR", help="model folder to write")
    parser.add_argument("--sam", metavar="FILE", help="SAM weights (.pth) to use instead of the checkpoint's")
    parser.add_argument(
        "--lora",
        metavar="PATH",
        help="LoRA adapter to merge: PEFT folder or its Hugging Face id, or one file",
    )
    parser.add_argument(
        "--lora-alpha",
        type=float,
        metavar="A",
        help="LoRA alpha (default: what the adapter says, else twice its rank)",
    )
    parser.add_argument(
        "--dtype",
        choices=("float32", "bfloat16"),
        help="type to store (default: bfloat16 if the source is, else float32)",
    )
    parser.add_argument(
        "--sasp",
        choices=tuple(SASP_PRESETS),
        help="Similarity-as-Points settings (default: by the width of the published models; "
        "SESAME checkpoints want off)",
    )
    parser.add_argument("--overwrite", action="store_true", help="replace MODEL_DIR if it exists")


def _convert(arguments: argparse.Namespace) -> None:
    from read_jax.weights.convert import convert

    with Progress("converting", "B") as progress:
        summary = convert(
            arguments.source,
            arguments.vision_tower,
            arguments.output,
            sam=arguments.sam,
            lora=arguments.lora,
            lora_alpha=arguments.lora_alpha,
            dtype=arguments.dtype,
            sasp=arguments.sasp,
            overwrite=arguments.overwrite,
            progress=progress,
        )
    print(summary)


def add_export(commands: Any) -> None:
    parser = command(
        commands,
        "export",
        _export,
        "write a model folder as a checkpoint that the original PyTorch code loads",
    )
    parser.add_argument(
        "model",
        metavar="MODEL_DIR",
        help="model folder made by read-jax convert, or nano; or a training run's folder, whose newest "
        "checkpoint is merged first",
    )
    parser.add_argument("--best", action="store_true", help="of a run: as for read-jax merge")
    parser.add_argument("--average", action="store_true", help="of a run: as for read-jax merge")
    parser.add_argument("--base", metavar="DIR", help="of a run: as for read-jax merge")
    parser.add_argument("--output", required=True, metavar="DIR", help="checkpoint folder to write")
    parser.add_argument(
        "--format",
        choices=("safetensors", "bin"),
        default="safetensors",
        help="file format of the weights; bin needs torch (default: %(default)s)",
    )
    parser.add_argument("--overwrite", action="store_true", help="replace DIR if it exists")


def _export(arguments: argparse.Namespace) -> None:
    from read_jax.weights.export import export

    with _merged(arguments) as model, Progress("exporting", "B") as progress:
        summary = export(
            model,
            arguments.output,
            format=arguments.format,
            overwrite=arguments.overwrite,
            progress=progress,
        )
    print(summary)


@contextlib.contextmanager
def _merged(arguments: argparse.Namespace) -> Iterator[str | Path]:
    """A model folder: this one, or what merging a run's gives, beside the output as long as it is needed."""
    from read_jax.weights.checkpoint import is_model_folder

    folder, output = arguments.model, arguments.output
    chosen = {"best": arguments.best, "average": arguments.average, "base": arguments.base}
    checkpoints = Path(folder).expanduser() / "checkpoints"
    if is_model_folder(Path(folder).expanduser()) or not checkpoints.is_dir():
        if any(chosen.values()):
            raise ConfigError(f"--best, --average and --base are for the folder of a run; {folder} is none.")
        yield folder
        return
    from read_jax.training.finish import finish
    from read_jax.weights.folders import terminate_politely

    if Path(output).expanduser().exists() and not arguments.overwrite:  # known before minutes of merging
        raise ConfigError(f"output {output} exists already; pass --overwrite, or choose another.")
    beside = Path(output).expanduser().absolute().parent
    beside.mkdir(parents=True, exist_ok=True)
    with terminate_politely(), tempfile.TemporaryDirectory(prefix=".read-jax-merged-", dir=beside) as merged:
        record = finish(folder, Path(merged) / "model", **chosen)
        print(f"{folder}: merged after {record.source['trained_updates']} updates", file=sys.stderr)
        yield Path(merged) / "model"


def add_inspect(commands: Any) -> None:
    parser = command(commands, "inspect", _inspect, "say what a model folder holds")
    parser.add_argument("model", metavar="MODEL_DIR", help="model folder made by read-jax convert, or nano")
    parser.add_argument(
        "--check",
        action="store_true",
        help="read all parameters too, and hold them against their fingerprint",
    )


def _inspect(arguments: argparse.Namespace) -> None:
    from read_jax.weights.checkpoint import check_content, inspect

    print(inspect(arguments.model))
    if arguments.check:
        check_content(arguments.model)
        print("every parameter is as it was written")
