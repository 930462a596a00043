"""A user's own records: what is read, and what is reported as broken."""

from __future__ import annotations

import json
import pickle

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image
from pycocotools import mask as coco

from read_jax.data import load_source
from read_jax.data.jsonl import check, parse
from read_jax.errors import DataError, ImageError, ReadJaxError
from tests.datasets import label_trees

HEIGHT, WIDTH = 6, 8
SQUARE = [[1, 1], [5, 1], [5, 4], [1, 4]]  # 4 x 3 pixels
BOX = np.zeros((HEIGHT, WIDTH), np.uint8)
BOX[1:4, 1:5] = 1


def write(folder, *lines, pictures=("a.jpg",)):
    """A file of records (or of lines as they are), and pictures beside it."""
    for name in pictures:
        label_trees.save_picture(folder / name, HEIGHT, WIDTH)
    path = folder / "mine.jsonl"
    texts = [line if isinstance(line, bytes) else json.dumps(line).encode() for line in lines]
    path.write_bytes(b"\n".join(texts) + b"\n")
    return path


def record(**changes):
    """A sound record; a key given as None is left out."""
    made = {"image": "a.jpg", "class": "the kettle", "mask": SQUARE, **changes}
    return {key: value for key, value in made.items() if value is not None}


def items(folder, *lines, pictures=("a.jpg",), **options):
    return list(load_source(str(write(folder, *lines, pictures=pictures)), **options))


def save_mask(path, array, mode=None):
    image = Image.fromarray(array)
    (image.convert(mode) if mode else image).save(path)


def test_a_class_is_put_into_a_question_and_a_question_asked_as_it_is(tmp_path):
    (item,) = items(tmp_path, record(), record(**{"class": None}, question="What boils water?"))
    assert item.phrases == ["the kettle", "What boils water?"]
    assert item.questions == [
        "What is the kettle in this image? Please output segmentation mask.",
        "What boils water?",
    ]
    assert [query.is_sentence for query in item.queries] == [False, True]


def test_an_answer_is_given_as_it_is_and_made_up_otherwise(tmp_path):
    (item,) = items(
        tmp_path,
        record(answer="Here: [SEG]"),
        record(mask=None, answer="No kettle."),
        record(mask=None, exists=False, correction="a pan"),
    )
    assert item.exists == [True, False, False]
    assert item.answers == [
        "Here: [SEG]",
        "No kettle.",
        "There is no sign of the kettle in this image, but there is a pan.",
    ]


def test_records_of_one_picture_are_one_item_in_the_files_order(tmp_path):
    lines = [record(**{"class": c}, image=i) for c, i in (("x", "b.jpg"), ("y", "a.jpg"), ("z", "./b.jpg"))]
    first, second = items(tmp_path, *lines, pictures=("a.jpg", "b.jpg"))
    assert (first.key, first.phrases, first.ref_ids) == ("b.jpg", ["x", "z"], [1, 3])
    assert (second.key, second.phrases, second.ref_ids) == ("a.jpg", ["y"], [2])
    assert first.image.shape == (HEIGHT, WIDTH, 3)


def test_paths_are_relative_to_the_file_or_to_the_folder_given(tmp_path):
    (tmp_path / "lists").mkdir()
    path = write(tmp_path / "lists", record(), record(mask="m.png"), pictures=())
    label_trees.save_picture(tmp_path / "a.jpg", HEIGHT, WIDTH)
    save_mask(tmp_path / "m.png", BOX * 255)
    (item,) = load_source(str(path), data_dir=tmp_path)
    assert item.masks.sum(axis=(1, 2)).tolist() == [12, 12] and item.key == "a.jpg"
    with pytest.raises(ImageError, match=r"mine\.jsonl:1: .*lists/a\.jpg: there is no such file"):
        load_source(str(path))[0]


@pytest.mark.parametrize(
    "shape",
    [
        SQUARE,
        [SQUARE],
        [1, 1, 5, 1, 5, 4, 1, 4],
        [[1, 1, 5, 1, 5, 4, 1, 4]],
        {"size": [6, 8], "counts": [7, 3, 3, 3, 3, 3, 3, 3, 20]},
        [{"size": [6, 8], "counts": coco.encode(np.asfortranarray(BOX))["counts"].decode()}],
        "box.png",
        ["box.png", SQUARE],
        [[[1, 1], [3, 1], [3, 4], [1, 4]], [3, 1, 5, 1, 5, 4, 3, 4]],
    ],
)
@pytest.mark.parametrize("key", ["mask", "masks"])
def test_every_form_of_a_mask_gives_its_pixels(tmp_path, key, shape):
    save_mask(tmp_path / "box.png", BOX * 255)
    (item,) = items(tmp_path, record(mask=None) | {key: shape})
    np.testing.assert_array_equal(item.masks[0], BOX)


