"""The referring sets' files to phrases and masks."""

from __future__ import annotations

import json
import pickle

import numpy as np
import pytest

from read_jax.data import load_source
from read_jax.data.sources import REFER_SETS
from read_jax.errors import DataError, ImageError
from read_jax.images.masks import mask_to_rle
from tests.datasets.trees import SIZE, rectangle, reference, sentence, write_picture, write_refer

UNC = "unc_exclude_unified"
SPLIT_BY = {
    "refclef": "unc",
    "refcocog": "umd_exclude_unified",
    "R-refcocog": "umd_exclude_unified",
    "fprefcoco": "berkeley_exclude_unified",
    "fprefcoco+": "berkeley_exclude_unified",
    "fprefcocog": "berkeley_exclude_unified",
}
DOG, CAT, SKY = 11, 12, 13
SEGMENTATIONS = {
    DOG: [rectangle(2, 3, 8, 9)],
    CAT: [rectangle(10, 3, 16, 9), rectangle(14, 5, 20, 12)],
    SKY: [rectangle(0, 0, 30, 2)],
}


def pixels(*boxes):
    """uint8 sum of boxes x1, y1, x2, y2, whose ends do not belong to them."""
    out = np.zeros(SIZE, np.uint8)
    for x1, y1, x2, y2 in boxes:
        out[y1:y2, x1:x2] += 1
    return out


DOG_PIXELS = pixels((2, 3, 8, 9))
CAT_SUM = pixels((10, 3, 16, 9), (14, 5, 20, 12))


def source(root, references, segmentations=None, *, family="refcoco", split="val", compat=None, **options):
    """The source of freshly written files."""
    chosen = SEGMENTATIONS if segmentations is None else segmentations
    write_refer(root, family, SPLIT_BY.get(family, UNC), references, chosen, **options)
    return load_source(f"{family}|{split}", root, compat)


def one_mask(root, ann_id, segmentations=None, **options):
    """The mask of a single reference."""
    (item,) = list(source(root, [reference(1, 5, ann_id, sentence("it"))], segmentations, **options))
    return item.masks[0]


def test_an_item_has_everything(tmp_path):
    references = [
        reference(70, 5, CAT, sentence("the Cat "), sentence("cat")),
        reference(71, 6, SKY, sentence("sky")),
        reference(72, 5, DOG, sentence("dog")),
    ]
    item = source(tmp_path, references)[0]
    assert item.key == "val/5"
    assert item.image_path is not None
    assert item.image_path.endswith(
        "refer_seg/images/mscoco/images/train2014/COCO_train2014_000000000005.jpg"
    )
    assert (item.height, item.width) == SIZE == item.image.shape[:2]
    assert item.phrases == ["the Cat ", "cat", "dog"]
    assert item.questions[0] == "What is the cat  in this image? Please output segmentation mask."
    assert item.exists == [True, True, True]
    assert item.ref_ids == [70, 70, 72]
    assert item.sent_ids == [0, 1, 0]
    np.testing.assert_array_equal(item.masks, [CAT_SUM > 0, CAT_SUM > 0, DOG_PIXELS])


@pytest.mark.parametrize("family", REFER_SETS)
def test_every_set_is_read_from_its_own_files(tmp_path, family):
    item = source(tmp_path, [reference(1, 5, DOG, sentence("dog"))], family=family)[0]
    np.testing.assert_array_equal(item.masks, [DOG_PIXELS])
    assert item.image.shape == (*SIZE, 3)


def test_overlapping_polygons_are_united(tmp_path):
    assert one_mask(tmp_path, CAT).max() == 1


def test_overlapping_polygons_of_the_original_are_summed(tmp_path):
    drawn = one_mask(tmp_path, CAT, compat="read")
    np.testing.assert_array_equal(drawn, CAT_SUM)
    assert drawn.max() == 2


