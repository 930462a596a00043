"""What the runner promises, with a model that answers at once; the real one is in test_tiny_model."""

from __future__ import annotations

import dataclasses
import json
import random
import signal
import subprocess
import sys
import time

import numpy as np
import pytest

from read_jax.errors import DataError, PromptError
from read_jax.evaluation import runner
from read_jax.evaluation.journal import read_records
from read_jax.evaluation.metrics import SegmentationMetrics
from read_jax.images.masks import rle_to_mask
from tests.evaluation.conftest import write_own_dataset
from tests.evaluation.fake_model import SIDE, FakeSegmenter, FakeSource, Interrupted, evaluate


@pytest.fixture
def run(tmp_path):
    """Evaluates a fake model: run(source, **options) -> (summary, header, records, segmenter)."""

    def run(source, segmenter=None, output="out", **options):
        segmenter = segmenter or FakeSegmenter()
        summary = evaluate(source, segmenter, tmp_path / output, **options)
        return (summary, *read_records(tmp_path / output), segmenter)

    return run


def value(summary, metric):
    return summary["overall"][metric]["value"]


def test_records_hold_what_was_asked_answered_and_counted(run):
    _, header, records, _ = run(FakeSource(7))
    assert (header["dataset"], header["mode"], header["source_length"]) == ("R-refcoco|val", "generate", 7)
    assert [record["index"] for record in records] == list(range(7))
    record = records[5]
    assert (record["key"], record["image"], record["height"], record["width"]) == ("p/5", "5.jpg", SIDE, SIDE)
    first, second, absent = record["questions"]
    assert (first["phrase"], first["ref_id"], first["sent_id"]) == ("Thing 5.0", 5, 0)
    assert first["question"] == "What is thing 5.0 in this image? Please output segmentation mask."
    assert second["is_sentence"] and not first["is_sentence"]
    assert (first["kind"], first["tags"], second["kind"]) == ("referring", ["near"], None)
    assert (first["exists"], absent["exists"]) == (True, False)
    assert first["text"] == "It is [SEG]."
    assert first["iou_estimate"] == 0.5
    item = FakeSource(7)[5]
    for number, question in enumerate(record["questions"]):
        target = item.compact_mask(number).decode()
        pred = rle_to_mask(question["mask"])
        judged = target != 255
        assert question["intersection"] == (pred & (target == 1)).sum()
        assert question["union"] == ((pred | (target == 1)) & judged).sum()
        assert question["target_pixels"] == (target == 1).sum()
        assert question["pred_pixels"] == (pred & judged).sum()
        assert question["valid_pixels"] == judged.sum()


@pytest.mark.parametrize("mode", ["generate", "forced"])
@pytest.mark.parametrize("compat", [None, "read"])
def test_metrics_equal_those_of_the_pixels(run, mode, compat):
    source = FakeSource(9, compat)
    summary, _, records, _ = run(source, mode=mode, compat=compat)
    metrics = SegmentationMetrics(compat)
    for record in records:
        item = source[record["index"]]
        rles = [question["mask"] for question in record["questions"]]
        pred = np.stack([np.zeros((SIDE, SIDE), bool) if r is None else rle_to_mask(r) for r in rles])
        said = pred.any((1, 2)) if mode == "generate" else None
        metrics.update(pred, item.masks, said, item.exists)
    expected = metrics.result()
    assert {name: value(summary, name) for name in summary["overall"]} == {
        name: expected[name] for name in summary["overall"]
    }
    assert (value(summary, "see_accuracy") is None) == (mode == "forced")


def test_several_masks_are_united_and_the_original_takes_the_first(run):
    segmenter = FakeSegmenter()
    ours = run(FakeSource(1), segmenter)[2][0]["questions"][0]
    theirs = run(FakeSource(2), FakeSegmenter(), "read", compat="read")[2][1]["questions"][0]
    _, _, ((image, question, _),) = segmenter.calls[0]
    masks = segmenter._answer(image, question, None, [0]).masks
    assert ours["mask"] is None and not masks.any()  # picture 0: empty
    both = FakeSegmenter()._answer(1, theirs["question"], None, [1]).masks
    np.testing.assert_array_equal(rle_to_mask(theirs["mask"]), both[0])
    united = run(FakeSource(2), FakeSegmenter(), "two")[2][1]["questions"][0]
    np.testing.assert_array_equal(rle_to_mask(united["mask"]), both[0] | both[1])


