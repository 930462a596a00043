"""Datasets built once into ArrayRecord: the same items as from the original files, from a few large files.

`read-jax data build` (`read_jax.data.build`) writes; this module defines what a record holds and reads it.
The files are an ordinary TFDS dataset: `tfds.builder_from_directory(folder).as_data_source(split)` opens it
without this package.

    TFDS folder/refcoco_plus/default/1.0.0/      the right thing; "read": built with compat="read"
        refcoco_plus-val.array_record-00000-of-00003
        dataset_info.json, features.json         splits and features, as TFDS writes them
        metadata.json                            the source's name, the vocabulary that `absent` counts in
"""

from __future__ import annotations

import dataclasses
import json
import operator
import os
import re
from collections.abc import Iterator, Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np

from read_jax.data.item import Compat, Item, Query
from read_jax.errors import DataError, ImageError
from read_jax.images.decode import read_image
from read_jax.images.masks import CompactMask

VERSION = "1.0.0"
"""Of the records' layout, and so of the TFDS datasets."""

FOLDER = "tfds"
"""Where builds lie under the folder of the datasets."""

QUERY_FIELDS = {field.name: str(field.type) for field in dataclasses.fields(Query)}
ITEM_FIELDS = {  # what is stored by the same rule; the rest of an item has a form of its own
    field.name: str(field.type)
    for field in dataclasses.fields(Item)
    if field.name not in ("image_path", "queries", "load_image", "load_mask", "absent", "absent_alternatives")
}


def tfds_name(family: str) -> str:
    """A dataset's name as TFDS allows it: "R-refcoco+" is r_refcoco_plus, "ReasonSeg" reason_seg."""
    name = re.sub(r"(?<=[a-z])(?=[A-Z])", "_", family).lower().replace("+", "_plus")
    name = re.sub(r"\W+", "_", name, flags=re.ASCII).strip("_")
    return name if name[:1].isalpha() else f"data_{name}".rstrip("_")


def config_name(compat: Compat) -> str:
    """The TFDS config that holds the items of that compatibility mode."""
    return compat or "default"


def features() -> Any:
    """The features of a record, a `tfds.features.FeaturesDict`; raises `DataError` without TFDS."""
    connectors = import_tfds().features
    kinds = {
        "str": connectors.Text,
        "bool": partial(connectors.Scalar, np.bool_),
        "int": partial(connectors.Scalar, np.int64),
        "float": partial(connectors.Scalar, np.float64),
    }

    def feature(kind: str) -> Any:
        return kinds[kind]() if kind in kinds else connectors.Text(doc=f"JSON of a {kind}")

    return connectors.FeaturesDict(
        {
            **{name: feature(kind) for name, kind in ITEM_FIELDS.items()},
            "image": connectors.Scalar(
                np.object_,
                doc="The image file as it was. Masks are of the upright picture: EXIF orientation counts.",
            ),
            "image_path": connectors.Text(doc='relative to the folder of the datasets; "" if drawn'),
            "queries": connectors.Sequence(
                {
                    **{name: feature(kind) for name, kind in QUERY_FIELDS.items()},
                    "mask": connectors.Scalar(np.int64, doc="which of the masks is its target; -1: none"),
                }
            ),
            "masks": connectors.Sequence(
                {
                    "mask": connectors.Scalar(np.int64, doc="the mask that this plane is part of"),
                    "value": connectors.Scalar(np.uint8, doc="of the plane's pixels: 1 target, 255 ignore"),
                    "counts": connectors.Text(doc="COCO's compressed run lengths"),
                }
            ),
            "absent": connectors.Sequence(np.int64, doc="positions in metadata.json's vocabulary"),
        }
    )


def to_example(item: Item, image: bytes, image_path: str, vocabulary: dict[str, int]) -> dict[str, Any]:
    """An item as the features above; `vocabulary` (entry in JSON -> position) grows by what it lacks.

    Raises `DataError` when a mask is not of the item's size, or `MaskError`, `DataError` from the reader.
    """
    masks: dict[CompactMask, int] = {}  # several texts about one object share its mask
    queries = []
    for i, query in enumerate(item.queries):
        which = -1
        if query.exists:
            mask = item.load_mask(i)
            if (mask.height, mask.width) != (item.height, item.width):
                raise DataError(
                    f"{item.key}: the mask of {query.phrase!r} has {mask.height} x {mask.width} pixels, the "
                    f"picture {item.height} x {item.width}."
                )
            which = masks.setdefault(mask, len(masks))
        queries.append({**_encode(query, QUERY_FIELDS), "mask": which})
    absent = []
    for i, name in enumerate(item.absent):
        entry = [name, *item.absent_alternatives[i]] if len(item.absent_alternatives) else name
        absent.append(vocabulary.setdefault(json.dumps(entry), len(vocabulary)))
    planes = [
        {"mask": index, "value": value, "counts": counts}
        for mask, index in masks.items()
        for value, counts in mask.planes
    ]
    return {
        **_encode(item, ITEM_FIELDS),
        "image": image,
        "image_path": _bytes(image_path),
        "queries": queries,
        "masks": planes,
        "absent": absent,
    }


