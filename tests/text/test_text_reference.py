"""The text room against the original's own ids, texts and targets: all exactly equal."""

from __future__ import annotations

import json

import numpy as np
import pytest

from read_jax.errors import PromptError
from read_jax.text.conversation import open_prompt, render
from read_jax.text.targets import expand_image_placeholder, mask_targets, pad_batch, truncation_columns
from read_jax.text.tokenizer import Tokenizer

CASES = [(case, template) for case in range(20) for template in ("llava_v1", "v1")]
SAMPLES = [f"s{i}" for i in range(9)]


@pytest.fixture(scope="module")
def reference(goldens):
    return json.loads((goldens / "unit" / "tokenization.json").read_text())


@pytest.fixture(scope="module")
def index(goldens):
    return json.loads((goldens / "tiny-a" / "goldens" / "index.json").read_text())


@pytest.fixture(scope="module")
def tiny(goldens):
    return Tokenizer.load(goldens / "tiny-a" / "checkpoint")


def test_special_ids(tiny, reference, index):
    ids = index["token_ids"]
    assert (tiny.seg_id, tiny.im_start_id, tiny.im_end_id) == (ids["seg"], ids["im_start"], ids["im_end"])
    assert (tiny.bos_id, tiny.eos_id, tiny.pad_id) == (reference["bos"], reference["eos"], reference["pad"])
    assert tiny.vocab_size == reference["vocab_len"]


def test_saved_tokenizer_files_are_the_checkpoints(tiny, goldens, tmp_path):
    tiny.save(tmp_path)
    for name in ("tokenizer.model", "tokenizer_config.json", "special_tokens_map.json"):
        assert (tmp_path / name).read_bytes() == (goldens / "tiny-a" / "checkpoint" / name).read_bytes()
    added = [
        json.loads((f / "added_tokens.json").read_text())
        for f in (tmp_path, goldens / "tiny-a" / "checkpoint")
    ]
    assert added[0] == added[1]


@pytest.mark.parametrize(("case", "template"), CASES)
def test_conversation_text_and_ids(tiny, reference, case, template):
    want = reference["conversations"][case][template]
    turns = [tuple(turn) for turn in reference["conversations"][case]["turns"]]
    full, opened = render(turns, template), render([*turns[:-1], (turns[-1][0], None)], template)
    assert (full, opened) == (want["full_text"], want["open_text"])
    assert tiny.encode(full) == want["full_ids"]
    assert tiny.encode(opened) == want["open_ids"]
    assert tiny.decode(want["full_ids"]) == want["decoded_full"]


@pytest.mark.parametrize(("case", "template"), CASES)
def test_conversation_targets(tiny, reference, case, template):
    want = reference["conversations"][case][template]
    if want["targets"] is None:  # the original asserts
        with pytest.raises(PromptError):
            mask_targets(want["full_ids"], want["full_text"], template, tiny)
    else:
        labels = mask_targets(want["full_ids"], want["full_text"], template, tiny)
        assert labels.tolist() == want["targets"]


@pytest.mark.parametrize("number", range(6))
def test_padded_batches(reference, number):
    want = reference["batches"][number]
    rows = [reference["conversations"][case]["llava_v1"] for case in want["cases"]]
    ids, targets = [row["full_ids"] for row in rows], [row["targets"] for row in rows]
    batch = pad_batch(ids, targets, side=want["padding"])
    np.testing.assert_array_equal(batch.ids, want["input_ids"])
    np.testing.assert_array_equal(batch.mask, want["attention_mask"])
    if want["padding"] == "right":
        np.testing.assert_array_equal(batch.labels, want["targets"])
        cut, want_cut = (
            pad_batch(ids, targets, max_columns=truncation_columns(300)),
            want["truncated_model_max_length_300"],
        )
        np.testing.assert_array_equal(cut.ids, want_cut["input_ids"])
        np.testing.assert_array_equal(cut.labels, want_cut["targets"])
        np.testing.assert_array_equal(cut.mask, want_cut["attention_mask"])


@pytest.mark.parametrize("sample", SAMPLES)
def test_sample_ids_and_image_positions(tiny, goldens, index, sample):
    want = np.load(goldens / "tiny-a" / "goldens" / f"{sample}.npz")
    rows = [tiny.encode(text) for text in index["samples"][sample]["prompts_with_im_tokens"]]
    batch = pad_batch(rows)
    np.testing.assert_array_equal(batch.ids, want["input_ids"])
    np.testing.assert_array_equal(batch.mask, want["attention_mask"])
    for row, mask in zip(rows, want["expanded_attention_mask"], strict=True):
        expanded, start = expand_image_placeholder(row, 576)
        assert len(expanded) == mask.sum()
        assert expanded[start - 1] == tiny.im_start_id and expanded[start + 576] == tiny.im_end_id


@pytest.mark.parametrize("sample", SAMPLES)
def test_generation_prompts_and_answers(tiny, goldens, index, sample):
    want = np.load(goldens / "tiny-a" / "goldens" / f"{sample}.npz")
    for number, case in enumerate(index["samples"][sample]["generation"]):
        prompt = open_prompt(case["question"], case["template"])
        ids = tiny.encode(prompt)
        assert prompt == case["prompt"]
        assert ids == want[f"gen{number}_prompt_ids"].tolist()
        answer = want[f"gen{number}_output_ids"][len(ids) :]
        assert tiny.decode(answer) == case["decoded"]
        assert tiny.decode(answer, skip_special_tokens=False) == case["decoded_keep_special"]


def test_training_batch(tiny, goldens):
    texts = json.loads((goldens / "tiny-a" / "training" / "training.json").read_text())["conversation_list"]
    want = np.load(goldens / "tiny-a" / "training" / "training.npz")
    ids = [tiny.encode(text) for text in texts]
    labels = [mask_targets(row, text, "llava_v1", tiny) for row, text in zip(ids, texts, strict=True)]
    batch = pad_batch(ids, labels)
    np.testing.assert_array_equal(batch.ids, want["input_ids"])
    np.testing.assert_array_equal(batch.labels, want["labels"])
    np.testing.assert_array_equal(batch.mask, want["attention_mask"])