def test_an_empty_mask_says_that_nothing_is_there(run):
    question = run(FakeSource(1))[2][0]["questions"][0]
    assert "[SEG]" in question["text"]
    assert (question["pred_exists"], question["mask"], question["pred_pixels"]) == (False, None, 0)


def test_forced_mode_gives_every_question_its_answer(run):
    _, header, records, segmenter = run(FakeSource(3), mode="forced")
    assert header["max_new_tokens"] is None
    assert segmenter.calls[-1][0] == "forced"
    item = FakeSource(3)[2]
    assert [q["text"] for q in records[2]["questions"]] == item.answers
    absent = records[2]["questions"][2]
    assert (absent["mask"], absent["pred_exists"], absent["iou_estimate"]) == (None, None, None)


@pytest.mark.parametrize(
    ("dataset", "mode"),
    [
        ("ReasonSeg|val", "forced"),
        ("refcocog|test", "forced"),
        ("paco_lvis|train", "forced"),
        ("fprefcoco+|val", "generate"),
        ("R-refcoco|val", "generate"),
        ("scenes|test", "generate"),
        ("my/own.jsonl", "generate"),
    ],
)
def test_each_dataset_is_evaluated_as_the_paper_does(dataset, mode):
    settings = runner.choose_settings(dataset, None, None, None, 512)
    assert (settings.mode, settings.conversation) == (mode, "llava_v1")


def test_the_conversation_of_the_originals_test_script_is_chosen_and_noted():
    chosen = runner.choose_settings("fprefcoco|val", None, "read", None, 512)
    assert chosen.conversation == "vicuna_v1" and "test script" in chosen.notes[0]
    given = runner.choose_settings("fprefcoco|val", None, "read", "llava_v1", 512)
    assert (given.conversation, given.notes) == ("llava_v1", ())
    assert runner.choose_settings("refcoco|val", None, "read", None, 512).conversation == "llava_v1"


def test_copies_of_the_model_answer_at_once_and_the_answers_keep_their_order(run):
    _, _, alone, _ = run(FakeSource(12), output="alone", images_per_batch=1)
    copies = [FakeSegmenter(seconds=seconds) for seconds in (0.3, 0.05, 0.0)]
    _, header, together, _ = run(FakeSource(12), copies, output="together", images_per_batch=1, copies=3)
    assert together == alone
    assert all(copy.calls for copy in copies) and sum(len(copy.calls) for copy in copies) == 12
    assert header["environment"]["copies_per_host"] == 3


def test_when_one_of_the_copies_fails_the_answers_before_it_are_kept(run, tmp_path):
    copies = [FakeSegmenter(seconds=0.01), FakeSegmenter(stop_after=2, seconds=0.01)]
    with pytest.raises(Interrupted):
        run(FakeSource(12), copies, images_per_batch=1)
    kept = [record["index"] for record in read_records(tmp_path / "out")[1]]
    assert kept == list(range(len(kept))) and 0 < len(kept) < 12
    _, _, records, _ = run(FakeSource(12), images_per_batch=1)
    assert [record["index"] for record in records] == list(range(12))


def test_a_stopped_run_goes_on_and_ends_with_the_same_bytes(run, tmp_path):
    source = FakeSource(40)
    run(source, output="whole", images_per_batch=2)
    expected = (tmp_path / "whole" / "summary.json").read_bytes()
    for stop in range(1, 5):
        with pytest.raises(Interrupted):
            run(source, FakeSegmenter(stop_after=stop), f"stopped{stop}", images_per_batch=2)
        before = len(read_records(tmp_path / f"stopped{stop}")[1])
        segmenter = run(source, output=f"stopped{stop}", images_per_batch=2)[3]
        assert (tmp_path / f"stopped{stop}" / "summary.json").read_bytes() == expected
        assert len(segmenter.calls) == 5 - before // 8


def test_a_window_with_one_missing_picture_is_asked_as_a_whole(run, tmp_path):
    run(FakeSource(10), images_per_batch=4, output="whole")
    run(FakeSource(10), images_per_batch=4)
    path = tmp_path / "out" / "answers-00000.jsonl"
    lines = path.read_bytes().splitlines(keepends=True)
    path.write_bytes(b"".join(lines[:3] + lines[4:6]))
    run(FakeSource(10), images_per_batch=4)
    assert len(path.read_bytes().splitlines()) == len(lines)
    assert (tmp_path / "out/summary.json").read_bytes() == (tmp_path / "whole/summary.json").read_bytes()


