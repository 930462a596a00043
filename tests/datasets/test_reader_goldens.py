"""ReasonSeg, the referring sets and decoding against what the original's loaders give for the same files."""

from __future__ import annotations

import json

import numpy as np
import pytest

from read_jax.data import load_source
from read_jax.data.refer import target_mask
from read_jax.data.sources import REFER_SETS
from read_jax.geometry import sam_input_size
from read_jax.images.decode import image_size, read_image
from read_jax.images.preprocess import clip_crop, normalize_clip, normalize_sam, sam_resize
from read_jax.text.conversation import open_prompt, render

SPLITS = ("train", "val", "test")
COMPATS = [None, "read"]


@pytest.fixture(scope="module")
def golden(fixtures):
    """(the JSON, the arrays) of a golden file by name."""

    def read(name):
        folder = fixtures / "golden_dev"
        masks = folder / f"{name}_masks.npz"
        arrays = np.load(masks if masks.exists() else folder / f"{name}.npz")
        return json.loads((folder / f"{name}.json").read_text("utf-8")), arrays

    return read


def by_image(source, folder):
    """(path below the dataset folder, item) in the source's order."""
    return [(str(item.image_path).removeprefix(f"{folder}/"), item) for item in source]


def upright_equals(expected, item):
    return [item.height, item.width] == expected["image_hw"] == expected["mask_hw"]


# --------------------------------------------------------------------------------------------- ReasonSeg


@pytest.mark.parametrize("split", SPLITS)
def test_reason_seg_evaluation_is_the_originals(golden, fixtures, split):
    expected, masks = golden("reason_test")
    folder = fixtures / "dataset"
    source = load_source(f"ReasonSeg|{split}", folder, "read")
    pairs = by_image(source, folder)
    assert [path for path, _ in pairs] == [e["image"] for e in expected[split]["items"]]
    for (_, item), e in zip(pairs, expected[split]["items"], strict=True):
        query = item.queries[0]
        assert upright_equals(e, item)
        assert item.phrases[0] == e["question_text"]
        assert query.is_sentence == e["is_sentence"]
        assert item.exists[:1] == e["exists_val"] == e["exists_test"]
        np.testing.assert_array_equal(item.masks[:1], masks[e["masks_key_val"]])
        np.testing.assert_array_equal(item.masks[0], masks[e["masks_key_test"]][0])
        if split != "train":
            assert len(item.queries) == 1


@pytest.mark.parametrize("split", SPLITS)
def test_reason_seg_prompts_are_the_originals(golden, fixtures, split):
    expected, _ = golden("reason_test")
    source = load_source(f"ReasonSeg|{split}", fixtures / "dataset", "read")
    for item, e in zip(source, expected[split]["items"], strict=True):
        question, answer = item.questions[0], item.answers[0]
        asked = f"<image>\n{question}"
        assert render([(asked, answer)], "llava_v1", use_im_start_end=False) == e["prompts_val_llava_v1"][0]
        assert open_prompt(question, "vicuna_v1", use_im_start_end=False) == e["prompts_test_vicuna_v1"][0]


@pytest.mark.parametrize("split", SPLITS)
def test_reason_seg_asks_the_false_premises_too(golden, fixtures, split):
    expected, masks = golden("reason_test")
    source = load_source(f"ReasonSeg|{split}", fixtures / "dataset")
    for item, e in zip(source, expected[split]["items"], strict=True):
        true = e["texts"] if split == "train" else e["texts"][:1]
        false = e["false_premise_QA"] or []
        assert item.phrases == [*true, *(text for text, _, _ in false)]
        assert [q.is_sentence for q in item.queries] == [e["is_sentence"]] * len(true) + [f[1] for f in false]
        assert item.answers[len(true) :] == [answer for _, _, answer in false]
        assert item.exists == [True] * len(true) + [False] * len(false)
        assert not item.masks[len(true) :].any()
        for mask in item.masks[: len(true)]:
            np.testing.assert_array_equal(mask, masks[e["masks_key_val"]][0])