@pytest.mark.parametrize(
    ("values", "mode", "expected"),
    [
        ([0, 255], None, [0, 1]),  # black and white
        ([0, 1], None, [0, 1]),
        ([0, 1, 255], None, [0, 1, 255]),
        ([0, 1, 2, 255], None, [0, 1, 1, 1]),
        ([0, 128, 255], None, [0, 1, 1]),
        ([0, 255], "1", [0, 1]),
        ([0, 1, 255], "RGB", [0, 1, 1]),
        ([0, 300], np.uint16, [0, 1]),
    ],
)
def test_a_png_means_what_is_not_zero_and_ignores_255_only_beside_1(tmp_path, values, mode, expected):
    picture = np.zeros((HEIGHT, WIDTH), mode if mode is np.uint16 else np.uint8)
    picture[0, : len(values)] = values
    save_mask(tmp_path / "m.png", picture, mode if isinstance(mode, str) else None)
    (item,) = items(tmp_path, record(mask="m.png"))
    assert item.masks[0, 0, : len(values)].tolist() == expected and not item.masks[0, 1:].any()


def test_a_palette_png_counts_indices(tmp_path):
    image = Image.fromarray(BOX * 3).convert("L")
    image.putpalette([255, 255, 255] + [0, 0, 0] * 255)  # index 0 is white, the rest black
    image.save(tmp_path / "m.png")
    np.testing.assert_array_equal(items(tmp_path, record(mask="m.png"))[0].masks[0], BOX)


def test_ignored_pixels_are_255_where_the_mask_is_not(tmp_path):
    ignore = [[0, 0], [3, 0], [3, 6], [0, 6]]
    (item,) = items(tmp_path, record(ignore=ignore))
    expected = np.zeros((HEIGHT, WIDTH), np.uint8)
    expected[:, :3] = 255
    expected[1:4, 1:5] = 1
    np.testing.assert_array_equal(item.masks[0], expected)


def test_a_polygon_partly_outside_is_cut_off(tmp_path):
    (item,) = items(tmp_path, record(mask=[[-3, -3], [2, -3], [2, 3], [-3, 3]]))
    expected = np.zeros((HEIGHT, WIDTH), np.uint8)
    expected[:3, :2] = 1
    np.testing.assert_array_equal(item.masks[0], expected)


def test_a_turned_picture_has_masks_as_it_is_shown(tmp_path):
    path = write(tmp_path, record())
    label_trees.save_picture(tmp_path / "a.jpg", HEIGHT, WIDTH, orientation=6)
    (item,) = load_source(str(path))
    assert item.image.shape[:2] == item.masks.shape[1:] == (HEIGHT, WIDTH)


def test_blank_lines_and_a_byte_order_mark_are_no_records(tmp_path):
    good = json.dumps(record()).encode()
    (item,) = items(tmp_path, b"\xef\xbb\xbf" + good, b"", b"  \r", good + b"\r")
    assert item.ref_ids == [1, 4]


def test_sources_and_items_travel_between_processes(tmp_path):
    source = pickle.loads(pickle.dumps(load_source(str(write(tmp_path, record())))))
    np.testing.assert_array_equal(pickle.loads(pickle.dumps(source[0])).masks[0], BOX)


