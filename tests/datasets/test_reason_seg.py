"""ReasonSeg's files to questions and masks."""

from __future__ import annotations

import pickle

import numpy as np
import pytest
from PIL import Image

from read_jax.data import load_source
from read_jax.errors import DataError, ImageError
from tests.datasets.trees import SIZE, box, shape, write_picture, write_reason

FALSE = [["Which part is made of glass?", True, "None is."], ["Blue Star", False, "There is no blue star."]]


def only(root, split="val", compat=None):
    (item,) = list(load_source(f"ReasonSeg|{split}", root, compat))
    return item


def mask(root, **content):
    """The one mask of a description."""
    write_reason(root, "val", "picture", **content)
    return only(root).masks[0]


def pixels(*boxes, value=1):
    """uint8 picture with inclusive boxes x1, y1, x2, y2."""
    out = np.zeros(SIZE, np.uint8)
    for x1, y1, x2, y2 in boxes:
        out[y1 : y2 + 1, x1 : x2 + 1] = value
    return out


def test_an_item_has_everything(tmp_path):
    path = write_reason(tmp_path, "val", "b", text=["What rolls?", "not asked"], false_premise_QA=FALSE)
    item = only(tmp_path)
    assert item.key == "val/b"
    assert item.image_path == str(path.with_suffix(".jpg"))
    assert (item.height, item.width) == SIZE == item.image.shape[:2]
    assert item.phrases == ["What rolls?", "Which part is made of glass?", "Blue Star"]
    assert item.questions == [
        "What rolls? Please output segmentation mask.",
        "Which part is made of glass? Please output segmentation mask.",
        "What is blue star in this image? Please output segmentation mask.",
    ]
    assert item.answers == ["Sure, the segmentation result is [SEG].", "None is.", "There is no blue star."]
    assert item.exists == [True, False, False]
    assert item.ref_ids == [0, 0, 0]
    assert item.sent_ids == [0, 1, 2]
    np.testing.assert_array_equal(item.masks, [pixels((2, 3, 8, 9)), pixels(), pixels()])


def test_the_original_asks_the_first_text_only(tmp_path):
    write_reason(tmp_path, "test", "a", text=["What rolls?", "And this?"], false_premise_QA=FALSE)
    item = only(tmp_path, "test", "read")
    assert item.phrases == ["What rolls?"]
    assert item.exists == [True]
    assert item.masks.shape == (1, *SIZE)


@pytest.mark.parametrize("compat", [None, "read"])
def test_training_enumerates_all_texts_then_all_false_premises(tmp_path, compat):
    texts = ["What rolls?", "What bounces?", "Which one?"]
    write_reason(tmp_path, "train", "a", text=texts, false_premise_QA=FALSE)
    item = only(tmp_path, "train", compat)
    assert item.phrases == [*texts, *(text for text, _, _ in FALSE)]
    assert item.exists == [True] * 3 + [False] * 2
    assert item.sent_ids == [0, 1, 2, 3, 4]
    assert [mask.any() for mask in item.masks] == item.exists


@pytest.mark.parametrize("split", ["train", "val"])
@pytest.mark.parametrize("content", [{}, {"false_premise_QA": []}])
def test_false_premises_are_optional(tmp_path, split, content):
    write_reason(tmp_path, split, "a", **content)
    assert only(tmp_path, split).exists == [True]


def test_pictures_come_by_file_name_and_only_those(tmp_path):
    for name in ("c", "a", "b"):
        folder = write_reason(tmp_path, "val", name).parent
    (folder / "notes.txt").write_text("")
    (folder / ".hidden.jpg").write_bytes(b"")
    source = load_source("ReasonSeg|val", tmp_path)
    assert [item.key for item in source] == ["val/a", "val/b", "val/c"]
    assert [item.ref_ids for item in source] == [[0], [1], [2]]