RLE_MASK = np.zeros(SIZE, bool)
RLE_MASK[3:9, 2:8] = True
FLAT = {"size": list(SIZE), "counts": [2 * 20 + 3, *([6, 14] * 5), 6, 22 * 20 + 11]}


@pytest.mark.parametrize(
    "segmentation",
    [
        [mask_to_rle(RLE_MASK)],
        mask_to_rle(RLE_MASK),
        [FLAT],
        FLAT,
        [mask_to_rle(RLE_MASK & (np.arange(30) < 5)), mask_to_rle(RLE_MASK & (np.arange(30) >= 5))],
    ],
    ids=["list", "bare", "uncompressed", "bare uncompressed", "in two pieces"],
)
@pytest.mark.parametrize("compat", [None, "read"])
def test_run_lengths_are_read_in_every_form(tmp_path, segmentation, compat):
    drawn = one_mask(tmp_path, DOG, {DOG: segmentation}, compat=compat)
    np.testing.assert_array_equal(drawn, DOG_PIXELS)


@pytest.mark.parametrize("compat", [None, "read"])
def test_empty_segmentation_is_an_empty_mask_of_what_exists(tmp_path, compat):
    (item,) = list(source(tmp_path, [reference(1, 5, DOG, sentence("it"))], {DOG: []}, compat=compat))
    assert item.exists == [True] and not item.masks.any()


@pytest.mark.parametrize("segmentations", [{}, {-1: []}])
def test_reference_to_nothing_needs_no_annotation(tmp_path, segmentations):
    assert not one_mask(tmp_path, -1, segmentations).any()


@pytest.mark.parametrize(
    ("ann_id", "default", "original"),
    [
        ([DOG], DOG_PIXELS, DOG_PIXELS),
        ([DOG, CAT], DOG_PIXELS | (CAT_SUM > 0), DOG_PIXELS | CAT_SUM),
        ([DOG, -1], DOG_PIXELS, 0 * DOG_PIXELS),
        ([-1], 0 * DOG_PIXELS, 0 * DOG_PIXELS),
    ],
)
def test_reference_to_several_objects_is_their_union(tmp_path, ann_id, default, original):
    np.testing.assert_array_equal(one_mask(tmp_path, ann_id), default)
    np.testing.assert_array_equal(one_mask(tmp_path, ann_id, compat="read"), original)


def test_overlap_of_several_objects_of_the_original_is_a_bitwise_or(tmp_path):
    segmentations = {DOG: [rectangle(2, 2, 6, 6), rectangle(2, 2, 6, 6)], CAT: [rectangle(4, 2, 8, 6)]}
    drawn = one_mask(tmp_path, [DOG, CAT], segmentations, compat="read")
    assert drawn[3, 3:9].tolist() == [2, 3, 3, 1, 1, 0]


@pytest.mark.parametrize(
    ("flags", "exists"),
    [
        ({}, True),
        ({"exist": True}, True),
        ({"exist": False}, False),
        ({"exist": 1}, True),
        ({"exist": 0}, False),
        ({"is_false_premise": True}, False),
        ({"is_false_premise": False}, True),
        ({"is_false_premise": 1}, False),
        ({"is_false_premise": 0}, True),
        ({"is_false_premise": True, "exist": True}, False),
    ],
)
@pytest.mark.parametrize("compat", [None, "read"])
def test_flags_say_what_exists_and_nothing_else_has_a_mask(tmp_path, flags, exists, compat):
    (item,) = list(source(tmp_path, [reference(1, 5, DOG, sentence("dog", **flags))], compat=compat))
    assert item.exists == [exists] and type(item.exists[0]) is bool
    np.testing.assert_array_equal(item.masks, [DOG_PIXELS * exists])


def test_correction_is_the_phrase_that_would_be_true(tmp_path):
    false = sentence("Blue cat", is_false_premise=True, gt_sent=" Brown Dog")
    silent = sentence("red cat", is_false_premise=True, gt_sent="")
    (item,) = list(source(tmp_path, [reference(1, 5, DOG, false, silent)], family="fprefcoco"))
    assert [query.correction for query in item.queries] == [" Brown Dog", ""]
    assert item.answers == [
        "There is no blue cat in this image, but there is brown dog.",
        "There is no red cat in this image.",
    ]


