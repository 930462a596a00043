"""Tiny trees in the originals' layout, written by the tests themselves."""

from __future__ import annotations

import json
import pickle
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image

SIZE = (20, 30)
"""Height and width of a picture, unless a test says otherwise."""
_STORE = {1: None, 3: Image.Transpose.ROTATE_180, 6: Image.Transpose.ROTATE_90, 8: Image.Transpose.ROTATE_270}
"""EXIF orientation -> what turns an upright picture into the stored one."""


def write_picture(path: Path, size: tuple[int, int] = SIZE, orientation: int = 1, level: int = 90) -> Path:
    """A plain JPEG that is `size` (height, width) when shown upright."""
    path.parent.mkdir(parents=True, exist_ok=True)
    image = Image.fromarray(np.full((*size, 3), level, np.uint8))
    transpose = _STORE[orientation]
    if transpose is not None:
        image = image.transpose(transpose)
    exif = Image.Exif()
    exif[0x0112] = orientation
    image.save(path, "JPEG", exif=exif)
    return path


def shape(label: str, *points: tuple[float, float]) -> dict[str, Any]:
    """A labelled polygon as ReasonSeg stores it."""
    return {"label": label, "points": [list(point) for point in points], "shape_type": "polygon"}


def box(label: str, x1: float, y1: float, x2: float, y2: float) -> dict[str, Any]:
    """A labelled rectangle; its corners' pixels belong to it."""
    return shape(label, (x1, y1), (x2, y1), (x2, y2), (x1, y2))


def write_reason(
    root: Path,
    split: str,
    name: str,
    *,
    size: tuple[int, int] = SIZE,
    orientation: int = 1,
    encoding: str = "utf-8",
    **content: Any,
) -> Path:
    """A ReasonSeg picture with its description. Returns the path of that.

    content replaces fields of the description; None removes one.
    """
    folder = root / "reason_seg/ReasonSeg" / split
    write_picture(folder / f"{name}.jpg", size, orientation)
    description: dict[str, Any] = {
        "text": ["What could roll away?"],
        "is_sentence": True,
        "shapes": [box("target", 2, 3, 8, 9)],
        **content,
    }
    description = {key: value for key, value in description.items() if value is not None}
    path = folder / f"{name}.json"
    path.write_bytes(json.dumps(description, ensure_ascii=False).encode(encoding))
    return path


def sentence(text: str, **flags: Any) -> dict[str, Any]:
    """One phrase of a reference."""
    return {"sent": text, "raw": text, "tokens": text.split(), "sent_id": 0, **flags}


def reference(
    ref_id: int, image_id: int, ann_id: Any, *sentences: dict[str, Any], split: str = "val"
) -> dict[str, Any]:
    """One entry of refs(*).p."""
    return {
        "ref_id": ref_id,
        "image_id": image_id,
        "ann_id": ann_id,
        "split": split,
        "sentences": list(sentences),
        "category_id": 1,
        "file_name": "unused",
        "sent_ids": [],
    }


def rectangle(x1: float, y1: float, x2: float, y2: float) -> list[float]:
    """A COCO polygon that covers pixels x1..x2-1, y1..y2-1."""
    return [x1, y1, x2, y1, x2, y2, x1, y2]


def write_refer(
    root: Path,
    family: str,
    split_by: str,
    references: list[dict[str, Any]],
    segmentations: dict[int, Any],
    *,
    sizes: dict[int, tuple[int, int]] | None = None,
    pictures: bool = True,
) -> Path:
    """A referring set with the pictures that references speak of. Returns its folder.

    segmentations are by annotation, sizes (height, width) by picture.
    """
    folder = root / "refer_seg" / family
    folder.mkdir(parents=True, exist_ok=True)
    below = "saiapr_tc-12" if family == "refclef" else "mscoco/images/train2014"
    images, owner = [], {}
    for entry in references:
        ids = entry["ann_id"] if isinstance(entry["ann_id"], list) else [entry["ann_id"]]
        owner.update(dict.fromkeys(ids, entry["image_id"]))
    for image_id in dict.fromkeys(entry["image_id"] for entry in references):
        height, width = (sizes or {}).get(image_id, SIZE)
        name = f"COCO_train2014_{image_id:012d}.jpg"
        images.append({"id": image_id, "file_name": name, "height": height, "width": width})
        if pictures:
            write_picture(root / "refer_seg/images" / below / name, (height, width))
    annotations = [
        {"id": ann_id, "image_id": owner.get(ann_id, 0), "category_id": 1, "segmentation": segmentation}
        for ann_id, segmentation in segmentations.items()
    ]
    instances = {"info": {"year": 2014}, "images": images, "annotations": annotations, "categories": []}
    (folder / "instances.json").write_text(json.dumps(instances))
    (folder / f"refs({split_by}).p").write_bytes(pickle.dumps(references, protocol=2))
    return folder
