"""The model folder that a checkpoint becomes: adapters merged by their formula, and which is taken."""

from __future__ import annotations

import dataclasses
import json
import shutil

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from read_jax import cli
from read_jax.config import SaspConfig
from read_jax.errors import CheckpointError
from read_jax.training.checkpoint import FOLDER, Checkpoints
from read_jax.training.config import CheckpointConfig, StartConfig, TrainConfig, ValidationConfig
from read_jax.training.finish import finish
from read_jax.training.lora import LoraConfig
from read_jax.training.step import TrainState
from read_jax.weights.checkpoint import PARAMS, load_record
from read_jax.weights.convert import convert
from read_jax.weights.export import export
from read_jax.weights.store import read_slice
from tests.training.tiny import write_model
from tests.weights.synthetic import write_clip, write_read_checkpoint

LORA = LoraConfig(rank=3, alpha=5.0, targets=("q_proj",))
KERNEL = "llama.layers.attn.q_proj.kernel"
NORM = "llama.norm.scale"
GIOU = {1: 0.2, 2: 0.6, 3: 0.4}


def open_run(workdir, config, start):
    """The checkpoints of a run that began from a model folder."""
    fingerprint = load_record(start).fingerprint
    identity = {"config": config.trajectory(), "base": {"path": str(start), "fingerprint": fingerprint}}
    workdir.mkdir()
    (workdir / "config.json").write_text(json.dumps(config.to_dict()))
    return Checkpoints(workdir / FOLDER, config.checkpoints, identity, print)


def state_of(step, a, b):
    """Adapters and their average, of zeros."""
    params = {"llama": {"layers": {"attn": {"q_proj": {"lora_a": a, "lora_b": b}}}}}
    return TrainState(jnp.int32(step), params, (), jax.tree.map(jnp.zeros_like, params), jnp.int32(0))


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    """(folder of the start, folder of the run, adapters by update): one checkpoint after each of three."""
    folder = tmp_path_factory.mktemp("finish")
    start = write_model(folder)
    config = TrainConfig(
        start=StartConfig(model=str(start)),
        lora=LORA,
        validation=ValidationConfig("scenes|val", every=1),
        checkpoints=CheckpointConfig(1, 3, "giou"),
    )
    checkpoints = open_run(folder / "run", config, start)
    layers, inputs, outputs = kernel(start).shape
    adapters = {}
    for step, giou in GIOU.items():
        a, b = (
            jax.random.normal(jax.random.key(2 * step + i), shape)
            for i, shape in enumerate([(layers, inputs, LORA.rank), (layers, LORA.rank, outputs)])
        )
        adapters[step] = np.asarray(a), np.asarray(b)
        checkpoints.save(step, state_of(step, a, b), {"step": step}, {"giou": giou}, last=True)
    checkpoints.close()
    return start, folder / "run", adapters


def kernel(folder):
    layers = load_record(folder).config.llama.num_layers
    return np.stack([read_slice(folder / PARAMS, KERNEL, layer) for layer in range(layers)])


def assert_merged(folder, start, adapters):
    a, b = (x.astype(np.float64) for x in adapters)
    wanted = kernel(start).astype(np.float64) + LORA.alpha / LORA.rank * np.einsum("lir,lro->lio", a, b)
    np.testing.assert_allclose(kernel(folder), wanted, rtol=1e-6, atol=1e-6)


def test_the_newest_checkpoints_adapters_are_added_to_their_weights(run, tmp_path):
    start, workdir, adapters = run
    record = finish(workdir, tmp_path / "model")
    assert record.source["trained_updates"] == 3
    assert_merged(tmp_path / "model", start, adapters[3])
    others = [read_slice(folder / PARAMS, NORM, None) for folder in (tmp_path / "model", start)]
    np.testing.assert_array_equal(*others)


def test_the_best_checkpoint_is_the_one_with_the_highest_score(run, tmp_path):
    start, workdir, adapters = run
    assert finish(workdir, tmp_path / "model", best=True).source["trained_updates"] == 2
    assert_merged(tmp_path / "model", start, adapters[2])


def test_of_a_run_with_an_average_the_best_is_what_was_scored(run, tmp_path):
    start, workdir, _ = run
    shutil.copytree(workdir, tmp_path / "run")
    meta = tmp_path / "run" / FOLDER / "2" / "meta" / "metadata"
    found = json.loads(meta.read_text())
    found["identity"]["config"]["step"]["ema_decay"] = 0.9
    meta.write_text(json.dumps(found))
    finish(tmp_path / "run", tmp_path / "model", best=True)
    np.testing.assert_array_equal(kernel(tmp_path / "model"), kernel(start))  # the average is of zeros