@pytest.mark.parametrize("compat", COMPATS)
def test_reason_seg_training_has_all_that_the_original_draws_from(golden, fixtures, compat):
    expected, masks = golden("reason_train")
    folder = fixtures / "dataset"
    source = load_source("ReasonSeg|train", folder, compat)
    for (path, item), e in zip(by_image(source, folder), expected["items"], strict=True):
        assert path == e["image"]
        true, false = e["True_Premise"], e["False_Premise_Correction"]
        there = [i for i, exists in enumerate(item.exists) if exists]
        absent = [i for i, exists in enumerate(item.exists) if not exists]
        assert [True] * len(there) == true["exists"]
        assert [False] * len(absent) == false["exists"]
        # ignored pixels are background to the original's training; here training decides
        np.testing.assert_array_equal(item.masks[there] == 1, masks[true["masks_key"]] == 1)
        for i, prompt in zip(there, true["first_template_prompts"], strict=True):
            text = item.phrases[i] if item.queries[i].is_sentence else item.phrases[i].lower()
            assert text in prompt and prompt.endswith("[SEG].</s>")
        # the original makes as many prompts as there are texts
        for i, prompt in zip(absent, false["first_template_prompts"], strict=False):
            assert item.phrases[i] in prompt and prompt.endswith(f" ASSISTANT: {item.answers[i]}</s>")


# ---------------------------------------------------------------------------------------- referring sets


@pytest.mark.parametrize("family", REFER_SETS)
def test_refer_is_the_originals(golden, fixtures, family):
    expected, masks = golden("refer_test")
    folder = fixtures / "dataset"
    for split, content in expected[family].items():
        source = load_source(f"{family}|{split}", folder, "read")
        for (path, item), e in zip(by_image(source, folder), content["items"], strict=True):
            assert path == e["image"]
            assert item.key == f"{split}/{e['image_id']}"
            assert upright_equals(e, item)
            assert item.phrases == e["sentences"]
            assert [q.correction for q in item.queries] == e["gt_sents"]
            assert item.exists == e["exists"]
            assert item.ref_ids == e["ref_ids"]
            assert item.sent_ids == e["sent_ids"]
            np.testing.assert_array_equal(item.masks, masks[e["masks_key"]])
            for query, question in zip(item.queries, e["first_template_raw_questions"], strict=True):
                assert query.phrase.lower() in question


@pytest.mark.parametrize("family", REFER_SETS)
def test_refer_by_default_differs_in_order_and_overlaps_only(golden, fixtures, family):
    expected, masks = golden("refer_test")
    for split, content in expected[family].items():
        source = load_source(f"{family}|{split}", fixtures / "dataset")
        items = sorted(content["items"], key=lambda e: e["image_id"])
        for item, e in zip(source, items, strict=True):
            assert item.key == f"{split}/{e['image_id']}"
            assert (item.phrases, item.exists) == (e["sentences"], e["exists"])
            assert (item.ref_ids, item.sent_ids) == (e["ref_ids"], e["sent_ids"])
            np.testing.assert_array_equal(item.masks, masks[e["masks_key"]] > 0)


@pytest.mark.parametrize("family", REFER_SETS)
def test_refer_training_has_all_that_the_original_draws_from(golden, fixtures, family):
    expected, masks = golden("refer_train")
    folder = fixtures / "dataset"
    source = load_source(f"{family}|train", folder, "read")
    for (path, item), e in zip(by_image(source, folder), expected[family]["items"], strict=True):
        assert path == e["image"]
        assert (item.phrases, item.exists) == (e["sentences"], e["exists"])
        there = np.flatnonzero(item.exists)
        assert len(there) == e["n_masks"]
        np.testing.assert_array_equal(item.masks[there], masks[e["masks_key"]])
        for exists, prompt in zip(item.exists, e["first_template_prompts"], strict=True):
            assert exists == ("[SEG]" in prompt)


