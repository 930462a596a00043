"""Datasets of one's own: a text file with one record per line (JSON lines, UTF-8).

    {"image": "kitchen.jpg", "class": "the kettle", "mask": [[210, 80], [305, 84], [300, 190], [214, 186]]}
    {"image": "kitchen.jpg", "question": "What boils the water?", "mask": "masks/kettle.png"}
    {"image": "kitchen.jpg", "class": "dog", "exists": false, "correction": "the cat"}

A record is one question about one picture; records of the same picture become one item, in the file's order.
Blank lines are skipped. Its keys:

    image       the picture's path, relative to the file's folder or to the data folder given
    question    asked as it is; or
    class       the name of a thing, put into a question ("What is ... in this image? ...")
    mask        what is meant: one shape or a list of shapes, united ("masks" is the same)
    ignore      pixels that count neither way: one shape or a list; the mask wins where both are
    exists      true or false; default: whether there is a mask
    answer      given as it is, with [SEG] once if the thing exists and not otherwise; default: made up
    correction  of something that does not exist: what is there instead

A shape is one of

    a polygon   [[x, y], [x, y], ...] or [x, y, x, y, ...], pixels of the upright picture, x to the right and
                y down from the top-left corner; drawn as pycocotools does, cut off at the picture's edge
    an RLE      {"size": [height, width], "counts": ...}, COCO's, compressed or not
    a PNG       its path; of the picture's size; grey, palette or RGB, without transparency. What is not 0 (of
                a palette: index 0; of RGB: black) is meant. Only where a grey or palette PNG holds no other
                values than 0, 1 and 255, and at least one 1, are the 255 ignored pixels.

`load` refuses a file with a malformed record at once. What needs the picture (its size, the masks) is looked
at when the item is; `read-jax data check FILE` looks at everything and lists every broken record.
"""

from __future__ import annotations

import dataclasses
import difflib
import json
import math
import os
from array import array
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
from PIL import Image

from read_jax.data.item import Compat, Item, Query
from read_jax.errors import DataError, ImageError, PromptError
from read_jax.images.decode import MAX_PIXELS, image_size, read_image
from read_jax.images.masks import CompactMask, MaskError
from read_jax.images.polygons import coco_mask
from read_jax.text.conversation import RESERVED_TEXTS, check_question
from read_jax.text.tokenizer import SEG_TOKEN

if TYPE_CHECKING:
    from read_jax.data.check import Report

KEYS = ("image", "question", "class", "answer", "mask", "masks", "ignore", "exists", "correction")

Shape = array | dict | Path
"""A polygon's x, y, x, y, ...; an RLE; a PNG file."""


@dataclasses.dataclass(frozen=True)
class Record:
    """One line of the file, checked as far as it can be without its picture."""

    line: int
    image: str
    query: Query
    target: tuple[Shape, ...]
    ignored: tuple[Shape, ...]

    def mask(self, height: int, width: int, warn: Callable[[str], None] | None = None) -> CompactMask:
        """The target: 1, 255 ignored. `warn` is told of polygons that are cut off.

        Raises `DataError` when a shape is malformed, does not fit the picture or lies outside it, a PNG is
        missing or damaged, or the mask has no pixel.
        """
        out = np.zeros((height, width), np.uint8)
        targets = [_draw(shape, height, width, warn) for shape in self.target]
        for shape in self.ignored:
            out[_draw(shape, height, width, warn) != 0] = 255
        for drawn in targets:
            out[drawn == 255] = 255
        for drawn in targets:
            out[drawn == 1] = 1
        if not (out == 1).any():
            raise DataError("the mask has no pixel; set exists to false if the thing is not in the picture.")
        return CompactMask.encode(out)


@dataclasses.dataclass(frozen=True)
class JsonLines:
    """A dataset of one's own; see the module."""

    name: str
    compat: Compat
    file: Path
    folder: Path
    """What the paths in it are relative to."""
    pictures: tuple[tuple[Record, ...], ...]
    """The records of each picture."""

    def __len__(self) -> int:
        return len(self.pictures)

    def __getitem__(self, index: int) -> Item:
        """Raises `ImageError` when the picture is missing or its header damaged."""
        records = self.pictures[index]
        path = records[0].image
        try:
            height, width = image_size(path)
        except ImageError as error:
            raise ImageError(f"{self.file}:{records[0].line}: {error}") from None
        return Item(
            key=os.path.relpath(path, self.folder),
            height=height,
            width=width,
            image_path=path,
            queries=tuple(record.query for record in records),
            load_image=partial(read_image, path),
            load_mask=partial(_mask, self.file, records, height, width),
        )


