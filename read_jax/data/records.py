"""Datasets built once into ArrayRecord: the same items as from the original files."""

from __future__ import annotations

from pathlib import Path

from read_jax.data.item import Compat, Source


def find(family: str, split: str, data_dir: Path, compat: Compat) -> Source | None:
    """The built records of that split under `data_dir`; None when there are none."""
    return None
