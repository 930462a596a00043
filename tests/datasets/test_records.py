"""What a record holds: every field of an item, through TFDS's features and back."""

from __future__ import annotations

import dataclasses
import io
import json

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image

from read_jax.data import records
from read_jax.data.item import Item, Query
from read_jax.errors import DataError, ImageError
from read_jax.images.masks import CompactMask

HEIGHT, WIDTH = 6, 9

texts = st.text(max_size=12)  # any code point, lone surrogates too
words = st.lists(texts, max_size=3).map(tuple)
queries = st.builds(
    Query,
    phrase=texts,
    exists=st.booleans(),
    is_sentence=st.booleans(),
    correction=texts,
    question=st.none() | texts,
    answer=st.none() | texts,
    ref_id=st.integers(-1, 2**40),
    sent_id=st.integers(-1, 9),
    tags=words,
    alternatives=words,
    shows_image=st.booleans(),
)
masks = st.lists(st.sampled_from([0, 1, 2, 255]), min_size=HEIGHT * WIDTH, max_size=HEIGHT * WIDTH).map(
    lambda values: CompactMask.encode(np.array(values, np.uint8).reshape(HEIGHT, WIDTH))
)


def png(height: int = HEIGHT, width: int = WIDTH) -> bytes:
    buffer = io.BytesIO()
    Image.fromarray(np.arange(height * width * 3, dtype=np.uint8).reshape(height, width, 3)).save(
        buffer, "PNG"
    )
    return buffer.getvalue()


def item_with(questions: list[Query], targets: list[CompactMask], **fields) -> Item:
    return Item(
        key="val/7",
        height=HEIGHT,
        width=WIDTH,
        image_path="images/7.png",
        queries=tuple(questions),
        load_image=lambda: np.zeros((HEIGHT, WIDTH, 3), np.uint8),
        load_mask=targets.__getitem__,
        **fields,
    )


def through_a_record(item: Item, image: bytes | None = None, root: str = "data") -> Item:
    vocabulary: dict[str, int] = {}
    features = records.features()
    example = records.to_example(item, image or png(), item.image_path or "", vocabulary)
    record = features.serialize_example(example)
    return records.from_record(record, [json.loads(entry) for entry in vocabulary], root)


@settings(max_examples=60, deadline=None)
@given(
    st.lists(st.tuples(queries, masks), max_size=4),
    st.lists(st.tuples(texts, words), max_size=4),
    st.booleans(),
)
def test_every_field_survives(pairs, absent, conversation):
    names, alternatives = tuple(name for name, _ in absent), tuple(others for _, others in absent)
    item = item_with(
        [query for query, _ in pairs],
        [mask for _, mask in pairs],
        absent=names,
        absent_alternatives=alternatives,
        conversation=conversation,
    )
    back = through_a_record(item)
    assert back.queries == item.queries
    assert (back.key, back.height, back.width, back.conversation) == ("val/7", HEIGHT, WIDTH, conversation)
    assert back.absent == names and back.absent_alternatives == alternatives
    assert [back.compact_mask(i) for i in range(len(pairs))] == [
        item.compact_mask(i) for i in range(len(pairs))
    ]
    assert back.masks.dtype == np.uint8 and np.array_equal(back.masks, item.masks)


def test_a_field_that_queries_gain_later_is_stored_by_itself():
    assert set(records.QUERY_FIELDS) == {field.name for field in dataclasses.fields(Query)}
    assert set(records.QUERY_FIELDS) < set(records.features()["queries"].feature)


def test_absent_names_without_wordings_stay_without():
    back = through_a_record(item_with([], [], absent=("cat", "dog", "cat")))
    assert back.absent == ("cat", "dog", "cat")
    assert back.absent_alternatives == ()


def test_texts_about_one_object_share_its_mask():
    mask = CompactMask.encode(np.eye(HEIGHT, WIDTH, dtype=np.uint8))
    example = records.to_example(item_with([Query("a"), Query("b")], [mask, mask]), b"", "", {})
    assert [query["mask"] for query in example["queries"]] == [0, 0]
    assert len(example["masks"]) == 1


def test_the_mask_of_what_does_not_exist_is_not_asked_for():
    back = through_a_record(item_with([Query("a", exists=False)], []))
    assert not back.masks.any()


def test_the_picture_is_decoded_from_the_stored_file():
    back = through_a_record(item_with([], []), png())
    assert np.array_equal(back.image.reshape(-1), np.arange(HEIGHT * WIDTH * 3, dtype=np.uint8))


def test_the_path_is_given_below_the_folder_of_the_datasets():
    assert through_a_record(item_with([], []), root="/mnt/data").image_path == "/mnt/data/images/7.png"


def test_a_drawn_picture_has_no_path():
    assert through_a_record(dataclasses.replace(item_with([], []), image_path=None)).image_path is None


def test_a_picture_that_does_not_decode_is_named():
    with pytest.raises(ImageError, match=r"images/7\.png"):
        _ = through_a_record(item_with([], []), b"not a picture").image


def test_a_picture_of_another_size_than_its_masks_is_an_error():
    with pytest.raises(DataError, match="do not belong together"):
        _ = through_a_record(item_with([], []), png(HEIGHT + 1)).image


def test_a_mask_of_another_size_than_the_picture_is_not_stored():
    with pytest.raises(DataError, match="mask of 'a' has 3 x 3"):
        records.to_example(item_with([Query("a")], [CompactMask(3, 3)]), b"", "", {})


def test_printing_an_item_does_not_print_its_picture():
    assert len(repr(through_a_record(item_with([Query("a", exists=False)], [])))) < 2000


@pytest.mark.parametrize(
    ("family", "name"),
    [
        ("refcoco", "refcoco"),
        ("refcoco+", "refcoco_plus"),
        ("R-refcoco+", "r_refcoco_plus"),
        ("ReasonSeg", "reason_seg"),
        ("ade20k", "ade20k"),
        ("my data.jsonl", "my_data_jsonl"),
        ("3 cats.jsonl", "data_3_cats_jsonl"),
    ],
)
def test_families_have_names_that_tfds_takes(family, name):
    assert records.tfds_name(family) == name


def test_no_two_families_share_a_tfds_name():
    from read_jax.data.sources import FAMILIES

    assert len({records.tfds_name(family) for family in FAMILIES}) == len(FAMILIES)


def test_nothing_is_found_where_nothing_is_built(tmp_path):
    assert records.find("refcoco", "val", tmp_path, None) is None
    assert records.find("refcoco", "val", tmp_path / "absent", None) is None
    assert records.built(tmp_path) == []


def test_without_the_packages_the_error_says_what_to_install(monkeypatch):
    monkeypatch.setitem(__import__("sys").modules, "tensorflow_datasets", None)
    with pytest.raises(DataError, match=r"pip install 'read-jax\[data\]'"):
        records.import_tfds()
