"""A cache of what frozen vision encoders say of pictures: its files, read and written. No encoder runs here.

`read-jax cache` (`read_jax.training.features`) fills it; training reads from it instead of from pictures.

    FOLDER/features.json             what it is of (`Card`), written first
    FOLDER/shard-00000.array_record  a record per picture: its two arrays' bytes, then its digest
    FOLDER/shard-00000.json          the items of the shard, with their pictures' digests; written last

A shard covers a fixed run of items, in the order of the sources, and is there whole or not at all. A picture
is known by the digest of what the encoders see of it, so one that many items share is stored once, in the
shard of its first item.
"""

from __future__ import annotations

import collections
import contextlib
import dataclasses
import errno
import json
import math
import os
import shutil
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, Self

import ml_dtypes
import numpy as np

from read_jax.data.packing import PictureFeatures
from read_jax.errors import DataError
from read_jax.files import write_file

BFLOAT16 = np.dtype(ml_dtypes.bfloat16)
SHARD_BYTES = 1 << 30
"""About what a shard holds; a run that is killed does at most one again."""
CARD = "features.json"
DIGEST_BYTES = 16
_FORMAT, _OPEN = 1, 128
_AGAIN = "run the same `read-jax cache` again: it makes what is missing."


@dataclasses.dataclass(frozen=True)
class Card:
    """What a cache is of.

    encoders: hash of their weights; dtype: of their computation; clip_size, sam_size: sides of their input in
    pixels; clip_features, image_embedding: shapes of a picture's arrays; sources: number of items by name, in
    order; shard_items: items of a shard.
    """

    encoders: str
    dtype: str
    clip_size: int
    sam_size: int
    clip_features: tuple[int, ...]
    image_embedding: tuple[int, ...]
    sources: dict[str, int]
    shard_items: int

    @property
    def record_bytes(self) -> int:
        """Of a picture."""
        values = math.prod(self.clip_features) + math.prod(self.image_embedding)
        return BFLOAT16.itemsize * values + DIGEST_BYTES

    @property
    def items(self) -> int:
        """Of all sources."""
        return sum(self.sources.values())

    @property
    def shards(self) -> list[range]:
        """The items of every shard, counted through all sources."""
        starts = range(0, self.items, self.shard_items)
        return [range(start, min(start + self.shard_items, self.items)) for start in starts]

    def save(self, folder: Path) -> None:
        """Write it."""
        data = {"format": _FORMAT, **dataclasses.asdict(self)}
        write_file(folder / CARD, (json.dumps(data, indent=2) + "\n").encode())

    @classmethod
    def load(cls, folder: Path) -> Card:
        """Read it; raises `DataError` when there is none of this format."""
        data = _json(folder / CARD, f"{folder} is no cache of features. Make one with `read-jax cache`.")
        if data.pop("format", None) != _FORMAT:
            raise DataError(f"{folder / CARD} is of another version of read_jax; make the cache anew.")
        try:
            shapes = {name: tuple(data[name]) for name in ("clip_features", "image_embedding")}
            return cls(**{**data, **shapes})
        except (KeyError, TypeError) as error:
            raise DataError(f"{folder / CARD} is damaged ({error}); make the cache anew.") from None