def test_joined_splits_follow_each_other(tmp_path):
    for split, name in (("val", "z"), ("test", "a"), ("test", "b"), ("train", "m")):
        write_reason(tmp_path, split, name)
    source = load_source("ReasonSeg|val_test", tmp_path)
    assert source.name == "ReasonSeg|val_test"
    assert [item.key for item in source] == ["val/z", "test/a", "test/b"]
    assert [item.ref_ids for item in source] == [[0], [1], [2]]


def test_short_and_long_queries_are_selected_and_keep_their_numbers(tmp_path):
    write_reason(tmp_path, "test", "a", text=["Red Ball"], is_sentence=False)
    write_reason(tmp_path, "test", "b", false_premise_QA=FALSE)
    write_reason(tmp_path, "test", "c")
    short, long = (list(load_source(f"ReasonSeg|test|{kind}", tmp_path)) for kind in ("short", "long"))
    assert [(i.key, i.phrases, i.ref_ids, i.sent_ids) for i in short] == [
        ("test/a", ["Red Ball"], [0], [0]),
        ("test/b", ["Blue Star"], [1], [2]),
    ]
    assert [(i.key, i.exists, i.ref_ids) for i in long] == [
        ("test/b", [True, False], [1, 1]),
        ("test/c", [True], [2]),
    ]


def test_short_queries_of_the_original_are_pictures_with_phrases(tmp_path):
    write_reason(tmp_path, "test", "a", text=["Red Ball"], is_sentence=False, false_premise_QA=FALSE)
    write_reason(tmp_path, "test", "b", false_premise_QA=FALSE)
    assert [item.key for item in load_source("ReasonSeg|test|short", tmp_path, "read")] == ["test/a"]


def test_selecting_nothing_is_an_error(tmp_path):
    write_reason(tmp_path, "test", "a")
    with pytest.raises(DataError, match="no picture has a short query"):
        load_source("ReasonSeg|test|short", tmp_path)


@pytest.mark.parametrize("orientation", [3, 6, 8])
def test_size_is_that_of_the_upright_picture(tmp_path, orientation):
    write_reason(tmp_path, "val", "a", orientation=orientation)
    item = only(tmp_path)
    assert (item.height, item.width) == SIZE == item.image.shape[:2] == item.masks.shape[1:]


@pytest.mark.parametrize("encoding", ["utf-8", "utf-8-sig", "cp1252"])
def test_text_is_utf_8_or_else_windows_1252(tmp_path, encoding):
    text = "Which one would the café’s owner call “5 €”?"
    write_reason(tmp_path, "val", "a", text=[text], encoding=encoding)
    assert only(tmp_path).phrases == [text]


def test_points_are_truncated_toward_zero(tmp_path):
    drawn = mask(tmp_path, shapes=[box("target", -0.9, -0.9, 4.9, 2.9)])
    np.testing.assert_array_equal(drawn, pixels((0, 0, 4, 2)))


def test_polygon_is_clipped_to_the_picture(tmp_path):
    drawn = mask(tmp_path, shapes=[box("target", -100, 10, 5, 4000)])
    np.testing.assert_array_equal(drawn, pixels((0, 10, 5, 19)))


def test_polygon_outside_the_picture_draws_nothing(tmp_path):
    assert not mask(tmp_path, shapes=[box("target", 100, 100, 120, 120)]).any()


@pytest.mark.parametrize("label", ["ignore", "IGNORE_area", "please ignore"])
@pytest.mark.parametrize("split", ["train", "val"])
def test_ignored_pixels_are_255(tmp_path, label, split):
    write_reason(tmp_path, split, "a", shapes=[box("target", 2, 2, 4, 4), box(label, 10, 2, 12, 4)])
    expected = pixels((2, 2, 4, 4)) + pixels((10, 2, 12, 4), value=255)
    np.testing.assert_array_equal(only(tmp_path, split).masks[0], expected)


@pytest.mark.parametrize("label", ["flag", "Flag", "FLAG"])
def test_flags_are_not_drawn(tmp_path, label):
    assert not mask(tmp_path, shapes=[box(label, 2, 2, 4, 4), {"label": label}]).any()


