"""Referring expressions: RefCOCO, RefCOCO+, RefCOCOg, RefClef, and their sets with false premises.

On disk, below DATA/refer_seg: SET/instances.json, in COCO's format, has the pictures and annotations;
SET/refs(AUTHOR).p, a pickle, the references: phrases, each about one annotation. The same pair serves all
splits.
"""

from __future__ import annotations

import dataclasses
import json
import re
from collections.abc import Iterator, Sequence
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np

from read_jax.data.files import read_picture
from read_jax.data.item import Compat, Item, Query
from read_jax.data.plain_pickle import load_plain_pickle
from read_jax.data.sources import unknown_split
from read_jax.errors import DataError
from read_jax.images.decode import MAX_PIXELS
from read_jax.images.masks import CompactMask, MaskError
from read_jax.images.polygons import coco_mask, coco_piece_sum

NO_OBJECT = -1
"""The annotation of a reference to nothing."""
_SPLIT_BY = {
    "refclef": "unc",
    "refcoco": "unc_exclude_unified",
    "refcoco+": "unc_exclude_unified",
    "refcocog": "umd_exclude_unified",
    "R-refcoco": "unc_exclude_unified",
    "R-refcoco+": "unc_exclude_unified",
    "R-refcocog": "umd_exclude_unified",
    "fprefcoco": "berkeley_exclude_unified",
    "fprefcoco+": "berkeley_exclude_unified",
    "fprefcocog": "berkeley_exclude_unified",
}
"""Who divided each set into splits: part of the name of its file."""
_SPLIT_NAMES = ("train", "val", "test", "testA", "testB", "testC", "testAB", "testBC", "testAC")


def load(family: str, split: str, data_dir: Path, compat: Compat) -> ReferSource:
    """The pictures of a split, each with all the phrases of its references, in the order of the file.

    Args:
        split: "train" or "val"; "test", which joins all splits with test in their name; "testA", "testB" and
            "testC", which take the splits with that letter (testAB too); "testAB" and the like.
        compat: None orders the pictures by number and unites the polygons of an object. "read" keeps the
            original's order, and its masks: pieces summed, so that 2 stands where two overlap, and in no
            bin of the metrics; of several annotations in one reference the bitwise or.

    Raises:
        DataError: unknown split, or one without references; files missing or malformed.
    """
    root = data_dir / "refer_seg"
    references_file = root / family / f"refs({_SPLIT_BY[family]}).p"
    found = load_plain_pickle(references_file)
    if not isinstance(found, list):
        raise DataError(f"{references_file} must hold a list of references, not {type(found).__name__}.")
    splits = [_split_of(entry, n, references_file) for n, entry in enumerate(found)]
    chosen = [n for n, name in enumerate(splits) if _in_split(name, split)]
    if not chosen:
        known = [name for name in _SPLIT_NAMES if any(_in_split(other, name) for other in set(splits))]
        raise unknown_split(family, split, (*known, *sorted(set(splits) - set(known))))
    references = [_reference(found[n], f"{references_file}: reference {n}") for n in chosen]
    del found
    images, segmentations = _read_instances(root / family / "instances.json", references)
    pictures = root / ("images/saiapr_tc-12" if family == "refclef" else "images/mscoco/images/train2014")
    return ReferSource(f"{family}|{split}", compat, references, images, segmentations, pictures)


class ReferSource:
    """A `Source` of pictures with referring expressions; holds its own split's annotations only."""

    def __init__(
        self,
        name: str,
        compat: Compat,
        references: Sequence[Reference],
        images: dict[int, _Picture],
        segmentations: dict[int, Any],
        pictures: Path,
    ):
        self.name = name
        self.compat: Compat = compat
        self._split = name.partition("|")[2]
        self._folder = pictures
        self._images = images
        self._segmentations = segmentations
        self._references: dict[int, list[Reference]] = {}
        for reference in references:
            if reference.sentences:
                self._references.setdefault(reference.image_id, []).append(reference)
        ids = [reference.image_id for reference in references]
        # the original's order is that in which CPython's set gives integers added in the order of the file
        order = list(set(ids)) if compat == "read" else sorted(set(ids))
        self._order = [image_id for image_id in order if image_id in self._references]

    def __len__(self) -> int:
        return len(self._order)

    def __getitem__(self, index: int) -> Item:
        image_id = self._order[index]
        picture = self._images[image_id]
        queries, ann_ids = [], []
        for reference in self._references[image_id]:
            for k, (phrase, exists, correction) in enumerate(reference.sentences):
                ann_ids.append(reference.ann_ids)
                queries.append(
                    Query(phrase, exists=exists, correction=correction, ref_id=reference.ref_id, sent_id=k)
                )
        used = {a: self._segmentations[a] for group in ann_ids for a in group if a in self._segmentations}
        path = self._folder / picture.file_name
        return Item(
            key=f"{self._split}/{image_id}",
            height=picture.height,
            width=picture.width,
            image_path=str(path),
            queries=tuple(queries),
            load_image=partial(
                read_picture, str(path), picture.height, picture.width, "its entry in instances.json"
            ),
            load_mask=_Targets(self.name, used, tuple(ann_ids), picture.height, picture.width, self.compat),
        )