class FeatureStore:
    """A complete cache, read by the keys of items; opens its files on first use, in each process for itself.

    Raises `DataError` when the folder holds no cache, or a part of one.
    """

    def __init__(self, folder: str | Path) -> None:
        self.folder = Path(folder).expanduser()
        self.card = Card.load(self.folder)
        missing = [n for n in range(len(self.card.shards)) if not shard_complete(self.folder, n)]
        if missing:
            raise DataError(
                f"{self.folder} is incomplete: {len(missing)} of {len(self.card.shards)} shards are missing "
                f"or cut short ({shard_path(self.folder, missing[0]).name} first); {_AGAIN}"
            )
        self._index: _Index | None = None
        self._readers: collections.OrderedDict[int, Any] = collections.OrderedDict()

    def __getitem__(self, key: str) -> PictureFeatures:
        """The arrays of an item's picture, without the leading B; key: "SOURCE:ITEM".

        Raises `DataError` when the cache lacks it, or its record is damaged.
        """
        digest = self._known().digests.get(key)
        if digest not in self._known().places:
            raise DataError(
                f"{self.folder} has no features of {key}: the data changed since it was made. Make a cache "
                "anew, in another folder, and name that as data.features."
            )
        shard, row = self._known().places[digest]
        path = shard_path(self.folder, shard)
        try:
            record = self._reader(shard).read([row])[0]
        except (RuntimeError, ValueError, IndexError, OSError) as error:  # riegeli has its own for damage
            raise _damaged(path, row, str(error)) from error
        if len(record) != self.card.record_bytes or record[-DIGEST_BYTES:].hex() != digest:
            raise _damaged(path, row, "it is of another picture")
        values = np.frombuffer(record, BFLOAT16, (len(record) - DIGEST_BYTES) // BFLOAT16.itemsize)
        clip, sam = np.split(values, [math.prod(self.card.clip_features)])
        return PictureFeatures(clip.reshape(self.card.clip_features), sam.reshape(self.card.image_embedding))

    def check_usable(self, key: str) -> None:
        """Raise `DataError` with the reason when the item's picture could not be used."""
        reason = self._known().unusable.get(key)
        if reason is not None:
            raise DataError(reason)

    def __getstate__(self) -> dict[str, Any]:
        return {**self.__dict__, "_index": None, "_readers": collections.OrderedDict()}

    def _known(self) -> _Index:
        if self._index is None:
            self._index = read_index(self.folder, range(len(self.card.shards)))
        return self._index

    def _reader(self, shard: int) -> Any:
        """Of one of the shards used last."""
        if shard not in self._readers:
            if len(self._readers) >= _OPEN:
                self._readers.popitem(last=False)[1].close()
            self._readers[shard] = _open(shard_path(self.folder, shard))
        self._readers.move_to_end(shard)
        return self._readers[shard]


@dataclasses.dataclass
class _Index:
    """digests: of pictures, by item; places: (shard, row) by digest; unusable: reasons, by item."""

    digests: dict[str, str] = dataclasses.field(default_factory=dict)
    places: dict[str, tuple[int, int]] = dataclasses.field(default_factory=dict)
    unusable: dict[str, str] = dataclasses.field(default_factory=dict)

    def add(self, shard: int, items: Sequence[Sequence[Any]], records: Sequence[str]) -> None:
        """The content of a shard; raises `DataError` when two pictures have one key."""
        for key, digest, reason in items:
            if digest is None:
                self.unusable[key] = reason
            elif self.digests.setdefault(key, digest) != digest:
                raise DataError(f"two items of different pictures are both named {key}; rename one.")
        self.places.update((digest, (shard, row)) for row, digest in enumerate(records))


def read_index(folder: Path, shards: Sequence[int]) -> _Index:
    """What complete shards hold."""
    index = _Index()
    for shard in shards:
        data = _read_items(folder, shard)
        index.add(shard, data["items"], data["records"])
    return index


def shard_path(folder: Path, number: int) -> Path:
    """The file of a shard's records; its items are beside it."""
    return folder / f"shard-{number:05d}.array_record"


def shard_complete(folder: Path, number: int) -> bool:
    """Whether a shard is there with all its bytes."""
    path = shard_path(folder, number)
    return (
        path.exists()
        and path.with_suffix(".json").exists()
        and path.stat().st_size == _read_items(folder, number)["bytes"]
    )


class ShardWriter:
    """Writes a shard: `add` its pictures, then `finish`; left before that, as by an error, nothing remains.

    Raises `DataError` when the disk is full.
    """

    def __init__(self, folder: Path, number: int, record_bytes: int, room: int) -> None:
        """room: pictures that there must be space for."""
        self._path, self._records, self._bytes = shard_path(folder, number), [], record_bytes
        self._partial = self._path.with_name(f".{self._path.name}.partial")
        self._partial.unlink(missing_ok=True)
        if shutil.disk_usage(folder).free < room * record_bytes + (1 << 20):
            raise self._full()
        module = import_array_record()
        self._writer = module.ArrayRecordWriter(str(self._partial), "group_size:1,uncompressed")

    def add(self, features: PictureFeatures, digest: str) -> None:
        """A picture's bfloat16 arrays."""
        data = b"".join(np.ascontiguousarray(x, BFLOAT16).tobytes() for x in features)
        data += bytes.fromhex(digest)
        if len(data) != self._bytes:
            raise AssertionError(f"a record of {len(data)} bytes, not {self._bytes}")
        with self._disk():
            self._writer.write(data)
        self._records.append(digest)

    def finish(self, items: Sequence[tuple[str, str | None, str | None]]) -> list[str]:
        """Close the shard; items: (key, digest or None, reason or None). Returns its pictures' digests."""
        with self._disk():
            self._writer.close()
            reader = _open(self._partial)  # not everything that is written arrives
            arrived = reader.num_records()
            reader.close()
            if arrived != len(self._records):
                raise self._full()
            with open(self._partial, "rb") as file:
                os.fsync(file.fileno())
            size = self._partial.stat().st_size
            os.replace(self._partial, self._path)
            data = {"items": items, "records": self._records, "bytes": size}
            write_file(self._path.with_suffix(".json"), json.dumps(data).encode())
        return self._records

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *error: object) -> None:
        if self._writer.is_open():
            with contextlib.suppress(RuntimeError):  # the error that leads here is the one to tell
                self._writer.close()
        self._partial.unlink(missing_ok=True)

    @contextlib.contextmanager
    def _disk(self) -> Iterator[None]:
        """Errors of the disk in words."""
        try:
            yield
        except (RuntimeError, OSError) as error:
            full = getattr(error, "errno", None) in (errno.ENOSPC, errno.EDQUOT)
            if full or "No space left" in str(error) or not shutil.disk_usage(self._path.parent).free:
                raise self._full() from error
            raise DataError(f"{self._path} cannot be written: {error}") from error

    def _full(self) -> DataError:
        return DataError(
            f"the disk of {self._path.parent} is full. The shards before {self._path.name} are whole: free "
            "some space and run the same command again, it goes on from there."
        )