def test_any_other_label_is_a_target(tmp_path):
    drawn = mask(tmp_path, shapes=[box("Target_2", 1, 1, 2, 2), box("red flag", 5, 5, 6, 6)])
    np.testing.assert_array_equal(drawn, pixels((1, 1, 2, 2), (5, 5, 6, 6)))


@pytest.mark.parametrize("reverse", [False, True])
def test_smaller_polygons_are_on_top_whatever_their_order(tmp_path, reverse):
    shapes = [box("target", 2, 2, 15, 15), box("ignore", 4, 4, 12, 12), box("target", 6, 6, 8, 8)]
    drawn = mask(tmp_path, shapes=shapes[::-1] if reverse else shapes)
    expected = pixels((2, 2, 15, 15))
    expected[4:13, 4:13] = 255
    expected[6:9, 6:9] = 1
    np.testing.assert_array_equal(drawn, expected)


def test_size_of_a_polygon_is_what_of_it_is_drawn(tmp_path):
    """The larger one by its points, but not in the picture, is on top."""
    drawn = mask(tmp_path, shapes=[box("target", 0, 0, 9, 9), box("ignore", -500, 0, 4, 4)])
    assert drawn[0, 0] == 255


def test_no_polygons_are_an_empty_mask(tmp_path):
    write_reason(tmp_path, "val", "a", shapes=[])
    item = only(tmp_path)
    assert item.exists == [True] and not item.masks.any()


def test_source_and_item_can_be_sent_to_another_process(tmp_path):
    write_reason(tmp_path, "val", "a")
    source = pickle.loads(pickle.dumps(load_source("ReasonSeg|val", tmp_path)))
    item = pickle.loads(pickle.dumps(source[0]))
    np.testing.assert_array_equal(item.masks, [pixels((2, 3, 8, 9))])
    assert item.image.shape == (*SIZE, 3)


@pytest.mark.parametrize("name", ["", "vall", "val_val", "val_", "val|tiny", "val|", "val,test"])
def test_unknown_split_lists_the_known_ones(tmp_path, name):
    with pytest.raises(DataError, match=r"known: ReasonSeg\|train, ReasonSeg\|val, ReasonSeg\|test"):
        load_source(f"ReasonSeg|{name}", tmp_path)


def test_missing_folder_is_named(tmp_path):
    with pytest.raises(DataError, match=r"ReasonSeg/val: there is no such folder"):
        load_source("ReasonSeg|val", tmp_path)


def test_folder_without_pictures_is_an_error(tmp_path):
    (tmp_path / "reason_seg/ReasonSeg/val").mkdir(parents=True)
    with pytest.raises(DataError, match=r"holds no \.jpg files"):
        load_source("ReasonSeg|val", tmp_path)


def test_picture_without_description_is_named(tmp_path):
    write_picture(write_reason(tmp_path, "val", "a").parent / "b.jpg")
    with pytest.raises(DataError, match=r"b\.json is missing"):
        load_source("ReasonSeg|val", tmp_path)


def test_description_without_picture_is_an_image_error_of_its_item_alone(tmp_path):
    write_reason(tmp_path, "val", "a").with_suffix(".jpg").unlink()
    write_reason(tmp_path, "val", "b")
    source = load_source("ReasonSeg|val", tmp_path)
    with pytest.raises(ImageError, match=r"a\.jpg: there is no such file"):
        source[0]
    assert source[1].key == "val/b"


@pytest.mark.parametrize("content", [b"", b"{", b"[1, 2", b"not json", b"\x81\x8d", b"[" * 100_000])
def test_description_that_is_not_json_is_named(tmp_path, content):
    write_reason(tmp_path, "val", "a").write_bytes(content)
    with pytest.raises(DataError, match=r"a\.json is (not valid JSON|neither UTF-8 nor)"):
        load_source("ReasonSeg|val", tmp_path)


