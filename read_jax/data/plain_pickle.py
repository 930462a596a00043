"""Pickles of plain data, read without running anything that they ask for."""

from __future__ import annotations

import io
import os
import pickle
from pathlib import Path
from typing import Any

from read_jax.errors import DataError


def load_plain_pickle(path: str | os.PathLike[str]) -> Any:
    """What a pickle file holds, if that is only lists, tuples, dicts, sets, strings, numbers, bools and None.

    An unpickler calls whatever functions its file names; this one finds none at all. (A file made for it can
    still claim much memory.) Strings of Python 2, which are bytes, are taken as UTF-8, or Latin-1 where they
    are not that.

    Raises `DataError`, naming the file, when it is missing, damaged, or holds anything else.
    """
    path = Path(path)
    try:
        data = path.read_bytes()
    except FileNotFoundError:
        raise DataError(f"{path}: there is no such file.") from None
    except OSError as error:
        raise DataError(f"{path} cannot be read: {error.strerror or error}.") from None
    try:
        try:
            return _load(data, path, "utf-8")
        except UnicodeDecodeError:
            return _load(data, path, "latin-1")  # which decodes any byte
    except UnicodeDecodeError as error:  # even so: a string of Python 3, always UTF-8, is damaged
        raise _damaged(path, error) from None


def _load(data: bytes, path: Path, encoding: str) -> Any:
    try:
        return _PlainUnpickler(data, path, encoding).load()
    except (DataError, UnicodeDecodeError):
        raise
    except Exception as error:  # damaged pickles raise nearly anything
        raise _damaged(path, error) from None


def _damaged(path: Path, error: Exception) -> DataError:
    reason = f"{type(error).__name__}: {error}".rstrip(". :")
    return DataError(f"{path} is not a pickle, is damaged or was not copied completely ({reason}).")


class _PlainUnpickler(pickle.Unpickler):
    def __init__(self, data: bytes, path: Path, encoding: str):
        super().__init__(io.BytesIO(data), encoding=encoding)
        self._path = path

    def find_class(self, module_name: str, global_name: str) -> Any:
        raise DataError(
            f"{self._path} asks for {module_name}.{global_name}; only pickles of plain lists, dicts, strings "
            "and numbers are read, because others can run programs. Get the file from its original source."
        )

    def persistent_load(self, pid: Any) -> Any:
        raise DataError(
            f"{self._path} refers to an object outside the file ({pid!r}), which is never loaded."
        )