IMAGE_IDS = [900, 17, 33, 4, 580_000, 65, 1]


def test_pictures_come_in_the_order_of_their_numbers(tmp_path):
    references = [reference(k, image_id, DOG, sentence("dog")) for k, image_id in enumerate(IMAGE_IDS)]
    assert [item.key for item in source(tmp_path, references)] == [f"val/{i}" for i in sorted(IMAGE_IDS)]


def test_pictures_of_the_original_come_in_the_order_of_its_set(tmp_path):
    references = [reference(k, image_id, DOG, sentence("dog")) for k, image_id in enumerate(IMAGE_IDS)]
    keys = [item.key for item in source(tmp_path, references, compat="read")]
    assert keys == [f"val/{i}" for i in list(set(IMAGE_IDS))] != [f"val/{i}" for i in sorted(IMAGE_IDS)]


def test_reference_without_sentences_asks_nothing(tmp_path):
    references = [reference(1, 5, DOG), reference(2, 6, DOG), reference(3, 6, CAT, sentence("cat"))]
    assert [item.phrases for item in source(tmp_path, references)] == [["cat"]]


SPLITS = ["train", "val", "test", "testA", "testB", "testAB", "testC"]


@pytest.mark.parametrize(
    ("split", "taken"),
    [
        ("train", ["train"]),
        ("val", ["val"]),
        ("test", ["test", "testA", "testB", "testAB", "testC"]),
        ("testA", ["testA", "testAB"]),
        ("testB", ["testB", "testAB"]),
        ("testC", ["testC"]),
        ("testAB", ["testAB"]),
    ],
)
def test_splits_take_the_references_of_their_name(tmp_path, split, taken):
    references = [reference(k, k, DOG, sentence(s), split=s) for k, s in enumerate(SPLITS)]
    assert [item.phrases for item in source(tmp_path, references, split=split)] == [[s] for s in taken]


def test_picture_shared_by_splits_has_the_references_of_each(tmp_path):
    references = [reference(k, 5, DOG, sentence(s), split=s) for k, s in enumerate(("train", "val"))]
    (item,) = list(source(tmp_path, references))
    assert item.phrases == ["val"]


@pytest.mark.parametrize("split", ["tset", "", "testC", "testBC", "train_val"])
def test_split_without_references_lists_those_that_have_some(tmp_path, split):
    references = [reference(k, 5, DOG, sentence("dog"), split=s) for k, s in enumerate(("testA", "train"))]
    with pytest.raises(DataError, match=r"known: refcoco\|train, refcoco\|test, refcoco\|testA\.$"):
        source(tmp_path, references, split=split)


def test_source_and_item_can_be_sent_to_another_process(tmp_path):
    made = pickle.loads(pickle.dumps(source(tmp_path, [reference(1, 5, CAT, sentence("cat"))])))
    item = pickle.loads(pickle.dumps(made[0]))
    np.testing.assert_array_equal(item.masks, [CAT_SUM > 0])


GOOD = [reference(1, 5, DOG, sentence("dog"))]


@pytest.mark.parametrize("name", [f"refs({UNC}).p", "instances.json"])
def test_missing_file_is_named(tmp_path, name):
    folder = write_refer(tmp_path, "refcoco", UNC, GOOD, SEGMENTATIONS)
    (folder / name).unlink()
    with pytest.raises(DataError) as error:
        load_source("refcoco|val", tmp_path)
    assert str(error.value).startswith(f"{folder / name}: there is no such file")


