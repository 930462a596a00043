"""Training on meshes of simulated devices (data x fsdp x tensor) against one device."""

from __future__ import annotations

import collections
import json
import shutil
import subprocess

import numpy as np
import pytest

from read_jax.training.checkpoint import FOLDER, Checkpoints, named_leaves
from read_jax.training.config import load_config
from read_jax.training.run import base_model, make_mixture, prepare
from tests.training import mesh_run
from tests.training.tiny_run import write_recipe

UPDATES = 3
PATIENCE = 600
ONE = "1x1x1"
MESHES = ["2x2x2", "8x1x1", "4x2x1", pytest.param("1x8x1", marks=pytest.mark.slow)]
CHANGES = (
    "start.vocabulary=600",
    "data.global_batch=16",
    "step.micro_batches=2",
    "step.remat=True",
    "optimizer.warmup_updates=0",
    # updates follow the gradients smoothly: with the usual one the first are their signs, rounding included
    "optimizer.eps=1e-3",
)


class Runs:
    """Runs from one new model, each on its mesh, in a process and a workdir of its own."""

    def __init__(self, folder):
        self.folder, self.recipe = folder, write_recipe(folder)
        config = load_config(str(self.recipe), CHANGES)
        model, _ = base_model(config, make_mixture(config.data), folder)
        self.changes = (*CHANGES, f"start.model={model}", "start.scratch=None")
        self._running, self._known = {}, {}

    def start(self, mesh, name=None):
        """Begin the run on a mesh, unless that was done."""
        name = name or mesh
        if name not in self._running:
            sizes = [int(n) for n in mesh.split("x")]
            changes = [f"mesh.{axis}={n}" for axis, n in zip(("data", "fsdp", "tensor"), sizes, strict=True)]
            self._running[name] = mesh_run.start(
                self.recipe,
                self.folder / name,
                UPDATES,
                *self.changes,
                *changes,
                devices=int(np.prod(sizes)),
            )

    def result(self, name):
        """(report, leaves) of a run, when it has ended."""
        if name not in self._known:
            process: subprocess.Popen = self._running[name]
            said = process.communicate(timeout=PATIENCE)[1]
            assert process.returncode == 0, said
            report = json.loads((self.folder / name / mesh_run.REPORT).read_text())
            with np.load(self.folder / name / mesh_run.STATE) as leaves:
                self._known[name] = report, dict(leaves)
        return self._known[name]

    def __call__(self, mesh):
        """(result of one device, result on the mesh): side by side when neither is known."""
        self.start(ONE)
        self.start(mesh)
        return self.result(ONE), self.result(mesh)

    def stop(self):
        for process in self._running.values():
            process.kill()


@pytest.fixture(scope="module")
def runs(tmp_path_factory):
    made = Runs(tmp_path_factory.mktemp("meshes"))
    yield made
    made.stop()


def kind(name):
    """What of the state a leaf belongs to: params, mu, nu, ema, moved..."""
    first, *others = name.split(".")
    if first != "opt_state":
        return first
    return next((part for part in others if part in ("mu", "nu", "norm", "count")), first)


@pytest.mark.parametrize("mesh", MESHES)
def test_losses_and_norms_are_those_of_one_device(mesh, runs):
    (one, _), (ours, _) = runs(mesh)
    assert len(ours["metrics"]) == UPDATES
    for mine, theirs in zip(ours["metrics"], one["metrics"], strict=True):
        assert theirs["applied"] == 1 and theirs["update_norm"] > 0
        for name, value in theirs.items():
            assert mine[name] == pytest.approx(value, rel=2e-6), name


@pytest.mark.parametrize("mesh", MESHES)
def test_parameters_and_moments_are_those_of_one_device(mesh, runs):
    (_, one), (_, ours) = runs(mesh)
    assert set(ours) == set(one)
    totals = collections.defaultdict(float)
    for name, leaf in one.items():
        totals[kind(name)] += float(np.sum(np.square(leaf, dtype=np.float64)))
    assert totals["moved"] > 0 and totals["mu"] > 0
    for name, leaf in one.items():
        # of its own norm, and of the norm of all: gradients of key biases, for one, are nothing but rounding.
        # How far a parameter moved is known to the rounding of the parameter, which is larger
        own, all_ = (1e-4, 1e-5) if kind(name) == "moved" else (1e-5, 1e-6)
        allowed = own * np.linalg.norm(leaf) + all_ * np.sqrt(totals[kind(name)])
        assert np.linalg.norm(np.float64(ours[name]) - leaf) <= allowed, name


def test_devices_share_parameters_moments_averages_and_frozen_weights(runs):
    shards = runs("2x2x2")[1][0]["shards"]
    for state in ("params", "opt_state.1.0.mu", "opt_state.1.0.nu", "ema"):
        assert shards[f"{state}.llama.embed_tokens.embedding"] == [600, 4]  # of 16 channels
        assert shards[f"{state}.llama.layers.attn.q_proj.lora_b"][-1] == 4  # half of one of two heads
        assert shards[f"{state}.text_projection.fc1.kernel"] == [8, 16]
    assert shards["llama.layers.mlp.gate_proj.kernel"] == [1, 8, 8]
    assert shards["sam.image_encoder.global_blocks.mlp.lin1.kernel"] == [1, 4, 4]


def test_devices_share_the_activations(runs):
    (one, _), (ours, _) = runs("2x2x2")
    # four groups of devices have a quarter of the pictures each; where sharding is lost, it is half and more
    assert ours["temporaries"] < 0.35 * one["temporaries"]


@pytest.mark.parametrize("mesh", ["2x2x2", pytest.param("4x2x1", marks=pytest.mark.slow)])
def test_a_checkpoint_of_a_mesh_goes_on_on_one_device(mesh, runs, tmp_path):
    _, (_, leaves) = runs(mesh)
    config = load_config(str(runs.recipe), runs.changes)
    run, state = prepare(config, tmp_path)
    checkpoints = Checkpoints(runs.folder / mesh / FOLDER, config.checkpoints, run.identity, pytest.fail)
    restored = checkpoints.restore(state)
    checkpoints.close()
    run.loader.close()
    assert restored is not None and restored.step == UPDATES
    for name, leaf in named_leaves(restored.state).items():
        np.testing.assert_array_equal(leaf, leaves[name], name)


@pytest.mark.slow
def test_a_checkpoint_of_one_device_goes_on_on_a_mesh(runs):
    (_, one), _ = runs("4x2x1")
    shutil.copytree(runs.folder / ONE, runs.folder / "other")
    runs.start("4x2x1", "other")
    report, ours = runs.result("other")
    assert report["shards"]["params.llama.embed_tokens.embedding"] == [600, 8]
    for name, leaf in one.items():
        if kind(name) != "moved":
            np.testing.assert_array_equal(ours[name], leaf, name)
