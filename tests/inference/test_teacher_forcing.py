"""Answers that are given: their masks equal those of a trace of each alone, however they are batched."""

from __future__ import annotations

import numpy as np
import pytest

import read_jax
from read_jax.errors import PromptError
from tests.inference.conftest import picture
from tests.models.parameters import assert_close

pytestmark = pytest.mark.usefixtures("compiled_quickly")
ASK = "What is the apple in this image?"
ONE, TWO, NONE = "Sure, the segmentation result is [SEG].", "a [SEG] and [SEG] .", "There is no apple."


@pytest.fixture(scope="module")
def images():
    return [picture(48, 64), picture(20, 300, 1), picture(130, 33, 2)]


def assert_equals_trace(result, trace, tolerance=1e-5):
    np.testing.assert_array_equal(result.masks, trace["mask"])
    np.testing.assert_array_equal(result.point_labels, trace["points_labels"])
    np.testing.assert_allclose(result.points, trace["points_continuous"], atol=1e-3)
    if len(result.masks):
        assert_close(result.similarity, trace["similarity"], tolerance)
        assert_close(result.iou, trace["iou_pred"][:, 0], tolerance)


@pytest.mark.parametrize("answer", [ONE, TWO, NONE, "[SEG]", ""])
def test_one_answer_equals_its_trace(segmenter, images, answer):
    (result,) = segmenter.segment_forced([(images[0], ASK, answer)])
    trace = segmenter.trace(images[0], ASK, answer)
    assert_equals_trace(result, trace)
    assert result.text == answer
    assert result.present == bool(trace["mask"].any())
    asked = len(trace["prompt_ids"])
    np.testing.assert_array_equal(result.output_ids, trace["input_ids"][0, asked:])


@pytest.mark.parametrize("together", [1, 2, 4])
def test_a_batch_equals_the_traces_of_its_answers(segmenter, images, monkeypatch, together):
    monkeypatch.setattr(segmenter, "images_per_batch", together)
    longer = f"{ASK} The green one, left of the tree, if it is not too much trouble."
    requests = [
        (images[0], ASK, ONE),
        (images[1], longer, TWO),
        (images[0], longer, NONE),
        (images[2], ASK, TWO),
        (images[0], ASK, TWO),
    ]
    results = segmenter.segment_forced(requests)
    assert [len(result.masks) for result in results] == [1, 2, 0, 2, 2]
    for request, result in zip(requests, results, strict=True):
        # this model multiplies a mean by 800, and with it the last digit that a batch's products differ in
        assert_equals_trace(result, segmenter.trace(*request), tolerance=3e-5)


def test_more_answers_than_rows_are_taken_in_turns(segmenter, images, monkeypatch):
    requests = [(images[0], ASK, answer) for answer in (ONE, TWO, NONE, ONE, TWO)]
    together = segmenter.segment_forced(requests)
    monkeypatch.setattr(segmenter, "rows_per_batch", 2)
    for one, other in zip(segmenter.segment_forced(requests), together, strict=True):
        np.testing.assert_array_equal(one.masks, other.masks)


def test_an_answer_without_seg_is_not_presence(segmenter, images):
    (result,) = segmenter.segment_forced([(images[1], ASK, NONE)])
    assert not result.present
    assert result.masks.shape == (0, 20, 300)
    assert result.iou.shape == (0,)


def test_another_conversation_gives_other_states(segmenter, images):
    request = (images[0], ASK, ONE)
    (result,) = segmenter.segment_forced([request], "vicuna_v1")
    assert_equals_trace(result, segmenter.trace(*request, conversation="vicuna_v1"))
    (other,) = segmenter.segment_forced([request])
    assert not np.array_equal(result.similarity, other.similarity)


def test_a_prepared_picture_equals_its_pixels_and_is_encoded_once(segmenter, images, monkeypatch):
    plain = segmenter.segment_forced([(images[0], ASK, ONE), (images[0], ASK, TWO)])
    seen = []
    encode = segmenter.programs.encode
    monkeypatch.setattr(
        segmenter.programs, "encode", lambda clip, *rest: seen.append(len(clip)) or encode(clip, *rest)
    )
    prepared = segmenter.prepare_image(images[0])
    forced = segmenter.segment_forced([(prepared, ASK, ONE), (prepared, ASK, TWO)])
    assert seen == [1]
    for one, other in zip(plain, forced, strict=True):
        np.testing.assert_array_equal(one.masks, other.masks)
    generated = segmenter.segment(prepared, "find 1 apple", max_new_tokens=4)
    np.testing.assert_array_equal(
        generated.masks, segmenter.segment(images[0], "find 1 apple", max_new_tokens=4).masks
    )


def test_a_few_shapes_serve_all_answers_and_no_logits_are_computed(model_folder, images):
    fresh = read_jax.load(model_folder)
    for number, image in enumerate(images):
        (result,) = fresh.segment_forced([(image, ASK, f"{'x ' * number} [SEG]")])
        assert result.masks.shape == (1, *image.shape[:2])
    counts = fresh.programs.compilations()
    assert (counts.pop("generate"), counts.pop("logits")) == (0, 0)
    assert counts == dict.fromkeys(counts, 1)


def test_an_answer_beyond_the_context_is_refused(segmenter, images):
    context = segmenter.config.llama.max_position_embeddings
    with pytest.raises(PromptError, match=f"context of {context}"):
        segmenter.segment_forced([(images[0], ASK, "x" * context)])


def test_a_question_with_control_tokens_is_refused(segmenter, images):
    with pytest.raises(PromptError, match="control token"):
        segmenter.segment_forced([(images[0], "find [SEG]", ONE)])


def test_no_requests_give_no_answers(segmenter):
    assert segmenter.segment_forced([]) == []
