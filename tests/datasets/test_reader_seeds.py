"""ReasonSeg and the referring sets on freshly generated datasets, against a naive reading of the files."""

from __future__ import annotations

import json
import pickle
import subprocess
import sys
from fractions import Fraction
from math import ceil, floor

import numpy as np
import pytest
from PIL import Image, ImageOps
from pycocotools import mask as coco

try:
    import cv2
except ImportError:
    cv2 = None

from read_jax.data import load_source
from read_jax.data.sources import REFER_SETS

# pycocotools warns of its own __array__
pytestmark = pytest.mark.filterwarnings("ignore:__array__ implementation:DeprecationWarning")
SEEDS = (5, 23, 411)
MARGIN = 60
"""Pixels around the naive canvas, for polygons that leave the picture."""


@pytest.fixture(scope="module", params=SEEDS, ids="seed {}".format)
def dataset(request, fixtures, tmp_path_factory):
    """A folder with every dataset, drawn from a seed."""
    folder = tmp_path_factory.mktemp(f"seed{request.param}")
    generator = fixtures / "make_fixture.py"
    subprocess.run(
        [sys.executable, generator, "--seed", str(request.param), "--out", folder],
        check=True,
        capture_output=True,
        timeout=600,
    )
    return folder


def upright_size(path):
    image = ImageOps.exif_transpose(Image.open(path))
    return image.height, image.width


def line(x1, y1, x2, y2):
    """Pixels nearest to a line, from left to right; halves go to the start's side."""
    if x2 < x1:
        x1, y1, x2, y2 = x2, y2, x1, y1
    n = max(x2 - x1, abs(y2 - y1))
    for i in range(n + 1):
        dx, dy = (Fraction(i * d, max(n, 1)) for d in (x2 - x1, abs(y2 - y1)))
        step = 1 if y2 > y1 else -1
        yield x1 + ceil(dx - Fraction(1, 2)), y1 + step * ceil(dy - Fraction(1, 2))


def draw(points, height, width):
    """(the pixels of a polygon, those that are not known for sure).

    Outline and even-odd inside, pixel by pixel in exact fractions, on a canvas with a margin. OpenCV clips
    lines that leave the picture, which moves them by up to a pixel: those are drawn by itself, if installed.
    """
    leaves = any(not (0 <= x < width and 0 <= y < height) for x, y in points)
    if leaves and cv2 is not None:
        out = np.zeros((height, width), np.uint8)
        array = np.array(points, np.int32)
        cv2.polylines(out, [array], True, 1, 1)
        cv2.fillPoly(out, [array], 1)
        return out.astype(bool), np.zeros((height, width), bool)
    outline = np.zeros((height + 2 * MARGIN, width + 2 * MARGIN), bool)
    moved = [(x + MARGIN, y + MARGIN) for x, y in points]
    edges = list(zip(moved, moved[1:] + moved[:1], strict=True))
    for (x1, y1), (x2, y2) in edges:
        for x, y in line(x1, y1, x2, y2):
            outline[y, x] = True
    inside = outline.copy()
    for y in range(len(inside)):
        crossings = sorted(
            x1 + Fraction((y - y1) * (x2 - x1), y2 - y1)
            for (x1, y1), (x2, y2) in edges
            if min(y1, y2) <= y < max(y1, y2)
        )
        for left, right in zip(crossings[::2], crossings[1::2], strict=True):
            inside[y, ceil(left) : floor(right) + 1] = True
    shifts = [np.roll(outline, (dy, dx), (0, 1)) for dy in (-1, 0, 1) for dx in (-1, 0, 1)]
    unsure = np.any(shifts, axis=0) & leaves
    return inside[MARGIN:-MARGIN, MARGIN:-MARGIN], unsure[MARGIN:-MARGIN, MARGIN:-MARGIN]


def reason_mask(description, height, width):
    """(uint8 mask, the pixels not known for sure)."""
    drawn, unsure = [], np.zeros((height, width), bool)
    for order, shape in enumerate(description["shapes"]):
        label = shape["label"].lower()
        if label != "flag":
            polygon, maybe = draw([(int(x), int(y)) for x, y in shape["points"]], height, width)
            drawn.append((-int(polygon.sum()), -order, 255 if "ignore" in label else 1, polygon))
            unsure |= maybe
    mask = np.zeros((height, width), np.uint8)
    for *_, value, polygon in sorted(drawn, key=lambda d: d[:2]):
        mask[polygon] = value
    return mask, unsure


