"""Numbers, groups and intervals of an evaluation."""

from __future__ import annotations

import json

import numpy as np
import pytest

from read_jax.evaluation.groups import MOST_NAMES
from read_jax.evaluation.metrics import MaskCounts, SegmentationMetrics
from read_jax.evaluation.summary import METRICS, summarize
from tests.evaluation.records import NOTHING, box, failed, header, question, random_records, record

COUNTS = ("intersection", "union", "target_pixels", "pred_pixels", "valid_pixels")


def scored(records, compat=None):
    """The metrics of records, fed picture by picture."""
    metrics = SegmentationMetrics(compat)
    for made in records:
        asked = made["questions"]
        metrics.update_counts(
            MaskCounts(*(np.array([q[key] for q in asked]) for key in COUNTS)),
            pred_exists=None if asked[0]["pred_exists"] is None else [q["pred_exists"] for q in asked],
            target_exists=[q["exists"] for q in asked],
        )
    return metrics.result()


def rows(summary, name):
    return {row["label"]: row for g in summary["groups"] if g["name"] == name for row in g["rows"]}


@pytest.mark.parametrize("compat", [None, "read"])
def test_the_values_are_those_of_the_metrics(compat):
    records = random_records(1, 30)
    summary = summarize(header(compat=compat), records, resamples=10)
    expected = scored(records, compat)
    assert {name: entry["value"] for name, entry in summary["overall"].items()} == {
        name: expected[name] for name in METRICS
    }


@pytest.mark.parametrize("forced", [False, True])
def test_intervals_equal_those_of_scoring_every_drawn_set_of_pictures_anew(forced):
    records = random_records(2, 12, forced)
    overall = summarize(header(), records, seed=5, resamples=200)["overall"]
    generator = np.random.default_rng(5)
    draws = [scored([records[i] for i in generator.integers(0, 12, 12)]) for _ in range(200)]
    for name in METRICS:
        values = [draw[name] for draw in draws if draw[name] is not None]
        bounds = [overall[name]["low"], overall[name]["high"]]
        if not values:
            assert bounds == [None, None]
        else:
            np.testing.assert_allclose(bounds, np.percentile(values, [2.5, 97.5]), atol=1e-8)


def test_intervals_of_a_group_equal_those_of_its_questions_in_the_drawn_pictures():
    records = random_records(3, 15)
    summary = summarize(header(), records, seed=1, resamples=100)
    generator = np.random.default_rng(1)
    values = []
    for _ in range(100):
        drawn = [records[i] for i in generator.integers(0, 15, 15)]
        kept = [{**r, "questions": [q for q in r["questions"] if q["is_sentence"]]} for r in drawn]
        values.append(scored([r for r in kept if r["questions"]])["ciou"])
    entry = rows(summary, "query")["whole sentence"]["metrics"]["ciou"]
    np.testing.assert_allclose([entry["low"], entry["high"]], np.percentile(values, [2.5, 97.5]), atol=1e-8)


def test_questions_of_one_picture_are_drawn_together():
    hit, miss = question(box(0, 0, 9, 9), box(0, 0, 9, 9)), question(box(0, 0, 9, 9), box(30, 30, 9, 9))
    alone = [record(i, hit if i < 10 else miss) for i in range(20)]
    together = [record(i, *[hit if i < 10 else miss] * 10) for i in range(20)]
    one, many = (summarize(header(), r, resamples=300)["overall"]["giou"] for r in (alone, together))
    assert one == many  # ten times the questions, no more certainty


def test_the_same_records_give_the_same_bytes():
    first, second = (json.dumps(summarize(header(), random_records(4, 20))) for _ in range(2))
    assert first == second


def test_another_seed_moves_the_intervals_only():
    one, two = (summarize(header(), random_records(4, 20), seed=s)["overall"]["giou"] for s in (0, 1))
    assert one["value"] == two["value"] and one["low"] != two["low"]


def test_the_value_lies_in_its_interval():
    for entry in summarize(header(), random_records(5, 40))["overall"].values():
        assert entry["low"] <= entry["value"] <= entry["high"]


def test_forced_mode_says_nothing_of_presence():
    overall = summarize(header(mode="forced"), random_records(6, 10, forced=True))["overall"]
    for name in ("see_accuracy", "n_acc", "t_acc"):
        assert overall[name] == {"value": None, "low": None, "high": None}
    assert overall["giou"]["value"] is not None


def test_one_picture_has_values_and_no_intervals():
    overall = summarize(header(), random_records(7, 1))["overall"]
    assert overall["giou"]["value"] is not None
    assert {entry["low"] for entry in overall.values()} == {None}