def load(name: str, data_dir: str | Path | None, compat: Compat) -> JsonLines:
    """The source of a file.

    Args:
        name: its path.
        data_dir: what the paths in it are relative to; default: its folder.
        compat: changes nothing here.

    Raises:
        DataError: the file is missing or empty, or a record is malformed ("FILE:LINE: ...").
    """
    file = Path(name).expanduser()
    folder = record_folder(file, data_dir)
    pictures: dict[str, list[Record]] = {}
    for line, text in read_lines(file):
        try:
            record = parse(text, line, folder)
        except DataError as error:
            raise DataError(f"{file}:{line}: {error}") from None
        pictures.setdefault(record.image, []).append(record)
    return JsonLines(name, compat, file, folder, tuple(tuple(records) for records in pictures.values()))


def record_folder(file: Path, data_dir: str | Path | None) -> Path:
    """What the paths in a file are relative to."""
    return file.parent if data_dir is None else Path(data_dir).expanduser()


def read_lines(file: Path) -> Iterator[tuple[int, bytes]]:
    """The number, from 1, and the text of each line that is not blank.

    Raises `DataError` when the file is missing, holds no record, or one JSON list instead.
    """
    try:
        data = file.read_bytes()
    except OSError as error:
        reason = "there is no such file" if isinstance(error, FileNotFoundError) else error.strerror
        raise DataError(f"{file}: {reason or error}.") from None
    data = data.removeprefix(b"\xef\xbb\xbf")
    if not data.strip():
        raise DataError(f"{file} holds no record.")
    if data.lstrip().startswith(b"["):
        raise DataError(
            f"{file} holds a JSON list. Write its records one per line, without the brackets and the commas "
            f"between them (jq -c '.[]' {file.name} does)."
        )
    return ((i, line) for i, line in enumerate(data.split(b"\n"), 1) if line.strip())


def parse(text: bytes, line: int, folder: Path) -> Record:
    """The record of one line. Raises `DataError` (without the place) when it is malformed."""
    try:
        record = json.loads(text.decode("utf-8"), object_pairs_hook=_once)
    except UnicodeDecodeError:
        raise DataError("is not UTF-8.") from None
    except (json.JSONDecodeError, RecursionError) as error:
        raise DataError(f"is not a JSON object on one line: {error}.") from None
    if not isinstance(record, dict):
        raise DataError("is not a JSON object {...}.")
    for key in record:
        if key not in KEYS:
            near = difflib.get_close_matches(key, KEYS, n=1)
            hint = f" Did you mean {near[0]!r}?" if near else ""
            raise DataError(f"unknown key {key!r}.{hint} Known: {', '.join(KEYS)}.")
    if {"mask", "masks"} <= record.keys():
        raise DataError("give mask or masks, not both.")
    target = _shapes(record.get("mask", record.get("masks")), "mask", folder)
    ignored = _shapes(record.get("ignore"), "ignore", folder)
    if ignored and not target:
        raise DataError("ignore is of use only beside a mask.")
    image = _text(record, "image")
    if image is None:
        raise DataError("has no image.")
    query = _query(record, bool(target), line)
    return Record(line, os.path.normpath(folder / image), query, target, ignored)


def _once(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    record = dict(pairs)
    if len(record) < len(pairs):
        keys = [key for key, _ in pairs]
        raise DataError(f"has the key {next(k for k in keys if keys.count(k) > 1)!r} twice.")
    return record


def _query(record: dict[str, Any], has_mask: bool, line: int) -> Query:
    question, name = _text(record, "question"), _text(record, "class")
    phrase = question or name
    if phrase is None or (question and name):
        raise DataError("needs a question or a class, one of the two.")
    try:
        check_question(phrase)
    except PromptError as error:
        raise DataError(str(error)) from None
    exists = record.get("exists")
    if exists is None:
        exists = has_mask
    elif not isinstance(exists, bool):
        raise DataError(f"exists must be true or false, not {exists!r}.")
    if exists and not has_mask:
        raise DataError("says that the thing exists, but has no mask.")
    if has_mask and not exists:
        raise DataError("has a mask, but says that the thing does not exist.")
    correction = _text(record, "correction") or ""
    if correction and exists:
        raise DataError("has a correction, but the thing exists.")
    return Query(
        phrase,
        exists=exists,
        is_sentence=question is not None,
        correction=correction,
        question=question,
        answer=_answer(record, exists),
        ref_id=line,
        sent_id=0,
    )


def _answer(record: dict[str, Any], exists: bool) -> str | None:
    answer = _text(record, "answer")
    if answer is None:
        return None
    for text in RESERVED_TEXTS:
        if text != SEG_TOKEN and text in answer:
            raise DataError(f"the answer contains {text}, which the tokenizer reads as a control token.")
    if answer.count(SEG_TOKEN) != exists:
        wanted = (
            f"once, where its mask is meant ('It is {SEG_TOKEN}.')" if exists else "nowhere: nothing exists"
        )
        raise DataError(f"the answer must contain {SEG_TOKEN} {wanted}.")
    return answer


def _text(record: dict[str, Any], key: str) -> str | None:
    value = record.get(key)
    if value is not None and (not isinstance(value, str) or not value.strip()):
        raise DataError(f"{key} must be text, not {json.dumps(value)[:60]}.")
    return value if value is None else _checked(value, key)


def _checked(text: str, key: str) -> str:
    """JSON can spell codes that no file name and no sentence holds."""
    if any(c == "\0" or "\ud800" <= c <= "\udfff" for c in text):
        raise DataError(f"{key} contains a code that is no character: {json.dumps(text)[:60]}.")
    return text


def _shapes(value: Any, key: str, folder: Path) -> tuple[Shape, ...]:
    """One shape or a list of them."""
    if value is None:
        return ()
    if not isinstance(value, list) or _is_polygon(value):
        value = [value]
    return tuple(_shape(shape, key, folder) for shape in value)


def _is_polygon(value: list[Any]) -> bool:
    """Whether a list is one polygon, not several shapes: numbers, or pairs."""
    first = value[0] if value else None
    return _is_number(first) or (isinstance(first, list) and len(first) == 2 and all(map(_is_number, first)))


def _is_number(value: Any) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool)