def test_description_that_is_no_object_is_named(tmp_path):
    write_reason(tmp_path, "val", "a").write_bytes(b"[]")
    with pytest.raises(DataError, match=r"a\.json must hold a JSON object"):
        load_source("ReasonSeg|val", tmp_path)


POINTS = [[1, 1], [5, 1], [5, 5]]
NAN = float("nan")


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ({"text": None}, "'text' must be .* not absent"),
        ({"text": []}, "'text' must be"),
        ({"text": "a question"}, "'text' must be"),
        ({"text": ["ok", 3]}, "'text' must be"),
        ({"is_sentence": None}, "'is_sentence' must be true or false, not absent"),
        ({"is_sentence": "yes"}, "'is_sentence' must be true or false, not str 'yes'"),
        ({"shapes": None}, "'shapes' must be"),
        ({"shapes": {"label": "target"}}, "'shapes' must be"),
        ({"shapes": ["target"]}, "shape 0 must be an object"),
        (
            {"shapes": [box("target", 1, 1, 2, 2), {"points": POINTS}]},
            "shape 1 must be an object with a 'label'",
        ),
        ({"shapes": [{"label": 3, "points": POINTS}]}, "shape 0 must be an object with a 'label'"),
        ({"shapes": [{"label": "target"}]}, "shape 0 .*'points' must be"),
        ({"shapes": [shape("target")]}, "shape 0 .*'points' must be"),
        ({"shapes": [{"label": "target", "points": [1, 2, 3, 4]}]}, "shape 0 .*'points' must be"),
        ({"shapes": [{"label": "target", "points": [[1, 2], [3]]}]}, "shape 0 .*'points' must be"),
        ({"shapes": [{"label": "target", "points": [["1", "2"]]}]}, "shape 0 .*'points' must be"),
        ({"shapes": [{"label": "target", "points": [[None, 1]]}]}, "shape 0 .*'points' must be"),
        ({"shapes": [shape("target", (1, 1), (5, NAN), (5, 5))]}, "shape 0 .*not finite"),
        ({"shapes": [shape("target", (1, 1), (float("inf"), 1), (5, 5))]}, "shape 0 .*not finite"),
        ({"shapes": [shape("target", (1, 1), (10**400, 1), (5, 5))]}, "shape 0 .*absurdly far"),
        ({"false_premise_QA": {}}, "'false_premise_QA' must be"),
        ({"false_premise_QA": ["text"]}, "'false_premise_QA' must be"),
        ({"false_premise_QA": [["text", True]]}, "'false_premise_QA' must be"),
        ({"false_premise_QA": [["text", 1, "answer"]]}, "'false_premise_QA' must be"),
    ],
)
def test_malformed_description_is_named_with_its_fault(tmp_path, content, message):
    write_reason(tmp_path, "val", "a", **content)
    with pytest.raises(DataError, match=rf"a\.json: {message}"):
        load_source("ReasonSeg|val", tmp_path)


def test_picture_that_is_no_picture_is_an_image_error_of_its_item_alone(tmp_path):
    path = write_reason(tmp_path, "val", "a")
    write_reason(tmp_path, "val", "b")
    path.with_suffix(".jpg").write_bytes(b"not a picture")
    source = load_source("ReasonSeg|val", tmp_path)
    with pytest.raises(ImageError, match=r"a\.jpg is not a picture"):
        source[0]
    assert source[1].image.shape == (*SIZE, 3)


def test_picture_cut_short_is_an_image_error_when_it_is_looked_at(tmp_path):
    path = write_reason(tmp_path, "val", "a").with_suffix(".jpg")
    Image.effect_noise(SIZE[::-1], 50).save(path)
    path.write_bytes(path.read_bytes()[:-200])
    item = only(tmp_path)
    assert item.masks.any()
    with pytest.raises(ImageError, match=r"a\.jpg cannot be decoded"):
        item.image  # noqa: B018 - decoding is the point
