"""The whole model against the original's own numbers: every stage of every sample, and generation."""

from __future__ import annotations

import json

import numpy as np
import pytest

import read_jax
from read_jax.weights import convert
from tests.models.parameters import assert_close

SAMPLES = [f"s{i}" for i in range(9)]
QUESTION_START = "<im_end>\n"


@pytest.fixture(scope="module")
def segmenter(goldens, tmp_path_factory):
    folder = tmp_path_factory.mktemp("model") / "tiny-a"
    tiny = goldens / "tiny-a"
    convert(tiny / "checkpoint", tiny / "clip", folder, sasp="7b")
    return read_jax.load(folder)


@pytest.fixture(scope="module")
def index(goldens):
    return json.loads((goldens / "tiny-a" / "goldens" / "index.json").read_text())["samples"]


def question_and_answer(text: str) -> tuple[str, str]:
    """The two halves of a one-round conversation, as `trace` takes them."""
    question, answer = text.split(QUESTION_START)[1].split(" ASSISTANT:")
    return question, answer.removeprefix(" ").removesuffix("</s>")


def unpack(packed: np.ndarray, shape: np.ndarray) -> np.ndarray:
    return np.unpackbits(packed)[: int(np.prod(shape))].reshape(shape).astype(bool)


def iou(a: np.ndarray, b: np.ndarray) -> float:
    union = (a | b).sum()
    return float((a & b).sum() / union) if union else 1.0


@pytest.mark.parametrize("sample", SAMPLES)
def test_every_stage_equals_the_original(sample, goldens, segmenter, index):
    golden = np.load(goldens / "tiny-a" / "goldens" / f"{sample}.npz")
    entry = index[sample]
    image = goldens / "tiny-a" / entry["image"]
    seg_rows = list(golden["seg_row"])
    for row, text in enumerate(entry["prompts_with_im_tokens"]):
        trace = segmenter.trace(image, *question_and_answer(text))
        length = int(golden["attention_mask"][row].sum())
        expanded = length + 575
        np.testing.assert_array_equal(trace["input_ids"][0], golden["input_ids"][row, :length])
        assert trace["last_hidden"].shape[1] == expanded
        assert trace["expanded_attention_mask"].all()
        np.testing.assert_allclose(
            trace["clip_pixel_values"][:, ::4, ::4], golden["clip_pixel_values_sub4"], atol=1e-5
        )
        np.testing.assert_allclose(trace["sam_input"][:, ::8, ::8], golden["sam_input_sub8"], atol=1e-5)
        np.testing.assert_array_equal(trace["original_hw"], golden["original_hw"])
        np.testing.assert_array_equal(trace["sam_input_hw"], golden["sam_input_hw"])
        assert_close(trace["clip_features"], golden["clip_features"])
        assert_close(trace["projector_output"], golden["projector_output"])
        assert_close(trace["last_hidden"][0], golden["last_hidden"][row, :expanded])
        assert_close(trace["image_embedding"][:, ::4, ::4], golden["image_embedding_sub4"])
        np.testing.assert_array_equal(trace["logits_last8_index"][0], golden["logits_last8_index"][row])
        assert_close(trace["logits_last8"][0], golden["logits_last8"][row])

        mine = [m for m, owner in enumerate(seg_rows) if owner == row]
        np.testing.assert_array_equal(trace["seg_expanded_index"], golden["seg_expanded_index"][mine])
        if not mine:
            assert trace["mask"].shape == (0, *golden["original_hw"])
            continue
        for name in ("points_discrete", "points_labels", "sasp_grid_hw", "sasp_image_hw"):
            np.testing.assert_array_equal(trace[name], golden[name][mine], err_msg=name)
        for name in ("pred_embedding", "similarity", "sparse_embeddings", "low_res_masks", "iou_pred"):
            assert_close(trace[name], golden[name][mine])
        np.testing.assert_allclose(trace["points_continuous"], golden["points_continuous"][mine], atol=2e-3)
        np.testing.assert_allclose(trace["point_coords_1024"], golden["point_coords_1024"][mine], atol=5e-3)
        assert_close(trace["dense_embedding_vector"], golden["dense_embedding_vector"])
        assert_close(trace["mask_logits"][:, ::4, ::4], golden["mask_logits_sub4"][mine])
        masks = unpack(golden["mask_packed"], golden["mask_shape"])[mine]
        assert iou(trace["mask"], masks) >= 0.999


@pytest.mark.parametrize("sample", SAMPLES)
def test_generation_equals_the_original(sample, goldens, segmenter, index):
    golden = np.load(goldens / "tiny-a" / "goldens" / f"{sample}.npz")
    image = goldens / "tiny-a" / index[sample]["image"]
    for j, expected in enumerate(index[sample]["generation"]):
        result = segmenter.segment(
            image, expected["question"], expected["template"], expected["max_new_tokens"]
        )
        prompt, output = golden[f"gen{j}_prompt_ids"], golden[f"gen{j}_output_ids"]
        np.testing.assert_array_equal(result.output_ids, output[len(prompt) :])
        assert result.text == expected["decoded"]
        assert result.present == expected["object_presence"]
        mask = unpack(golden[f"gen{j}_mask_packed"], golden[f"gen{j}_mask_shape"])
        if f"gen{j}_similarity" not in golden:
            assert len(result.masks) == 0 and not mask.any()
            continue
        assert iou(result.masks[0], mask) >= 0.999
        assert_close(result.similarity[0], golden[f"gen{j}_similarity"])
        np.testing.assert_array_equal(result.point_labels[0], golden[f"gen{j}_points_labels"])
        np.testing.assert_allclose(result.points[0], golden[f"gen{j}_points_continuous"], atol=2e-3)
        assert_close(result.iou[0], golden[f"gen{j}_iou_pred"][0])


def test_bfloat16_answers_alike(goldens, segmenter, index, tmp_path_factory):
    """With 8 significant bits: the same words, similarity within 3 %, masks IoU >= 0.95 of float32's."""
    tiny, entry = goldens / "tiny-a", index["s2"]
    folder = tmp_path_factory.mktemp("bfloat16") / "tiny-a"
    convert(tiny / "checkpoint", tiny / "clip", folder, sasp="7b", dtype="bfloat16")
    rough = read_jax.load(folder)
    questions = [(tiny / entry["image"], expected["question"]) for expected in entry["generation"]]
    exact, close = segmenter.segment_batch(questions), rough.segment_batch(questions)
    for ours, reference, expected in zip(close, exact, entry["generation"], strict=True):
        assert ours.text == expected["decoded"]
        assert_close(ours.similarity, reference.similarity, 3e-2)
        assert iou(ours.masks, reference.masks) >= 0.95
