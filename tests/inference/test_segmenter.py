"""What the Segmenter promises: one mask per [SEG], batches equal to single questions, few compilations."""

from __future__ import annotations

import json
import shutil
import subprocess
import sys

import numpy as np
import pytest

import read_jax
from read_jax.errors import CheckpointError, ConfigError, ImageError, PromptError
from tests.inference.conftest import SIZES, picture
from tests.models.parameters import assert_close

pytestmark = pytest.mark.usefixtures("compiled_quickly")
NONE, ONE, TWO = "find apples", "find 1 apple", "find 2 apples"
LIMIT = 8
TRACE_NAMES = {
    "input_ids", "attention_mask", "expanded_attention_mask", "original_hw", "sam_input_hw",
    "clip_pixel_values", "sam_input", "clip_features", "projector_output", "last_hidden", "logits",
    "logits_last8", "logits_last8_index", "seg_row", "seg_expanded_index", "pred_embedding", "similarity",
    "points_discrete", "points_labels", "points_continuous", "point_coords_1024", "sasp_grid_hw",
    "sasp_image_hw", "sparse_embeddings", "dense_embedding_vector", "image_embedding", "low_res_masks",
    "iou_pred", "mask_logits", "mask", "prompt_ids", "output_ids",
}  # fmt: skip


@pytest.fixture(scope="module")
def image():
    return picture(48, 64)


@pytest.fixture(scope="module")
def two(segmenter, image):
    return segmenter.segment(image, TWO, max_new_tokens=LIMIT)


def assert_same(one, other):
    assert one.text == other.text
    assert one.present == other.present
    np.testing.assert_array_equal(one.output_ids, other.output_ids)
    np.testing.assert_array_equal(one.masks, other.masks)
    np.testing.assert_array_equal(one.point_labels, other.point_labels)
    np.testing.assert_allclose(one.points, other.points, atol=1e-3)
    if len(one.masks):
        assert_close(one.similarity, other.similarity, 1e-5)
        assert_close(one.iou, other.iou, 1e-5)


def test_every_seg_gives_a_mask_with_its_points_similarity_and_score(two):
    assert two.text == "a [SEG] a [SEG]"
    assert two.present
    assert two.masks.shape == (2, 48, 64)
    assert two.masks.dtype == bool
    assert two.points.shape == (2, 30, 2)
    assert two.point_labels.shape == (2, 30)
    assert two.similarity.shape == (2, 576)
    assert two.iou.shape == (2,)
    assert set(two.timings) == {"encode", "generate", "masks"}
    assert not np.array_equal(two.masks[0], two.masks[1])


def test_an_answer_without_seg_has_no_mask(segmenter, image):
    result = segmenter.segment(image, NONE, max_new_tokens=LIMIT)
    assert result.text == "a"
    assert not result.present
    assert result.masks.shape == (0, 48, 64)
    assert result.points.shape == (0, 30, 2)
    assert result.point_labels.shape == (0, 30)
    assert result.similarity.shape == (0, 576)
    assert result.iou.shape == (0,)


def test_a_seg_that_is_the_last_token_allowed_counts(segmenter, image, two):
    cut = segmenter.segment(image, TWO, max_new_tokens=2)
    assert cut.text == "a [SEG]"
    np.testing.assert_array_equal(cut.masks, two.masks[:1])


def test_max_new_tokens_cuts_before_a_seg(segmenter, image):
    assert segmenter.segment(image, TWO, max_new_tokens=1).masks.shape == (0, 48, 64)


def test_an_empty_mask_is_not_presence(segmenter, image, monkeypatch):
    monkeypatch.setattr(
        segmenter.programs, "mask", lambda low_res, geometry: np.full((48, 64), -1.0, np.float32)
    )
    result = segmenter.segment(image, ONE, max_new_tokens=LIMIT)
    assert result.text == "a [SEG]"
    assert result.masks.shape == (1, 48, 64)
    assert not result.present


