"""Real models end to end: the report's numbers equal those of a few independent lines over the masks."""

from __future__ import annotations

import json

import numpy as np
import pytest
from pycocotools import mask as coco

import read_jax
from read_jax.data import load_source
from read_jax.evaluation.runner import evaluate
from read_jax.weights import convert
from tests.evaluation.conftest import write_own_dataset

NEW_TOKENS = 24


def decoded(question, height, width):
    """The mask in the journal, decoded by pycocotools."""
    if question["mask"] is None:
        return np.zeros((height, width), bool)
    return coco.decode(question["mask"]).astype(bool)


def journal(output):
    lines = (output / "answers-00000.jsonl").read_text().splitlines()
    return [json.loads(line) for line in lines[1:]]


def by_hand(records, source, mode):
    """The metrics from predicted and target masks, in plain NumPy."""
    ious, found, right, intersections, unions = [], [], [], 0, 0
    for record in records:
        item = source[record["index"]]
        for question, target, exists in zip(record["questions"], item.masks, item.exists, strict=True):
            judged = target != 255
            pred, wanted = decoded(question, item.height, item.width)[judged], target[judged] > 0
            intersection, union = (pred & wanted).sum(), (pred | wanted).sum()
            ious.append(intersection / union if union else 1.0)
            intersections, unions = intersections + intersection, unions + union
            if exists:
                found.append(ious[-1])
            right.append((exists, decoded(question, item.height, item.width).any()))
    right = np.array(right)
    exists, said = right.T
    spoken = mode == "generate"
    return {
        "giou": np.mean(ious),
        "ciou": intersections / unions,
        "see_accuracy": np.mean(exists == said) if spoken else None,
        "n_acc": np.mean(~said[~exists]) if spoken and (~exists).any() else None,
        "t_acc": np.mean(said[exists]) if spoken and exists.any() else None,
        **{f"precision@{t / 10}": np.mean(np.array(found) >= t / 10) for t in range(5, 10)},
    }


def assert_report_is_right(output, source, mode):
    records = journal(output)
    summary = json.loads((output / "summary.json").read_text())
    assert sorted(record["index"] for record in records) == list(range(len(source)))
    assert summary["counts"]["questions"] == sum(len(source[i].queries) for i in range(len(source)))
    for name, expected in by_hand(records, source, mode).items():
        value = summary["overall"][name]["value"]
        assert value == (None if expected is None else pytest.approx(expected, abs=1e-12)), name


def assert_masks_are_the_models(output, source, segmenter, mode, most=3):
    """The journal's answers equal those the model gives when it is asked directly, question by question."""
    checked = 0
    for record in sorted(journal(output), key=lambda record: record["index"])[:most]:
        item = source[record["index"]]
        for question, ask, answer in list(
            zip(record["questions"], item.questions, item.answers, strict=True)
        )[:2]:
            assert question["question"] == ask
            if mode == "forced":
                masks, text = segmenter.trace(item.image, ask, answer)["mask"], answer
            else:
                result = segmenter.segment(item.image, ask, max_new_tokens=NEW_TOKENS)
                masks, text = result.masks, result.text
            assert question["text"] == text
            np.testing.assert_array_equal(decoded(question, item.height, item.width), masks.any(axis=0))
            checked += 1
    assert checked


@pytest.fixture(scope="module")
def own(tmp_path_factory):
    return write_own_dataset(tmp_path_factory.mktemp("own"), pictures=3)


@pytest.fixture(scope="module")
def tiny_segmenter(tiny_model):
    return read_jax.load(tiny_model)


@pytest.mark.parametrize("mode", ["generate", "forced"])
def test_the_committed_model_on_a_dataset_of_ones_own(tiny_model, tiny_segmenter, own, tmp_path, mode):
    evaluate(tiny_model, str(own), None, tmp_path, mode=mode, max_new_tokens=NEW_TOKENS)
    source = load_source(str(own))
    assert_report_is_right(tmp_path, source, mode)
    assert_masks_are_the_models(tmp_path, source, tiny_segmenter, mode)
    for name in ("report.md", "report.html"):
        assert (tmp_path / name).stat().st_size > 0


@pytest.fixture(scope="module")
def recorded_model(goldens, tmp_path_factory):
    folder = tmp_path_factory.mktemp("model") / "tiny-a"
    tiny = goldens / "tiny-a"
    convert(tiny / "checkpoint", tiny / "clip", folder, sasp="7b")
    return folder


@pytest.fixture(scope="module")
def recorded_segmenter(recorded_model):
    return read_jax.load(recorded_model)


@pytest.mark.parametrize(
    ("dataset", "mode"),
    [
        ("ReasonSeg|val", "generate"),
        ("ReasonSeg|val", "forced"),
        ("refcoco|val", "forced"),
        ("fprefcoco|val", "generate"),
        # as the paper does not evaluate them
        pytest.param("refcoco|val", "generate", marks=pytest.mark.slow),
        pytest.param("fprefcoco|val", "forced", marks=pytest.mark.slow),
    ],
)
def test_the_recorded_model_on_the_small_copies(
    fixtures, recorded_model, recorded_segmenter, tmp_path, dataset, mode
):
    data = fixtures / "dataset"
    evaluate(recorded_model, dataset, data, tmp_path, mode=mode, max_new_tokens=NEW_TOKENS)
    source = load_source(dataset, data)
    assert_report_is_right(tmp_path, source, mode)
    assert_masks_are_the_models(tmp_path, source, recorded_segmenter, mode, most=1)
