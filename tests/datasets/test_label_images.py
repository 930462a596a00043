"""ADE20K, COCO-Stuff and Mapillary, on trees of a few pixels."""

from __future__ import annotations

import pickle

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra import numpy as hnp

from read_jax.data import load_source
from read_jax.data.label_images import LabelImages, load
from read_jax.errors import DataError, ImageError
from tests.datasets import label_trees

NAMES = ["Bird", "Road", "Traffic Sign", "Traffic Sign", "Unlabeled"]


def rows(*values):
    """uint8 [len(values), 4]: one value per row."""
    return np.repeat(np.array(values, np.uint8)[:, None], 4, axis=1)


def pixels(item):
    """The rows that each question's mask covers."""
    return [np.flatnonzero(mask[:, 0]).tolist() for mask in item.masks]


def test_ade20k_counts_from_one_and_ignores_0_and_255(tmp_path):
    label_trees.ade20k(tmp_path, {"a": rows(1, 0, 255, 150, 2)})
    item = load_source("ade20k|train", tmp_path)[0]
    assert item.phrases == ["wall", "building", "flag"]
    assert item.ref_ids == [0, 1, 149]
    assert item.sent_ids == [0, 0, 0]
    assert pixels(item) == [[0], [4], [3]]
    assert item.masks.dtype == np.uint8 and item.masks.max() == 1
    assert (item.height, item.width) == item.image.shape[:2] == (5, 4)


def test_ade20k_offers_every_name_not_in_the_picture(tmp_path):
    label_trees.ade20k(tmp_path, {"a": rows(1, 150)})
    item = load_source("ade20k|train", tmp_path)[0]
    assert len(item.absent) == 148 and item.absent[0] == "building"
    assert not {"wall", "flag"} & set(item.absent)


def test_cocostuff_counts_from_zero_person(tmp_path):
    label_trees.cocostuff(tmp_path, {"7": rows(181, 255, 0)})
    item = load_source("cocostuff|train", tmp_path)[0]
    assert (item.phrases, item.ref_ids) == (["person", "wood"], [0, 181])
    assert pixels(item) == [[2], [0]]
    assert item.image_path == str(tmp_path / "coco" / "train2017" / "7.jpg")


def test_cocostuff_classes_with_a_hyphen_are_classes_like_others(tmp_path):
    label_trees.cocostuff(tmp_path, {"7": rows(0, 95)})
    item = load_source("cocostuff|train", tmp_path)[0]
    assert item.phrases == ["person", "building-other"]
    assert "building-other" not in item.absent and len(item.absent) == 180


def test_in_compat_classes_with_a_hyphen_are_absent_even_where_present(tmp_path):
    label_trees.cocostuff(tmp_path, {"7": rows(0, 95)})
    item = load_source("cocostuff|train", tmp_path, compat="read")[0]
    assert item.phrases == ["person"]
    assert "building-other" in item.absent and len(item.absent) == 181


def test_mapillary_names_come_from_its_own_list_in_lower_case(tmp_path):
    label_trees.mapillary(tmp_path, NAMES, {"a": rows(1, 0, 255)})
    item = load_source("mapillary|train", tmp_path)[0]
    assert item.phrases == ["bird", "road"]
    assert pixels(item) == [[1], [0]]


def test_palette_indices_are_classes_whatever_their_colours(tmp_path):
    labels = {"a": rows(1, 0, 2)}
    plain = label_trees.mapillary(tmp_path / "grey", NAMES, labels, palette=False)
    coloured = label_trees.mapillary(tmp_path / "palette", NAMES, labels, palette=True)
    masks = [load_source("mapillary|train", root)[0].masks for root in (plain, coloured)]
    np.testing.assert_array_equal(*masks)


def test_classes_of_one_name_are_one_question_with_the_union(tmp_path):
    label_trees.mapillary(tmp_path, NAMES, {"a": rows(3, 2, 1)})
    item = load_source("mapillary|train", tmp_path)[0]
    assert (item.phrases, item.ref_ids) == (["road", "traffic sign"], [1, 2])
    assert pixels(item) == [[2], [0, 1]]
    assert item.absent == ("bird",)