def description(path):
    data = path.read_bytes()
    try:
        return json.loads(data.decode())
    except ValueError:
        return json.loads(data.decode("cp1252"))


@pytest.mark.parametrize("split", ["train", "val", "test"])
@pytest.mark.parametrize("compat", [None, "read"])
def test_reason_seg(dataset, split, compat):
    paths = sorted((dataset / "reason_seg/ReasonSeg" / split).glob("*.json"))
    source = load_source(f"ReasonSeg|{split}", dataset, compat)
    for position, (path, item) in enumerate(zip(paths, source, strict=True)):
        content = description(path)
        height, width = upright_size(path.with_suffix(".jpg"))
        true = content["text"] if split == "train" else content["text"][:1]
        false = content.get("false_premise_QA", [])
        if compat == "read" and split != "train":
            false = []
        expected = [(text, True, content["is_sentence"], None) for text in true]
        expected += [(text, False, is_sentence, answer) for text, is_sentence, answer in false]
        assert [(q.phrase, q.exists, q.is_sentence, q.answer) for q in item.queries] == expected
        assert item.ref_ids == [position] * len(expected)
        assert item.sent_ids == list(range(len(expected)))
        assert (item.height, item.width) == (height, width) == item.image.shape[:2]
        mask, unsure = reason_mask(content, height, width)
        for found in item.masks[: len(true)]:
            np.testing.assert_array_equal(found[~unsure], mask[~unsure])
        assert not item.masks[len(true) :].any()


@pytest.mark.parametrize("kind", ["short", "long"])
def test_reason_seg_of_a_kind(dataset, kind):
    folder = dataset / "reason_seg/ReasonSeg/test"
    wanted = [
        p.stem for p in sorted(folder.glob("*.json")) if description(p)["is_sentence"] == (kind == "long")
    ]
    if wanted:
        items = load_source(f"ReasonSeg|test|{kind}", dataset, "read")
        assert [item.key for item in items] == [f"test/{stem}" for stem in wanted]


def refer_mask(segmentation, height, width, compat):
    if not segmentation:
        return np.zeros((height, width), np.uint8)
    compressed = isinstance(segmentation[0], dict)
    rles = segmentation if compressed else coco.frPyObjects(segmentation, height, width)
    total = np.asarray(coco.decode(rles)).sum(axis=2)
    return np.minimum(total, 255 if compat == "read" else 1).astype(np.uint8)


RULES = {
    "train": lambda s: s == "train",
    "val": lambda s: s == "val",
    "test": lambda s: s.startswith("test"),
    "testA": lambda s: s in ("testA", "testAB"),
    "testB": lambda s: s in ("testB", "testAB"),
    "testAB": lambda s: s == "testAB",
}


@pytest.mark.parametrize("family", REFER_SETS)
@pytest.mark.parametrize("compat", [None, "read"])
def test_refer(dataset, family, compat):
    folder = dataset / "refer_seg" / family
    (pickled,) = folder.glob("refs(*).p")
    references = pickle.loads(pickled.read_bytes())
    instances = json.loads((folder / "instances.json").read_text())
    images = {image["id"]: image for image in instances["images"]}
    segmentations = {a["id"]: a["segmentation"] for a in instances["annotations"]}
    for split, rule in RULES.items():
        chosen = [r for r in references if rule(r["split"])]
        if not chosen:
            continue
        ids = [r["image_id"] for r in chosen]
        order = list(set(ids)) if compat == "read" else sorted(set(ids))
        for image_id, item in zip(order, load_source(f"{family}|{split}", dataset, compat), strict=True):
            height, width = images[image_id]["height"], images[image_id]["width"]
            expected, masks = [], []
            for r in chosen:
                if r["image_id"] != image_id:
                    continue
                for k, s in enumerate(r["sentences"]):
                    exists = not s["is_false_premise"] if "is_false_premise" in s else s.get("exist", True)
                    expected.append((s["sent"], exists, s.get("gt_sent", ""), r["ref_id"], k))
                    masks.append(refer_mask(segmentations[r["ann_id"]], height, width, compat) * exists)
            found = [(q.phrase, q.exists, q.correction, q.ref_id, q.sent_id) for q in item.queries]
            assert found == expected
            assert item.image.shape[:2] == (height, width)
            np.testing.assert_array_equal(item.masks, masks)
