"""Label images, parts and conversations against what the original gives on a small copy of the sets."""

from __future__ import annotations

import json
from types import SimpleNamespace

import numpy as np
import pytest

from read_jax.data import load_source
from read_jax.data.label_images import load
from read_jax.text.conversation import render

LABELS = ("ade20k", "cocostuff", "mapillary")
PARTS = ("pascal_part", "paco_lvis")


@pytest.fixture(scope="module")
def golden(fixtures):
    folder = fixtures / "golden_dev"
    with np.load(folder / "semseg_train_masks.npz") as masks:
        return SimpleNamespace(
            root=fixtures / "dataset",
            sets=json.loads((folder / "semseg_train.json").read_text("utf-8")),
            conversations=json.loads((folder / "vqa_train.json").read_text("utf-8"))["items"],
            masks=dict(masks),
        )


def pairs(golden, family, compat):
    """Each golden of a family with our item of the same picture."""
    source = load_source(f"{family}|train", golden.root, compat)
    goldens = golden.sets[family]["items"]
    assert len(source) == len(goldens)
    if family in PARTS:
        found = {int(item.key.removeprefix("train/")): item for item in source}
        return [(g, found[g["image_id"]]) for g in goldens]
    found = {item.image_path: item for item in source}
    return [(g, found[str(golden.root / g["image"])]) for g in goldens]


def check_sizes_and_masks(golden, expected, item):
    assert [item.height, item.width] == expected["mask_hw"] == expected["image_hw"]
    assert item.image_path == str(golden.root / expected["image"])
    assert list(item.image.shape[:2]) == expected["image_hw"]
    assert item.exists == expected["exists"]
    np.testing.assert_array_equal(item.masks, golden.masks[expected["masks_key"]])
    assert item.masks.sum(axis=(1, 2)).tolist() == [sample["pixels"] for sample in expected["samples"]]


@pytest.mark.parametrize("family", LABELS)
def test_label_images_in_compat_are_the_originals(golden, family):
    for expected, item in pairs(golden, family, "read"):
        if expected["resampled"]:
            assert not item.queries
            continue
        check_sizes_and_masks(golden, expected, item)
        samples = expected["samples"]
        assert item.phrases == [sample["name"] for sample in samples]
        assert item.ref_ids == [sample["class_id"] for sample in samples]
        assert sorted(set(item.absent)) == expected["negatives_sorted"]
        assert len(item.absent) == expected["n_negatives"]


@pytest.mark.parametrize("family", LABELS)
def test_the_names_are_the_originals(golden, family):
    assert list(load(family, "train", golden.root, None).vocabulary.names) == golden.sets[family]["class_map"]


def test_ade20k_is_the_same_by_default(golden):
    default, compat = (load_source("ade20k|train", golden.root, c) for c in (None, "read"))
    for ours, theirs in zip(default, compat, strict=True):
        assert (ours.phrases, ours.absent) == (theirs.phrases, theirs.absent)
        np.testing.assert_array_equal(ours.masks, theirs.masks)


@pytest.mark.parametrize("family", ["cocostuff", "mapillary"])
def test_by_default_the_originals_sound_masks_are_kept_and_no_present_class_is_absent(golden, family):
    for expected, item in pairs(golden, family, None):
        ours = dict(zip(item.phrases, item.masks, strict=True))
        assert len(ours) == len(item.phrases) and not set(ours) & set(item.absent)
        if expected["resampled"]:
            continue
        for sample, mask in zip(expected["samples"], golden.masks[expected["masks_key"]], strict=True):
            if sample["name"] == "unlabeled":
                assert sample["name"] not in ours
            elif sample["name"] == "traffic sign":  # of two classes: the original has the first alone
                assert (ours[sample["name"]] >= mask).all() and ours[sample["name"]].any()
            else:
                np.testing.assert_array_equal(ours[sample["name"]], mask)


@pytest.mark.parametrize("family", PARTS)
@pytest.mark.parametrize("compat", [None, "read"])
def test_parts_are_the_originals_with_spaces_for_underscores_by_default(golden, family, compat):
    def said(record):
        names = dict.fromkeys((record["name_if_coin_below_half"], record["name_otherwise"]))
        return tuple(name if compat else name.replace("_", " ") for name in names)

    for expected, item in pairs(golden, family, compat):
        if expected["resampled"]:
            assert not item.queries
            continue
        check_sizes_and_masks(golden, expected, item)
        assert item.ref_ids == [sample["ann_id"] for sample in expected["samples"]]
        assert [(q.phrase, *q.alternatives) for q in item.queries] == [said(s) for s in expected["samples"]]
        absent = [(n, *others) for n, others in zip(item.absent, item.absent_alternatives, strict=True)]
        assert absent == [said(n) for n in sorted(expected["negatives"], key=lambda n: n["category_id"])]


@pytest.mark.parametrize("family", LABELS + PARTS)
def test_phrases_and_kinds_of_answer_are_those_of_the_originals_prompts(golden, family):
    checked = 0
    for expected, item in pairs(golden, family, "read"):
        for kind, prompts in expected.get("first_template_prompts", {}).items():
            second = kind.endswith("coin=0.9")
            if not kind.startswith("True_Premise"):
                assert all("[SEG]" not in prompt for prompt in prompts)
                continue
            for query, prompt in zip(item.queries, prompts, strict=False):
                phrase = (query.alternatives or (query.phrase,))[0] if second else query.phrase
                assert f" if {phrase.lower()} is " in prompt and "[SEG]" in prompt
                checked += 1
    assert checked


def test_conversations_give_the_originals_prompts(golden):
    source = load_source("llava_instruct|train", golden.root)
    assert len(source) == len(golden.conversations)
    for expected, item in zip(golden.conversations, source, strict=True):
        assert item.image_path == str(golden.root / expected["image"])
        turns = [(("<image>\n" if q.shows_image else "") + q.question, q.answer) for q in item.queries]
        assert [render(turns, "llava_v1", use_im_start_end=False)] == expected["prompts"]
        assert not any(item.exists) and not any(expected["exists"])
        assert item.image.shape[:2] == (item.height, item.width)
