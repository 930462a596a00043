"""The `read-jax` command. Subcommands are thin: they parse, call one function, and print."""

from __future__ import annotations

import argparse
import errno
import io
import os
import sys
from collections.abc import Sequence

import read_jax
from read_jax.commands.data import add_data
from read_jax.commands.evaluate import add_evaluate
from read_jax.commands.plan import add_plan
from read_jax.commands.segment import add_segment
from read_jax.commands.train import add_cache, add_merge, add_train
from read_jax.commands.weights import add_convert, add_export, add_inspect
from read_jax.errors import AGAIN, BROKEN, ReadJaxError
from read_jax.planning.libtpu import quiet_without_tpu


def main(argv: Sequence[str] | None = None) -> int:
    """Run the command line; returns the exit status (0 done, 1 bad input, 2 bad usage, 130 interrupted).

    One of several processes also ends with `BROKEN`, when it lost another or fails in an unknown way.
    """
    try:
        status = _main(argv)
    except BaseException as error:
        if not isinstance(error, SystemExit):
            _leave_the_job(BROKEN, error)  # networks fail in many ways when another process dies
        elif error.code:
            _leave_the_job(error.code if isinstance(error.code, int) else 1)
        raise
    if status not in (0, AGAIN):
        _leave_the_job(status)
    return status


def _leave_the_job(status: int, error: BaseException | None = None) -> None:
    """One of several processes does not wait for the others when it ends with an error."""
    processes = sys.modules.get("read_jax.processes")
    if processes is not None:  # some command has asked for it
        processes.leave_the_job(status, error)


def _main(argv: Sequence[str] | None) -> int:
    for stream in (sys.stdout, sys.stderr):
        if isinstance(stream, io.TextIOWrapper):  # names and answers may hold what the terminal cannot show
            stream.reconfigure(errors="backslashreplace")
    arguments = _parser().parse_args(argv)
    quiet_without_tpu()
    try:
        status = arguments.run(arguments)
        sys.stdout.flush()
    except ReadJaxError as error:
        return _fail(str(error), error.status)
    except BrokenPipeError:  # the reader of our output has left, as `| head` does
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 1
    except OSError as error:
        if error.errno in (errno.ENOSPC, errno.EDQUOT):
            return _fail(f"no space left on the device while writing {error.filename or 'the output'}.")
        return _fail(f"{error.strerror or error}: {error.filename}" if error.filename else str(error))
    except KeyboardInterrupt:
        print("read-jax: interrupted", file=sys.stderr)
        return 130
    except Exception as error:
        if not (isinstance(error, MemoryError) or "RESOURCE_EXHAUSTED" in str(error)):
            raise
        way = getattr(arguments, "memory", "--dtype bfloat16, fewer prompts at a time, or a larger device")
        return _fail(f"out of memory. Try {way}.")
    return status or 0


def _fail(message: str, status: int = 1) -> int:
    """One plain line on standard error, whatever the message holds; the exit status."""
    print(f"read-jax: error: {' '.join(message.split())}", file=sys.stderr)
    return status


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="read-jax", description="Reasoning segmentation: READ, SESAME and LISA in JAX."
    )
    parser.add_argument("--version", action="version", version=f"read-jax {read_jax.__version__}")
    commands = parser.add_subparsers(title="commands", metavar="COMMAND", required=True)
    for add in (
        add_convert,
        add_export,
        add_inspect,
        add_segment,
        add_data,
        add_evaluate,
        add_cache,
        add_plan,
        add_train,
        add_merge,
    ):
        add(commands)
    return parser


if __name__ == "__main__":
    sys.exit(main())
