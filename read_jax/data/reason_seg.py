"""ReasonSeg: pictures with questions that take reasoning, and with questions whose premise is false.

On disk: DATA/reason_seg/ReasonSeg/{train,val,test}/NAME.jpg, each with a NAME.json of the labelme kind.
"""

from __future__ import annotations

import dataclasses
import json
from functools import cached_property, partial
from pathlib import Path
from typing import Any

import numpy as np

from read_jax.data.item import Compat, Item, Query
from read_jax.data.sources import unknown_split
from read_jax.errors import DataError
from read_jax.images.decode import image_size, read_image
from read_jax.images.masks import CompactMask
from read_jax.images.polygons import fill_polygon

SPLITS = ("train", "val", "test")
KINDS = ("short", "long")
"""Of queries: short ones name a thing, long ones are sentences."""
TARGET, IGNORE = 1, 255
_INT32 = 2**31


def load(family: str, split: str, data_dir: Path, compat: Compat) -> ReasonSeg:
    """The pictures of a split, by file name.

    Args:
        split: "train", "val" or "test"; several joined ("val_test"), one after the other; optionally
            "|short" or "|long" behind it, for the queries that are phrases or sentences.
        compat: "read" asks, of val and test, only the first text, as the published numbers did; None asks
            the false premises too.

    Raises:
        DataError: unknown split, missing folder, or a description that is missing or malformed.
    """
    names, bar, kind = split.partition("|")
    parts = names.split("_")
    if not set(parts) <= set(SPLITS) or len(set(parts)) < len(parts) or (bar and kind not in KINDS):
        raise unknown_split(family, split, (*SPLITS, "val_test", "test|short", "test|long"))
    records = [record for part in parts for record in _read_folder(data_dir / "reason_seg/ReasonSeg" / part)]
    return ReasonSeg(f"{family}|{split}", records, kind, compat)


class ReasonSeg:
    """A `Source` of ReasonSeg pictures; `item.load_image` decodes the file beside the description."""

    def __init__(self, name: str, records: list[Record], kind: str, compat: Compat):
        self.name = name
        self.compat: Compat = compat
        self._records = [
            (record, chosen)
            for position, record in enumerate(records)
            if (chosen := _queries(record, position, kind, compat))
        ]
        if not self._records:
            raise DataError(f"{name}: no picture has a {kind} query.")

    def __len__(self) -> int:
        return len(self._records)

    def __getitem__(self, index: int) -> Item:
        """Raises `ImageError` when the header of the picture, which tells its size, cannot be read."""
        record, queries = self._records[index]
        height, width = image_size(record.image)
        return Item(
            key=f"{record.split}/{record.image.stem}",
            height=height,
            width=width,
            image_path=str(record.image),
            queries=queries,
            load_image=partial(read_image, record.image),
            load_mask=_Target(record, height, width),
        )


@dataclasses.dataclass(frozen=True)
class Record:
    """One description, checked.

    Attributes:
        texts: questions, or phrases, about the thing that is there.
        is_sentence: whether they are sentences.
        false_premises: (text, whether it is a sentence, answer) of things that are not there.
        shapes: (1 target or 255 ignore, its polygon int32 [n, 2] of x, y in pixels, which may leave the
            picture).
    """

    split: str
    image: Path
    texts: tuple[str, ...]
    is_sentence: bool
    false_premises: tuple[tuple[str, bool, str], ...]
    shapes: tuple[tuple[int, np.ndarray], ...]


def _queries(record: Record, position: int, kind: str, compat: Compat) -> tuple[Query, ...]:
    """What is asked about a picture; the numbers do not depend on which kind is selected."""
    validation = record.split != "train"
    texts = record.texts[:1] if validation else record.texts
    asked: list[dict[str, Any]] = [{"phrase": text, "is_sentence": record.is_sentence} for text in texts]
    if not (validation and compat == "read"):
        asked += [
            {"phrase": text, "is_sentence": is_sentence, "exists": False, "answer": answer}
            for text, is_sentence, answer in record.false_premises
        ]
    queries = [Query(**query, ref_id=position, sent_id=k) for k, query in enumerate(asked)]
    return tuple(query for query in queries if not kind or query.is_sentence == (kind == "long"))


@dataclasses.dataclass
class _Target:
    """The mask that all the texts of a picture share, painted once."""

    record: Record
    height: int
    width: int

    def __call__(self, query: int) -> CompactMask:
        return self._mask

    @cached_property
    def _mask(self) -> CompactMask:
        return CompactMask.encode(paint(self.record.shapes, self.height, self.width))


