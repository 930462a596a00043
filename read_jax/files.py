"""Files that are there whole or not at all, and folders that one process writes to at a time."""

from __future__ import annotations

import contextlib
import errno
import fcntl
import os
from collections.abc import Iterator
from pathlib import Path

_NO_LOCKS = (errno.ENOLCK, errno.ENOSYS, errno.EOPNOTSUPP, errno.EINVAL)
"""What a file system answers that knows no locks."""


def write_file(path: Path, data: bytes) -> None:
    """Replace a file in one step: after a crash it holds the earlier bytes or these."""
    partial = path.with_name(f".{path.name}.partial")
    try:
        with open(partial, "wb") as file:
            file.write(data)
            file.flush()
            os.fsync(file.fileno())
        os.replace(partial, path)
    finally:
        partial.unlink(missing_ok=True)


@contextlib.contextmanager
def only_writer(folder: Path, busy: Exception) -> Iterator[None]:
    """Raises `busy` while another process is in here with the same folder, which is made if need be.

    On a file system without locks, as some network ones are, nobody is kept out.
    """
    folder.mkdir(parents=True, exist_ok=True)
    with open(folder / ".lock", "ab") as lock:
        try:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            raise busy from None
        except OSError as error:
            if error.errno not in _NO_LOCKS:
                raise
        yield
