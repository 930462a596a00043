"""What the subcommands share: how a parser is added, and the progress bar."""

from __future__ import annotations

import argparse
import sys
from typing import Any

_PREFIX = "--config."


def command(commands: Any, name: str, run: Any, summary: str, details: str = "") -> argparse.ArgumentParser:
    parser = commands.add_parser(
        name,
        help=summary,
        description=f"{summary[0].upper()}{summary[1:]}. {details}".strip(),
    )
    parser.set_defaults(run=run)
    return parser


def add_config(parser: argparse.ArgumentParser) -> None:
    """--config RECIPE, and --config.KEY=VALUE, which come as `changes`."""
    parser.add_argument(
        "--config",
        required=True,
        metavar="RECIPE",
        help="name of a recipe, such as read_7b_reasonseg, or a .py file with get_config(); ':runlocal' "
        "after it tries it out on a laptop",
    )
    parser.epilog = (
        f"{_PREFIX}KEY=VALUE changes a setting of the recipe, as {_PREFIX}optimizer.learning_rate=1e-4."
    )
    parse: Any = parser.parse_known_args

    def parse_known_args(args: Any = None, namespace: Any = None) -> Any:  # the names of settings are many
        changes = [a.removeprefix(_PREFIX) for a in args if a.startswith(_PREFIX)]
        parsed, rest = parse([a for a in args if not a.startswith(_PREFIX)], namespace)
        parsed.changes = changes
        return parsed, rest

    parser.parse_known_args = parse_known_args


def add_processes(parser: argparse.ArgumentParser) -> None:
    """Options by which several processes become one job; see `join_processes`."""
    group = parser.add_argument_group(
        "several processes",
        "One job on several machines: the same command on each of them. The folder must be one that all "
        "of them see.",
    )
    group.add_argument(
        "--distributed",
        action="store_true",
        help="find the others by what the cluster tells (TPU pod, Slurm, Kubernetes, Open MPI)",
    )
    group.add_argument("--coordinator", metavar="HOST:PORT", help="or: where process 0 listens")
    group.add_argument("--processes", type=int, metavar="N", help="how many there are")
    group.add_argument("--process", type=int, metavar="I", help="number of this one, from 0")


def join_processes(arguments: argparse.Namespace) -> None:
    """Join the job that the options name, if any; before JAX is asked for its devices."""
    given = (arguments.coordinator, arguments.processes, arguments.process)
    if arguments.distributed or given != (None, None, None):
        from read_jax.processes import join

        join(*given)


class Progress:
    """A progress bar on standard error, only on a terminal; called as `progress(done, total)`."""

    def __init__(self, label: str, unit: str, total: int | None = None):
        from tqdm import tqdm

        self._bar = tqdm(
            desc=label,
            unit=unit,
            unit_scale=unit == "B",
            total=total,
            file=sys.stderr,
            disable=None,
            leave=False,
        )

    def __enter__(self) -> Progress:
        return self

    def __exit__(self, *_: Any) -> None:
        self._bar.close()

    def __call__(self, done: int, total: int, what: str = "") -> None:
        if self._bar.total is None:  # the first call: what an earlier run did says nothing of our speed
            self._bar.initial = self._bar.n = done
        self._bar.total = total
        self._bar.set_postfix_str(what, refresh=False)
        self._bar.update(done - self._bar.n)

    def label(self, label: str) -> None:
        """Say what is being done now."""
        self._bar.set_description(label)

    def say(self, text: str) -> None:
        """Print lines above the bar."""
        self._bar.write(text, file=sys.stdout)