@pytest.mark.parametrize("records", [[], [failed(0), failed(1)]])
def test_without_answers_there_are_no_values(records):
    summary = summarize(header(), records)
    assert {entry["value"] for entry in summary["overall"].values()} == {None}
    assert summary["groups"] == [] and summary["counts"]["questions"] == 0
    assert summary["counts"]["skipped"] == len(records)


def test_skipped_pictures_are_listed_with_their_errors():
    summary = summarize(header(), [record(0, question(box(0, 0, 9, 9), NOTHING)), failed(1, "not a JPEG")])
    assert summary["skipped"] == [
        {"index": 1, "key": "val/1", "image": "images/1.jpg", "error": "not a JPEG"},
    ]
    assert summary["counts"] == {"pictures": 1, "skipped": 1, "questions": 1, "existing": 1, "absent": 0}


def test_a_picture_without_questions_changes_no_value_and_no_interval():
    records = random_records(8, 10)
    empty = {**record(10), "questions": []}
    with_it, without = (summarize(header(), r, resamples=50)["overall"] for r in ([*records, empty], records))
    assert with_it == without


def test_the_summary_is_json_without_nan():
    for records in ([], [failed(0)], random_records(9, 1), random_records(9, 8, forced=True)):
        json.dumps(summarize(header(), records, resamples=20), allow_nan=False)


def test_groups_by_presence_and_form_cover_every_question_once():
    summary = summarize(header(), random_records(10, 25), resamples=10)
    for name in ("presence", "query", "words", "kind"):
        assert sum(row["questions"] for row in rows(summary, name).values()) == summary["counts"]["questions"]


def test_a_group_has_the_metrics_of_its_questions_alone():
    records = random_records(11, 25)
    present = [{**r, "questions": [q for q in r["questions"] if q["exists"]]} for r in records]
    expected = scored([r for r in present if r["questions"]])
    row = rows(summarize(header(), records, resamples=10), "presence")["target exists"]
    assert {name: entry["value"] for name, entry in row["metrics"].items()} == {
        name: expected[name] for name in METRICS
    }
    assert row["pictures"] == expected["images"]


@pytest.mark.parametrize(
    "side, area, share",
    [
        (31, "small: below 32² pixels", "below 1%"),
        (32, "medium: below 96²", "1 to 10%"),
        (95, "medium: below 96²", "1 to 10%"),
        (96, "large: 96² and more", "1 to 10%"),
        (101, "large: 96² and more", "10% and more"),
    ],
)
def test_the_bounds_between_sizes(side, area, share):
    asked = question(NOTHING, NOTHING, exists=True, target_pixels=side * side, union=side * side)
    summary = summarize(header(), [record(0, asked, height=320, width=318)], resamples=0)
    assert list(rows(summary, "area")) == [area] and list(rows(summary, "share")) == [share]


def test_an_absent_target_has_no_size():
    summary = summarize(header(), [record(0, question(NOTHING, NOTHING))], resamples=0)
    assert not rows(summary, "area") and not rows(summary, "share")


@pytest.mark.parametrize(
    "words, label", [(1, "1 to 2"), (2, "1 to 2"), (3, "3 to 5"), (20, "11 to 20"), (21, "21 or more")]
)
def test_the_bounds_between_numbers_of_words(words, label):
    asked = question(NOTHING, NOTHING, phrase=" ".join(["word"] * words))
    assert list(rows(summarize(header(), [record(0, asked)], resamples=0), "words")) == [label]


def test_a_question_counts_under_each_of_its_tags():
    asked = [question(NOTHING, NOTHING, tags=tags) for tags in (["far", "red"], ["red", "red"], [])]
    tags = rows(summarize(header(), [record(0, *asked)], resamples=0), "tag")
    assert {label: row["questions"] for label, row in tags.items()} == {"far": 1, "red": 2}


def test_names_too_many_to_show_are_put_together():
    asked = [question(NOTHING, NOTHING, kind=f"kind {n:03}") for n in range(MOST_NAMES + 5)]
    kinds = rows(summarize(header(), [record(0, *asked)], resamples=0), "kind")
    assert len(kinds) == MOST_NAMES + 1 and kinds["5 others"]["questions"] == 5


def test_the_histogram_and_the_curve_count_targets_that_exist():
    summary = summarize(header(), random_records(12, 30), resamples=10)
    histogram, curve = summary["iou"]["histogram"], summary["iou"]["curve"]
    assert sum(histogram["counts"]) == summary["counts"]["existing"]
    reached = dict(zip(curve["thresholds"], curve["shares"], strict=True))
    for threshold in (0.5, 0.6, 0.7, 0.8, 0.9):
        assert reached[threshold] == summary["overall"][f"precision@{threshold}"]["value"]
