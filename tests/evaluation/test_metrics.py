"""Metrics against a naive reference, hand-made cases, and the original's own numbers."""

from __future__ import annotations

import json

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from read_jax.errors import DataError
from read_jax.evaluation.metrics import THRESHOLDS, MaskCounts, SegmentationMetrics, counts

VALUES = (0, 1, 2, 3, 255)


def masks(*rows):
    """Masks [k, 1, w] from strings such as "1100"; 9 is 255."""
    return np.array([[[255 if c == "9" else int(c) for c in row]] for row in rows], np.uint8)


def of(pred, target, compat=None, **flags):
    metrics = SegmentationMetrics(compat)
    metrics.update(np.asarray(pred, bool), target, **flags)
    return metrics.result()


@st.composite
def runs(draw, values=VALUES):
    """A few pictures: (pred, target, pred_exists, target_exists) each."""
    pictures = []
    for _ in range(draw(st.integers(1, 4))):
        k, h, w = draw(st.tuples(st.integers(1, 4), st.integers(1, 5), st.integers(1, 5)))
        rng = np.random.default_rng(draw(st.integers(0, 2**32 - 1)))
        target = rng.choice(values, (k, h, w)).astype(np.uint8)
        target[rng.random(k) < 0.2] = 0
        pred = rng.random((k, h, w)) < draw(st.sampled_from([0.0, 0.3, 1.0]))
        pictures.append((pred, target, rng.random(k) < 0.5, rng.random(k) < 0.5))
    return pictures


def accumulate(pictures, compat=None):
    metrics = SegmentationMetrics(compat)
    for pred, target, said, exists in pictures:
        metrics.update(pred, target, said, exists)
    return metrics.result()


@given(runs())
def test_results_equal_a_naive_reference(pictures):
    ious, found, total_i, total_u, right, absent, present = [], [], 0, 0, [], [], []
    for pred, target, said, exists in pictures:
        for p, t, s, e in zip(pred, target, said, exists, strict=True):
            pairs = [(bool(a), b != 0) for a, b in zip(p.flat, t.flat, strict=True) if b != 255]
            intersection = sum(a and b for a, b in pairs)
            union = sum(a or b for a, b in pairs)
            ious.append(intersection / union if union else 1.0)
            if e:
                found.append(ious[-1])
            total_i, total_u = total_i + intersection, total_u + union
            right.append(s == e)
            (present if e else absent).append(bool(s) == bool(e))
    result = accumulate(pictures)
    assert result["giou"] == pytest.approx(np.mean(ious), abs=1e-12)
    assert result["ciou"] == pytest.approx(total_i / total_u if total_u else 1.0, abs=1e-12)
    assert result["see_accuracy"] == pytest.approx(np.mean(right), abs=1e-12)
    assert result["n_acc"] == (pytest.approx(np.mean(absent)) if absent else None)
    assert result["t_acc"] == (pytest.approx(np.mean(present)) if present else None)
    for t in THRESHOLDS:
        expected = np.mean([x >= t for x in found]) if found else None
        assert result[f"precision@{t}"] == (pytest.approx(expected) if found else None)


@given(runs(), st.sampled_from([None, "read"]))
def test_counts_give_what_their_pixels_give(pictures, compat):
    metrics = SegmentationMetrics(compat)
    for pred, target, said, exists in pictures:
        written = json.loads(json.dumps([field.tolist() for field in counts(pred, target, compat)]))
        metrics.update_counts(MaskCounts(*map(np.array, written)), said, exists)
    assert metrics.result() == accumulate(pictures, compat)


@given(runs(), st.randoms())
def test_the_order_of_pictures_does_not_matter(pictures, random):
    shuffled = list(pictures)
    random.shuffle(shuffled)
    assert accumulate(pictures) == accumulate(shuffled)


