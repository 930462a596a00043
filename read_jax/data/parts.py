"""Sets of objects and their parts in COCO's format: Pascal-Part and PACO-LVIS.

Layouts, under the data folder:

    vlpart/pascal_part/train.json                          vlpart/pascal_part/VOCdevkit/VOC2010/JPEGImages/X
    vlpart/paco/annotations/paco_lvis_v1_train.json        coco/train2017/X ("train2017/X" in the file)

An item is a picture, in the order of file names; each annotation is a question, in the file's order, with
only its own mask: instances of one class stay apart. `ref_id` is the annotation's id. A picture without
annotations keeps its place, with no questions. The masks hold 0 and 1.

Categories are named "object" or "object:part". A part is called "dog head", its other wording
(`alternatives`) is "the head of the dog". Of PACO's names the explanation is cut:
"mouse_(computer_equipment)" is "mouse".
`absent` names the categories without an annotation in the picture; PACO was annotated from lists of chosen
classes per picture, so such an object may yet be seen there, as it may in the original.

Where `compat="read"` differs from the default:

- Underscores stay in the names ("trash_can"); by default they are read as spaces.
- A category is offered as absent even if another one of the same name is in the picture.
- An annotation with an empty segmentation stays a question, whose mask raises `DataError`, as the original
  fails on it; by default it is left out.

Reference: the original's `utils/sem_seg_dataset.py`; PACO's and VLPart's own formats.
"""

from __future__ import annotations

import dataclasses
from array import array
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np

from read_jax.data.files import read_json, read_picture
from read_jax.data.item import Compat, Item, Query
from read_jax.data.sources import unknown_split
from read_jax.errors import DataError
from read_jax.images.masks import CompactMask, MaskError
from read_jax.images.polygons import coco_mask

_FILES = {  # family -> (annotations, folder of the pictures)
    "pascal_part": ("vlpart/pascal_part/train.json", "vlpart/pascal_part/VOCdevkit/VOC2010/JPEGImages"),
    "paco_lvis": ("vlpart/paco/annotations/paco_lvis_v1_train.json", "coco"),
}

Wordings = tuple[str, ...]
"""The name of a category, then the other ways to say it."""


@dataclasses.dataclass(frozen=True)
class Picture:
    """A picture of the annotation file; size in pixels, upright."""

    id: int
    file_name: str
    height: int
    width: int


@dataclasses.dataclass(frozen=True)
class Annotation:
    """One object or part of a picture."""

    id: int
    category_id: int
    segmentation: Any
    """Polygons or RLE; checked when its mask is asked for."""


@dataclasses.dataclass(frozen=True)
class Parts:
    """The train split of such a set; see the module."""

    name: str
    compat: Compat
    file: Path
    folder: Path
    """What file names are relative to."""
    categories: dict[int, Wordings]
    """In the order of their ids."""
    pictures: tuple[Picture, ...]
    annotations: dict[int, tuple[Annotation, ...]]
    """Of each picture's id."""

    def __len__(self) -> int:
        return len(self.pictures)

    def __getitem__(self, index: int) -> Item:
        picture = self.pictures[index]
        annotations = self.annotations.get(picture.id, ())
        absent = self._absent({a.category_id for a in annotations})
        if self.compat is None:
            annotations = tuple(a for a in annotations if not _is_empty(a.segmentation))
        wordings = [self.categories[a.category_id] for a in annotations]
        path = str(self.folder / picture.file_name)
        stated_by = f"its size in {self.file} (image {picture.id})"
        return Item(
            key=f"train/{picture.id}",
            height=picture.height,
            width=picture.width,
            image_path=path,
            queries=tuple(
                Query(words[0], ref_id=a.id, sent_id=0, alternatives=words[1:])
                for words, a in zip(wordings, annotations, strict=True)
            ),
            load_image=partial(read_picture, path, picture.height, picture.width, stated_by),
            load_mask=partial(_mask, self.file, picture, annotations),
            absent=tuple(words[0] for words in absent),
            absent_alternatives=tuple(words[1:] for words in absent),
        )

    def _absent(self, present: set[int]) -> list[Wordings]:
        absent = [words for i, words in self.categories.items() if i not in present]
        if self.compat == "read":
            return absent
        there = {self.categories[i] for i in present}
        return [words for words in dict.fromkeys(absent) if words not in there]


