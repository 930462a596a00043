"""Reads the manifests of third_party/: the tensors of every published checkpoint, without weights."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace

FOLDER = Path(__file__).resolve().parents[2] / "third_party" / "manifests"


def _indices(spans: str) -> Iterator[int]:
    """ "0-3,7" -> 0, 1, 2, 3, 7."""
    for span in spans.split(","):
        first, _, last = span.partition("-")
        yield from range(int(first), int(last or first) + 1)


def load_manifest(name: str, *, optional: bool = True) -> dict[str, SimpleNamespace]:
    """Every tensor of a published checkpoint by key: `shape`, `dtype`; optional: rotary buffers too."""
    data = json.loads((FOLDER / f"{name}.json").read_text())
    tensors: dict[str, SimpleNamespace] = {}
    for row in data["tensors"]:
        if row.get("optional") and not optional:
            continue
        keys = [row["key"].replace("{i}", str(i)) for i in _indices(row["i"])] if "i" in row else [row["key"]]
        for key in keys:
            assert key not in tensors, key
            tensors[key] = SimpleNamespace(shape=tuple(row["shape"]), dtype=row.get("dtype", data["dtype"]))
    assert not optional or len(tensors) == data["count"]
    return tensors