def _shape(value: Any, key: str, folder: Path) -> Shape:
    if isinstance(value, str) and value:
        return folder / _checked(value, key)
    if isinstance(value, dict) and value.keys() == {"size", "counts"}:
        return value
    if not isinstance(value, list) or not value:
        raise DataError(
            f"{key} holds {json.dumps(value)[:60]}, which is neither a polygon, nor an RLE (size and counts "
            "and nothing else), nor the path of a PNG."
        )
    pairs = isinstance(value[0], list)
    if pairs and not all(isinstance(p, list) and len(p) == 2 for p in value):
        raise DataError(f"{key} holds a polygon with a corner that is not [x, y].")
    numbers = [v for p in value for v in p] if pairs else value
    if not all(map(_is_number, numbers)):
        raise DataError(f"{key} holds a polygon with a coordinate that is not a number.")
    try:
        polygon = array("d", numbers)
    except OverflowError:
        polygon = array("d", [math.inf])
    if not all(map(math.isfinite, polygon)):
        raise DataError(f"{key} holds a polygon with a coordinate that is not finite.")
    if len(polygon) < 6 or len(polygon) % 2:
        raise DataError(
            f"{key} holds a polygon of {len(polygon)} numbers; it needs 3 corners (x, y) or more."
        )
    return polygon


def _draw(shape: Shape, height: int, width: int, warn: Callable[[str], None] | None) -> np.ndarray:
    """uint8 [h, w] of one shape: 1 meant, 255 ignored."""
    if isinstance(shape, Path):
        return _read_png(shape, height, width)
    try:
        drawn = coco_mask(shape if isinstance(shape, dict) else [np.asarray(shape)], height, width).decode()
    except MaskError as error:
        raise DataError(str(error)) from None
    if warn and isinstance(shape, array):
        x, y = np.asarray(shape[::2]), np.asarray(shape[1::2])
        beyond = max(-x.min(), -y.min(), x.max() - width, y.max() - height)
        if beyond > 0:
            warn(f"a polygon reaches {beyond:g} pixels out of its {width} x {height} picture; it is cut off.")
    return drawn


def _read_png(path: Path, height: int, width: int) -> np.ndarray:
    try:
        with Image.open(path, formats=("PNG",)) as image:
            if (image.height, image.width) != (height, width) or height * width > MAX_PIXELS:
                raise DataError(
                    f"the mask {path} is {image.width} x {image.height} pixels (width x height), its picture "
                    f"{width} x {height}."
                )
            if image.mode not in ("1", "L", "P", "I", "I;16", "RGB"):
                raise DataError(
                    f"the mask {path} is a PNG of type {image.mode}; save it grey, without transparency."
                )
            labels = np.asarray(image)
    except DataError:
        raise
    except FileNotFoundError:
        raise DataError(f"the mask {path} is missing.") from None
    except Exception as error:  # damaged files raise nearly anything from Pillow's readers
        raise DataError(f"the mask {path} is not a readable PNG ({type(error).__name__}: {error}).") from None
    if labels.ndim == 3:
        return np.any(labels != 0, axis=2).view(np.uint8)
    with_ignored = labels.dtype != bool and (labels == 1).any() and np.isin(labels, (0, 1, 255)).all()
    return (labels if with_ignored else labels != 0).astype(np.uint8)


def _mask(file: Path, records: tuple[Record, ...], height: int, width: int, index: int) -> CompactMask:
    try:
        return records[index].mask(height, width)
    except DataError as error:
        raise DataError(f"{file}:{records[index].line}: {error}") from None


def check(
    path: str | Path, data_dir: str | Path | None = None, progress: Callable[[int, int], None] | None = None
) -> Report:
    """Look at every record of a file, or of a dataset by its name; see `read_jax.data.check.check`."""
    from read_jax.data.check import check as look

    return look(path, data_dir, progress)