def test_masks_of_a_generated_answer_equal_those_of_the_same_answer_teacher_forced(segmenter, image, two):
    trace = segmenter.trace(image, TWO, answer=two.text)
    assert trace["input_ids"][0, len(trace["prompt_ids"]) :].tolist() == two.output_ids.tolist()
    np.testing.assert_array_equal(trace["mask"], two.masks)
    np.testing.assert_array_equal(trace["points_labels"], two.point_labels)
    assert_close(trace["similarity"], two.similarity, 1e-5)
    assert_close(trace["iou_pred"][:, 0], two.iou, 1e-5)


def test_a_seg_as_the_first_token_equals_the_teacher_forced_one(segmenter, image):
    result = segmenter.segment(image, ONE, "llava_llama_2", LIMIT)
    assert result.output_ids.tolist() == [segmenter.seg_id, segmenter.tokenizer.eos_id]
    trace = segmenter.trace(image, ONE, answer="[SEG]", conversation="llava_llama_2")
    np.testing.assert_array_equal(trace["mask"], result.masks)
    assert_close(trace["similarity"], result.similarity, 1e-5)


def test_trace_gives_every_documented_array(segmenter, image):
    trace = segmenter.trace(image, TWO)
    assert set(trace) == TRACE_NAMES
    length = len(trace["output_ids"])
    expanded, width, side = length + 575, SIZES.hidden, 4 * SIZES.sam_grid
    vocab = segmenter.config.llama.vocab_size
    shapes = {
        "input_ids": (1, length),
        "attention_mask": (1, length),
        "expanded_attention_mask": (1, expanded),
        "original_hw": (2,),
        "sam_input_hw": (2,),
        "clip_pixel_values": (3, 336, 336),
        "sam_input": (3, 16 * SIZES.sam_grid, 16 * SIZES.sam_grid),
        "clip_features": (576, SIZES.clip_hidden),
        "projector_output": (576, width),
        "last_hidden": (1, expanded, width),
        "logits": (1, expanded, vocab),
        "logits_last8": (1, 8, vocab),
        "logits_last8_index": (1, 8),
        "seg_row": (2,),
        "seg_expanded_index": (2,),
        "pred_embedding": (2, SIZES.sam_out),
        "similarity": (2, 576),
        "points_discrete": (2, 30, 2),
        "points_labels": (2, 30),
        "points_continuous": (2, 30, 2),
        "point_coords_1024": (2, 30, 2),
        "sasp_grid_hw": (2, 2),
        "sasp_image_hw": (2, 2),
        "sparse_embeddings": (2, 32, SIZES.sam_out),
        "dense_embedding_vector": (SIZES.sam_out,),
        "image_embedding": (SIZES.sam_out, SIZES.sam_grid, SIZES.sam_grid),
        "low_res_masks": (2, side, side),
        "iou_pred": (2, 1),
        "mask_logits": (2, 48, 64),
        "mask": (2, 48, 64),
    }
    assert {name: trace[name].shape for name in shapes} == shapes
    kinds = {trace[name].dtype for name in TRACE_NAMES if np.issubdtype(trace[name].dtype, np.floating)}
    assert kinds == {np.dtype(np.float32)}
    predicted = trace["logits"][0, trace["seg_expanded_index"]].argmax(-1)
    assert (predicted == segmenter.seg_id).all()


def test_a_batch_equals_its_questions_one_by_one(segmenter, image):
    wide, tall = picture(20, 300, 1), picture(130, 33, 2)
    long = "where are the 2 apples, the green ones, if you please?"
    requests = [(image, TWO), (wide, NONE), (image, NONE), (tall, ONE), (wide, long), (image, ONE)]
    batch = segmenter.segment_batch(requests, max_new_tokens=LIMIT)
    assert [len(result.masks) for result in batch] == [2, 0, 0, 1, 2, 1]
    for request, result in zip(requests, batch, strict=True):
        assert result.masks.shape[1:] == request[0].shape[:2]
        assert_same(segmenter.segment(*request, max_new_tokens=LIMIT), result)