def test_a_finished_run_is_reported_again_without_the_model(run, tmp_path, monkeypatch):
    first = run(FakeSource(4))[0]
    (tmp_path / "out" / "summary.json").unlink()
    monkeypatch.setattr(FakeSegmenter, "_answers", lambda *_: pytest.fail("asked again"))
    assert run(FakeSource(4))[0] == first
    assert (tmp_path / "out" / "summary.json").exists()


def test_a_resumed_run_hides_the_report_until_it_is_complete(run, tmp_path):
    run(FakeSource(4))
    with pytest.raises(Interrupted):
        run(FakeSource(4), FakeSegmenter(stop_after=1), mode="forced", overwrite=True)
    assert not (tmp_path / "out" / "summary.json").exists()


@pytest.mark.parametrize(
    "change", [{"mode": "forced"}, {"conversation": "vicuna_v1"}, {"max_new_tokens": 9}, {"limit": 2}]
)
def test_other_settings_do_not_continue_a_run(run, change):
    run(FakeSource(4))
    with pytest.raises(DataError, match=f"{next(iter(change))} was"):
        run(FakeSource(4), **change)
    run(FakeSource(4), **change, overwrite=True)


def test_other_content_does_not_continue_a_run(run):
    class Changed(FakeSource):
        def __getitem__(self, index):
            return dataclasses.replace(super().__getitem__(index), key=f"other/{index}")

    run(FakeSource(4))
    with pytest.raises(DataError, match="source_content was"):
        run(Changed(4))


def test_hosts_share_the_pictures_and_end_with_the_numbers_of_one(run, tmp_path, monkeypatch):
    monkeypatch.setattr(runner, "wait_for_all", lambda what: None)
    whole = run(FakeSource(30), output="whole", images_per_batch=2)[0]
    asked = []
    for host in (2, 1, 0):
        monkeypatch.setattr(runner, "rank", lambda host=host: (host, 3))
        segmenter = FakeSegmenter()
        if host:
            with pytest.raises(DataError, match="another host has not finished"):
                run(FakeSource(30), segmenter, images_per_batch=2)
        else:
            summary = run(FakeSource(30), segmenter, images_per_batch=2)[0]
        asked += [image for _, _, requests in segmenter.calls for image in {r[0] for r in requests}]
    assert sorted(asked) == list(range(30))
    assert len(list((tmp_path / "out").glob("answers-*.jsonl"))) == 3
    assert (summary["overall"], summary["groups"]) == (whole["overall"], whole["groups"])


def test_a_run_begun_on_three_hosts_is_finished_on_one(run, monkeypatch):
    monkeypatch.setattr(runner, "wait_for_all", lambda what: None)
    whole = run(FakeSource(30), output="whole", images_per_batch=2)[0]
    monkeypatch.setattr(runner, "rank", lambda: (1, 3))
    with pytest.raises(DataError, match="another host"):
        run(FakeSource(30), images_per_batch=2)
    monkeypatch.setattr(runner, "rank", lambda: (0, 1))
    assert run(FakeSource(30), images_per_batch=2)[0]["overall"] == whole["overall"]


def test_bad_pictures_are_skipped_counted_and_listed(run):
    source = FakeSource(12, broken=(3,), sizes_differ=(8,), endless=(11,))
    summary, _, records, _ = run(source, max_bad=0.25)
    errors = {record["index"]: record["error"] for record in records if "error" in record}
    assert set(errors) == {3, 8, 11}
    assert "torn" in errors[3]
    assert f"{SIDE}x{SIDE + 1}" in errors[8]
    assert "too long" in errors[11]
    assert summary["counts"]["skipped"] == 3
    assert [entry["key"] for entry in summary["skipped"]] == ["p/3", "p/8", "p/11"]


