"""The arrays of a model folder: written slice by slice, in the layout stock Orbax restores.

Orbax without OCDBT keeps every array as a Zarr v2 folder plus one `_METADATA` file that lists the tree.
Without a compressor a Zarr chunk is the raw bytes of its block, so a layer can be written the moment it
is read, and no more than a few chunks are ever in memory. Stock Orbax reads the result onto any
sharding; the tests hold it to that.
"""

from __future__ import annotations

import hashlib
import itertools
import json
import math
import threading
import time
from collections.abc import Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import ml_dtypes
import numpy as np

from read_jax.errors import CheckpointError
from read_jax.weights.engine import Leaf

CHUNK_BYTES = 8 << 20
"""Largest chunk: small enough to shard reads evenly, large enough to keep the number of files low."""
_GATHER_BYTES = 4 << 20  # a stacked leaf up to this size is gathered in memory and becomes one chunk
_METADATA = "_METADATA"
DTYPES: dict[str, np.dtype] = {"float32": np.dtype(np.float32), "bfloat16": np.dtype(ml_dtypes.bfloat16)}


def chunk_shape(leaf: Leaf, itemsize: int) -> tuple[int, ...]:
    """Blocks of a leaf: one stacked layer at a time, its largest axis halved until a block is small."""
    chunk = [max(n, 1) for n in leaf.shape]
    if leaf.rows[0].index is not None and math.prod(chunk) * itemsize > _GATHER_BYTES:
        chunk[0] = 1
    while math.prod(chunk) * itemsize > CHUNK_BYTES:
        axis = int(np.argmax(chunk))
        chunk[axis] = -(-chunk[axis] // 2)
    return tuple(chunk)


def _zarray(shape: Sequence[int], chunks: Sequence[int], dtype: np.dtype) -> dict[str, Any]:
    return {
        "zarr_format": 2,
        "shape": list(shape),
        "chunks": list(chunks),
        "dtype": "bfloat16" if dtype == DTYPES["bfloat16"] else dtype.str,
        "compressor": None,
        "filters": None,
        "fill_value": None,
        "order": "C",
        "dimension_separator": ".",
    }


def _blocks(
    shape: Sequence[int], chunks: Sequence[int]
) -> Iterator[tuple[tuple[int, ...], tuple[slice, ...]]]:
    """Every chunk's number and the region it covers."""
    for number in itertools.product(*(range(-(-n // c)) for n, c in zip(shape, chunks, strict=True))):
        yield (
            number,
            tuple(slice(i * c, min((i + 1) * c, n)) for i, c, n in zip(number, chunks, shape, strict=True)),
        )


def fill(target: np.ndarray, values: np.ndarray) -> None:
    """target[...] = values, in strips that fit the cache when `values` is a transposed view."""
    if target.dtype == values.dtype:  # plain bits copy faster than bfloat16 elements
        bits = f"u{target.dtype.itemsize}"
        target, values = target.view(bits), values.view(bits)
    if values.ndim == 2 and values.strides[0] < values.strides[1]:
        for start in range(0, values.shape[1], 16):
            target[:, start : start + 16] = values[:, start : start + 16]
    else:
        target[...] = values


def raw_bytes(values: np.ndarray) -> memoryview:
    """The bytes of a contiguous array, without a copy."""
    return values.reshape(-1).view(np.uint8).data


def write_bytes(path: Path, data: bytes | memoryview) -> None:
    """Write one file. All array data of a model goes through here."""
    with path.open("wb") as file:
        file.write(data)


def bytes_to_read(shape: Sequence[int], parts: Sequence[int], chunks: Sequence[int], itemsize: int) -> int:
    """At most, for one of the equal parts that an array of this shape is divided into: whole chunks."""
    total = itemsize
    for size, part, chunk in zip(shape, parts, chunks, strict=True):
        # a part that does not begin with a chunk touches one more
        touched = -(-part // chunk) + (part % chunk != 0)
        total *= min(touched, -(-size // chunk)) * chunk
    return total


class ParamsWriter:
    """Fills a new params folder. `write` may be called from several threads, once per slice."""

    def __init__(self, folder: Path, leaves: Mapping[str, Leaf], dtype: np.dtype) -> None:
        """folder: must not exist. leaves: what will be written. dtype: the type everything is stored in."""
        self._folder, self._leaves, self._dtype = folder, leaves, dtype
        self._left = {path: len(leaf.rows) for path, leaf in leaves.items()}
        self._gathered: dict[str, np.ndarray] = {}
        self._digests: dict[str, str] = {}
        self._lock = threading.Lock()
        folder.mkdir()
        for path, leaf in leaves.items():
            (folder / path).mkdir()
            header = _zarray(leaf.shape, chunk_shape(leaf, dtype.itemsize), dtype)
            write_bytes(folder / path / ".zarray", json.dumps(header, separators=(",", ":")).encode())

    def write(self, path: str, index: int | None, values: np.ndarray) -> None:
        """Store one slice of a leaf: layer `index` of a stacked one, everything when None."""
        leaf = self._leaves[path]
        chunks = chunk_shape(leaf, self._dtype.itemsize)
        layer_wise = chunks[0] == 1 and leaf.shape[0] > 1
        if index is None:
            self._write_region(path, (), chunks, values)
        elif layer_wise:
            self._write_region(path, (index,), chunks[1:], values)
        else:  # a small stack: gathered, and written when its last layer arrives
            with self._lock:
                whole = self._gathered.setdefault(path, np.empty(leaf.shape, self._dtype))
            fill(whole[index], values)
        with self._lock:
            self._left[path] -= 1
            whole = self._gathered.pop(path, None) if self._left[path] == 0 else None
        if whole is not None:
            self._write_region(path, (), chunks, whole)

    def _write_region(
        self, path: str, lead: tuple[int, ...], chunks: tuple[int, ...], values: np.ndarray
    ) -> None:
        for number, region in _blocks(values.shape, chunks):
            part = values[region]
            # chunks at the far edge are stored whole too, padded with zeros
            block = np.empty(chunks, self._dtype) if part.shape == chunks else np.zeros(chunks, self._dtype)
            fill(block[tuple(slice(0, n) for n in part.shape)], part)
            name = f"{path}/" + (".".join(map(str, (*lead, *number))) or "0")
            data = raw_bytes(block)
            write_bytes(self._folder / name, data)
            digest = hashlib.sha256(data).hexdigest()
            with self._lock:
                self._digests[name] = digest

    def finish(self) -> str:
        """Write the tree's metadata; returns the content's fingerprint (SHA-256 over every chunk's)."""
        unfilled = [path for path, left in self._left.items() if left]
        if unfilled:
            raise AssertionError(f"leaves were not filled exactly once: {unfilled[:5]}")
        tree = {
            str(tuple(path.split("."))): {
                "key_metadata": [{"key": key, "key_type": 2} for key in path.split(".")],
                "value_metadata": {"value_type": "np.ndarray", "skip_deserialize": False},
            }
            for path in self._leaves
        }
        metadata = {
            "tree_metadata": tree,
            "use_ocdbt": False,
            "use_zarr3": False,
            "store_array_data_equal_to_fill_value": True,
            "custom_metadata": None,
        }
        now = time.time_ns()
        handler = "orbax.checkpoint._src.handlers.pytree_checkpoint_handler.PyTreeCheckpointHandler"
        step = {
            "item_handlers": handler,
            "metrics": {},
            "performance_metrics": {},
            "init_timestamp_nsecs": now,
            "commit_timestamp_nsecs": now,
            "custom_metadata": {},
        }
        write_bytes(self._folder / _METADATA, json.dumps(metadata).encode())
        write_bytes(self._folder / "_CHECKPOINT_METADATA", json.dumps(step).encode())
        return _of_digests(self._digests)


def content_fingerprint(folder: Path, leaves: Mapping[str, Leaf]) -> str:
    """What `ParamsWriter.finish` returned for this params folder, if nothing in it has changed; reads all."""

    def of_file(name: str) -> str:
        with (folder / name).open("rb") as file:
            return hashlib.file_digest(file, "sha256").hexdigest()

    names = [
        f"{path}/{file.name}"
        for path in leaves
        for file in (folder / path).iterdir()
        if not file.name.startswith(".")
    ]
    with ThreadPoolExecutor() as pool:
        return _of_digests(dict(zip(names, pool.map(of_file, names), strict=True)))


def _of_digests(digests: Mapping[str, str]) -> str:
    lines = (f"{name} {digest}\n" for name, digest in sorted(digests.items()))
    return "sha256:" + hashlib.sha256("".join(lines).encode()).hexdigest()


def stored_bytes(leaves: Mapping[str, Leaf], dtype: np.dtype) -> int:
    """Bytes the leaves take on disk, the padding of edge chunks included."""
    total = 0
    for leaf in leaves.values():
        chunks = chunk_shape(leaf, dtype.itemsize)
        number = math.prod(-(-n // c) for n, c in zip(leaf.shape, chunks, strict=True))
        total += number * math.prod(chunks) * dtype.itemsize
    return total


def check_params(folder: Path, leaves: Mapping[str, Leaf], dtype: np.dtype) -> dict[str, tuple[int, ...]]:
    """Raise `CheckpointError` unless every array of `leaves` is there, of its shape and type, and whole.

    Returns the shape of each one's chunks. Looks at names and sizes of files only. This matters: Zarr reads a
    missing chunk as zeros.
    """
    again = "The model folder is damaged; convert again."
    if not (folder / _METADATA).is_file():
        raise CheckpointError(f"{folder} has no {_METADATA}: it is not a complete Orbax checkpoint. {again}")
    found = {}
    for path, leaf in leaves.items():
        try:
            header = json.loads((folder / path / ".zarray").read_text())
            chunks, shape = tuple(header["chunks"]), tuple(header["shape"])
            stored, packed = header["dtype"], header["compressor"]
        except FileNotFoundError:
            raise CheckpointError(f"{folder}: parameter {path} is missing. {again}") from None
        except (OSError, ValueError, KeyError, TypeError) as error:
            raise CheckpointError(f"{folder}: parameter {path} is unreadable ({error!r}). {again}") from None
        wanted = "bfloat16" if dtype == DTYPES["bfloat16"] else dtype.str
        if shape != leaf.shape or stored != wanted:
            raise CheckpointError(
                f"{folder}: parameter {path} is {stored} {list(shape)}, config.json says {wanted} "
                f"{list(leaf.shape)}. {again}"
            )
        expected = math.prod(chunks) * dtype.itemsize
        sizes = {entry.name: entry.stat().st_size for entry in (folder / path).iterdir()}
        for number, _ in _blocks(shape, chunks):
            name = ".".join(map(str, number)) or "0"
            if name not in sizes:
                raise CheckpointError(f"{folder}: parameter {path} lacks chunk {name}. {again}")
            if packed is None and sizes[name] != expected:
                raise CheckpointError(
                    f"{folder}: chunk {name} of parameter {path} has {sizes[name]} bytes, not "
                    f"{expected}. {again}"
                )
        found[path] = chunks
    return found


def read_slice(folder: Path, path: str, index: int | None) -> np.ndarray:
    """One slice of a leaf as numpy: layer `index` of a stacked one, everything when None."""
    import tensorstore

    store = tensorstore.open(
        {"driver": "zarr", "kvstore": {"driver": "file", "path": str(folder / path)}}, read=True, open=True
    ).result()
    return (store if index is None else store[index]).read().result()