def instances(folder, family):
    content = json.loads((folder / "dataset/refer_seg" / family / "instances.json").read_text())
    sizes = {image["id"]: (image["height"], image["width"]) for image in content["images"]}
    return sizes, {a["id"]: a["segmentation"] for a in content["annotations"]}


@pytest.mark.parametrize("family", REFER_SETS)
@pytest.mark.parametrize("compat", COMPATS)
def test_every_annotation_is_drawn_as_the_original_draws_it(golden, fixtures, family, compat):
    expected, masks = golden("refer_train")
    sizes, segmentations = instances(fixtures, family)
    for e in expected[family]["annotations"]:
        drawn = target_mask(segmentations, [e["ann_id"]], *sizes[e["image_id"]], compat).decode()
        original = masks[e["masks_key"]].reshape(drawn.shape)
        np.testing.assert_array_equal(drawn, original if compat else original > 0)


@pytest.mark.parametrize("family", REFER_SETS)
def test_lists_of_annotations_are_drawn_as_the_original_draws_them(golden, fixtures, family):
    expected, masks = golden("refer_train")
    sizes, segmentations = instances(fixtures, family)
    e = expected[family]["ann_list"]
    height, width = sizes[e["image_id"]]
    groups = [ids if isinstance(ids, list) else [ids] for ids in e["ann_ids"]]
    drawn = [target_mask(segmentations, ids, height, width, "read").decode() for ids in groups]
    drawn = np.array([mask * exists for mask, exists in zip(drawn, e["exists"], strict=True)])
    existing = np.flatnonzero(e["exists"])
    without, with_ = e["results"]
    np.testing.assert_array_equal(drawn[existing], masks[without["masks_key"]])
    np.testing.assert_array_equal(drawn, masks[with_["masks_key"]])


# ---------------------------------------------------------------------------------------------- pictures


def test_every_picture_has_the_originals_size(golden, fixtures):
    expected, _ = golden("preprocess")
    assert len(expected["decoded_hw_all"]) > 50
    for path, (height, width) in expected["decoded_hw_all"].items():
        file = fixtures / "dataset" / path
        assert image_size(file) == (height, width) == read_image(file).shape[:2]
        assert list(sam_input_size(height, width, 1024)) == expected["sam_input_hw_all"][path]


def test_pictures_are_decoded_and_preprocessed_as_the_original_does(golden, fixtures):
    expected, arrays = golden("preprocess")
    for e in expected["items"]:
        k = e["k"]
        image = read_image(fixtures / "dataset" / e["image"])
        np.testing.assert_array_equal(image, arrays[f"rgb_{k}"])
        clip = normalize_clip(clip_crop(image)).transpose(2, 0, 1)
        np.testing.assert_allclose(clip[:, ::8, ::8], arrays[f"clip_{k}"], atol=1e-5, rtol=0)
        padded, (height, width) = sam_resize(image)
        assert [height, width] == e["sam_input_hw"]
        np.testing.assert_array_equal(padded[:height:8, :width:8], arrays[f"sam_resized_u8_{k}"])
        sam = normalize_sam(padded, height, width).transpose(2, 0, 1)
        np.testing.assert_allclose(sam[:, ::8, ::8], arrays[f"sam_{k}"], atol=1e-5, rtol=0)
        assert abs(sam.mean(dtype=np.float64) - e["sam_mean"]) < 1e-5
        assert abs(clip.mean(dtype=np.float64) - e["clip_mean"]) < 1e-5
        small, size = sam_resize(image, 96)
        assert list(size) == e["sam96_input_hw"]
        sam = normalize_sam(small, *size).transpose(2, 0, 1)
        np.testing.assert_allclose(sam, arrays[f"sam96_{k}"], atol=1e-5, rtol=0)
