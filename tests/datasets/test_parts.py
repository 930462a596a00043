"""Pascal-Part and PACO-LVIS, on annotation files of a few records."""

from __future__ import annotations

import json
import pickle

import numpy as np
import pytest
from pycocotools import mask as coco

from read_jax.data import load_source
from read_jax.data.parts import load
from read_jax.errors import DataError, ImageError
from tests.datasets import label_trees

SQUARE = [[1.0, 1, 5, 1, 5, 4, 1, 4]]  # 4 x 3 pixels
ELSEWHERE = [[6.0, 0, 8, 0, 8, 2, 6, 2]]


def image(number, name="a.jpg", height=6, width=8):
    return {"id": number, "file_name": name, "height": height, "width": width}


def annotation(number, category, segmentation=SQUARE, image_id=1):
    return {"id": number, "image_id": image_id, "category_id": category, "segmentation": segmentation}


def pascal(tmp_path, names, annotations, compat=None, images=None):
    label_trees.pascal_part(tmp_path, images or [image(1)], names, annotations)
    return load_source("pascal_part|train", tmp_path, compat)


def paco(tmp_path, names, annotations, compat=None):
    label_trees.paco_lvis(tmp_path, [image(1, "train2017/a.jpg")], names, annotations)
    return load_source("paco_lvis|train", tmp_path, compat)


def test_a_part_is_said_in_two_ways(tmp_path):
    (item,) = pascal(tmp_path, ["dog:head", "dog:front left leg"], [annotation(5, 20)])
    (query,) = item.queries
    assert query.phrase == "dog front left leg"
    assert query.alternatives == ("the front left leg of the dog",)
    assert item.absent == ("dog head",)
    assert item.absent_alternatives == (("the head of the dog",),)


def test_an_object_is_said_in_one_way(tmp_path):
    (item,) = paco(tmp_path, ["bottle", "tray"], [annotation(5, 10)])
    assert (item.queries[0].phrase, item.queries[0].alternatives) == ("bottle", ())
    assert (item.absent, item.absent_alternatives) == (("tray",), ((),))


def test_every_annotation_is_a_question_with_its_own_mask_in_the_files_order(tmp_path):
    annotations = [annotation(9, 10, ELSEWHERE), annotation(3, 10)]
    (item,) = pascal(tmp_path, ["dog:head", "dog:tail"], annotations)
    assert item.phrases == ["dog head"] * 2
    assert (item.ref_ids, item.sent_ids) == ([9, 3], [0, 0])
    expected = np.zeros((2, 6, 8), np.uint8)
    expected[0, 0:2, 6:8] = 1
    expected[1, 1:4, 1:5] = 1
    np.testing.assert_array_equal(item.masks, expected)


def test_polygons_of_an_annotation_are_united(tmp_path):
    overlapping = [*SQUARE, [3.0, 2, 7, 2, 7, 5, 3, 5]]
    (item,) = pascal(tmp_path, ["dog:head"], [annotation(1, 10, overlapping)])
    assert item.masks.max() == 1 and item.masks.sum() == 12 + 12 - 4


def test_run_lengths_compressed_or_not_give_the_polygons_mask(tmp_path):
    plain = {"size": [6, 8], "counts": [7, 3, 3, 3, 3, 3, 3, 3, 20]}
    packed = coco.frPyObjects(plain, 6, 8)
    compressed = {"size": [6, 8], "counts": packed["counts"].decode()}
    (item,) = pascal(
        tmp_path, ["dog:head"], [annotation(i, 10, s) for i, s in enumerate((SQUARE, plain, compressed))]
    )
    np.testing.assert_array_equal(item.masks[1], item.masks[0])
    np.testing.assert_array_equal(item.masks[2], item.masks[0])


