"""`read-jax data`: look at datasets, check a file of one's own, build records for a pod."""

from __future__ import annotations

import argparse
from typing import Any

from read_jax.commands.shared import Progress, command
from read_jax.errors import DataError

_NAME = "dataset, such as 'refcoco|val', 'ReasonSeg|train' or 'scenes|test', or a .jsonl file of your own"


def add_data(commands: Any) -> None:
    """Add `read-jax data` and its actions."""
    parser = commands.add_parser(
        "data",
        help="look at, check and build datasets",
        description="Look at datasets, check a file of your own, build records for fast reading.",
    )
    actions = parser.add_subparsers(title="actions", metavar="ACTION", required=True)
    for add in (_add_show, _add_check, _add_build):
        add(actions)


def _add_show(actions: Any) -> None:
    parser = command(
        actions,
        "show",
        _show,
        "draw some pictures of a dataset with their questions and masks",
        "Writes one PNG per picture, with its questions and answers below it, to DIR.",
    )
    parser.add_argument("name", metavar="NAME", help=_NAME)
    parser.add_argument("--data", metavar="DIR", help="folder with the datasets in their original layout")
    parser.add_argument("--output", required=True, metavar="DIR", help="folder for the pictures")
    parser.add_argument(
        "--start", type=int, default=0, metavar="I", help="first picture (default: %(default)s)"
    )
    parser.add_argument("--count", type=int, default=8, metavar="N", help="pictures (default: %(default)s)")


def _show(arguments: argparse.Namespace) -> None:
    from read_jax.data import load_source
    from read_jax.data.show import show

    source = load_source(arguments.name, arguments.data)
    if not 0 <= arguments.start < len(source) or arguments.count < 1:
        raise DataError(
            f"{arguments.name} has the pictures 0 to {len(source) - 1}; --start {arguments.start} --count "
            f"{arguments.count} asks for none of them."
        )
    stop = min(arguments.start + arguments.count, len(source))
    with Progress("drawing", "picture", stop - arguments.start) as progress:
        written = show(source, range(arguments.start, stop), arguments.output, progress)
    print(f"{len(source)} pictures in {arguments.name}; drawn: {written}")


def _add_check(actions: Any) -> None:
    parser = command(
        actions,
        "check",
        _check,
        "find every broken record of a file or dataset",
        "Reads everything, decodes every picture and mask, and lists what is broken with its line. Ends with "
        "status 1 if anything is.",
    )
    parser.add_argument("path", metavar="PATH", help="a .jsonl file of your own, or a dataset's name")
    parser.add_argument("--data", metavar="DIR", help="folder the pictures are relative to (default: PATH's)")


def _check(arguments: argparse.Namespace) -> int:
    from read_jax.data.check import check

    with Progress("checking", "record") as progress:
        report = check(arguments.path, arguments.data, progress=progress)
    print(report)
    return 0 if report.ok else 1


def _add_build(actions: Any) -> None:
    parser = command(
        actions,
        "build",
        _build,
        "turn a dataset into ArrayRecord files once, for fast reading from a disk or bucket",
        "The result is a TensorFlow Datasets folder (TensorFlow is not needed); the same names then read "
        "from it, with the same examples. Needs pip install 'read-jax[data]'.",
    )
    parser.add_argument(
        "name", metavar="NAME", help=_NAME + "; without a split all of them, or 'all' for every dataset found"
    )
    parser.add_argument("--data", metavar="DIR", help="folder with the datasets in their original layout")
    parser.add_argument("--output", metavar="DIR", help="folder for the records (default: tfds in --data)")
    parser.add_argument("--compat", choices=("read",), help="build the variant with the original's defects")
    parser.add_argument("--overwrite", action="store_true", help="replace what is there")


def _build(arguments: argparse.Namespace) -> None:
    from read_jax.data.build import build
    from read_jax.weights.folders import terminate_politely

    with terminate_politely(), Progress("building", "picture") as progress:
        summary = build(
            arguments.name,
            arguments.data,
            arguments.output,
            compat=arguments.compat,
            overwrite=arguments.overwrite,
            progress=progress,
        )
    print(summary)
