"""Target masking, padding and the room for image tokens."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from read_jax.errors import PromptError
from read_jax.text.conversation import TEMPLATES, render
from read_jax.text.targets import (
    IGNORE_INDEX,
    expand_image_placeholder,
    expand_labels,
    mask_targets,
    pad_batch,
    truncation_columns,
)
from read_jax.text.tokenizer import IMAGE_TOKEN_ID

TURNS = [
    ("<image>\nWhat is the red circle?", "Sure, [SEG]."),
    ("Is it larger", "It is the largest, see [SEG]"),
    ("And the star?  ", "Sorry, there is no star."),
]


def supervised_runs(labels: np.ndarray) -> list[list[int]]:
    """The stretches of supervised targets, in order."""
    runs: list[list[int]] = [[]]
    for label in labels.tolist():
        if label != IGNORE_INDEX:
            runs[-1].append(label)
        elif runs[-1]:
            runs.append([])
    return [run for run in runs if run]


@pytest.mark.parametrize("name", TEMPLATES)
@pytest.mark.parametrize("count", [1, 2, 3])
def test_exactly_the_answers_and_their_ends_are_supervised(tokenizer, name, count):
    text = render(TURNS[:count], name)
    labels = mask_targets(tokenizer.encode(text), text, name, tokenizer)
    ends = TEMPLATES[name].end
    wanted = [tokenizer.encode(answer + ends, bos=False) for _, answer in TURNS[:count]]
    assert supervised_runs(labels) == wanted


@pytest.mark.parametrize("name", TEMPLATES)
def test_supervised_targets_are_the_ids_at_their_place(tokenizer, name):
    text = render(TURNS, name)
    ids = np.array(tokenizer.encode(text))
    labels = mask_targets(ids, text, name, tokenizer)
    kept = labels != IGNORE_INDEX
    assert (labels[kept] == ids[kept]).all() and not kept[0] and kept[-1]
    assert labels[ids == IMAGE_TOKEN_ID] == IGNORE_INDEX


def test_padding_is_ignored(tokenizer):
    text = render(TURNS)
    ids = tokenizer.encode(text)
    labels = mask_targets(ids + [tokenizer.pad_id] * 5, text, "llava_v1", tokenizer)
    assert (labels[-5:] == IGNORE_INDEX).all()
    assert (labels[:-5] == mask_targets(ids, text, "llava_v1", tokenizer)).all()


@pytest.mark.parametrize("turn", [("Q", "I am the ASSISTANT: hello"), ("an ASSISTANT: here", "A")])
def test_a_separator_inside_a_turn_is_an_error(tokenizer, turn):
    text = render([turn])
    with pytest.raises(PromptError, match=r"round 1 .* 2 times"):
        mask_targets(tokenizer.encode(text), text, "llava_v1", tokenizer)


def test_a_round_of_another_template_is_an_error(tokenizer):
    text = render(TURNS[:1], "llava_llama_2")
    with pytest.raises(PromptError, match=r"round 1 .* no separator"):
        mask_targets(tokenizer.encode(text), text, "llava_v1", tokenizer)


def test_an_open_conversation_has_no_targets(tokenizer):
    text = render([("Q", None)])
    with pytest.raises(PromptError, match="no separator"):
        mask_targets(tokenizer.encode(text), text, "llava_v1", tokenizer)


def test_ids_that_do_not_match_the_text_are_an_error(tokenizer):
    text = render(TURNS)
    with pytest.raises(PromptError, match="differ"):
        mask_targets(tokenizer.encode(text)[:-3], text, "llava_v1", tokenizer)


def test_rows_cut_at_the_maximum_length_are_accepted(tokenizer):
    text = render(TURNS)
    ids = tokenizer.encode(text)[:30]
    labels = mask_targets(ids, text, "llava_v1", tokenizer, model_max_length=30)
    assert labels.shape == (30,)


@given(st.lists(st.lists(st.integers(1, 99), max_size=8), max_size=5), st.sampled_from(["right", "left"]))
def test_padding_keeps_every_row_and_masks_the_rest(rows, side):
    batch = pad_batch(rows, rows, side=side)
    for row, ids, mask, labels in zip(rows, *batch, strict=True):
        assert ids[mask].tolist() == labels[mask].tolist() == row
        assert (ids[~mask] == 0).all() and (labels[~mask] == IGNORE_INDEX).all()
        if row and not mask.all():
            assert mask[0 if side == "right" else -1]


def test_batches_are_cut_where_the_original_cuts_them():
    batch = pad_batch([[5] * 60, [6] * 10], max_columns=truncation_columns(300))
    assert batch.ids.shape == batch.mask.shape == (2, 45)
    assert batch.mask.sum(axis=1).tolist() == [45, 10]


@pytest.mark.parametrize("bad", [{"side": "top"}, {"max_columns": 0}, {"side": "left", "max_columns": 3}])
def test_impossible_paddings_are_refused(bad):
    with pytest.raises(ValueError):
        pad_batch([[1, 2]], **bad)


def test_labels_of_other_lengths_are_refused():
    with pytest.raises(ValueError, match="length"):
        pad_batch([[1, 2]], [[1]])


@given(st.lists(st.integers(0, 99), max_size=9), st.lists(st.integers(0, 99), max_size=9), st.integers(1, 6))
def test_the_placeholder_becomes_the_image_tokens(before, after, count):
    ids, start = expand_image_placeholder([*before, IMAGE_TOKEN_ID, *after], count)
    assert start == len(before)
    assert ids.tolist() == [*before, *[IMAGE_TOKEN_ID] * count, *after]
    labels = expand_labels([*before, IGNORE_INDEX, *after], start, count)
    assert labels.tolist() == [*before, *[IGNORE_INDEX] * count, *after]


@pytest.mark.parametrize("ids", [[1, 2, 3], [1, IMAGE_TOKEN_ID, IMAGE_TOKEN_ID]])
def test_exactly_one_placeholder_is_wanted(ids):
    with pytest.raises(PromptError, match="exactly one picture"):
        expand_image_placeholder(ids, 4)