def from_record(record: bytes, vocabulary: Sequence[Any], root: str) -> Item:
    """The item of a record, a serialised tf.Example; its `image_path` is given below `root`.

    TFDS's own decoding gives the same columns, in three times the time.
    """
    columns = _columns(record)
    fields = {name: values[0] for name, values in _decode(columns, ITEM_FIELDS).items()}
    path = _text(columns["image_path"][0])
    path = os.path.join(root, path) if path else None
    size = fields["height"], fields["width"]
    of_queries = _decode(columns, QUERY_FIELDS, "queries/")
    count = len(columns["queries/mask"])
    planes: dict[int, list[tuple[int, str]]] = {}
    for mask, value, counts in zip(
        *(columns[f"masks/{n}"] for n in ("mask", "value", "counts")), strict=True
    ):
        planes.setdefault(mask, []).append((value, counts.decode("ascii")))
    targets = [CompactMask(*size, tuple(planes.get(mask, ()))) for mask in columns["queries/mask"]]
    entries = [vocabulary[i] for i in columns["absent"]]
    plain = not entries or isinstance(entries[0], str)
    return Item(
        **fields,
        image_path=path,
        queries=tuple(Query(**{name: of_queries[name][i] for name in of_queries}) for i in range(count)),
        load_image=_Picture(path or fields["key"], *size, columns["image"][0]),
        load_mask=targets.__getitem__,
        absent=tuple(entries) if plain else tuple(entry[0] for entry in entries),
        absent_alternatives=() if plain else tuple(tuple(entry[1:]) for entry in entries),
    )


class RecordSource:
    """A built split: a `Source` that opens its files on first use, in each process for itself.

    folder: the dataset's, with dataset_info.json in it, on a disk or in a bucket ("gs://...", which needs
    gcsfs besides). Raises `DataError` when TFDS is not installed, or when the build is of another layout.
    """

    def __init__(self, folder: str | Path, split: str, name: str, compat: Compat, root: str) -> None:
        self.name = name
        self.compat: Compat = compat
        self._folder, self._split, self._root = str(folder), split, root
        import_tfds()
        lengths = _splits(folder)
        if split not in lengths:
            raise DataError(f"{folder} holds no split {split!r}; it holds {', '.join(lengths) or 'none'}.")
        self._length = lengths[split]
        metadata = read_metadata(folder)
        unknown = set(metadata["query_fields"]) - set(QUERY_FIELDS) | set(metadata["item_fields"]) - set(
            ITEM_FIELDS
        )
        if unknown:
            raise DataError(
                f"{folder} was built by a newer version of read_jax: its records hold "
                f"{', '.join(sorted(unknown))}. Update read_jax, or build again with --overwrite."
            )
        self._vocabulary = metadata["vocabulary"]
        self._records: Any = None

    def __len__(self) -> int:
        return self._length

    def __getitem__(self, index: int) -> Item:
        index = operator.index(index)
        if not -self._length <= index < self._length:
            raise IndexError(f"{self.name} has {self._length} items, no item {index}.")
        if self._records is None:
            tfds = import_tfds()
            builder = tfds.builder_from_directory(self._folder)
            self._records = builder.as_data_source(
                self._split, deserialize_method=tfds.decode.DeserializeMethod.RAW_BYTES
            )
        index %= self._length
        try:
            return from_record(self._records[index], self._vocabulary, self._root)
        except Exception as error:  # protobuf, riegeli and numpy each have their own for damaged bytes
            raise DataError(
                f"record {index} of {self._folder} ({self._split}) cannot be read: "
                f"{type(error).__name__}: {error}. Is the copy complete? "
                "Else build it again with --overwrite."
            ) from error

    def __iter__(self) -> Iterator[Item]:
        return (self[i] for i in range(len(self)))

    def __repr__(self) -> str:
        return f"RecordSource({self.name!r}, {self._length} items, {self._folder!r})"

    def __getstate__(self) -> dict[str, Any]:
        return {**self.__dict__, "_records": None}


def find(family: str, split: str, data_dir: str | Path, compat: Compat) -> RecordSource | None:
    """The built records of a split under the folder of the datasets, or under a folder of builds itself.

    Where the original files lie beside a build, the build is what counts: who changes the originals builds
    again. None when that split is not built in that compatibility mode.
    """
    for top in (_path(data_dir) / FOLDER, _path(data_dir)):
        folder = top / tfds_name(family) / config_name(compat) / VERSION
        if (folder / "dataset_info.json").exists() and split in _splits(folder):
            if read_metadata(folder)["source"] != family:  # another family of the same TFDS name
                continue
            root = top.parent if top.name == FOLDER else top
            name = family if family.endswith((".jsonl", ".json")) else f"{family}|{split}"
            return RecordSource(folder, split, name, compat, str(root))
    return None