def load(family: str, split: str, data_dir: Path, compat: Compat) -> Parts:
    """The source of pascal_part or paco_lvis.

    Raises `DataError`: unknown split, a missing or malformed file, an annotation of an unknown picture or
    category.
    """
    if split != "train":
        raise unknown_split(family, split, ("train",))
    name, folder = _FILES[family]
    file = data_dir / name
    content = read_json(file, f"{family}'s annotations")
    if not isinstance(content, dict):
        raise DataError(f"{file} must hold one object with images, annotations and categories.")
    categories = {
        _integer(record, "id", where): _wordings(_text(record, "name", where), family, compat)
        for record, where in _records(content, "categories", file)
    }
    pictures = [
        Picture(
            _integer(record, "id", where),
            _text(record, "file_name", where),
            _integer(record, "height", where, least=1),
            _integer(record, "width", where, least=1),
        )
        for record, where in _records(content, "images", file)
    ]
    return Parts(
        f"{family}|{split}",
        compat,
        file,
        data_dir / folder,
        dict(sorted(categories.items())),
        tuple(sorted(pictures, key=lambda p: (p.file_name, p.id))),
        _by_picture(content, file, {p.id for p in pictures}, set(categories)),
    )


def _by_picture(
    content: dict[str, Any], file: Path, pictures: set[int], categories: set[int]
) -> dict[int, tuple[Annotation, ...]]:
    found: dict[int, list[Annotation]] = {}
    for record, where in _records(content, "annotations", file):
        annotation = Annotation(
            _integer(record, "id", where),
            _integer(record, "category_id", where),
            _packed(record.get("segmentation")),
        )
        picture = _integer(record, "image_id", where)
        if picture not in pictures:
            raise DataError(f"{file}: annotation {annotation.id} is of image {picture}, which is not listed.")
        if annotation.category_id not in categories:
            raise DataError(
                f"{file}: annotation {annotation.id} is of category {annotation.category_id}, which is not "
                "listed."
            )
        found.setdefault(picture, []).append(annotation)
    return {picture: tuple(annotations) for picture, annotations in found.items()}


def _wordings(name: str, family: str, compat: Compat) -> Wordings:
    """The ways to say a category's name, "object" or "object:part"."""
    words = name.split(":", 1)
    if family == "paco_lvis":
        words = [word.partition("_(")[0] for word in words]
    if compat is None:
        words = [word.replace("_", " ") for word in words]
    if len(words) == 1:
        return (words[0],)
    whole, part = words
    return (f"{whole} {part}", f"the {part} of the {whole}")


def _mask(file: Path, picture: Picture, annotations: tuple[Annotation, ...], index: int) -> CompactMask:
    annotation = annotations[index]
    segmentation = annotation.segmentation
    if isinstance(segmentation, tuple):  # packed
        segmentation = [np.asarray(polygon) for polygon in segmentation]
    try:
        if _is_empty(segmentation):
            raise MaskError("its segmentation is empty.")
        return coco_mask(segmentation, picture.height, picture.width)
    except MaskError as error:
        raise DataError(f"{file}: annotation {annotation.id} of {picture.file_name}: {error}") from None


def _is_empty(segmentation: Any) -> bool:
    return segmentation is None or (isinstance(segmentation, list | tuple | dict) and not segmentation)


def _packed(segmentation: Any) -> Any:
    """The same with its polygons as arrays, a quarter of the memory; unchanged if malformed."""
    if not isinstance(segmentation, list):
        return segmentation
    try:
        return tuple(array("d", polygon) for polygon in segmentation)
    except (TypeError, OverflowError):
        return segmentation  # refused when its mask is asked for


def _records(content: dict[str, Any], key: str, file: Path) -> list[tuple[dict[str, Any], str]]:
    """The records of a list in the file, each with the words that say where it is."""
    records = content.get(key)
    if not isinstance(records, list) or not all(isinstance(record, dict) for record in records):
        raise DataError(f"{file} has no list {key!r} of objects.")
    return [(record, f"{file}: {key}[{i}]") for i, record in enumerate(records)]


def _integer(record: dict[str, Any], key: str, where: str, least: int | None = None) -> int:
    value = record.get(key)
    if type(value) is not int or (least is not None and value < least):
        raise DataError(f"{where} has no whole number {key!r}{f' of at least {least}' if least else ''}.")
    return value


def _text(record: dict[str, Any], key: str, where: str) -> str:
    value = record.get(key)
    if not isinstance(value, str) or not value:
        raise DataError(f"{where} has no text {key!r}.")
    return value