@given(runs(values=(0, 1, 255)))
def test_without_overlaps_the_original_differs_by_its_epsilons_alone(pictures):
    ours, theirs = accumulate(pictures), accumulate(pictures, "read")
    assert theirs["giou"] == pytest.approx(ours["giou"], abs=1e-4)
    if ours["union"]:
        assert theirs["ciou"] == pytest.approx(ours["ciou"], abs=1e-6)
    assert theirs["intersection"] == ours["intersection"]


@given(runs())
def test_a_perfect_prediction_scores_one(pictures):
    result = accumulate([((t > 0) & (t < 255), t, e, e) for _, t, _, e in pictures])
    assert (result["giou"], result["ciou"], result["see_accuracy"]) == (1, 1, 1)


def test_ignored_pixels_are_not_judged():
    result = of(masks("1111"), masks("1990"))
    assert (result["intersection"], result["union"], result["giou"]) == (1, 2, 0.5)


def test_an_empty_mask_of_an_empty_target_scores_one_and_any_other_zero():
    assert of(masks("0000"), masks("0000"))["giou"] == 1
    assert of(masks("1000"), masks("0000"))["giou"] == 0
    assert of(masks("1111"), masks("9999"))["giou"] == 1


def test_ciou_of_nothing_asked_and_nothing_said_is_one():
    assert of(masks("00"), masks("00"))["ciou"] == 1


def test_ciou_of_nothing_is_zero_in_the_originals_arithmetic():
    assert of(masks("00"), masks("00"), "read")["ciou"] == 0


def test_giou_is_the_mean_over_masks_and_ciou_over_pixels():
    result = of(masks("1000", "1111"), masks("1000", "1000"))
    assert result["giou"] == (1 + 0.25) / 2
    assert result["ciou"] == 2 / 5


def test_overlapping_pieces_are_target_but_in_no_class_of_the_original():
    pred, target = masks("1111"), masks("1230")
    assert [int(field[0]) for field in counts(pred, target)] == [3, 4, 3, 4, 4]
    assert [int(field[0]) for field in counts(pred, target, "read")] == [1, 4, 1, 4, 4]


def test_precision_counts_an_iou_at_the_threshold():
    result = of(masks("11100"), masks("11111"))
    assert (result["precision@0.6"], result["precision@0.7"]) == (1, 0)


def test_precision_looks_at_existing_things_only():
    result = of(masks("11", "00"), masks("11", "00"))
    assert (result["existing"], result["precision@0.9"]) == (1, 1)
    assert of(masks("00"), masks("00"))["precision@0.5"] is None


def test_an_existing_thing_may_be_stated_despite_an_empty_target():
    result = of(masks("00"), masks("00"), pred_exists=[True], target_exists=[True])
    assert (result["existing"], result["t_acc"]) == (1, 1)


def test_presence_by_whether_the_thing_exists():
    target = masks("1", "1", "1", "0", "0")
    said = [True, True, False, False, True]
    result = of(target == 0, target, pred_exists=said)
    assert result["see_accuracy"] == 3 / 5
    assert result["t_acc"] == 2 / 3
    assert result["n_acc"] == 1 / 2


def test_presence_is_unknown_when_no_answer_states_it():
    result = of(masks("1"), masks("1"))
    assert (result["see_accuracy"], result["n_acc"], result["t_acc"]) == (None, None, None)
    assert result["answers"] == 0


@pytest.mark.parametrize("compat", [None, "read"])
def test_nothing_given_has_no_values_and_raises_nothing(compat):
    metrics = SegmentationMetrics(compat)
    metrics.update(np.zeros((0, 3, 3), bool), np.zeros((0, 3, 3), np.uint8))
    result = metrics.result()
    assert (result["giou"], result["ciou"], result["masks"]) == (None, None, 0)


def test_the_original_drops_a_surplus_of_masks_but_divides_by_all_targets():
    result = of(masks("11"), masks("11", "11"), "read")
    assert result["giou"] == pytest.approx(0.5, abs=1e-4)
    assert of(masks("11", "11"), masks("11"), "read")["giou"] == pytest.approx(1, abs=1e-4)
    with pytest.raises(DataError, match="one shape"):
        of(masks("11"), masks("11", "11"))