def test_pictures_may_go_through_the_device_together(segmenter, image, monkeypatch):
    images = [image, picture(20, 300, 1), picture(130, 33, 2)]
    requests = [(images[0], TWO), (images[1], ONE), (images[2], NONE), (images[0], NONE), (images[2], ONE)]
    monkeypatch.setattr(segmenter, "images_per_batch", 1)
    alone = segmenter.segment_batch(requests, max_new_tokens=LIMIT)
    monkeypatch.setattr(segmenter, "images_per_batch", 3)
    together = segmenter.segment_batch(requests, max_new_tokens=LIMIT)
    for one, other in zip(alone, together, strict=True):
        assert_same(one, other)


def test_more_questions_than_rows_are_answered_in_turns(segmenter, image, monkeypatch):
    requests = [(image, question) for question in (TWO, ONE, NONE, TWO, ONE)]
    together = segmenter.segment_batch(requests, max_new_tokens=LIMIT)
    monkeypatch.setattr(segmenter, "rows_per_batch", 2)
    for one, other in zip(segmenter.segment_batch(requests, max_new_tokens=LIMIT), together, strict=True):
        assert_same(one, other)


def test_questions_about_one_picture_share_its_encoding(segmenter, image, monkeypatch):
    seen = []
    encode = segmenter.programs.encode
    monkeypatch.setattr(
        segmenter.programs, "encode", lambda clip, *rest: seen.append(len(clip)) or encode(clip, *rest)
    )
    segmenter.segment_batch([(image, TWO), (image, NONE)], max_new_tokens=LIMIT)
    assert seen == [1]


def test_no_requests_give_no_answers(segmenter):
    assert segmenter.segment_batch([]) == []


def test_sampling_repeats_with_its_seed_whatever_else_is_in_the_batch(segmenter, image):
    hot = {"max_new_tokens": LIMIT, "temperature": 60.0, "top_p": 0.9}
    alone = segmenter.segment(image, ONE, **hot, seed=3)
    again = segmenter.segment(image, ONE, **hot, seed=3)
    among = segmenter.segment_batch([(image, TWO), (image, ONE)], **hot, seed=3)[1]
    assert_same(alone, again)
    assert_same(alone, among)
    answers = {segmenter.segment(image, ONE, **hot, seed=seed).text for seed in range(4)}
    assert len(answers) > 1


@pytest.mark.parametrize("setting", [{"temperature": 1e-40}, {"temperature": 1.0, "top_p": 1e-40}])
def test_sampling_at_its_coldest_is_greedy(segmenter, image, two, setting):
    assert_same(segmenter.segment(image, TWO, max_new_tokens=LIMIT, **setting), two)


def test_an_answer_near_the_end_of_the_context_does_not_depend_on_its_neighbours(segmenter, image):
    context = segmenter.config.llama.max_position_embeddings
    shortest = segmenter.prepare_prompt("1", "llava_v1")
    room = context - len(shortest.prefix) - len(shortest.question)
    brim = "1" + "x" * (room - 1)  # one byte, one token: leaves room for a single one
    with pytest.raises(PromptError, match="context of 2048"):
        segmenter.prepare_prompt(brim + "x", "llava_v1")
    full, short = segmenter.segment_batch([(image, brim), (image, TWO)], max_new_tokens=LIMIT)
    assert len(full.output_ids) == 1
    assert short.text == "a [SEG] a [SEG]"


