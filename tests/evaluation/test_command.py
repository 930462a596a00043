"""`read-jax evaluate` as a stranger would use and break it."""

from __future__ import annotations

import json
import shutil

import pytest

from read_jax import cli
from tests.evaluation.conftest import write_own_dataset


@pytest.fixture(scope="module")
def own(tmp_path_factory):
    return write_own_dataset(tmp_path_factory.mktemp("own"), 4)


def run(model, dataset, output, *more):
    return cli.main(
        [
            "evaluate",
            str(model),
            "--dataset",
            str(dataset),
            "--output",
            str(output),
            "--mode",
            "forced",
            *more,
        ]
    )


@pytest.mark.parametrize(
    ("options", "words"),
    [
        (("--devices", "0"), "the model cannot be shared by 0"),
        (("--copies", "0"), "not for 0"),
        (("--copies", "99"), "copies of the model on 1 each, not for 99"),
    ],
    ids=str,
)
def test_copies_that_the_devices_are_not_enough_for_are_refused_before_anything_is_written(
    options, words, tmp_path, capsys
):
    command = ["evaluate", "nano", "--dataset", "scenes|val", "--output", str(tmp_path / "out"), *options]
    assert cli.main(command) == 1
    assert words in capsys.readouterr().err
    assert not (tmp_path / "out" / "answers-00000.jsonl").exists()


def test_it_prints_the_numbers_leaves_a_report_and_compares(tiny_model, own, tmp_path, capsys, monkeypatch):
    first, second = tmp_path / "first", tmp_path / "second"
    assert run(tiny_model, own, first) == 0
    printed = capsys.readouterr().out
    assert "gIoU" in printed and "4 pictures" in printed
    assert {"summary.json", "report.md", "report.html"} <= {path.name for path in first.iterdir()}
    summary = (first / "summary.json").read_bytes()

    monkeypatch.setattr(
        "read_jax.evaluation.runner.load_copies", lambda *_, **__: pytest.fail("the model was loaded")
    )
    assert run(tiny_model, own, first) == 0  # finished already: reported again from the answers
    assert (first / "summary.json").read_bytes() == summary
    monkeypatch.undo()

    capsys.readouterr()
    assert run(tiny_model, own, second, "--compare", str(first), "--limit", "3") == 0
    compared = capsys.readouterr().out
    assert "3 pictures" in compared
    assert json.loads((second / "summary.json").read_text())["counts"]["pictures"] == 3


def test_what_is_wrong_is_said_before_the_model_is_loaded(tiny_model, own, tmp_path, capsys, monkeypatch):
    monkeypatch.setattr(
        "read_jax.evaluation.runner.load_copies", lambda *_, **__: pytest.fail("the model was loaded")
    )
    out = tmp_path / "out"
    cases = [
        (("refcocos|val",), "Did you mean refcoco?"),
        (("refcoco|val",), "--data"),
        (("scenes|tset",), "scenes|test"),
        ((own, "--max-bad", "2"), "max_bad"),
        ((own, "--limit", "0"), "limit"),
        ((own, "--conversation", "v7"), "llava_v1"),
        ((own, "--compare", str(tmp_path / "none")), "none"),
    ]
    for (dataset, *more), words in cases:
        assert run(tiny_model, dataset, out, *more) == 1
        error = capsys.readouterr().err
        assert error.startswith("read-jax: error: ") and error.count("\n") == 1, error
        assert words in error
        assert not out.exists()


def test_another_runs_answers_are_neither_mixed_nor_lost(tiny_model, own, tmp_path, capsys):
    out = tmp_path / "out"
    assert run(tiny_model, own, out, "--limit", "1") == 0
    before = (out / "answers-00000.jsonl").read_bytes()
    assert run(tiny_model, own, out, "--limit", "2") == 1
    assert "--overwrite" in capsys.readouterr().err
    assert (out / "answers-00000.jsonl").read_bytes() == before
    assert run(tiny_model, own, out, "--limit", "2", "--overwrite") == 0


def test_a_model_that_does_not_load_costs_no_earlier_answers(tiny_model, own, tmp_path, capsys):
    out, broken = tmp_path / "out", tmp_path / "broken"
    assert run(tiny_model, own, out, "--limit", "1") == 0
    before = (out / "answers-00000.jsonl").read_bytes()
    shutil.copytree(tiny_model, broken)
    for weights in (broken / "params").rglob("*"):
        if weights.is_file():
            weights.write_bytes(weights.read_bytes()[:10])
    assert run(broken, own, out, "--limit", "1", "--overwrite") == 1
    assert capsys.readouterr().err.startswith("read-jax: error: ")
    assert (out / "answers-00000.jsonl").read_bytes() == before