MALFORMED = [
    (b"{", "not a JSON object on one line"),
    (b'{"image": "a.jpg"', "not a JSON object on one line"),
    (b"[" * 100_000, "JSON"),
    (b'"text"', "not a JSON object"),
    (b'{"image": "\xff"}', "not UTF-8"),
    (b'{"image": "a.jpg", "image": "b.jpg"}', "the key 'image' twice"),
    (record(anwser="x"), "unknown key 'anwser'. Did you mean 'answer'?"),
    (record(image=None), "has no image"),
    (record(image=3), "image must be text"),
    (record(image="a\0.jpg"), "no character"),
    (record(image="a\ud800.jpg"), "no character"),
    (record(mask="a\0.png"), "no character"),
    (record(question="And this?"), "a question or a class"),
    (record(**{"class": None}), "a question or a class"),
    (record(**{"class": "  "}), "class must be text"),
    (record(**{"class": "the <image> one"}), "contains <image>"),
    (record(masks=SQUARE), "mask or masks, not both"),
    (record(exists=1), "exists must be true or false, not 1"),
    (record(exists=False), "has a mask, but says that the thing does not exist"),
    (record(mask=None, exists=True), "has no mask"),
    (record(mask=[], exists=True), "has no mask"),
    (record(mask=None, ignore=SQUARE), "of use only beside a mask"),
    (record(correction="a pan"), "has a correction, but the thing exists"),
    (record(answer="There."), "must contain [SEG] once"),
    (record(answer="[SEG] [SEG]"), "must contain [SEG] once"),
    (record(mask=None, answer="[SEG]"), "nowhere"),
    (record(answer="[SEG]</s>"), "contains </s>"),
    (record(mask=7), "neither a polygon"),
    (record(mask={"size": [6, 8]}), "neither a polygon"),
    (record(mask=[SQUARE, True]), "neither a polygon"),
    (record(mask=[[1, 1], [5, 1, 2], [3, 3]]), "a corner that is not [x, y]"),
    (record(mask=[[1, 1], [5, "1"], [3, 3]]), "a coordinate that is not a number"),
    (record(mask=[[1, 1], [5, float("nan")], [3, 3]]), "not finite"),
    (record(mask=[[1, 1], [5, 10**400], [3, 3]]), "not finite"),
    (record(mask=[[1, 1], [5, 5]]), "3 corners"),
    (record(mask=[1, 1, 5, 5, 3, 3, 2]), "3 corners"),
]
UNFIT = [
    (record(image="none.jpg"), "there is no such file"),
    (record(image="text.jpg"), "not a picture"),
    (record(mask="none.png"), "is missing"),
    (record(mask="text.jpg"), "not a readable PNG"),
    (record(mask="large.png"), "16 x 12 pixels"),
    (record(mask="clear.png"), "type RGBA"),
    (record(mask="black.png"), "no pixel"),
    (record(mask={"size": [8, 6], "counts": [48]}), "does not fit"),
    (record(mask={"size": [6, 8], "counts": [20, 8]}), "cover 28 pixels"),
    (record(mask=[[90, 90], [95, 90], [95, 95]]), "outside"),
    (record(mask=[[1, 1], [1e12, 1], [1, 4]]), "absurdly long"),
    (record(mask=[[2, 2], [2, 2], [2, 2]]), "no pixel"),
    (record(ignore="none.png"), "is missing"),
]


def write_unfit(folder):
    (folder / "text.jpg").write_text("no picture")
    save_mask(folder / "large.png", np.ones((12, 16), np.uint8))
    save_mask(folder / "clear.png", np.ones((HEIGHT, WIDTH, 4), np.uint8))
    save_mask(folder / "black.png", np.zeros((HEIGHT, WIDTH), np.uint8))


@pytest.mark.parametrize(("line", "words"), MALFORMED)
def test_a_malformed_record_is_refused_with_its_line(tmp_path, line, words):
    path = write(tmp_path, record(), line)
    with pytest.raises(DataError) as error:
        load_source(str(path))
    assert str(error.value).startswith(f"{path}:2: ") and words in str(error.value)


@pytest.mark.parametrize(("line", "words"), UNFIT)
def test_a_record_that_does_not_fit_its_files_fails_with_its_line_when_looked_at(tmp_path, line, words):
    write_unfit(tmp_path)
    path = write(tmp_path, line | {"image": "a.jpg"}, line)
    source = load_source(str(path))
    with pytest.raises(ReadJaxError) as error:
        _ = source[len(source) - 1].masks
    assert f"{path}:{2 if len(source) == 2 else 1}: " in str(error.value) and words in str(error.value)


def test_check_lists_every_broken_record_with_its_line(tmp_path):
    write_unfit(tmp_path)
    broken = [*MALFORMED, *UNFIT]
    lines = [part for line, _ in broken for part in (record(**{"class": f"thing {len(str(line))}"}), line)]
    report = check(write(tmp_path, *lines))
    assert not report.ok and report.broken == len(broken)
    errors = [p for p in report.problems if p.broken]
    assert [p.where.rpartition(":")[2] for p in errors] == [str(2 * i + 2) for i in range(len(broken))]
    for problem, (_, words) in zip(errors, broken, strict=True):
        assert words in problem.message
        assert str(problem) in str(report)


