"""Two runs, paired."""

from __future__ import annotations

import copy

import numpy as np
import pytest

from read_jax.errors import DataError
from read_jax.evaluation.compare import check_comparable, compare
from read_jax.evaluation.summary import METRICS, summarize
from tests.evaluation.records import NOTHING, box, failed, header, question, random_records, record, write_run
from tests.evaluation.test_summary import scored


@pytest.fixture
def folders(tmp_path):
    """Writes runs, each (header, records), and gives their folders."""

    def make(*runs):
        for number, (head, records) in enumerate(runs):
            write_run(tmp_path / f"run{number}", head, records)
        return [tmp_path / f"run{number}" for number in range(len(runs))]

    return make


def test_the_values_of_either_run_are_its_own(folders):
    runs = random_records(1, 12), random_records(2, 12)
    found = compare(*folders(*((header(), run) for run in runs)), resamples=20)
    for name in METRICS:
        entry = found.metrics[name]
        assert [entry.a, entry.b] == [
            summarize(header(), r, resamples=0)["overall"][name]["value"] for r in runs
        ]
        assert entry.difference == entry.a - entry.b


def test_the_intervals_are_of_the_difference_on_the_same_pictures(folders):
    one, two = random_records(1, 12), random_records(2, 12)
    found = compare(*folders((header(), one), (header(), two)), seed=3, resamples=100)
    generator = np.random.default_rng(3)
    drawn = [generator.integers(0, 12, 12) for _ in range(100)]
    for name in METRICS:
        pairs = [(scored([one[i] for i in d])[name], scored([two[i] for i in d])[name]) for d in drawn]
        expected = np.percentile([a - b for a, b in pairs if a is not None and b is not None], [2.5, 97.5])
        np.testing.assert_allclose([found.metrics[name].low, found.metrics[name].high], expected, atol=1e-8)


def test_a_run_compared_with_itself_is_equal(folders):
    found = compare(*folders((header(), random_records(1, 10)), (header(), random_records(1, 10))))
    assert found.wins == found.losses == 0 and found.ties == found.questions
    assert found.changed == [] and found.settings == []
    assert all((m.difference, m.low, m.high) == (0, 0, 0) for m in found.metrics.values())


def test_exchanging_the_runs_exchanges_the_signs(folders):
    a, b = folders((header(), random_records(1, 15)), (header(), random_records(2, 15)))
    there, back = compare(a, b, resamples=50), compare(b, a, resamples=50)
    assert (there.wins, there.ties, there.losses) == (back.losses, back.ties, back.wins)
    for name in METRICS:
        one, two = there.metrics[name], back.metrics[name]
        np.testing.assert_allclose([one.low, one.high], [-two.high, -two.low], atol=1e-12)


def test_pairing_sees_a_small_steady_gain(folders):
    target = box(0, 0, 20, 20)
    widths = np.random.default_rng(0).integers(1, 19, 40).tolist()
    better, worse = (
        [record(i, question(target, box(0, 0, 20, w + extra))) for i, w in enumerate(widths)]
        for extra in (1, 0)
    )
    entry = compare(*folders((header(), better), (header(), worse))).metrics["giou"]
    alone = summarize(header(), worse)["overall"]["giou"]
    assert entry.clear and entry.difference == pytest.approx(0.05)
    assert alone["high"] - alone["low"] > 0.1  # unpaired, it would drown


def test_wins_ties_and_losses_are_counted_by_question(folders):
    target = box(0, 0, 20, 20)
    half, most, all_but_little = box(0, 0, 20, 10), box(0, 0, 20, 15), target.copy()
    all_but_little[0, 0] = 0
    a = record(0, *(question(target, p) for p in (most, half, target)))
    b = record(0, *(question(target, p) for p in (half, most, all_but_little)))
    found = compare(*folders((header(), [a]), (header(), [b])))
    assert (found.wins, found.ties, found.losses) == (1, 1, 1)


def test_the_largest_changes_come_first(folders):
    target = box(0, 0, 20, 20)
    a = [record(i, question(target, box(0, 0, 20, 1 + i), phrase=f"box {i}")) for i in range(15)]
    b = [record(i, question(target, target, phrase=f"box {i}")) for i in range(15)]
    found = compare(*folders((header(), a), (header(), b)))
    assert [c.phrase for c in found.changed] == [f"box {i}" for i in range(10)]
    assert found.changed[0].a == pytest.approx(0.05) and found.changed[0].b == 1