def test_a_runs_folder_is_exported_with_its_adapters_merged(run, tmp_path, capsys):
    _, workdir, _ = run
    assert cli.main(["export", str(workdir), "--output", str(tmp_path / "of-run")]) == 0
    assert "merged after 3 updates" in capsys.readouterr().err
    finish(workdir, tmp_path / "model")
    export(tmp_path / "model", tmp_path / "of-model")
    ours, theirs = (
        {path.name: path.read_bytes() for path in (tmp_path / name).glob("*.safetensors")}
        for name in ("of-run", "of-model")
    )
    assert ours == theirs and ours
    assert sorted(path.name for path in tmp_path.iterdir()) == ["model", "of-model", "of-run"]
    assert cli.main(["export", str(workdir), "--output", str(tmp_path / "of-run")]) == 1
    assert "exists already; pass --overwrite" in capsys.readouterr().err  # before anything is merged


def test_of_what_is_no_run_no_checkpoint_is_chosen(run, tmp_path, capsys):
    start, workdir, _ = run
    assert cli.main(["export", str(start), "--best", "--output", str(tmp_path / "hf")]) == 1
    assert "is none" in capsys.readouterr().err
    shutil.copytree(start, tmp_path / "moved")
    asked = ["export", str(workdir), "--base", str(tmp_path / "moved"), "--output", str(tmp_path / "hf")]
    assert cli.main(asked) == 0


def test_a_base_that_is_elsewhere_now_is_asked_for(run, tmp_path):
    start, workdir, adapters = run
    shutil.copytree(workdir, tmp_path / "run")
    meta = tmp_path / "run" / FOLDER / "3" / "meta" / "metadata"
    found = json.loads(meta.read_text())
    found["identity"]["base"]["path"] = "/home/pod/bucket/models/start"
    meta.write_text(json.dumps(found))
    with pytest.raises(CheckpointError, match="say with --base where"):
        finish(tmp_path / "run", tmp_path / "model")
    finish(tmp_path / "run", tmp_path / "model", base=start)
    assert_merged(tmp_path / "model", start, adapters[3])


def test_adapters_of_zero_change_nothing(run, tmp_path):
    start, workdir, _ = run
    finish(workdir, tmp_path / "model", average=True)
    np.testing.assert_array_equal(kernel(tmp_path / "model"), kernel(start))


def test_a_run_that_kept_no_average_says_so(run, tmp_path):
    shutil.copytree(run[1], tmp_path / "run")
    meta = tmp_path / "run" / FOLDER / "3" / "meta" / "metadata"
    found = json.loads(meta.read_text())
    found["checksums"] = {k: v for k, v in found["checksums"].items() if not k.startswith("ema.")}
    meta.write_text(json.dumps(found))
    with pytest.raises(CheckpointError, match="holds no moving average"):
        finish(tmp_path / "run", tmp_path / "model", average=True)


def test_a_base_whose_parameters_were_changed_is_refused(run, tmp_path):
    shutil.copytree(run[0], tmp_path / "base")
    chunk = tmp_path / "base" / PARAMS / NORM / "0"
    data = bytearray(chunk.read_bytes())
    data[5] ^= 1
    chunk.write_bytes(data)
    with pytest.raises(CheckpointError, match=r"base is damaged: the parameters have the fingerprint"):
        finish(run[1], tmp_path / "model", base=tmp_path / "base")
    assert not (tmp_path / "model").exists()


def test_the_points_a_run_was_trained_with_survive_its_export(tmp_path):
    """Of a base without points; and settings that no preset has."""
    source = write_read_checkpoint(tmp_path / "sesame", kind="sesame")
    tower = write_clip(tmp_path / "clip")
    convert(source, tower, tmp_path / "start")
    assert not load_record(tmp_path / "start").config.sasp.enabled
    start = StartConfig(model=str(tmp_path / "start"), sasp="7b", continuous=False)
    checkpoints = open_run(tmp_path / "run", TrainConfig(start=start, lora=LORA), tmp_path / "start")
    layers, inputs, outputs = kernel(tmp_path / "start").shape
    state = state_of(1, jnp.ones((layers, inputs, LORA.rank)), jnp.ones((layers, LORA.rank, outputs)))
    checkpoints.save(1, state, {"step": 1}, last=True)
    checkpoints.close()
    assert cli.main(["export", str(tmp_path / "run"), "--output", str(tmp_path / "hf")]) == 0
    assert json.loads((tmp_path / "hf" / "config.json").read_text())["architectures"] == ["READForCausalLM"]
    convert(tmp_path / "hf", tower, tmp_path / "again")
    wanted = dataclasses.replace(SaspConfig.preset("7b"), continuous=False)
    assert load_record(tmp_path / "again").config.sasp == wanted


def test_a_run_that_kept_no_best_checkpoint_says_so(run, tmp_path):
    workdir = tmp_path / "run"
    workdir.mkdir()
    (workdir / FOLDER).symlink_to(run[1] / FOLDER)
    with pytest.raises(CheckpointError, match="does not tell what the run was"):
        finish(workdir, tmp_path / "model", best=True)
    (workdir / "config.json").write_text(json.dumps(TrainConfig().to_dict()))
    with pytest.raises(CheckpointError, match=r"set checkpoints\.best"):
        finish(workdir, tmp_path / "model", best=True)
    assert not (tmp_path / "model").exists()