def test_check_counts_records_pictures_and_masks(tmp_path):
    lines = [
        record(),
        record(**{"class": "b"}, mask=[0, 0, 8, 0, 8, 6, 0, 6]),
        record(image="b.jpg", mask=None),
    ]
    report = check(write(tmp_path, *lines, pictures=("a.jpg", "b.jpg")))
    assert report.ok and not report.problems
    assert (report.records, report.pictures, report.masks) == (3, 2, 2)
    np.testing.assert_allclose(report.shares, [12 / 48, 1])
    assert "3 records of 2 pictures, 2 sound masks; 0 broken" in str(report)
    assert "cover 25 % to 100 % of their pictures, median 62.5 %" in str(report)


def test_check_warns_of_what_can_be_used_but_deserves_a_look(tmp_path):
    cut_off = [[-3, -3], [2, -3], [2, 3], [-3, 3]]
    report = check(write(tmp_path, record(), record(mask=cut_off), record(**{"class": "the cup"})))
    assert report.ok and [p.broken for p in report.problems] == [False, False]
    assert "asks the same of the same picture as line 1" in report.problems[0].message
    assert "reaches 3 pixels out of its 8 x 6 picture" in report.problems[1].message
    assert all(p.where.endswith(":2") for p in report.problems)


def test_check_tells_how_far_it_is(tmp_path):
    seen = []
    path = write(tmp_path, record(image="b.jpg"), record(), b"{", pictures=("a.jpg", "b.jpg"))
    check(path, progress=lambda done, total: seen.append((done, total)))
    assert seen == [(2, 3), (3, 3)]


def test_check_goes_through_a_dataset_by_its_name(tmp_path):
    labels = {stem: np.full((2, 4), i, np.uint8) for i, stem in enumerate("abc")}
    label_trees.ade20k(tmp_path, labels)
    (tmp_path / "ade20k/annotations/training/b.png").unlink()
    (tmp_path / "ade20k/images/training/c.jpg").write_bytes(b"no picture")
    report = check("ade20k|train", tmp_path)
    assert (report.records, report.pictures, report.masks, report.broken) == (1, 3, 0, 2)
    assert [p.where for p in report.problems] == ["ade20k|train: item 1", "ade20k|train: train/c"]


@pytest.mark.parametrize("function", [check, load_source])
@pytest.mark.parametrize(
    ("content", "words"),
    [
        (b"", "holds no record"),
        (b"\n \n", "holds no record"),
        (b'[\n{"image": "a.jpg"}\n]', "holds a JSON list"),
        (None, "there is no such file"),
    ],
)
def test_a_file_that_is_not_of_this_format_is_refused_whole(tmp_path, function, content, words):
    path = tmp_path / "mine.json"
    if content is not None:
        path.write_bytes(content)
    with pytest.raises(DataError, match=rf"mine\.json.*{words}"):
        function(str(path))


def test_check_of_an_unknown_name_lists_the_known_ones():
    with pytest.raises(DataError, match=r"unknown dataset 'refcocos'.*Known: ReasonSeg"):
        check("refcocos|val", ".")


JSON = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=8),
    lambda inner: st.lists(inner, max_size=4) | st.dictionaries(st.text(max_size=6), inner, max_size=3),
    max_leaves=8,
)


@settings(max_examples=200, deadline=None)
@given(st.dictionaries(st.sampled_from(["image", "class", "mask", "ignore", "exists", "answer"]), JSON))
def test_any_record_is_read_or_refused_with_a_reason(tmp_path_factory, content):
    text = json.dumps({"image": "a.jpg", "class": "x", **content}).encode()
    try:
        made = parse(text, 1, tmp_path_factory.getbasetemp())
    except DataError as error:
        assert str(error)
    else:
        assert made.query.phrase and made.query.exists == bool(made.target)


@settings(max_examples=50, deadline=None)
@given(st.lists(st.tuples(st.floats(-20, 30), st.floats(-20, 30)), min_size=3, max_size=7), st.booleans())
def test_a_polygon_has_the_pixels_pycocotools_gives_it_or_is_refused(tmp_path_factory, corners, flat):
    numbers = [v for corner in corners for v in corner]
    line = json.dumps(
        {"image": "a.jpg", "class": "x", "mask": numbers if flat else [list(c) for c in corners]}
    )
    made = parse(line.encode(), 1, tmp_path_factory.getbasetemp())
    expected = coco.decode(coco.merge(coco.frPyObjects([numbers], HEIGHT, WIDTH)))
    if expected.any():
        np.testing.assert_array_equal(made.mask(HEIGHT, WIDTH).decode(), expected)
    else:
        with pytest.raises(DataError, match=r"no pixel|outside"):
            made.mask(HEIGHT, WIDTH)