def built(data_dir: str | Path, family: str | None = None) -> list[str]:
    """What is built under a folder, of one family or of all, for people: "refcoco|val", "refcoco|val (compat
    read)"."""
    names = []
    for top in (_path(data_dir) / FOLDER, _path(data_dir)):
        for file in top.glob(f"*/*/{VERSION}/dataset_info.json"):
            metadata = read_metadata(file.parent)
            compat = f" (compat {metadata['compat']})" if metadata["compat"] else ""
            if family in (None, metadata["source"]):
                names += [f"{metadata['source']}|{split}{compat}" for split in _splits(file.parent)]
    return sorted(names)


def read_metadata(folder: str | Path) -> dict[str, Any]:
    """metadata.json of a build: source, compat, query_fields, item_fields, vocabulary."""
    return _json(_path(folder) / "metadata.json", "vocabulary", list)


def import_tfds() -> Any:
    """TensorFlow Datasets, which needs no TensorFlow; raises `DataError` when it is not installed."""
    try:
        import array_record.python.array_record_data_source  # noqa: F401 - TFDS imports it only later
        import tensorflow_datasets
    except ImportError as error:
        raise DataError(
            f"built datasets need packages that are not installed ({error}): pip install 'read-jax[data]'"
        ) from error
    return tensorflow_datasets


def _splits(folder: str | Path) -> dict[str, int]:
    """Split -> number of items."""
    info = _json(_path(folder) / "dataset_info.json", "splits", list)
    return {split["name"]: sum(map(int, split["shardLengths"])) for split in info["splits"]}


def _json(file: Any, key: str, kind: type) -> dict[str, Any]:
    try:
        content = json.loads(file.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise DataError(
            f"{file} cannot be read: {error}. Build the dataset again with --overwrite."
        ) from None
    if not isinstance(content, dict) or not isinstance(content.get(key), kind):
        raise DataError(f"{file} has no {key}; it is damaged. Build the dataset again with --overwrite.")
    return content


def _path(path: str | Path) -> Any:
    """A path on a disk, or in a bucket; `pathlib` would make one slash of two in "gs://"."""
    if "://" not in str(path):
        return Path(path).expanduser()
    try:
        from etils import epath
    except ImportError:
        raise DataError(
            f"{path}: buckets need packages that are not installed: pip install 'read-jax[data]'"
        ) from None
    return epath.Path(path)


@dataclasses.dataclass(frozen=True)
class _Picture:
    """Decodes a record's image file when called."""

    name: str
    height: int
    width: int
    data: bytes = dataclasses.field(repr=False)

    def __call__(self) -> np.ndarray:
        try:
            image = read_image(self.data)
        except ImageError as error:
            raise ImageError(f"{self.name}: {error}") from None
        if image.shape[:2] != (self.height, self.width):
            raise DataError(
                f"{self.name} is {image.shape[1]} x {image.shape[0]} pixels (upright), but its record says "
                f"{self.width} x {self.height}; picture and mask do not belong together."
            )
        return image


def _encode(value: Any, kinds: Mapping[str, str]) -> dict[str, Any]:
    out = {}
    for name, kind in kinds.items():
        field = getattr(value, name)
        if kind not in _CONVERT:
            field = json.dumps(field)
        out[name] = _bytes(field) if isinstance(field, str) else field
    return out


def _columns(record: bytes) -> dict[str, list[Any]]:
    """A tf.Example's features by name, "queries/phrase" and so on."""
    from tensorflow_datasets.proto import tf_example_pb2

    example = tf_example_pb2.Example.FromString(record)  # pyright: ignore[reportAttributeAccessIssue]
    features = example.features.feature
    return {name: list(getattr(value, value.WhichOneof("kind")).value) for name, value in features.items()}


def _decode(columns: Mapping[str, list[Any]], kinds: Mapping[str, str], prefix: str = "") -> dict[str, list]:
    """Fields by name; those that an older build does not have are left to their defaults."""
    return {
        name: [_CONVERT.get(kind, _from_json)(value) for value in columns[prefix + name]]
        for name, kind in kinds.items()
        if prefix + name in columns
    }


def _bytes(text: str) -> bytes:
    return text.encode("utf-8", "surrogatepass")  # JSON may spell lone surrogates


def _text(data: bytes) -> str:
    return data.decode("utf-8", "surrogatepass")


def _from_json(data: bytes) -> Any:
    value = json.loads(data)
    return tuple(value) if isinstance(value, list) else value


_CONVERT = {"str": _text, "bool": bool, "int": int, "float": float}  # any other type is stored as its JSON
