"""Label images, parts and conversations on freshly generated sets, against a second, naive reading of them.

Nothing of read_jax.data but `load_source` is used: names, labels and masks are parsed again with json, Pillow
and pycocotools' own COCO class.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys

import numpy as np
import pytest
from PIL import Image, ImageOps
from pycocotools.coco import COCO

from read_jax.data import load_source

SEEDS = (17, 404, 9001)


@pytest.fixture(scope="module", params=SEEDS)
def tree(request, fixtures, tmp_path_factory):
    """The generator's sets for one more seed."""
    root = tmp_path_factory.mktemp("seed") / str(request.param)
    command = [sys.executable, fixtures / "make_fixture.py", "--seed", str(request.param), "--out", root]
    subprocess.run(list(map(str, command)), check=True, timeout=600)
    return root


def by_picture(tree, family, compat):
    return {
        os.path.relpath(item.image_path, tree): item for item in load_source(f"{family}|train", tree, compat)
    }


def label_of(path):
    return np.array(Image.open(path)).astype(int)


def upright(path):
    return np.array(ImageOps.exif_transpose(Image.open(path)).convert("RGB"))


def check_masks(item, expected):
    """expected: [(name, bool mask)] in order."""
    assert item.phrases == [name for name, _ in expected]
    assert item.masks.shape == (len(expected), item.height, item.width)
    for got, (_, mask) in zip(item.masks, expected, strict=True):
        np.testing.assert_array_equal(got, mask.astype(np.uint8))


@pytest.mark.parametrize("compat", [None, "read"])
def test_ade20k(tree, fixtures, compat):
    names = json.loads((fixtures / "class_lists" / "ade20k_classes.json").read_text())
    items = by_picture(tree, "ade20k", compat)
    pictures = sorted(os.listdir(tree / "ade20k/images/training"))
    assert list(items) == [f"ade20k/images/training/{name}" for name in pictures]
    for path, item in items.items():
        label = label_of(tree / path.replace("images", "annotations").replace(".jpg", ".png"))
        there = sorted(set(label.ravel().tolist()) - {0, 255})
        check_masks(item, [(names[i - 1], label == i) for i in there])
        assert set(item.absent) == set(names) - {names[i - 1] for i in there}
        np.testing.assert_array_equal(item.image, upright(tree / path))


@pytest.mark.parametrize("compat", [None, "read"])
def test_cocostuff(tree, fixtures, compat):
    lines = (fixtures / "class_lists" / "cocostuff_classes.txt").read_text().splitlines()[1:]
    names = [line.split(": ")[1] for line in lines]
    items = by_picture(tree, "cocostuff", compat)
    labels = sorted(os.listdir(tree / "cocostuff/train2017"))
    assert list(items) == [f"coco/train2017/{name[:-4]}.jpg" for name in labels]
    for path, item in items.items():
        label = label_of(tree / "cocostuff/train2017" / os.path.basename(path).replace(".jpg", ".png"))
        there = [i for i in range(182) if (label == i).any()]
        asked = [i for i in there if compat is None or "-" not in names[i]]
        check_masks(item, [(names[i], label == i) for i in asked])
        assert set(item.absent) == set(names) - {names[i] for i in asked}
        np.testing.assert_array_equal(item.image, upright(tree / path))


def mapillary_labels(tree):
    config = json.loads((tree / "mapillary/config_v2.0.json").read_text())
    names = [entry["readable"].lower() for entry in config["labels"]]
    stems = sorted(name[:-4] for name in os.listdir(tree / "mapillary/training/v2.0/labels"))
    labels = {stem: label_of(tree / f"mapillary/training/v2.0/labels/{stem}.png") for stem in stems}
    return names, labels


def test_mapillary_by_default(tree):
    names, labels = mapillary_labels(tree)
    items = by_picture(tree, "mapillary", None)
    assert list(items) == [f"mapillary/training/images/{stem}.jpg" for stem in labels]
    for item, label in zip(items.values(), labels.values(), strict=True):
        expected = []
        for name in dict.fromkeys(names):
            mask = np.isin(label, [i for i, other in enumerate(names) if other == name])
            if name != "unlabeled" and mask.any():
                expected.append((name, mask))
        check_masks(item, expected)
        absent = set(names) - {"unlabeled"} - {name for name, _ in expected}
        assert sorted(item.absent) == sorted(absent)


def test_mapillary_in_compat(tree):
    names, labels = mapillary_labels(tree)
    items = by_picture(tree, "mapillary", "read")
    for item, label in zip(items.values(), labels.values(), strict=True):
        there = sorted(set(label.ravel().tolist()) - {255})
        check_masks(item, [(names[i], label == names.index(names[i])) for i in there])
        assert list(item.absent) == [name for i, name in enumerate(names) if i not in there]


@pytest.mark.parametrize("compat", [None, "read"])
@pytest.mark.parametrize(
    ("family", "file", "folder"),
    [
        ("pascal_part", "vlpart/pascal_part/train.json", "vlpart/pascal_part/VOCdevkit/VOC2010/JPEGImages"),
        ("paco_lvis", "vlpart/paco/annotations/paco_lvis_v1_train.json", "coco"),
    ],
)
def test_parts(tree, family, file, folder, compat):
    api = COCO(str(tree / file))

    def wordings(category):
        pieces = api.cats[category]["name"].split(":")
        if family == "paco_lvis":
            pieces = [piece.split("_(")[0] for piece in pieces]
        if compat is None:
            pieces = [piece.replace("_", " ") for piece in pieces]
        return pieces if len(pieces) == 1 else [" ".join(pieces), f"the {pieces[1]} of the {pieces[0]}"]

    items = by_picture(tree, family, compat)
    records = sorted(api.imgs.values(), key=lambda record: record["file_name"])
    assert list(items) == [f"{folder}/{record['file_name']}" for record in records]
    for record, (path, item) in zip(records, items.items(), strict=True):
        annotations = api.loadAnns(api.getAnnIds(imgIds=[record["id"]]))
        said = [wordings(a["category_id"]) for a in annotations]
        check_masks(
            item,
            [(words[0], api.annToMask(a) != 0) for words, a in zip(said, annotations, strict=True)],
        )
        assert [list(q.alternatives) for q in item.queries] == [words[1:] for words in said]
        assert item.ref_ids == [a["id"] for a in annotations]
        there = {a["category_id"] for a in annotations}
        absent = [wordings(c) for c in sorted(api.cats) if c not in there]
        assert [
            [name, *more] for name, more in zip(item.absent, item.absent_alternatives, strict=True)
        ] == absent
        np.testing.assert_array_equal(item.image, upright(tree / path))


def test_conversations(tree):
    records = json.loads((tree / "llava_dataset/llava_instruct_150k.json").read_text())
    source = load_source("llava_instruct|train", tree)
    assert len(source) == len(records)
    for record, item in zip(records, source, strict=True):
        turns = record["conversations"]
        turns = turns[1:] if turns[0]["from"] == "gpt" else turns
        asked = [turn["value"] for turn in turns if turn["from"] == "human"]
        cleaned = [t.replace("<image>", "").strip() if "<image>" in t else t for t in asked]
        assert item.questions == cleaned
        assert [query.shows_image for query in item.queries] == ["<image>" in t for t in asked]
        assert item.answers == [turn["value"] for turn in turns if turn["from"] == "gpt"]
        np.testing.assert_array_equal(item.image, upright(tree / "coco/train2017" / record["image"]))
        assert item.image.shape[:2] == (item.height, item.width)