def test_the_second_class_of_a_name_alone_has_its_own_pixels(tmp_path):
    label_trees.mapillary(tmp_path, NAMES, {"a": rows(3, 1)})
    item = load_source("mapillary|train", tmp_path)[0]
    assert pixels(item)[1] == [0] and item.ref_ids == [1, 2]
    assert "traffic sign" not in item.absent


def test_in_compat_every_class_of_a_name_has_the_mask_of_the_first(tmp_path):
    label_trees.mapillary(tmp_path, NAMES, {"a": rows(3, 2), "b": rows(3, 1)})
    both, second = load_source("mapillary|train", tmp_path, compat="read")
    assert (both.phrases, both.ref_ids) == (["traffic sign"] * 2, [2, 2])
    assert pixels(both) == [[1], [1]]
    assert second.phrases == ["road", "traffic sign"] and pixels(second) == [[1], []]
    assert second.absent == ("bird", "traffic sign", "unlabeled")


def test_unlabeled_is_nothing_by_default_and_a_class_in_compat(tmp_path):
    label_trees.mapillary(tmp_path, NAMES, {"a": rows(4, 1)})
    item = load_source("mapillary|train", tmp_path)[0]
    assert item.phrases == ["road"] and "unlabeled" not in item.absent
    assert load_source("mapillary|train", tmp_path, compat="read")[0].phrases == ["road", "unlabeled"]


def test_a_picture_without_any_class_keeps_its_place(tmp_path):
    label_trees.ade20k(tmp_path, {"a": rows(1), "b": rows(0), "c": rows(2)})
    items = list(load_source("ade20k|train", tmp_path))
    assert [item.phrases for item in items] == [["wall"], [], ["building"]]
    assert items[1].masks.shape == (0, 1, 4) and len(items[1].absent) == 150


def test_items_are_sorted_by_file_name_and_keyed_by_it(tmp_path):
    label_trees.ade20k(tmp_path, {name: rows(1) for name in ("b", "a10", "a9")})
    assert [item.key for item in load_source("ade20k|train", tmp_path)] == [
        "train/a10",
        "train/a9",
        "train/b",
    ]


@pytest.mark.parametrize("family", ["ade20k", "mapillary"])
def test_validation_folders_are_read_too(tmp_path, family):
    if family == "ade20k":
        label_trees.ade20k(tmp_path, {"v": rows(1)}, "validation")
    else:
        label_trees.mapillary(tmp_path, NAMES, {"v": rows(1)}, "validation")
    (item,) = load_source(f"{family}|val", tmp_path)
    assert item.key == "val/v" and item.image.shape == (1, 4, 3)


@pytest.mark.parametrize("word", ["images", "cocostuff", "v2.0/labels"])
def test_the_names_of_the_folders_above_do_not_matter(tmp_path, word):
    root = tmp_path / word / "data"
    label_trees.ade20k(root, {"a": rows(1)})
    label_trees.cocostuff(root, {"a": rows(1)})
    label_trees.mapillary(root, NAMES, {"a": rows(1)})
    for family in ("ade20k", "cocostuff", "mapillary"):
        item = load_source(f"{family}|train", root)[0]
        assert item.image.shape == (1, 4, 3) and item.masks.sum() == 4


def test_a_turned_picture_has_the_size_it_is_shown_in(tmp_path):
    label_trees.ade20k(tmp_path, {"a": rows(1, 2)})
    label_trees.save_picture(tmp_path / "ade20k/images/training/a.jpg", 2, 4, orientation=6)
    assert load_source("ade20k|train", tmp_path)[0].image.shape == (2, 4, 3)


def test_a_label_of_another_size_than_its_picture_is_refused_when_decoded(tmp_path):
    label_trees.ade20k(tmp_path, {"a": rows(1, 2)})
    label_trees.save_picture(tmp_path / "ade20k/images/training/a.jpg", 4, 2)
    item = load_source("ade20k|train", tmp_path)[0]
    with pytest.raises(DataError, match=r"a\.jpg is 2 x 4 pixels .*a\.png is 4 x 2"):
        _ = item.image


@pytest.mark.parametrize(
    ("label", "words"),
    [
        (np.zeros((2, 4), np.uint16), "type I;16"),
        (np.zeros((2, 4, 3), np.uint8), "type RGB"),
        (rows(1, 151), r"holds the class 151 \(4 pixels\), but the classes of ade20k are 1 to 150"),
    ],
)
def test_a_label_that_is_no_list_of_known_classes_is_refused(tmp_path, label, words):
    label_trees.ade20k(tmp_path, {"a": rows(1)})
    label_trees.save_label(tmp_path / "ade20k/annotations/training/a.png", label)
    with pytest.raises(DataError, match=rf"a\.png.*{words}"):
        load_source("ade20k|train", tmp_path)[0]