def test_references_that_run_code_are_refused(tmp_path):
    folder = write_refer(tmp_path, "refcoco", UNC, GOOD, SEGMENTATIONS)
    (folder / f"refs({UNC}).p").write_bytes(pickle.dumps([print]))
    with pytest.raises(DataError, match=r"asks for builtins\.print"):
        load_source("refcoco|val", tmp_path)


@pytest.mark.parametrize(
    "text",
    ["", "{", "[]", '{"images": [1, 2', '{"images": [{}] "x": 1}', '{"a": 1} trailing', '{"images": [}'],
)
def test_wrong_json_is_named(tmp_path, text):
    folder = write_refer(tmp_path, "refcoco", UNC, GOOD, SEGMENTATIONS)
    (folder / "instances.json").write_text(text)
    with pytest.raises(DataError, match=r"instances\.json(: entry 0 of 'images' must| is not valid JSON)"):
        load_source("refcoco|val", tmp_path)


@pytest.mark.parametrize("indent", [None, 1])
@pytest.mark.parametrize("backwards", [False, True])
def test_layout_and_order_of_the_json_do_not_matter(tmp_path, indent, backwards):
    folder = write_refer(tmp_path, "refcoco", UNC, GOOD, SEGMENTATIONS)
    content = json.loads((folder / "instances.json").read_text())
    content["images"][0]["note"] = 'a "quoted] note, {with} brackets'
    content["licenses"] = {"nested": [{"id": [1, {}]}]}
    content = dict(reversed(content.items())) if backwards else content
    (folder / "instances.json").write_text("\n" + json.dumps(content, indent=indent) + "\n")
    np.testing.assert_array_equal(load_source("refcoco|val", tmp_path)[0].masks, [DOG_PIXELS])


def changed(**fields):
    return [GOOD[0] | fields]


@pytest.mark.parametrize(
    ("references", "message"),
    [
        ({}, "must hold a list"),
        (["text"], "reference 0 must be a mapping"),
        ([{"ref_id": 1}], "reference 0 must be a mapping with a 'split'"),
        (changed(ann_id=None), "reference 0: 'ann_id' must be an integer, not None"),
        (changed(ann_id=[]), r"reference 0: 'ann_id' must be an integer, not \[\]"),
        (changed(ann_id=[DOG, "x"]), "reference 0: 'ann_id' must be"),
        (changed(image_id="5"), "reference 0: 'image_id' must be an integer, not '5'"),
        (changed(ref_id=True), "reference 0: 'ref_id' must be an integer"),
        (changed(sentences=None), "reference 0: 'sentences' must be a list"),
        (changed(sentences=["dog"]), "reference 0, sentence 0 must be a mapping"),
        (changed(sentences=[sentence("a"), {"raw": "b"}]), "reference 0, sentence 1 must be .* 'sent'"),
        (
            changed(sentences=[sentence("a", exist="no")]),
            "reference 0, sentence 0: 'exist' must be true or false",
        ),
        (
            changed(sentences=[sentence("a", exist=None)]),
            "reference 0, sentence 0: 'exist' must be true or false",
        ),
        (
            changed(sentences=[sentence("a", is_false_premise=2)]),
            "reference 0, sentence 0: 'is_false_premise' must be .*, not 2",
        ),
        (
            changed(sentences=[sentence("a", gt_sent=None)]),
            "reference 0, sentence 0: 'gt_sent' must be a text",
        ),
    ],
)
def test_malformed_references_are_named(tmp_path, references, message):
    folder = write_refer(tmp_path, "refcoco", UNC, GOOD, SEGMENTATIONS)
    (folder / f"refs({UNC}).p").write_bytes(pickle.dumps(references))
    with pytest.raises(DataError, match=rf"refs\({UNC}\)\.p:? {message}"):
        load_source("refcoco|val", tmp_path)