def test_explanations_are_cut_and_underscores_read_as_spaces(tmp_path):
    names = ["mouse_(computer_equipment)", "trash_can:outer_rim_(metal)"]
    (item,) = paco(tmp_path, names, [annotation(1, 10), annotation(2, 20)])
    assert item.phrases == ["mouse", "trash can outer rim"]
    assert item.queries[1].alternatives == ("the outer rim of the trash can",)


def test_in_compat_underscores_stay(tmp_path):
    names = ["mouse_(computer_equipment)", "trash_can:outer_rim_(metal)"]
    (item,) = paco(tmp_path, names, [annotation(1, 10), annotation(2, 20)], "read")
    assert item.phrases == ["mouse", "trash_can outer_rim"]
    assert item.queries[1].alternatives == ("the outer_rim of the trash_can",)


@pytest.mark.parametrize(("compat", "absent"), [(None, ("tray",)), ("read", ("mouse", "tray"))])
def test_a_name_that_another_category_shares_is_absent_only_in_compat(tmp_path, compat, absent):
    names = ["mouse_(animal)", "mouse_(computer_equipment)", "tray"]
    (item,) = paco(tmp_path, names, [annotation(1, 10)], compat)
    assert item.absent == absent


def test_a_picture_without_annotations_keeps_its_place(tmp_path):
    images = [image(4, "b.jpg"), image(1, "c.jpg"), image(2, "a.jpg")]
    items = list(pascal(tmp_path, ["dog:head"], [annotation(1, 10)], images=images))
    assert [item.key for item in items] == ["train/2", "train/4", "train/1"]
    assert [len(item.queries) for item in items] == [0, 0, 1]
    assert items[0].masks.shape == (0, 6, 8) and items[0].absent == ("dog head",)


@pytest.mark.parametrize("empty", [[], {}, None])
def test_an_annotation_without_a_segmentation_is_left_out_yet_present(tmp_path, empty):
    annotations = [annotation(1, 10, empty), annotation(2, 20)]
    (item,) = pascal(tmp_path, ["dog:head", "dog:tail", "dog:nose"], annotations)
    assert item.phrases == ["dog tail"]
    assert item.absent == ("dog nose",)


def test_in_compat_an_annotation_without_a_segmentation_fails_when_its_mask_is_asked_for(tmp_path):
    (item,) = pascal(tmp_path, ["dog:head"], [annotation(77, 10, [])], "read")
    assert item.phrases == ["dog head"]
    with pytest.raises(DataError, match=r"train\.json: annotation 77 of a\.jpg: its segmentation is empty"):
        _ = item.masks


@pytest.mark.parametrize(
    ("segmentation", "words"),
    [
        ([[1, 1, 2, 2]], "at least 6"),
        ([[1, 1, 2, 2, 3]], "even"),
        ([[1, 1, 2, "x", 3, 3]], "flat list of numbers"),
        ([[1, 1, 2, float("nan"), 3, 3]], "finite"),
        ([[1, 1, 10**400, 2, 3, 3]], "finite"),
        ([[1, 1, 1e12, 2, 3, 3]], "absurdly long"),
        ([[90, 90, 95, 90, 95, 95]], "outside"),
        ({"size": [8, 6], "counts": [48]}, "does not fit"),
        ({"size": [6, 8], "counts": [40]}, "cover 40 pixels"),
        ("everything", "list of polygons"),
    ],
)
def test_a_broken_segmentation_fails_with_the_annotations_number(tmp_path, segmentation, words):
    (item,) = pascal(tmp_path, ["dog:head"], [annotation(1, 10), annotation(77, 10, segmentation)])
    assert item.compact_mask(0).decode().sum() == 12
    with pytest.raises(DataError, match=rf"annotation 77 of a\.jpg: .*{words}"):
        item.compact_mask(1)


