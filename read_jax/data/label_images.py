"""Sets whose masks are one label image per picture: ADE20K, COCO-Stuff, Mapillary Vistas.

Layouts, under the data folder:

    ade20k/images/{training,validation}/X.jpg             ade20k/annotations/{training,validation}/X.png
    coco/train2017/X.jpg                                  cocostuff/train2017/X.png
    mapillary/{training,validation}/images/X.jpg          mapillary/{training,validation}/v2.0/labels/X.png
    mapillary/config_v2.0.json                            the class names, `labels[i].readable`

A label image is an 8-bit PNG, grey or with a palette, whose values are class numbers: ADE20K's 1 to 150 with
0 for nothing, COCO-Stuff's 0 to 181 (its names without "unlabeled"), Mapillary's positions in its own list.
255 is ignored everywhere.

An item is a picture, in the order of file names; each class in it is a question, in the order of class
numbers. A picture without any class keeps its place, with no questions. `ref_id` is the class's number.
The masks hold 0 and 1.

Where `compat="read"` differs:

- COCO-Stuff: classes with a hyphen in the name ("wall-brick") are never asked for, and are offered as absent
  even where they are in the picture. By default they are classes like the others.
- Mapillary: several classes may share a readable name. The original asks once for each, always with the mask
  of the first (which may be empty), and offers the name as absent when one of them is missing. By default
  such classes are one, its mask their union.
- Mapillary: "unlabeled" is an ordinary class. By default it is nothing.

Reference: the original's `utils/sem_seg_dataset.py`; names from the datasets' own lists.
"""

from __future__ import annotations

import dataclasses
import json
from functools import partial
from importlib.resources import files
from pathlib import Path

import numpy as np
from PIL import Image

from read_jax.data.files import read_json, read_picture
from read_jax.data.item import Compat, Item, Query
from read_jax.data.sources import unknown_split
from read_jax.errors import DataError
from read_jax.images.decode import MAX_PIXELS
from read_jax.images.masks import CompactMask

IGNORED = 255


@dataclasses.dataclass(frozen=True)
class Vocabulary:
    """The classes of a set by their number, and which of them are asked for.

    Attributes:
        names: the name of each number.
        mask_ids: the numbers whose pixels are the mask of each number; the first is what it is known by.
        unasked: numbers that are never asked for.
        unsaid: numbers whose names are never offered as absent.
        present_by_name: absent is a name that no class of the picture has, and each such name once;
            otherwise every asked number that is not in the picture, as the original has it.
    """

    names: tuple[str, ...]
    mask_ids: tuple[tuple[int, ...], ...]
    unasked: frozenset[int] = frozenset()
    unsaid: frozenset[int] = frozenset()
    present_by_name: bool = True

    def asked(self, present: list[int]) -> list[int]:
        """The numbers to ask for, of those in a picture."""
        wanted = [i for i in present if i not in self.unasked]
        if not self.present_by_name:
            return wanted
        return sorted({self.mask_ids[i][0] for i in wanted})

    def absent(self, present: list[int]) -> tuple[str, ...]:
        """The names to offer as not in a picture."""
        if not self.present_by_name:
            asked = set(self.asked(present))
            return tuple(name for i, name in enumerate(self.names) if i not in asked)
        there = {self.names[i] for i in present}
        names = (name for i, name in enumerate(self.names) if i not in self.unsaid)
        return tuple(name for name in dict.fromkeys(names) if name not in there)


@dataclasses.dataclass(frozen=True)
class LabelImages:
    """One split of such a set; see the module."""

    name: str
    compat: Compat
    vocabulary: Vocabulary
    pictures: tuple[Path, ...]
    labels: tuple[Path, ...]
    ids_from: int
    """The pixel value of class 0; lower values are nothing."""

    def __len__(self) -> int:
        return len(self.pictures)

    def __getitem__(self, index: int) -> Item:
        """Reads the label image. Raises `DataError` when it is missing, damaged or holds an unknown class."""
        picture, path = self.pictures[index], self.labels[index]
        classes = _read_classes(path, self.ids_from, len(self.vocabulary.names), self.name)
        present = [int(i) for i in np.flatnonzero(np.bincount(classes.reshape(-1))) if i != IGNORED]
        asked = self.vocabulary.asked(present)
        mask_ids = [self.vocabulary.mask_ids[i] for i in asked]
        height, width = classes.shape
        return Item(
            key=f"{self.name.partition('|')[2]}/{picture.stem}",
            height=height,
            width=width,
            image_path=str(picture),
            queries=tuple(
                Query(self.vocabulary.names[i], ref_id=ids[0], sent_id=0)
                for i, ids in zip(asked, mask_ids, strict=True)
            ),
            load_image=partial(read_picture, str(picture), height, width, f"its label image {path}"),
            load_mask=partial(_mask, classes, mask_ids),
            absent=self.vocabulary.absent(present),
        )


