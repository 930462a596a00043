"""`load_source`: every dataset by its name."""

from __future__ import annotations

import difflib
from collections.abc import Callable
from importlib import import_module
from pathlib import Path
from typing import Any

from read_jax.data.item import Compat, Source
from read_jax.errors import DataError

REFER_SETS = (
    "refclef",
    "refcoco",
    "refcoco+",
    "refcocog",
    "R-refcoco",
    "R-refcoco+",
    "R-refcocog",
    "fprefcoco",
    "fprefcoco+",
    "fprefcocog",
)
# family -> (module, function(family, split, data_dir, compat)); imported when asked for
_READERS: dict[str, tuple[str, str]] = {
    "ReasonSeg": ("reason_seg", "load"),
    **{name: ("refer", "load") for name in REFER_SETS},
    "ade20k": ("label_images", "load"),
    "cocostuff": ("label_images", "load"),
    "mapillary": ("label_images", "load"),
    "pascal_part": ("parts", "load"),
    "paco_lvis": ("parts", "load"),
    "llava_instruct": ("conversations", "load"),
    "scenes": ("scenes", "load"),
}
FAMILIES = tuple(_READERS)
SYNTHETIC = ("scenes",)
"""Drawn, not read: these need no folder."""


def load_source(
    name: str, data_dir: str | Path | None = None, compat: Compat = None, *, built: bool = True
) -> Source:
    """The source of that name.

    Args:
        name: "FAMILY|SPLIT", such as "refcoco|testA", "ReasonSeg|val" or "scenes|test"; or the path of a
            JSON-lines file of the user's own (see `read_jax.data.jsonl`).
        data_dir: the folder with the datasets in their original layout, or with what `read-jax data build`
            made of them, also in a bucket ("gs://..."); what is built is preferred. For a user's file, the
            folder its pictures are relative to (default: the file's), or where it is built, which is read
            when the file itself is not there.
        compat: "read" to reproduce the original's defects where published numbers depend on them.
        built: False: the original files, whatever is built.

    Raises:
        DataError: unknown name or split (lists the known ones), or files that are missing or malformed.
    """
    if compat not in (None, "read"):
        raise DataError(f"compat must be None or 'read', not {compat!r}.")
    if name.endswith((".jsonl", ".json")) and "|" not in name:
        records = None
        if built and data_dir is not None and not Path(name).expanduser().exists():
            records = _function("records", "find")(Path(name).name, "data", data_dir, compat)
        return records if records is not None else _function("jsonl", "load")(name, data_dir, compat)
    family, _, split = name.partition("|")
    if family not in _READERS:
        near = difflib.get_close_matches(family.lower(), [f.lower() for f in FAMILIES], n=1)
        hint = f" Did you mean {next(f for f in FAMILIES if f.lower() == near[0])}?" if near else ""
        raise DataError(
            f"unknown dataset {family!r}.{hint} Known: {', '.join(FAMILIES)}; or give the path of a .jsonl "
            "file of your own."
        )
    if data_dir is None:
        if family in SYNTHETIC:
            return _function(*_READERS[family])(family, split, None, compat)
        raise DataError(
            f"{name} is read from files: give the folder that holds the datasets (data_dir, --data)."
        )
    if built:
        records = _function("records", "find")(family, split, data_dir, compat)
        if records is not None:
            return records
    if family in SYNTHETIC:
        return _function(*_READERS[family])(family, split, None, compat)
    try:
        if "://" in str(data_dir):
            raise DataError(f"{data_dir} holds no built {name}; only built datasets are read from buckets.")
        folder = Path(data_dir).expanduser()
        if not folder.is_dir():
            raise DataError(f"{folder}: there is no such folder (looked for {name} in it).")
        return _function(*_READERS[family])(family, split, folder, compat)
    except DataError as error:
        others = _function("records", "built")(data_dir, family) if built else []
        if not others:
            raise
        raise DataError(f"{error} Built there: {', '.join(others)}.") from error


def _function(module: str, name: str) -> Callable[..., Any]:
    return getattr(import_module(f"read_jax.data.{module}"), name)


class UnknownSplitError(DataError):
    """A dataset has no such split."""


def unknown_split(family: str, split: str, known: tuple[str, ...]) -> UnknownSplitError:
    """The error for a split that a family does not have."""
    what = f"has no split {split!r}" if split else "needs a split"
    return UnknownSplitError(f"{family} {what}; known: {', '.join(f'{family}|{s}' for s in known)}.")
