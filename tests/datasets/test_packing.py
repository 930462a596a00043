"""Packed rows are the tokens of the whole conversation; batches have the same shapes whatever is in them."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from read_jax.data.item import Query
from read_jax.data.mixture import Row, Sample
from read_jax.data.packing import Limits, evaluation_sample, fitted_size, scaled_mask
from read_jax.errors import DataError, PromptError
from read_jax.geometry import image_geometry
from read_jax.images.masks import CompactMask
from read_jax.images.preprocess import clip_crop, sam_resize
from read_jax.inference.request import prepare_prompt
from read_jax.text.conversation import RESERVED_TEXTS, TEMPLATES, render
from read_jax.text.targets import IGNORE_INDEX, expand_image_placeholder, expand_labels, mask_targets
from tests.datasets.in_memory import Pictures, chats, five, tiny_packer

PACKER = tiny_packer()
ROW = Row((("What is the cup?", "Here: [SEG]."),), True, CompactMask(12, 20))


def sample(rows, size=(12, 20), key="set:one") -> Sample:
    image = np.random.default_rng(0).integers(0, 256, (*size, 3), np.uint8)
    return Sample(key, "set", image, tuple(rows))


def whole(turns, packer) -> tuple[np.ndarray, np.ndarray]:
    """Ids and labels of a conversation tokenised in one go."""
    (question, answer), *later = turns
    text = render([(f"<image>\n{question}", answer), *later], packer.template, packer.config.use_im_start_end)
    ids = packer.tokenizer.encode(text)
    labels = mask_targets(ids, text, packer.template, packer.tokenizer)
    count = packer.config.clip.num_image_tokens
    expanded, start = expand_image_placeholder(ids, count)
    return expanded, expand_labels(labels, start, count)


def assert_whole(turns, packer) -> None:
    row = packer.pack_row(Row(tuple(turns), False, None))
    ids, labels = whole(turns, packer)
    np.testing.assert_array_equal(np.concatenate([packer.prefix_ids, row.ids]), ids)
    np.testing.assert_array_equal(row.labels, labels[len(packer.prefix_ids) :])
    assert (labels[: len(packer.prefix_ids)] == IGNORE_INDEX).all()


# rows


@pytest.mark.parametrize("im_start_end", [True, False])
@pytest.mark.parametrize("template", TEMPLATES)
@pytest.mark.parametrize("turns", [1, 2, 3])
def test_prefix_and_row_are_the_whole_conversation(template, im_start_end, turns):
    packer = tiny_packer(Limits(3, 400), template, im_start_end)
    conversation = [("Is it red? ", "Yes, [SEG]."), ("And now\nwhat", "Nothing."), (" éß", "Good.\n")]
    assert_whole(conversation[:turns], packer)


WORDS = st.text(st.characters(codec="utf-8", exclude_characters="<[\n"), min_size=1, max_size=12).filter(
    lambda text: text.strip() and "ASSISTANT" not in text
)


@given(st.lists(st.tuples(WORDS, WORDS), min_size=1, max_size=3))
def test_any_words_pack_to_the_tokens_of_the_whole_conversation(turns):
    assert_whole(turns, LONG)


LONG = tiny_packer(Limits(3, 900))


def test_the_prefix_is_that_of_inference():
    prepared = prepare_prompt("What is it?", "llava_v1", PACKER.config, PACKER.tokenizer)
    np.testing.assert_array_equal(PACKER.prefix_ids, prepared.prefix)
    assert PACKER.image_start == prepared.image_start


@pytest.mark.parametrize("answer", ["[SEG]", "Here: [SEG].", "It is [SEG] , look"])
def test_seg_at_is_the_state_that_predicts_seg(answer):
    row = PACKER.pack_row(Row((("Where?", answer),), True, CompactMask(12, 20)))
    assert row.ids[row.seg_at + 1] == row.labels[row.seg_at + 1] == PACKER.tokenizer.seg_id
    assert row.mask is not None and row.seg_at > 0


def test_seg_in_a_later_turn_is_found():
    row = PACKER.pack_row(Row((("Hello", "Hi."), ("Where?", "At [SEG].")), True, CompactMask(12, 20)))
    assert row.ids[row.seg_at + 1] == PACKER.tokenizer.seg_id


def test_without_seg_there_is_no_mask():
    row = PACKER.pack_row(Row((("Where?", "There."),), True, CompactMask(12, 20)))
    assert row.mask is None and row.seg_at == -1


def test_a_long_row_is_cut_at_the_limit():
    row = tiny_packer(Limits(3, 20)).pack_row(Row((("Why?", "because " * 30),), False, None))
    ids, labels = whole([("Why?", "because " * 30)], PACKER)
    start = len(PACKER.prefix_ids)
    np.testing.assert_array_equal(row.ids, ids[start : start + 20])
    np.testing.assert_array_equal(row.labels, labels[start : start + 20])


def test_a_row_of_whose_answer_nothing_is_left_is_refused():
    row = Row((("Why?", "because " * 30),), False, None)
    begin = int(np.argmax(PACKER.pack_row(row).labels != IGNORE_INDEX))
    assert np.any(tiny_packer(Limits(3, begin + 1)).pack_row(row).labels != IGNORE_INDEX)
    with pytest.raises(PromptError, match=f"beyond the limit of {begin} tokens: nothing of it is left"):
        tiny_packer(Limits(3, begin)).pack_row(row)


@pytest.mark.parametrize("spare", [0, 1])
def test_seg_is_never_cut_off(spare):
    place = PACKER.pack_row(ROW).seg_at + 1
    packer = tiny_packer(Limits(3, place + spare))
    if spare:
        assert packer.pack_row(ROW).ids[-1] == packer.tokenizer.seg_id
    else:
        with pytest.raises(PromptError, match=f"token {place + 1} of its row, beyond the limit of {place}"):
            packer.pack_row(ROW)


@pytest.mark.parametrize("text", [*RESERVED_TEXTS, "a ASSISTANT: b"])
@pytest.mark.parametrize("place", [0, 1])
def test_control_texts_are_refused(text, place):
    turn = ["Question", "Answer"]
    turn[place] += f" {text} more"
    if text == "[SEG]" and place:
        turn[place] += " [SEG]"  # one is what an answer may hold
    with pytest.raises(PromptError):
        PACKER.pack_row(Row(((turn[0], turn[1]),), False, None))


@pytest.mark.parametrize("turn", [("", "A"), (" ", "A"), ("Q", ""), ("Q", " ")])
def test_empty_texts_are_refused(turn):
    with pytest.raises(PromptError, match="empty"):
        PACKER.pack_row(Row((turn,), False, None))


# examples


def test_pictures_and_geometry_are_those_of_the_preprocessing():
    example = PACKER.pack(sample([ROW], (12, 20)))
    image, c = sample([ROW]).image, PACKER.config
    np.testing.assert_array_equal(example.clip_pixels, clip_crop(image, 28))
    np.testing.assert_array_equal(example.sam_pixels, sam_resize(image, 64)[0])
    assert example.geometry == image_geometry(12, 20, c.sasp, c.clip.grid_size, 64)


def test_a_row_that_cannot_be_packed_is_left_out_with_its_reason():
    bad = Row((("What </s>?", "No."),), False, None)
    example = PACKER.pack(sample([ROW, bad, ROW]))
    assert len(example.rows) == 2
    assert len(example.dropped) == 1 and "</s>" in example.dropped[0]


def test_an_example_without_rows_is_an_error():
    with pytest.raises(DataError, match=r"none of its questions can be used.*</s>"):
        PACKER.pack(sample([Row((("What </s>?", "No."),), False, None)]))


def test_more_rows_than_a_batch_holds_are_an_error():
    with pytest.raises(DataError, match="set:one has 4 questions; a batch holds 3"):
        PACKER.pack(sample([ROW] * 4))


def test_a_mask_of_another_size_is_an_error():
    with pytest.raises(DataError, match="mask of 12x20 pixels for a picture of 12x21"):
        PACKER.pack(sample([ROW], (12, 21)))


def test_rows_beyond_the_context_are_refused_at_once():
    with pytest.raises(DataError, match="rows of 1024 tokens do not fit"):
        tiny_packer(Limits(3, 1024))


# batches


def test_a_batch_holds_every_example_in_its_place():
    mask = np.zeros((12, 20), np.uint8)
    mask[2:5, 3:9], mask[11] = 1, 255
    deny = Row((("Where is the dog?", "No dog here."),), False, None)
    examples = [PACKER.pack(sample([deny, ROW._replace(mask=CompactMask.encode(mask))])), None]
    batch = PACKER.batch(examples)
    assert batch.valid.tolist() == [True, False]
    assert batch.has_mask.tolist() == [[False, True, False], [False] * 3]
    assert batch.exists.tolist() == batch.has_mask.tolist()
    for j, row in enumerate(examples[0].rows):
        length = batch.lengths[0, j]
        np.testing.assert_array_equal(batch.question_ids[0, j, :length], row.ids)
        np.testing.assert_array_equal(batch.labels[0, j, :length], row.labels)
        assert (batch.question_ids[0, j, length:] == PACKER.tokenizer.pad_id).all()
        assert (batch.labels[0, j, length:] == IGNORE_INDEX).all()
    assert batch.seg_at.tolist() == [[0, examples[0].rows[1].seg_at, 0], [0] * 3]
    assert batch.mask_size[0].tolist() == [12, 20]
    np.testing.assert_array_equal(batch.masks[0, 1, :12, :20], mask)
    assert batch.masks.sum() == mask.sum()
    assert (batch.lengths[1] == 0).all() and (batch.labels[1] == IGNORE_INDEX).all()
    assert batch.geometry.height.tolist()[0] == 12 and batch.geometry.sasp.grid_height.shape == (2,)


def test_shapes_do_not_depend_on_the_contents():
    small = PACKER.batch([PACKER.pack(sample([ROW]))])
    rows = [Row((("Why?", "because " * 9),), False, None)] * 3
    large = PACKER.batch([PACKER.pack(sample(rows, (90, 40)))])
    padding = PACKER.batch([None])
    for other in (large, padding):
        for a, b in zip(
            (*small[:-2], *small.geometry[:-1]), (*other[:-2], *other.geometry[:-1]), strict=True
        ):
            if isinstance(a, np.ndarray):
                assert a.shape == b.shape and a.dtype == b.dtype


def test_a_target_beyond_the_canvas_is_scaled_down_in_proportion():
    mask = np.zeros((40, 64), np.uint8)
    mask[:20], mask[20:, 32:] = 1, 255
    example = PACKER.pack(sample([ROW._replace(mask=CompactMask.encode(mask))], (40, 64)))
    batch = PACKER.batch([example])
    assert batch.mask_size.tolist() == [[20, 32]]
    wanted = np.zeros((32, 32), np.uint8)
    wanted[:10], wanted[10:20, 16:] = 1, 255
    np.testing.assert_array_equal(batch.masks[0, 0], wanted)
    assert int(batch.geometry.height[0]) == 40


@given(st.integers(1, 3000), st.integers(1, 3000), st.integers(1, 64), st.integers(1, 64))
def test_a_fitted_size_lies_within_the_canvas(height, width, rows, columns):
    fitted = fitted_size((height, width), (rows, columns))
    assert 1 <= fitted[0] <= min(rows, height) and 1 <= fitted[1] <= min(columns, width)
    if height <= rows and width <= columns:
        assert fitted == (height, width)


@given(st.integers(1, 30), st.integers(1, 30), st.data())
def test_scaling_takes_the_nearest_pixels(height, width, data):
    mask = np.arange(height * width).reshape(height, width)
    size = data.draw(st.integers(1, height)), data.draw(st.integers(1, width))
    scaled = scaled_mask(mask, size)
    for y in range(size[0]):
        for x in range(size[1]):
            at = int((y + 0.5) * height / size[0] + 1e-9), int((x + 0.5) * width / size[1] + 1e-9)
            assert scaled[y, x] == mask[at]


# evaluation


def test_evaluation_rows_are_the_fixed_questions_of_a_part_of_an_item():
    def queries(index):
        return (Query("Cup"), Query("Fork", False, correction="Spoon"), Query("Knife"))

    item = Pictures("fprefcoco|val", 1, queries)[0]
    taken = evaluation_sample(item, "fprefcoco|val", 1, 5)
    assert taken.key == "fprefcoco|val:p0"
    assert [row.turns[0] for row in taken.rows] == list(zip(item.questions, item.answers, strict=True))[1:]
    assert [row.exists for row in taken.rows] == [False, True]
    np.testing.assert_array_equal(taken.rows[1].mask.decode(), item.masks[2])


def test_evaluation_rows_of_an_absent_thing_have_no_mask():
    item = Pictures("x|val", 1, lambda i: (Query("Fork", False),))[0]
    batch = PACKER.batch([PACKER.pack(evaluation_sample(item, "x|val"))])
    assert not batch.has_mask.any() and not batch.exists.any()


def test_a_conversation_cannot_be_evaluated():
    with pytest.raises(DataError, match="conversation"):
        evaluation_sample(chats()[0], "llava_instruct|train")


def test_an_item_packs_to_a_mask_for_every_question():
    item = Pictures("refcoco|val", 1, five)[0]
    batch = PACKER.batch([PACKER.pack(evaluation_sample(item, "refcoco|val", 0, 3))])
    np.testing.assert_array_equal(batch.masks[0, :, :12, :20], item.masks[:3])
