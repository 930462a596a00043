"""What a source gives, whatever the dataset."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from hypothesis.extra import numpy as hnp

from read_jax.data import Item, Query, load_source
from read_jax.errors import DataError
from read_jax.images.masks import CompactMask, MaskError


def item(*queries, mask=None):
    mask = np.zeros((4, 5), np.uint8) if mask is None else mask
    decoded = []

    def load_image():
        decoded.append(1)
        return np.zeros((*mask.shape, 3), np.uint8)

    made = Item("key", *mask.shape, None, queries, load_image, lambda i: CompactMask.encode(mask))
    return made, decoded


@given(
    hnp.arrays(
        np.uint8,
        hnp.array_shapes(min_dims=2, max_dims=2, max_side=12),
        elements=st.sampled_from([0, 1, 2, 255]),
    )
)
def test_a_compact_mask_gives_the_mask_back(mask):
    compact = CompactMask.encode(mask)
    np.testing.assert_array_equal(compact.decode(), mask)


def test_a_boolean_mask_becomes_the_value_1():
    compact = CompactMask.encode(np.eye(3, dtype=bool))
    np.testing.assert_array_equal(compact.decode(), np.eye(3, dtype=np.uint8))


def test_a_damaged_compact_mask_is_refused():
    with pytest.raises(MaskError, match="cover"):
        CompactMask(4, 4, ((1, "04"),)).decode()


def test_the_picture_is_decoded_once_and_only_when_looked_at():
    made, decoded = item(Query("a cat"))
    assert made.questions and made.masks.shape == (1, 4, 5) and not decoded
    assert made.image.shape == (4, 5, 3)
    assert made.image is made.image
    assert decoded == [1]


def test_where_nothing_exists_the_mask_is_empty_whatever_the_loader_gives():
    made, _ = item(Query("cat"), Query("dog", exists=False), mask=np.ones((2, 2), np.uint8))
    assert made.masks.sum(axis=(1, 2)).tolist() == [4, 0]
    assert made.exists == [True, False]


def test_a_phrase_is_asked_in_lower_case_and_a_sentence_as_it_is():
    made, _ = item(Query("the RED car"), Query("Which one is FAST?", is_sentence=True))
    assert made.questions == [
        "What is the red car in this image? Please output segmentation mask.",
        "Which one is FAST? Please output segmentation mask.",
    ]
    assert made.answers == ["Sure, the segmentation result is [SEG]."] * 2
    assert made.phrases == ["the RED car", "Which one is FAST?"]


def test_a_false_premise_is_denied_or_corrected_without_seg():
    made, _ = item(Query("Blue cup ", exists=False), Query("cup", exists=False, correction=" Red cup"))
    assert made.answers == [
        "There is no blue cup in this image.",
        "There is no cup in this image, but there is red cup.",
    ]


def test_a_denial_is_a_sentence_whatever_it_denies():
    texts = Query("the cup", exists=False), Query("What rolls away?", is_sentence=True, exists=False)
    made, _ = item(*texts)
    assert made.answers == [
        "There is no sign of the cup in this image.",
        "There is nothing of the kind in this image.",
    ]


def test_questions_and_answers_given_verbatim_stay_so():
    made, _ = item(Query("x", question="Where?", answer="There: [SEG]."))
    assert (made.questions, made.answers) == (["Where?"], ["There: [SEG]."])


@pytest.mark.parametrize(
    ("name", "words"),
    [
        ("refcocos|val", ["unknown dataset 'refcocos'", "Did you mean refcoco?", "ReasonSeg", ".jsonl"]),
        ("", ["unknown dataset ''", "Known: ReasonSeg"]),
        ("refcoco|val", ["folder that holds the datasets"]),
    ],
)
def test_an_unknown_name_is_told_the_known_ones(name, words):
    with pytest.raises(DataError) as error:
        load_source(name)
    for word in words:
        assert word in str(error.value)


def test_a_missing_folder_is_named(tmp_path):
    with pytest.raises(DataError, match="nowhere: there is no such folder"):
        load_source("refcoco|val", tmp_path / "nowhere")


def test_an_unknown_compat_is_refused():
    with pytest.raises(DataError, match="compat must be None or 'read', not 'lisa'"):
        load_source("scenes|val", compat="lisa")