@pytest.mark.parametrize(
    ("pred", "target", "flags", "message"),
    [
        (np.zeros((1, 2, 3), bool), np.zeros((1, 3, 2), np.uint8), {}, r"\[1, 2, 3\].*\[1, 3, 2\]"),
        (np.zeros((2, 3), bool), np.zeros((2, 3), np.uint8), {}, r"\[k, h, w\]"),
        (np.full((1, 2, 2), 0.5), np.zeros((1, 2, 2), np.uint8), {}, "logits > 0"),
        (np.full((1, 2, 2), 7), np.zeros((1, 2, 2), np.uint8), {}, "boolean"),
        (np.zeros((1, 2, 2), bool), np.zeros((1, 2, 2)), {}, "uint8"),
        (np.zeros((1, 2, 2), bool), np.full((1, 2, 2), -1), {}, "uint8"),
        (
            np.zeros((1, 2, 2), bool),
            np.zeros((1, 2, 2), np.uint8),
            {"pred_exists": [True] * 2},
            "pred_exists",
        ),
        (np.zeros((1, 2, 2), bool), np.zeros((1, 2, 2), np.uint8), {"target_exists": [3]}, "target_exists"),
    ],
)
def test_what_is_no_mask_is_refused(pred, target, flags, message):
    metrics = SegmentationMetrics()
    with pytest.raises(DataError, match=message):
        metrics.update(pred, target, **flags)
    assert metrics.result()["masks"] == 0


def test_an_unknown_compat_is_refused():
    with pytest.raises(DataError, match="'READ'"):
        SegmentationMetrics("READ")


def test_sums_beyond_what_a_float32_holds_round_as_the_original_does():
    metrics = SegmentationMetrics("read")
    big, one = np.array([2**24]), np.array([1])
    metrics.update_counts(MaskCounts(big, big, big, big, big))
    for _ in range(64):
        metrics.update_counts(MaskCounts(one * 0, one, one, one, one))
    assert metrics.result()["ciou"] == 1  # each single pixel is lost in the sum
    assert metrics.result()["union"] == 2**24 + 64


@pytest.fixture(scope="module")
def recorded(fixtures):
    folder = fixtures / "golden_dev" / "metrics"
    return folder, json.loads((folder / "metrics.json").read_text())


def test_the_originals_validation_numbers(recorded):
    folder, expected = recorded
    sets = np.load(folder / "validate_sets.npz")
    assert len(expected["validate"]) >= 2
    for group in expected["validate"].values():
        metrics = SegmentationMetrics("read")
        for entry in group["per_set"]:
            pred, target = sets[f"logits_{entry['set']}"] > 0, sets[f"gt_{entry['set']}"]
            counted = counts(pred, target, "read")
            assert counted.intersection.sum() == entry["intersection"][1]
            assert counted.union.sum() == entry["union"][1]
            metrics.update(pred, target)
        result = metrics.result()
        assert result["giou"] == pytest.approx(group["gIoU"], abs=1e-6)
        assert result["ciou"] == pytest.approx(group["cIoU"], abs=1e-6)


def test_the_originals_false_premise_numbers(recorded):
    folder, expected = recorded
    for name, entry in expected["run_eval"].items():
        (answers,) = (folder / f"see_{name}").glob("preds_*.json")
        metrics = SegmentationMetrics("read")
        for picture in json.loads(answers.read_text()).values():
            arrays = np.load(answers.parent / picture["segmentation_path"])
            metrics.update(arrays["pred"], arrays["gt"], picture["pred_exists"], picture["gt_exists"])
        result = metrics.result()
        assert result["ciou"] == pytest.approx(entry["cIoU"], abs=1e-6)
        assert result["see_accuracy"] == entry["see_accuracy"]
        assert (result["images"], result["answers"]) == (entry["n_images"], entry["total"])