def test_only_common_questions_are_compared(folders):
    both = random_records(1, 10)
    found = compare(*folders((header(), both), (header(), [*both[2:6], failed(6)])), resamples=20)
    count = sum(len(r["questions"]) for r in both[2:6])
    assert (found.pictures, found.questions, found.only_b) == (4, count, 0)
    assert found.only_a == sum(len(r["questions"]) for r in both) - count
    assert f"{found.only_a} only in a, 0 only in b" in str(found)
    assert found.metrics["giou"].a == scored(both[2:6])["giou"]


def test_pictures_in_another_order_are_matched(folders):
    records = random_records(1, 6)
    turned = [{**r, "index": 5 - r["index"]} for r in reversed(records)]
    found = compare(*folders((header(), records), (header(), turned)), resamples=10)
    assert found.ties == found.questions and found.only_a == found.only_b == 0


def test_a_question_whose_text_has_changed_is_another(folders):
    records = random_records(1, 4)
    changed = copy.deepcopy(records)
    changed[0]["questions"][0]["phrase"] = "something else"
    found = compare(*folders((header(), records), (header(), changed)), resamples=10)
    assert found.only_a == found.only_b == 1


def test_different_datasets_are_refused(folders):
    runs = folders(
        (header(dataset="refcoco|val"), random_records(1, 2)),
        (header(dataset="refcoco|testA"), random_records(1, 2)),
    )
    with pytest.raises(DataError, match=r"refcoco\|val.*refcoco\|testA.*cannot be compared"):
        compare(*runs)


@pytest.mark.parametrize("other", [[], [failed(0)], [record(9, question(NOTHING, NOTHING))]])
def test_no_common_question_is_refused(folders, other):
    with pytest.raises(DataError, match="no question in common"):
        compare(*folders((header(), random_records(1, 3)), (header(), other)))


def test_a_folder_without_an_evaluation_is_refused(tmp_path):
    with pytest.raises(DataError, match="holds no evaluation"):
        compare(tmp_path, tmp_path)


def test_comparability_is_checked_before_the_run(folders):
    (folder,) = folders((header(dataset="refcoco|val"), random_records(1, 2)))
    check_comparable(folder, "refcoco|val")
    with pytest.raises(DataError, match=r"not on 'refcoco\|testA'"):
        check_comparable(folder, "refcoco|testA")


def test_settings_that_differ_are_named(folders):
    one, two = header(), header(compat="read", environment={"model": "other"})
    found = compare(*folders((one, random_records(1, 3)), (two, random_records(1, 3))), resamples=10)
    assert ("compat", "–", "read") in found.settings and (
        "environment: model",
        "tiny",
        "other",
    ) in found.settings
    assert "other in b" in str(found)


def test_forced_runs_are_compared_without_presence(folders):
    runs = ((header(mode="forced"), random_records(s, 8, forced=True)) for s in (1, 2))
    found = compare(*folders(*runs), resamples=20)
    entry = found.metrics["see_accuracy"]
    assert (entry.a, entry.b, entry.difference, entry.low) == (None, None, None, None)
    assert "See" not in str(found) and "gIoU" in str(found)


def test_a_forced_and_a_generated_run_share_the_masks_metrics(folders):
    runs = folders(
        (header(), random_records(1, 8)), (header(mode="forced"), random_records(1, 8, forced=True))
    )
    found = compare(*runs, resamples=20)
    assert found.metrics["see_accuracy"].b is None and found.metrics["see_accuracy"].difference is None
    assert found.metrics["giou"].difference == 0


def test_one_picture_has_differences_and_no_intervals(folders):
    found = compare(*folders((header(), random_records(1, 1)), (header(), random_records(2, 1))))
    assert found.metrics["giou"].difference is not None and found.metrics["giou"].low is None


def test_a_difference_too_small_to_show_has_no_sign_of_its_own(folders):
    target = np.zeros((300, 300), np.uint8)
    target[:-1] = 1  # 89,700 pixels; an IoU differs by 1 / 89,700
    less = target.copy()
    less[0, 0] = 0
    runs = [[record(0, question(target, answer))] for answer in (less, target)]
    found = compare(*folders((header(), runs[0]), (header(), runs[1])))
    assert -5e-5 < found.metrics["giou"].difference < 0
    assert "+0.00" in str(found) and "-0.00" not in str(found)


def test_the_table_has_no_control_characters(folders):
    target = box(0, 0, 20, 20)
    a = record(0, question(target, target, phrase="\x1b[2J red\nball"), image="\x07.jpg")
    b = record(0, question(target, NOTHING, phrase="\x1b[2J red\nball"), image="\x07.jpg")
    text = str(compare(*folders((header(), [a]), (header(), [b]))))
    assert not any(ord(c) < 32 and c != "\n" for c in text) and "red ball" in text
