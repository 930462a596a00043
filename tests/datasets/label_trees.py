"""Tiny datasets in their true layouts, written by the test that reads them."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
from PIL import Image


def save_picture(path: Path, height: int, width: int, orientation: int = 1) -> None:
    """A JPEG that is height x width once upright; orientations 5 to 8 store it turned."""
    path.parent.mkdir(parents=True, exist_ok=True)
    stored = (height, width) if orientation < 5 else (width, height)
    exif = Image.Exif()
    exif[0x0112] = orientation
    Image.fromarray(np.full((*stored, 3), 120, np.uint8)).save(path, "JPEG", exif=exif.tobytes())


def save_label(path: Path, label: np.ndarray, palette: bool = False) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    image = Image.fromarray(label)
    if palette:  # colours that differ from their indices
        image = image.convert("L")
        image.putpalette([255 - i // 3 for i in range(768)])
    image.save(path)


def ade20k(root: Path, labels: dict[str, np.ndarray], folder: str = "training") -> Path:
    for stem, label in labels.items():
        save_picture(root / "ade20k" / "images" / folder / f"{stem}.jpg", *label.shape[:2])
        save_label(root / "ade20k" / "annotations" / folder / f"{stem}.png", label)
    return root


def cocostuff(root: Path, labels: dict[str, np.ndarray]) -> Path:
    for stem, label in labels.items():
        save_picture(root / "coco" / "train2017" / f"{stem}.jpg", *label.shape[:2])
        save_label(root / "cocostuff" / "train2017" / f"{stem}.png", label)
    return root


def mapillary(
    root: Path,
    names: list[str],
    labels: dict[str, np.ndarray],
    folder: str = "training",
    palette: bool = True,
) -> Path:
    write_json(root / "mapillary" / "config_v2.0.json", {"labels": [{"readable": name} for name in names]})
    for stem, label in labels.items():
        save_picture(root / "mapillary" / folder / "images" / f"{stem}.jpg", *label.shape[:2])
        save_label(root / "mapillary" / folder / "v2.0" / "labels" / f"{stem}.png", label, palette)
    return root


def pascal_part(root: Path, images: list[dict], names: list[str], annotations: list[dict]) -> Path:
    folder = root / "vlpart" / "pascal_part"
    _parts(folder / "train.json", folder / "VOCdevkit" / "VOC2010" / "JPEGImages", images, names, annotations)
    return root


def paco_lvis(root: Path, images: list[dict], names: list[str], annotations: list[dict]) -> Path:
    file = root / "vlpart" / "paco" / "annotations" / "paco_lvis_v1_train.json"
    _parts(file, root / "coco", images, names, annotations)
    return root


def _parts(file: Path, folder: Path, images: list[dict], names: list[str], annotations: list[dict]) -> None:
    """Category ids are 10, 20, ... in the order of `names`."""
    categories = [{"id": 10 * i, "name": name} for i, name in enumerate(names, 1)]
    write_json(file, {"images": images, "categories": categories, "annotations": annotations})
    for image in images:
        save_picture(folder / image["file_name"], image["height"], image["width"])


def llava_instruct(root: Path, records: list) -> Path:
    """Every record's picture is 6 x 8."""
    write_json(root / "llava_dataset" / "llava_instruct_150k.json", records)
    for record in records:
        save_picture(root / "coco" / "train2017" / record["image"], 6, 8)
    return root


def write_json(path: Path, content: object) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps(content), encoding="utf-8")