def test_pictures_lie_where_the_sets_have_them(tmp_path):
    pascal_item = pascal(tmp_path, ["dog:head"], [])[0]
    paco_item = paco(tmp_path, ["dog:head"], [])[0]
    assert pascal_item.image_path == str(tmp_path / "vlpart/pascal_part/VOCdevkit/VOC2010/JPEGImages/a.jpg")
    assert paco_item.image_path == str(tmp_path / "coco/train2017/a.jpg")
    assert pascal_item.image.shape == paco_item.image.shape == (6, 8, 3)


def test_a_picture_of_another_size_than_stated_is_refused_when_decoded(tmp_path):
    (item,) = pascal(tmp_path, ["dog:head"], [annotation(1, 10)])
    label_trees.save_picture(
        tmp_path / "vlpart/pascal_part/VOCdevkit/VOC2010/JPEGImages/a.jpg", 6, 8, orientation=1
    )
    assert item.load_image().shape == (6, 8, 3)
    label_trees.save_picture(tmp_path / "vlpart/pascal_part/VOCdevkit/VOC2010/JPEGImages/a.jpg", 8, 6)
    with pytest.raises(DataError, match=r"a\.jpg is 6 x 8 .*image 1\) is 8 x 6"):
        item.load_image()


def test_a_missing_picture_is_an_image_error(tmp_path):
    (item,) = pascal(tmp_path, ["dog:head"], [annotation(1, 10)])
    (tmp_path / "vlpart/pascal_part/VOCdevkit/VOC2010/JPEGImages/a.jpg").unlink()
    with pytest.raises(ImageError, match=r"a\.jpg: there is no such file"):
        _ = item.image


@pytest.mark.parametrize(
    ("change", "words"),
    [
        (lambda c: c["annotations"][0].update(image_id=99), "annotation 1 is of image 99"),
        (lambda c: c["annotations"][0].update(category_id=99), "annotation 1 is of category 99"),
        (lambda c: c["images"][0].pop("height"), r"images\[0\] has no whole number 'height' of at least 1"),
        (lambda c: c["images"][0].update(width=0), r"images\[0\] has no whole number 'width'"),
        (lambda c: c["categories"][0].update(name=None), r"categories\[0\] has no text 'name'"),
        (lambda c: c.pop("annotations"), "no list 'annotations'"),
        (lambda c: c.update(images=[1]), "no list 'images'"),
    ],
)
def test_a_malformed_file_is_refused_with_the_place(tmp_path, change, words):
    pascal(tmp_path, ["dog:head"], [annotation(1, 10)])
    file = tmp_path / "vlpart/pascal_part/train.json"
    content = json.loads(file.read_text())
    change(content)
    file.write_text(json.dumps(content))
    with pytest.raises(DataError, match=rf"train\.json.*{words}"):
        load_source("pascal_part|train", tmp_path)


@pytest.mark.parametrize(
    ("content", "words"),
    [(b"[1]", "one object"), (b'{"images": [', "not valid JSON"), (b"\xff\xfe{", "not UTF-8")],
)
def test_a_file_that_is_no_annotation_file_is_named(tmp_path, content, words):
    pascal(tmp_path, ["dog:head"], [])
    (tmp_path / "vlpart/pascal_part/train.json").write_bytes(content)
    with pytest.raises(DataError, match=rf"train\.json.*{words}"):
        load_source("pascal_part|train", tmp_path)


def test_a_missing_file_and_an_unknown_split_are_named(tmp_path):
    with pytest.raises(DataError, match=r"paco_lvis_v1_train\.json: there is no such file"):
        load_source("paco_lvis|train", tmp_path)
    with pytest.raises(DataError, match=r"no split 'val'; known: paco_lvis\|train"):
        load("paco_lvis", "val", tmp_path, None)


def test_sources_and_items_travel_between_processes(tmp_path):
    source = pickle.loads(pickle.dumps(pascal(tmp_path, ["dog:head"], [annotation(1, 10)])))
    item = pickle.loads(pickle.dumps(source[0]))
    assert item.masks.sum() == 12 and item.image.shape == (6, 8, 3)