@dataclasses.dataclass(frozen=True, slots=True)
class Reference:
    """An object of a picture and what it is called.

    Attributes:
        ann_ids: its annotations; `NO_OBJECT` for none.
        sentences: (phrase, whether it is in the picture, what is there instead or "").
    """

    ref_id: int
    image_id: int
    ann_ids: tuple[int, ...]
    sentences: tuple[tuple[str, bool, str], ...]


@dataclasses.dataclass(frozen=True, slots=True)
class _Picture:
    file_name: str
    height: int
    width: int


@dataclasses.dataclass(frozen=True)
class _Targets:
    """The masks of a picture's queries."""

    name: str
    segmentations: dict[int, Any]
    ann_ids: tuple[tuple[int, ...], ...]
    height: int
    width: int
    compat: Compat

    def __call__(self, query: int) -> CompactMask:
        try:
            return target_mask(self.segmentations, self.ann_ids[query], self.height, self.width, self.compat)
        except DataError as error:
            raise DataError(f"{self.name}: {error}") from None


def target_mask(
    segmentations: dict[int, Any], ann_ids: Sequence[int], height: int, width: int, compat: Compat
) -> CompactMask:
    """The mask of a reference to some annotations.

    segmentations: COCO's, by annotation. `NO_OBJECT` among ann_ids is passed over; with compat "read" it
    makes the whole mask empty.

    Raises `DataError`, naming the annotation, when a segmentation is malformed, of another size than the
    picture, or outside of it.
    """
    if compat == "read" and NO_OBJECT in ann_ids:
        return CompactMask(height, width)
    objects = [a for a in ann_ids if a != NO_OBJECT]
    if compat is None and len(objects) == 1:  # nothing to unite: the encoding need not be expanded
        return _annotation(coco_mask, segmentations, objects[0], height, width)
    out = np.zeros((height, width), np.uint8)
    for ann_id in objects:
        if compat == "read":
            out |= _annotation(coco_piece_sum, segmentations, ann_id, height, width)
        else:
            out |= _annotation(coco_mask, segmentations, ann_id, height, width).decode()
    return CompactMask.encode(out)


def _annotation(draw: Any, segmentations: dict[int, Any], ann_id: int, height: int, width: int) -> Any:
    try:
        return draw(segmentations[ann_id], height, width)
    except MaskError as error:
        raise DataError(f"annotation {ann_id}: {error}") from None


def _in_split(name: str, wanted: str) -> bool:
    if wanted == "test":
        return "test" in name
    if wanted in ("testA", "testB", "testC"):
        return wanted[-1] in name
    return name == wanted


def _split_of(entry: Any, position: int, path: Path) -> str:
    if not isinstance(entry, dict) or not isinstance(entry.get("split"), str):
        raise DataError(f"{path}: reference {position} must be a mapping with a 'split'.")
    return entry["split"]


def _reference(entry: dict[str, Any], where: str) -> Reference:
    ann_id = entry.get("ann_id")
    ann_ids: list[Any] = list(ann_id) if isinstance(ann_id, list | tuple) else [ann_id]
    numbers = {"ref_id": [entry.get("ref_id")], "image_id": [entry.get("image_id")], "ann_id": ann_ids}
    for key, values in numbers.items():
        if not values or not all(type(value) is int for value in values):
            raise DataError(f"{where}: {key!r} must be an integer, not {entry.get(key)!r}.")
    sentences = entry.get("sentences")
    if not isinstance(sentences, list | tuple):
        raise DataError(f"{where}: 'sentences' must be a list, not {type(sentences).__name__}.")
    return Reference(
        ref_id=entry["ref_id"],
        image_id=entry["image_id"],
        ann_ids=tuple(ann_ids),
        sentences=tuple(_sentence(s, f"{where}, sentence {k}") for k, s in enumerate(sentences)),
    )


def _sentence(sentence: Any, where: str) -> tuple[str, bool, str]:
    if not isinstance(sentence, dict) or not isinstance(sentence.get("sent"), str):
        raise DataError(f"{where} must be a mapping with the text as 'sent'.")
    key = "is_false_premise" if "is_false_premise" in sentence else "exist"
    flag = sentence.get(key, True)
    if not isinstance(flag, bool | int) or flag not in (0, 1):
        raise DataError(f"{where}: {key!r} must be true or false (or 1 or 0), not {flag!r}.")
    correction = sentence.get("gt_sent", "")
    if not isinstance(correction, str):
        raise DataError(f"{where}: 'gt_sent' must be a text, not {correction!r}.")
    return sentence["sent"], bool(flag) != (key == "is_false_premise"), correction