def load(family: str, split: str, data_dir: Path, compat: Compat) -> LabelImages:
    """The source of ade20k, cocostuff or mapillary. Raises `DataError`: unknown split, missing folders."""
    layout, splits, vocabulary = {
        "ade20k": (_ade20k, ("train", "val"), _ade20k_classes),
        "cocostuff": (_cocostuff, ("train",), _cocostuff_classes),
        "mapillary": (_mapillary, ("train", "val"), _mapillary_classes),
    }[family]
    if split not in splits:
        raise unknown_split(family, split, splits)
    pictures, labels = layout(data_dir, {"train": "training", "val": "validation"}[split])
    return LabelImages(
        f"{family}|{split}",
        compat,
        vocabulary(data_dir, compat),
        tuple(pictures),
        tuple(labels),
        ids_from=1 if family == "ade20k" else 0,
    )


_Files = tuple[list[Path], list[Path]]


def _ade20k(data_dir: Path, folder: str) -> _Files:
    base = data_dir / "ade20k"
    pictures = _listed(base / "images" / folder, ".jpg", "ADE20K's pictures")
    return pictures, [base / "annotations" / folder / f"{p.stem}.png" for p in pictures]


def _cocostuff(data_dir: Path, folder: str) -> _Files:
    labels = _listed(data_dir / "cocostuff" / "train2017", ".png", "COCO-Stuff's label images")
    return [data_dir / "coco" / "train2017" / f"{p.stem}.jpg" for p in labels], labels


def _mapillary(data_dir: Path, folder: str) -> _Files:
    base = data_dir / "mapillary" / folder
    labels = _listed(base / "v2.0" / "labels", ".png", "Mapillary's label images")
    return [base / "images" / f"{p.stem}.jpg" for p in labels], labels


def _listed(folder: Path, suffix: str, what: str) -> list[Path]:
    if not folder.is_dir():
        raise DataError(f"{folder}: there is no such folder; it should hold {what} (*{suffix}).")
    found = sorted(p for p in folder.iterdir() if p.suffix == suffix and not p.name.startswith("."))
    if not found:
        raise DataError(f"{folder} holds no {suffix} file; it should hold {what}.")
    return found


def _bundled(family: str) -> tuple[str, ...]:
    text = (files("read_jax.data") / "class_lists" / f"{family}.json").read_text("utf-8")
    return tuple(json.loads(text))


def _ade20k_classes(data_dir: Path, compat: Compat) -> Vocabulary:
    names = _bundled("ade20k")
    return Vocabulary(names, tuple((i,) for i in range(len(names))))


def _cocostuff_classes(data_dir: Path, compat: Compat) -> Vocabulary:
    names = _bundled("cocostuff")
    own = tuple((i,) for i in range(len(names)))
    if compat is None:
        return Vocabulary(names, own)
    hyphens = frozenset(i for i, name in enumerate(names) if "-" in name)
    return Vocabulary(names, own, unasked=hyphens, present_by_name=False)


def _mapillary_classes(data_dir: Path, compat: Compat) -> Vocabulary:
    path = data_dir / "mapillary" / "config_v2.0.json"
    config = read_json(path, "Mapillary's list of classes")
    try:
        names = tuple(label["readable"].lower() for label in config["labels"])
    except (TypeError, KeyError, AttributeError):
        raise DataError(f"{path} has no list `labels` of classes with a text `readable` each.") from None
    if compat == "read":
        return Vocabulary(names, tuple((names.index(n),) for n in names), present_by_name=False)
    same = {name: tuple(i for i, other in enumerate(names) if other == name) for name in names}
    nothing = frozenset(i for i, name in enumerate(names) if name == "unlabeled")
    return Vocabulary(names, tuple(same[name] for name in names), unasked=nothing, unsaid=nothing)


def _read_classes(path: Path, ids_from: int, count: int, name: str) -> np.ndarray:
    """uint8 [h, w]: the class of each pixel, 255 where there is none."""
    label = _read_label(path)
    if ids_from:
        label = np.where((label < ids_from) | (label == IGNORED), IGNORED, label - np.uint8(ids_from))
        label = label.astype(np.uint8)
    beyond = label[(label >= count) & (label != IGNORED)]
    if beyond.size:
        raise DataError(
            f"{path} holds the class {int(beyond[0]) + ids_from} ({beyond.size} pixels), but the classes of "
            f"{name.partition('|')[0]} are {ids_from} to {count - 1 + ids_from} (255: ignored)."
        )
    return label


def _read_label(path: Path) -> np.ndarray:
    """uint8 [h, w] as stored: palette indices, not colours."""
    try:
        with Image.open(path, formats=("PNG",)) as image:
            if image.mode not in ("L", "P"):
                raise DataError(
                    f"{path} is a PNG of type {image.mode}; a label image has 8 bits per pixel, grey or "
                    "with a palette."
                )
            if image.width * image.height > MAX_PIXELS:
                raise DataError(f"{path} is too large: {image.width} x {image.height} pixels.")
            return np.array(image)
    except DataError:
        raise
    except FileNotFoundError:
        raise DataError(f"{path}: there is no such label image for its picture.") from None
    except Exception as error:  # damaged files raise nearly anything from Pillow's readers
        raise DataError(f"{path} cannot be read as a PNG ({type(error).__name__}: {error}).") from None


def _mask(classes: np.ndarray, mask_ids: list[tuple[int, ...]], index: int) -> CompactMask:
    return CompactMask.encode(np.isin(classes, mask_ids[index]))