def test_pictures_of_any_size_compile_every_program_once(model_folder):
    fresh = read_jax.load(model_folder)
    sizes = [(1, 1), (10, 3000), (30000, 10), (480, 640), (37, 36), (1, 1500)]
    for number, (height, width) in enumerate(sizes):
        result = fresh.segment(picture(height, width, number), ONE, max_new_tokens=LIMIT)
        assert result.masks.shape == (1, height, width)
        inside = (result.points >= 0).all() and (result.points <= [width, height]).all()
        assert inside
    counts = fresh.programs.compilations()
    assert (counts.pop("teacher_force"), counts.pop("logits")) == (0, 0)
    assert counts == dict.fromkeys(counts, 1)


def test_without_points_there_are_none(scripted_sources, tmp_path, image):
    read_jax.weights.convert(*scripted_sources, tmp_path / "off", sasp="off")
    result = read_jax.load(tmp_path / "off").segment(image, ONE, max_new_tokens=LIMIT)
    assert result.text == "a [SEG]"
    assert result.points.shape == (1, 0, 2)
    assert result.point_labels.shape == (1, 0)
    assert result.similarity.shape == (1, 576)


def test_bfloat16_runs_and_stays_finite(model_folder, image):
    segmenter = read_jax.load(model_folder, dtype="bfloat16")
    result = segmenter.segment(image, ONE, max_new_tokens=LIMIT)
    assert result.text == "a [SEG]"
    assert result.masks.shape == (1, 48, 64)
    for values in (result.points, result.similarity, result.iou):
        assert values.dtype == np.float32
        assert np.isfinite(values).all()


@pytest.mark.parametrize(
    ("setting", "message"),
    [
        ({"max_new_tokens": 0}, "max_new_tokens"),
        ({"max_new_tokens": 2.5}, "max_new_tokens"),
        ({"temperature": -1.0}, "temperature"),
        ({"temperature": float("nan")}, "temperature"),
        ({"temperature": float("inf")}, "temperature"),
        ({"top_p": 0.0}, "top_p"),
        ({"top_p": 1.1}, "top_p"),
        ({"seed": -1}, "seed"),
        ({"seed": 2**32}, "seed"),
        ({"conversation": "v7"}, "conversation template 'v7'"),
    ],
)
def test_a_setting_out_of_range_is_named(segmenter, image, setting, message):
    with pytest.raises(PromptError, match=message):
        segmenter.segment(image, ONE, **setting)


def test_a_bad_prompt_or_picture_is_refused(segmenter, image):
    with pytest.raises(PromptError, match="empty"):
        segmenter.segment_batch([(image, ONE), (image, " ")])
    with pytest.raises(ImageError, match="uint8"):
        segmenter.segment(image / 255, ONE)


def test_load_refuses_an_unknown_type(model_folder):
    with pytest.raises(ConfigError, match="float64"):
        read_jax.load(model_folder, dtype="float64")


def test_load_misses_the_tokenizer_before_it_reads_the_weights(model_folder, tmp_path, monkeypatch):
    shutil.copytree(model_folder, tmp_path / "model")
    (tmp_path / "model" / "upstream" / "tokenizer.model").unlink()
    monkeypatch.setattr(
        "read_jax.inference.segmenter.load_model", lambda *_, **__: pytest.fail("weights read")
    )
    with pytest.raises(CheckpointError, match=r"tokenizer\.model"):
        read_jax.load(tmp_path / "model")


def test_inference_imports_neither_torch_nor_tensorflow(model_folder):
    code = (
        "import sys, json, numpy as np, read_jax\n"
        f"s = read_jax.load({str(model_folder)!r})\n"
        f"r = s.segment(np.zeros((8, 8, 3), np.uint8), {ONE!r}, max_new_tokens=3)\n"
        "unwanted = [m for m in ('torch', 'tensorflow', 'transformers') if m in sys.modules]\n"
        "print(json.dumps([r.text, unwanted]))"
    )
    command = [sys.executable, "-c", code]
    out = subprocess.run(command, capture_output=True, text=True, check=True, timeout=300)
    assert json.loads(out.stdout.splitlines()[-1]) == ["a [SEG]", []]