@pytest.mark.parametrize(
    ("key", "fields", "message"),
    [
        ("images", {"id": "5"}, "entry 0 of 'images' must be an object with an integer 'id'"),
        ("images", {"id": 6}, r"has no image 5, which references are about \(1 such\)"),
        ("images", {"height": None}, "image 5: 'height', 'width' must be"),
        ("images", {"width": 30.5}, "image 5: 'height', 'width' must be"),
        ("images", {"height": -20, "width": -30}, "image 5: 'height', 'width' must be"),
        ("images", {"height": 10**6, "width": 10**6}, "image 5 has 1000000x1000000 pixels"),
        ("images", {"file_name": ""}, "image 5: 'file_name' must be a path below"),
        ("images", {"file_name": "/etc/passwd"}, "image 5: 'file_name' must be a path below"),
        ("images", {"file_name": "../../picture.jpg"}, "image 5: 'file_name' must be a path below"),
        ("annotations", {"id": None}, "entry 0 of 'annotations' must be an object with an integer 'id'"),
        ("annotations", {"id": 99}, rf"has no annotation {DOG}, which references are about"),
    ],
)
def test_malformed_instances_are_named(tmp_path, key, fields, message):
    folder = write_refer(tmp_path, "refcoco", UNC, GOOD, {DOG: SEGMENTATIONS[DOG]})
    path = folder / "instances.json"
    content = json.loads(path.read_text())
    content[key][0].update(fields)
    path.write_text(json.dumps(content))
    with pytest.raises(DataError, match=rf"instances\.json:? {message}"):
        load_source("refcoco|val", tmp_path)


def test_annotation_without_segmentation_is_named(tmp_path):
    folder = write_refer(tmp_path, "refcoco", UNC, GOOD, {DOG: []})
    path = folder / "instances.json"
    content = json.loads(path.read_text())
    del content["annotations"][0]["segmentation"]
    path.write_text(json.dumps(content))
    with pytest.raises(DataError, match=rf"annotation {DOG} has no 'segmentation'"):
        load_source("refcoco|val", tmp_path)


@pytest.mark.parametrize(
    ("segmentation", "message"),
    [
        ([rectangle(100, 100, 120, 120)], "outside its picture of 20x30"),
        ([[1, 1, 5, float("nan"), 5, 5]], "not a finite number"),
        ([[1, 1, 5, 5]], "at least 6"),
        ([["1", "1", "5", "5", "1", "5"]], "flat list of numbers"),
        (None, "must be a list"),
        ([mask_to_rle(RLE_MASK.T)], "30x20 pixels .* does not fit its picture of 20x30"),
        ([{"size": list(SIZE), "counts": "nonsense"}], "no encoder writes"),
    ],
)
@pytest.mark.parametrize("compat", [None, "read"])
def test_segmentation_that_cannot_be_drawn_is_named_and_spoils_no_other(
    tmp_path, segmentation, message, compat
):
    references = [reference(1, 5, CAT, sentence("cat")), reference(2, 6, DOG, sentence("dog"))]
    segmentations = {CAT: segmentation, DOG: SEGMENTATIONS[DOG]}
    bad, good = list(source(tmp_path, references, segmentations, compat=compat))
    with pytest.raises(DataError, match=rf"^refcoco\|val: annotation {CAT}: .*{message}"):
        bad.compact_mask(0)
    assert good.masks.any()


def test_picture_of_another_size_than_its_masks_is_an_error(tmp_path):
    (item,) = list(source(tmp_path, GOOD))
    write_picture(
        tmp_path / "refer_seg/images/mscoco/images/train2014/COCO_train2014_000000000005.jpg", (30, 20)
    )
    with pytest.raises(DataError, match=r"is 20 x 30 pixels .* instances\.json is 30 x 20"):
        item.image  # noqa: B018 - decoding is the point


def test_missing_picture_is_an_image_error_when_it_is_looked_at(tmp_path):
    (item,) = list(source(tmp_path, GOOD, pictures=False))
    assert item.masks.any()
    with pytest.raises(ImageError, match=r"COCO_train2014_000000000005\.jpg: there is no such file"):
        item.image  # noqa: B018 - decoding is the point
