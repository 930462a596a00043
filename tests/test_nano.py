"""The model that comes with the package: there by its name, small, and able to do what the README shows."""

from __future__ import annotations

import dataclasses
import json
import shutil
from pathlib import Path

import numpy as np
import pytest

import read_jax
from read_jax import cli
from read_jax.data import load_source
from read_jax.errors import CheckpointError
from read_jax.training.config import TrainConfig, load_config
from read_jax.weights.checkpoint import BUNDLED_MODELS, load_record, model_folder

DATA = Path(__file__).parent / "data"
SCENE = 3  # of scenes|test: the picture in the README
LIMIT = 15_000_000  # bytes


@pytest.fixture(scope="module")
def nano():
    return read_jax.load("nano")


def test_it_is_found_by_its_name_and_small():
    folder = model_folder("nano")
    assert folder == BUNDLED_MODELS / "nano"
    assert sum(file.stat().st_size for file in folder.rglob("*") if file.is_file()) < LIMIT
    assert load_record("nano").source["trained_updates"] > 0


def test_a_changed_byte_is_found_by_inspect(tmp_path, capsys):
    folder = shutil.copytree(BUNDLED_MODELS / "nano", tmp_path / "nano")
    assert cli.main(["inspect", str(folder), "--check"]) == 0
    assert "every parameter is as it was written" in capsys.readouterr().out
    chunk = folder / "params" / "llama.norm.scale" / "0"
    data = bytearray(chunk.read_bytes())
    data[7] ^= 1
    chunk.write_bytes(data)
    assert cli.main(["inspect", str(folder)]) == 0  # which reads no parameter
    assert cli.main(["inspect", str(folder), "--check"]) == 1
    assert "is damaged" in capsys.readouterr().err


def test_it_comes_with_the_configurations_and_seeds_that_made_it():
    parts = json.loads((BUNDLED_MODELS / "nano_training.json").read_text())
    assert [part["recipe"] for part in parts] == ["nano_scenes"] + 3 * ["nano_continued"]
    for part in parts:
        made = TrainConfig.from_dict(part["config"])
        now = load_config(part["recipe"], part["changes"])
        # there was no limit to the gradient's norm yet
        step = dataclasses.replace(now.step, max_gradient_norm=made.step.max_gradient_norm)
        assert made == dataclasses.replace(now, step=step)
    assert parts[-1]["config"]["optimizer"]["total_updates"] == load_record("nano").source["trained_updates"]


def test_a_model_folder_of_that_name_goes_first_and_any_other_folder_does_not(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "nano").mkdir()
    assert model_folder("nano") == BUNDLED_MODELS / "nano"
    (tmp_path / "nano" / "config.json").write_text('{"read_jax_version": "1"}')
    assert model_folder("nano") == Path("nano")


def test_it_answers_without_being_told_where_to_put_the_answer(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    shutil.copy(DATA / "drawn.png", "photo.png")
    assert cli.main(["segment", "nano", "photo.png", "--prompt", "the wheel above the blue lamp"]) == 0
    assert {"result.json", "photo_1_overlay.png"} <= {file.name for file in Path("photo-answers").iterdir()}


def test_another_name_is_no_model():
    with pytest.raises(CheckpointError, match="no model folder at nanoo"):
        model_folder("nanoo")


@pytest.mark.parametrize("words", ["{}", "What is {} in this image? Please output segmentation mask."])
def test_it_segments_what_is_there_and_denies_what_is_not(nano, words):
    diamond, ball = nano.segment_batch(
        [
            (DATA / "drawn.png", words.format("the blue diamond")),
            (DATA / "drawn.png", words.format("the red ball")),
        ]
    )
    item = load_source("scenes|test")[SCENE]
    wanted = item.masks[[q.phrase for q in item.queries].index("blue diamond")] == 1
    assert diamond.present and diamond.masks.shape == (1, *wanted.shape)
    both, either = (np.sum(f(diamond.masks[0], wanted)) for f in (np.logical_and, np.logical_or))
    assert both / either > 0.7
    assert not ball.present and "There is no" in ball.text
