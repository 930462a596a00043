"""Folders that appear whole or not at all, and the space they need.

Work happens in a hidden sibling of the output, which is renamed into place at the very end. Whatever
ends the run early, the output is either as it was before or complete; the partial is removed, at once
or, after a hard kill, by the next run.
"""

from __future__ import annotations

import contextlib
import errno
import fcntl
import os
import shutil
import signal
import threading
import uuid
from collections.abc import Callable, Iterator
from pathlib import Path
from types import FrameType
from typing import Any

from read_jax.errors import CheckpointError

_PARTIAL, _OLD, _LOCK = "read-jax-partial", "read-jax-old", ".lock"


def check_output(
    output: Path, inputs: list[Path], *, overwrite: bool, replaceable: Callable[[Path], bool], kind: str
) -> None:
    """Refuse, before any work, an output that exists or that would endanger what is read.

    replaceable: whether an existing folder is of the kind that overwriting may replace.
    """
    target = output.resolve()
    for source in inputs:
        other = source.resolve()
        if target == other or (other.is_dir() and other in target.parents) or target in other.parents:
            raise CheckpointError(
                f"output {output} and input {source} are inside one another; choose an output elsewhere."
            )
    if not output.exists():
        return
    if not overwrite:
        raise CheckpointError(
            f"output {output} exists already; pass overwrite to replace it, or choose another."
        )
    if not output.is_dir() or (any(output.iterdir()) and not replaceable(output)):
        raise CheckpointError(
            f"output {output} exists and is not {kind}; it is not overwritten. Choose another."
        )


def check_space(output: Path, needed: int) -> None:
    """Refuse when the output's disk has not `needed` bytes free."""
    parent = next(p for p in (output.absolute(), *output.absolute().parents) if p.is_dir())
    free = shutil.disk_usage(parent).free
    if free < needed:
        raise CheckpointError(
            f"not enough space for {output}: {needed / 1e9:.1f} GB needed, {free / 1e9:.1f} GB free "
            "on its disk."
        )


def _hidden(output: Path, kind: str) -> str:
    return f".{output.name}.{kind}-"


def clean_leftovers(output: Path) -> None:
    """Remove what killed runs for this output left beside it; raises if one of them is still running."""
    for partial in sorted(output.parent.glob(_hidden(output, _PARTIAL) + "*")):
        with contextlib.ExitStack() as stack:
            try:
                lock = stack.enter_context((partial / _LOCK).open("ab"))
                fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except BlockingIOError:
                raise CheckpointError(
                    f"another run is writing {output} right now (its work is in {partial}); wait for it or "
                    "choose another output."
                ) from None
            except (FileNotFoundError, NotADirectoryError):
                continue  # gone meanwhile, or a file and so not ours
            shutil.rmtree(partial, ignore_errors=True)
    for old in sorted(output.parent.glob(_hidden(output, _OLD) + "*")):
        if output.exists():
            shutil.rmtree(old, ignore_errors=True)
        else:  # killed between the two renames: the old folder is the good one
            old.rename(output)


def fsync(path: Path) -> None:
    """Have a file or a folder's entries on the disk before going on."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


@contextlib.contextmanager
def atomic_folder(output: Path) -> Iterator[Path]:
    """A fresh folder to fill; it becomes `output` when the block ends well and is removed otherwise.

    SIGTERM ends the block like Ctrl-C. An existing output is moved aside only after the new one is
    complete. A full disk, or any other `OSError`, becomes a `CheckpointError`.
    """
    output = output.absolute()
    partial = output.parent / f"{_hidden(output, _PARTIAL)}{uuid.uuid4().hex[:8]}"
    try:
        output.parent.mkdir(parents=True, exist_ok=True)
        clean_leftovers(output)
        partial.mkdir()
    except OSError as error:
        raise CheckpointError(f"cannot create {output}: {error.strerror or error}.") from error
    with (partial / _LOCK).open("ab") as lock, terminate_politely():
        try:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
            yield partial
            for folder, _, files in os.walk(partial):
                for name in files if output.exists() else ():
                    fsync(Path(folder, name))  # what is replaced must not be lost to a power failure
                fsync(Path(folder))
            old = (
                output.parent / f"{_hidden(output, _OLD)}{uuid.uuid4().hex[:8]}" if output.exists() else None
            )
            if old:
                output.rename(old)
            partial.rename(output)
            (output / _LOCK).unlink()
            fsync(output.parent)
            if old:
                shutil.rmtree(old, ignore_errors=True)
        except BaseException as error:
            shutil.rmtree(partial, ignore_errors=True)
            if not isinstance(error, OSError):
                raise
            if error.errno in (errno.ENOSPC, errno.EDQUOT):
                problem = "its disk became full; free some space and run again"
            else:
                problem = str(error)
            raise CheckpointError(
                f"{output} was not made, and what was written is removed: {problem}."
            ) from error


@contextlib.contextmanager
def terminate_politely() -> Iterator[None]:
    """Turn SIGTERM into SystemExit, so that clean-up runs; only the main thread may and needs to."""
    if threading.current_thread() is not threading.main_thread():
        yield
        return

    def stop(number: int, frame: FrameType | None) -> Any:
        raise SystemExit(128 + number)

    before = signal.signal(signal.SIGTERM, stop)
    try:
        yield
    finally:
        signal.signal(signal.SIGTERM, before)