def _read_instances(
    path: Path, references: Sequence[Reference]
) -> tuple[dict[int, _Picture], dict[int, Any]]:
    """The pictures, and the segmentations by annotation, that references need, of an instances.json."""
    image_ids = {r.image_id for r in references}
    ann_ids = {a for r in references if any(s[1] for s in r.sentences) for a in r.ann_ids} - {NO_OBJECT}
    images: dict[int, _Picture] = {}
    segmentations: dict[int, Any] = {}
    for key, position, entry in _array_elements(path):
        if key not in ("images", "annotations"):
            continue
        if not isinstance(entry, dict) or type(entry.get("id")) is not int:
            raise DataError(f"{path}: entry {position} of {key!r} must be an object with an integer 'id'.")
        if key == "images" and entry["id"] in image_ids:
            images[entry["id"]] = _picture(entry, f"{path}: image {entry['id']}")
        elif key == "annotations" and entry["id"] in ann_ids:
            if "segmentation" not in entry:
                raise DataError(f"{path}: annotation {entry['id']} has no 'segmentation'.")
            segmentations[entry["id"]] = _slim(entry["segmentation"])
    for what, missing in (
        ("image", image_ids - images.keys()),
        ("annotation", ann_ids - segmentations.keys()),
    ):
        if missing:
            raise DataError(
                f"{path} has no {what} {min(missing)}, which references are about ({len(missing)} such); it "
                "and the references must come from the same release."
            )
    return images, segmentations


def _picture(entry: dict[str, Any], where: str) -> _Picture:
    name, height, width = entry.get("file_name"), entry.get("height"), entry.get("width")
    if not isinstance(name, str) or not name or Path(name).is_absolute() or ".." in Path(name).parts:
        raise DataError(f"{where}: 'file_name' must be a path below the folder of pictures, not {name!r}.")
    if type(height) is not int or type(width) is not int or min(height, width) < 1:
        raise DataError(f"{where}: 'height', 'width' must be numbers of pixels, not {height!r}, {width!r}.")
    if height * width > MAX_PIXELS:
        raise DataError(f"{where} has {height}x{width} pixels; pictures of up to {MAX_PIXELS:,} are read.")
    return _Picture(name, height, width)


def _slim(segmentation: Any) -> Any:
    """Polygons as arrays, a quarter of the memory; whatever is not one stays, to be reported when drawn."""
    if not isinstance(segmentation, list):
        return segmentation
    return [_slim_polygon(piece) if isinstance(piece, list) else piece for piece in segmentation]


def _slim_polygon(piece: list[Any]) -> Any:
    if all(type(value) in (int, float) for value in piece):
        try:
            return np.array(piece, np.float64)
        except OverflowError:  # an integer beyond any float
            return piece
    return piece


def _array_elements(path: Path) -> Iterator[tuple[str, int, Any]]:
    """(key, position, element) of the arrays in a file's JSON object, one element in memory at a time.

    The files have hundreds of megabytes, of which a split needs a part.
    """
    try:
        text = path.read_text("utf-8-sig")
    except FileNotFoundError:
        raise DataError(f"{path}: there is no such file.") from None
    except (OSError, UnicodeDecodeError) as error:
        raise DataError(f"{path} cannot be read: {error}.") from None
    try:
        yield from _parse_arrays(text)
    except (json.JSONDecodeError, RecursionError) as error:
        raise DataError(f"{path} is not valid JSON of an object: {error}.") from None


def _parse_arrays(text: str) -> Iterator[tuple[str, int, Any]]:
    value = json.JSONDecoder().raw_decode
    space = re.compile(r"[ \t\n\r]*")

    def skip(at: int) -> int:
        return space.match(text, at).end()  # type: ignore[union-attr] - it matches anywhere

    def expect(characters: str, at: int) -> int:
        at = skip(at)
        if text[at : at + 1] not in tuple(characters):
            raise json.JSONDecodeError(f"Expecting {' or '.join(map(repr, characters))}", text, at)
        return at

    at = skip(expect("{", 0) + 1)
    while text[at : at + 1] != "}":
        key, at = value(text, expect('"', at))
        at = skip(expect(":", at) + 1)
        if text[at : at + 1] == "[":
            at, position = skip(at + 1), 0
            while text[at : at + 1] != "]":
                element, at = value(text, at)
                yield key, position, element
                position += 1
                at = expect(",]", at)
                at = skip(at + 1) if text[at] == "," else at
            at += 1
        else:
            _, at = value(text, at)
        at = expect(",}", at)
        at = skip(at + 1) if text[at] == "," else at
    if skip(at + 1) != len(text):
        raise json.JSONDecodeError("Extra data", text, at + 1)