def paint(shapes: tuple[tuple[int, np.ndarray], ...], height: int, width: int) -> np.ndarray:
    """uint8 [height, width] of (value, polygon int [n, 2] of x, y), the larger below the smaller.

    Of polygons that cover equally many pixels, the earlier one ends on top.
    """
    out = np.zeros((height, width), np.uint8)
    areas = [np.count_nonzero(fill_polygon(points, height, width)) for _, points in shapes]
    # drawn a second time rather than kept: dozens of pictures of megapixels would be
    for k in sorted(range(len(shapes)), key=lambda k: (-areas[k], -k)):
        value, points = shapes[k]
        out[fill_polygon(points, height, width)] = value
    return out


def _read_folder(folder: Path) -> list[Record]:
    if not folder.is_dir():
        raise DataError(f"{folder}: there is no such folder; it should hold .jpg and .json files.")
    files = [p for p in folder.iterdir() if p.suffix in (".jpg", ".json") and not p.name.startswith(".")]
    if not any(p.suffix == ".jpg" for p in files):
        raise DataError(f"{folder} holds no .jpg files; was ReasonSeg unpacked completely?")
    # a description whose picture is missing keeps its place: its item raises, where the original is silent
    return [_read_record(image) for image in sorted({p.with_suffix(".jpg") for p in files})]


def _read_record(image: Path) -> Record:
    path = image.with_suffix(".json")
    content = _read_json(path)
    if not isinstance(content, dict):
        raise DataError(f"{path} must hold a JSON object, not {_kind(content)}.")
    texts = content.get("text")
    if not isinstance(texts, list) or not texts or not all(isinstance(text, str) for text in texts):
        raise DataError(f"{path}: 'text' must be a list of at least one string, not {_kind(texts)}.")
    is_sentence = content.get("is_sentence")
    if not isinstance(is_sentence, bool):
        raise DataError(f"{path}: 'is_sentence' must be true or false, not {_kind(is_sentence)}.")
    shapes = content.get("shapes")
    if not isinstance(shapes, list):
        raise DataError(f"{path}: 'shapes' must be a list of labelled polygons, not {_kind(shapes)}.")
    premises = content.get("false_premise_QA")
    premises = [] if premises is None else premises
    if not isinstance(premises, list) or not all(_is_premise(premise) for premise in premises):
        raise DataError(f"{path}: 'false_premise_QA' must be a list of [text, true or false, answer].")
    checked = [_shape(shape, f"{path}: shape {k}") for k, shape in enumerate(shapes)]
    return Record(
        split=image.parent.name,
        image=image,
        texts=tuple(texts),
        is_sentence=is_sentence,
        false_premises=tuple((text, flag, answer) for text, flag, answer in premises),
        shapes=tuple(shape for shape in checked if shape is not None),
    )


def _read_json(path: Path) -> Any:
    try:
        data = path.read_bytes()
    except FileNotFoundError:
        raise DataError(f"{path} is missing: the picture beside it has no description.") from None
    except OSError as error:
        raise DataError(f"{path} cannot be read: {error.strerror or error}.") from None
    try:
        text = data.decode("utf-8-sig")
    except UnicodeDecodeError:
        try:
            text = data.decode("cp1252")  # some of the dataset's own files are
        except UnicodeDecodeError as error:
            raise DataError(f"{path} is neither UTF-8 nor Windows-1252 text: {error}.") from None
    try:
        return json.loads(text)
    except (ValueError, RecursionError) as error:
        raise DataError(f"{path} is not valid JSON: {error}.") from None


def _is_premise(value: Any) -> bool:
    types = [str, bool, str]
    return isinstance(value, list) and [type(part) for part in value] == types


def _shape(shape: Any, where: str) -> tuple[int, np.ndarray] | None:
    """(value, polygon), None for a flag, which marks no pixels."""
    if not isinstance(shape, dict) or not isinstance(shape.get("label"), str):
        raise DataError(f"{where} must be an object with a 'label' and 'points'.")
    label = shape["label"].lower()
    if label == "flag":
        return None
    points = shape.get("points")
    if not isinstance(points, list) or not points or not all(_is_point(point) for point in points):
        raise DataError(f"{where} ({label!r}): 'points' must be a list of at least one [x, y] in pixels.")
    if not all(abs(v) < _INT32 for point in points for v in point):  # NaN neither
        raise DataError(f"{where} ({label!r}) has a point that is not finite, or absurdly far away.")
    pixels = np.trunc(np.array(points, np.float64)).astype(np.int32)
    return IGNORE if "ignore" in label else TARGET, pixels


def _is_point(value: Any) -> bool:
    return isinstance(value, list) and len(value) == 2 and all(type(v) in (int, float) for v in value)


def _kind(value: Any) -> str:
    """A JSON value's kind, for a message."""
    if value is None:
        return "absent or null"
    return f"{type(value).__name__} {str(value)[:40]!r}"