def test_too_many_bad_pictures_fail_the_run_and_keep_the_answers(run, tmp_path):
    with pytest.raises(DataError, match=r"1 of 10 pictures could not be read.*p/3: 3.jpg is torn"):
        run(FakeSource(10, broken=(3,)))
    _, records = read_records(tmp_path / "out")
    assert "error" in records[3]
    assert not (tmp_path / "out" / "summary.json").exists()
    with pytest.raises(DataError, match="could not be read"):
        run(FakeSource(10, broken=(3,)))
    summary = run(FakeSource(10))[0]
    assert (summary["counts"]["skipped"], summary["counts"]["pictures"]) == (0, 10)


def test_progress_is_told_of_every_picture_and_starts_where_the_run_was(run):
    told = []
    with pytest.raises(Interrupted):
        run(FakeSource(6), FakeSegmenter(stop_after=4), progress=lambda *args: told.append(args))
    assert told[:3] == [(0, 6, ""), (1, 6, "1 questions"), (2, 6, "3 questions")]
    again = []
    run(FakeSource(6), progress=lambda *args: again.append(args))
    assert again[0] == (told[-1][0], 6, "")
    assert again[-1][:2] == (6, 6)


def test_a_limit_takes_the_first_pictures(run):
    summary, header, records, _ = run(FakeSource(9), limit=4)
    assert [record["index"] for record in records] == [0, 1, 2, 3]
    assert (header["limit"], header["source_length"], summary["counts"]["pictures"]) == (4, 9, 4)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"mode": "both"}, "'both'"),
        ({"max_bad": 1.5}, "max_bad"),
        ({"limit": 0}, "limit"),
        ({"images_per_batch": 0}, "images_per_batch"),
        ({"max_new_tokens": 0}, "max_new_tokens"),
        ({"conversation": "v9"}, "v9"),
        ({"dataset": "llava_instruct|train"}, "no masks"),
    ],
)
def test_a_setting_out_of_range_is_named(run, tmp_path, options, message):
    with pytest.raises((DataError, PromptError), match=message):
        run(FakeSource(3), **options)
    assert not (tmp_path / "out").exists()


def test_a_dataset_without_pictures_is_named(run):
    with pytest.raises(DataError, match="holds no pictures"):
        run(FakeSource(0))


REAL = """
import sys
from read_jax.evaluation.runner import evaluate
evaluate(*sys.argv[1:3], None, sys.argv[3], mode="generate", max_new_tokens=8)
"""


PATIENCE = 400
"""Seconds that one evaluation may take on a busy machine."""


def kill_and_resume(start, folder, pictures, points, seed):
    """Kill an evaluation at random points; returns the bytes of its summary and of an undisturbed one's.

    start: gives the command that evaluates into a folder.
    """
    output = folder / "killed"
    journal = output / "answers-00000.jsonl"

    def written():
        return journal.read_bytes().count(b"\n") if journal.exists() else 0

    rng = random.Random(seed)
    for left in range(points, 0, -1):
        process = subprocess.Popen(start(output))
        wanted = written() + rng.randint(0, max(1, (pictures - written()) // left))
        try:
            deadline = time.monotonic() + PATIENCE
            while process.poll() is None and written() < wanted:
                assert time.monotonic() < deadline, f"{written()} of {wanted} answers after {PATIENCE} s"
                time.sleep(0.01)
            time.sleep(rng.random() / 20)
        finally:
            process.kill()
        assert process.wait(timeout=60) == -signal.SIGKILL
    assert not (output / "summary.json").exists()
    for name in ("killed", "whole"):
        subprocess.run(start(folder / name), check=True, timeout=PATIENCE)
    return [(folder / name / "summary.json").read_bytes() for name in ("killed", "whole")]


def test_killed_twice_it_ends_with_the_same_bytes(tmp_path):
    def start(output):
        return [sys.executable, "-m", "tests.evaluation.fake_model", str(output), "100", "0.02"]

    killed, whole = kill_and_resume(start, tmp_path, pictures=100, points=2, seed=1)
    assert killed == whole
    assert json.loads(killed)["counts"]["pictures"] == 100


@pytest.mark.slow
def test_the_model_killed_ten_times_ends_with_the_same_bytes(tiny_model, tmp_path):
    dataset = write_own_dataset(tmp_path / "data", pictures=24)

    def start(output):
        return [sys.executable, "-c", REAL, str(tiny_model), str(dataset), str(output)]

    killed, whole = kill_and_resume(start, tmp_path, pictures=24, points=10, seed=2)
    assert killed == whole
    assert json.loads(killed)["counts"]["pictures"] == 24
