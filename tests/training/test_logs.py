"""What is left of a log when a run goes on from an earlier step, and what is written."""

from __future__ import annotations

import json
import time

import numpy as np
import pytest

from read_jax.errors import ConfigError
from read_jax.training.config import LogConfig
from read_jax.training.logs import METRICS, PICTURES, RunLog, rewind
from read_jax.training.validation import Picture
from tests.training.tiny_run import lines


def test_lines_of_later_steps_and_torn_ones_are_dropped(tmp_path):
    path = tmp_path / "metrics.jsonl"
    path.write_text("".join(json.dumps({"step": n}) + "\n" for n in range(1, 6)) + '{"step": 2')
    rewind(path, 3)
    assert lines(path) == [{"step": 1}, {"step": 2}, {"step": 3}]
    assert path.read_text().endswith("}\n")


def test_a_line_without_its_end_is_torn_even_if_it_can_be_read(tmp_path):
    path = tmp_path / "metrics.jsonl"
    path.write_text('{"step": 1}\n{"step": 2}')
    rewind(path, 3)
    assert lines(path) == [{"step": 1}]


def test_numbers_and_pictures_go_to_all_places(tmp_path):
    log = RunLog(tmp_path, LogConfig(), 0, 2, {})
    log.train(1, {"total": 2.5, "gradient_norm": float("inf")})
    picture = Picture("scenes_val_0", np.zeros((4, 6, 3), np.uint8))
    log.validation(1, {"giou": 0.5, "masks": 3}, [picture])
    log.close()
    assert lines(tmp_path / METRICS) == [
        {"step": 1, "total": 2.5, "gradient_norm": None},
        {"step": 1, "validation": {"giou": 0.5, "masks": 3.0}},
    ]
    assert (tmp_path / PICTURES / "0000001" / "scenes_val_0.png").is_file()
    (events,) = (tmp_path / "tensorboard").iterdir()
    content = events.read_bytes()
    assert b"train/total" in content and b"validation/giou" in content and b"scenes_val_0" in content


def test_a_full_disk_costs_no_line_and_is_told_once(tmp_path, capsys):
    log = RunLog(tmp_path, LogConfig(tensorboard=False), 0, 2, {})
    full = open("/dev/full", "a")  # noqa: SIM115
    log._examples, whole = full, log._examples
    log.used(1, ["a"])
    log.used(2, ["b"])
    log.train(1, {"total": 2.5})
    log.close()
    assert capsys.readouterr().err.count("cannot be written (No space left on device)") == 1
    assert lines(tmp_path / METRICS) == [{"step": 1, "total": 2.5}]
    whole.close()


def test_weights_and_biases_get_the_numbers_and_a_run_that_goes_on_is_the_same_one(tmp_path, monkeypatch):
    monkeypatch.setenv("WANDB_MODE", "offline")
    monkeypatch.setenv("WANDB_SILENT", "true")
    for start in (0, 1):
        log = RunLog(tmp_path, LogConfig(tensorboard=False, wandb="read"), start, 2, {"seed": 7})
        log.train(start + 1, {"total": 0.5})
        log.validation(start + 1, {"giou": 0.5}, [Picture("scenes_val_0", np.zeros((4, 6, 3), np.uint8))])
        log.close()
        time.sleep(1.1)  # its folders are told apart by the second
    name = (tmp_path / "wandb_id.txt").read_text()
    parts = sorted((tmp_path / "wandb").glob(f"offline-run-*-{name}"))
    assert len(parts) == 2
    deadline = time.monotonic() + 300
    for part in parts:  # written by a process of its own
        while not any(b"train/total" in file.read_bytes() for file in part.glob("*.wandb")):
            assert time.monotonic() < deadline, part
            time.sleep(0.1)
        assert list(part.rglob("scenes_val_0*.png"))


def test_weights_and_biases_must_be_installed_when_asked_for(tmp_path, monkeypatch):
    monkeypatch.setitem(__import__("sys").modules, "wandb", None)
    with pytest.raises(ConfigError, match="pip install wandb"):
        RunLog(tmp_path, LogConfig(wandb="read"), 0, 2, {})