@pytest.mark.parametrize("compat", [None, "read"])
def test_a_class_beyond_mapillarys_list_names_the_file_and_the_class(tmp_path, compat):
    label_trees.mapillary(tmp_path, NAMES, {"a": rows(1, 200)})
    with pytest.raises(DataError, match=r"a\.png holds the class 200 .* mapillary are 0 to 4"):
        load_source("mapillary|train", tmp_path, compat)[0]


def test_a_missing_label_or_picture_is_named(tmp_path):
    label_trees.ade20k(tmp_path, {"a": rows(1), "b": rows(1)})
    (tmp_path / "ade20k/annotations/training/a.png").unlink()
    (tmp_path / "ade20k/images/training/b.jpg").write_bytes(b"\xff\xd8 cut")
    source = load_source("ade20k|train", tmp_path)
    with pytest.raises(DataError, match=r"a\.png: there is no such label image"):
        source[0]
    with pytest.raises(ImageError, match=r"b\.jpg"):
        _ = source[1].image


def test_a_cut_label_is_named(tmp_path):
    label_trees.ade20k(tmp_path, {"a": np.arange(1, 101, dtype=np.uint8).reshape(10, 10)})
    path = tmp_path / "ade20k/annotations/training/a.png"
    path.write_bytes(path.read_bytes()[:50])
    with pytest.raises(DataError, match=r"a\.png cannot be read as a PNG"):
        load_source("ade20k|train", tmp_path)[0]


@pytest.mark.parametrize(
    ("config", "words"),
    [("{", "not valid JSON"), ('{"labels": [{"name": "x"}]}', "`readable`"), ("[]", "`labels`")],
)
def test_a_broken_list_of_classes_is_named(tmp_path, config, words):
    label_trees.mapillary(tmp_path, NAMES, {"a": rows(1)})
    (tmp_path / "mapillary/config_v2.0.json").write_text(config)
    with pytest.raises(DataError, match=rf"config_v2\.0\.json.*{words}"):
        load_source("mapillary|train", tmp_path)


def test_missing_and_empty_folders_are_named(tmp_path):
    with pytest.raises(DataError, match=r"cocostuff/train2017: there is no such folder.*\*\.png"):
        load_source("cocostuff|train", tmp_path)
    (tmp_path / "cocostuff/train2017").mkdir(parents=True)
    with pytest.raises(DataError, match=r"train2017 holds no \.png"):
        load_source("cocostuff|train", tmp_path)


def test_an_unknown_split_is_told_the_known_ones(tmp_path):
    with pytest.raises(DataError, match=r"no split 'test'; known: ade20k\|train, ade20k\|val"):
        load("ade20k", "test", tmp_path, None)
    with pytest.raises(DataError, match=r"known: cocostuff\|train\."):
        load("cocostuff", "val", tmp_path, None)


def test_sources_and_items_travel_between_processes(tmp_path):
    label_trees.ade20k(tmp_path, {"a": rows(1, 2)})
    source = pickle.loads(pickle.dumps(load_source("ade20k|train", tmp_path)))
    assert isinstance(source, LabelImages)
    item = pickle.loads(pickle.dumps(source[0]))
    assert pixels(item) == [[0], [1]] and item.image.shape == (2, 4, 3)


@settings(max_examples=30, deadline=None)
@given(
    hnp.arrays(np.uint8, st.tuples(st.integers(1, 6), st.integers(1, 6)), elements=st.integers(0, 150)),
    st.booleans(),
)
def test_masks_are_disjoint_cover_what_is_labelled_and_names_split_the_vocabulary(
    tmp_path_factory, label, compat
):
    root = label_trees.ade20k(tmp_path_factory.mktemp("ade"), {"a": label})
    item = load_source("ade20k|train", root, "read" if compat else None)[0]
    np.testing.assert_array_equal(item.masks.sum(axis=0), label != 0)
    assert len({*item.phrases, *item.absent}) == len(item.phrases) + len(item.absent) == 150
