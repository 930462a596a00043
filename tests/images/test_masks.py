"""Run-length encoding of masks, both ways."""

from __future__ import annotations

import json

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from hypothesis.extra.numpy import array_shapes, arrays
from pycocotools import mask as coco

from read_jax.errors import ReadJaxError
from read_jax.images.masks import MaskError, mask_to_rle, rle_to_mask

masks = arrays(bool, array_shapes(min_dims=2, max_dims=2, max_side=40))


@given(masks)
def test_masks_survive_the_round_trip(mask):
    rle = json.loads(json.dumps(mask_to_rle(mask)))
    again = rle_to_mask(rle)
    assert again.dtype == bool
    np.testing.assert_array_equal(again, mask)


@pytest.mark.parametrize("shape", [(1, 1), (1, 9), (9, 1), (300, 700)])
@pytest.mark.parametrize("value", [False, True])
def test_empty_and_full_masks_survive(shape, value):
    mask = np.full(shape, value)
    np.testing.assert_array_equal(rle_to_mask(mask_to_rle(mask)), mask)


def test_long_runs_and_large_masks_survive():
    mask = np.random.default_rng(0).random((1500, 2000)) < 0.5
    mask[:, 300:1500] = True
    np.testing.assert_array_equal(rle_to_mask(mask_to_rle(mask)), mask)


@pytest.mark.filterwarnings("ignore:__array__ implementation")  # inside pycocotools
@given(masks)
def test_uncompressed_runs_are_read_as_coco_reads_them(mask):
    flat = mask.T.ravel()
    edges = np.flatnonzero(np.diff(np.concatenate([[False], flat]).astype(int)))
    runs = np.diff(np.concatenate([[0], edges, [flat.size]])).tolist()
    rle = {"size": list(mask.shape), "counts": runs}
    np.testing.assert_array_equal(rle_to_mask(rle), coco.decode(coco.frPyObjects(rle, *mask.shape)))


def test_counts_may_be_bytes():
    mask = np.eye(5, dtype=bool)
    rle = mask_to_rle(mask)
    np.testing.assert_array_equal(rle_to_mask({**rle, "counts": rle["counts"].encode()}), mask)


@pytest.mark.parametrize(
    "rle",
    [
        None,
        {},
        {"size": [2, 2]},
        {"size": [2], "counts": ""},
        {"size": [0, 2], "counts": ""},
        {"size": [2.0, 2], "counts": "4"},
        {"size": [2, 2], "counts": "5"},
        {"size": [2, 2], "counts": "12"},
        {"size": [2, 2], "counts": ""},
        {"size": [2, 2], "counts": "P"},
        {"size": [2, 2], "counts": " !é"},
        {"size": [2, 2], "counts": "o" * 50 + "0"},
        {"size": [2, 2], "counts": [5, -1]},
        {"size": [2, 2], "counts": [1.5, 2.5]},
        {"size": [2, 2], "counts": [[4]]},
        {"size": [2, 2], "counts": 4.0},
        {"size": [10**6, 10**6], "counts": [10**12]},
    ],
)
def test_malformed_encodings_are_refused(rle):
    with pytest.raises(MaskError):
        rle_to_mask(rle)


@given(st.text(st.characters(min_codepoint=32, max_codepoint=126), max_size=30))
def test_arbitrary_counts_never_crash(counts):
    try:
        assert rle_to_mask({"size": [6, 7], "counts": counts}).shape == (6, 7)
    except MaskError as error:
        assert isinstance(error, ReadJaxError)


@given(masks, st.integers(0, 30), st.integers(48, 111))
def test_a_changed_character_gives_a_mask_or_an_error(mask, place, code):
    rle = mask_to_rle(mask)
    counts = rle["counts"]
    place %= len(counts)
    try:
        changed = rle_to_mask({**rle, "counts": counts[:place] + chr(code) + counts[place + 1 :]})
    except MaskError:
        return
    assert changed.shape == mask.shape


@pytest.mark.parametrize(
    "mask", [np.zeros((0, 3), bool), np.zeros(4, bool), np.full((2, 2), 0.3), np.full((2, 2), 255)]
)
def test_other_arrays_are_not_masks(mask):
    with pytest.raises(MaskError):
        mask_to_rle(mask)


def test_masks_of_zeros_and_ones_are_accepted():
    mask = np.eye(3)
    np.testing.assert_array_equal(rle_to_mask(mask_to_rle(mask)), mask.astype(bool))