def import_array_record() -> Any:
    """The module of ArrayRecord's reader and writer; raises `DataError` when it is not installed."""
    try:
        import array_record.python.array_record_module as array_record_module
    except ImportError as error:
        raise DataError(
            f"cached features need a package that is not installed ({error}): pip install 'read-jax[data]'"
        ) from error
    return array_record_module


def _open(path: Path) -> Any:
    module = import_array_record()
    return module.ArrayRecordReader(str(path), "readahead_buffer_size:0,max_parallelism:0")


def _read_items(folder: Path, shard: int) -> dict[str, Any]:
    file = shard_path(folder, shard).with_suffix(".json")
    data = _json(file, f"Delete it; then {_AGAIN}")
    if not isinstance(data.get("bytes"), int) or not all(
        isinstance(data.get(key), list) for key in ("items", "records")
    ):
        raise DataError(f"{file} is damaged. Delete it; then {_AGAIN}")
    return data


def _json(file: Path, advice: str) -> dict[str, Any]:
    try:
        data = json.loads(file.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise DataError(f"{file} cannot be read: {error}. {advice}") from None
    if not isinstance(data, Mapping):
        raise DataError(f"{file} is damaged. {advice}")
    return dict(data)


def _damaged(path: Path, row: int, why: str) -> DataError:
    return DataError(
        f"record {row} of {path} is damaged: {why}. Delete {path.name} and {path.stem}.json; then {_AGAIN}"
    )
