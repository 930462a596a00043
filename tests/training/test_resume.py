"""Eight updates equal k updates, a kill and the rest: parameters, metrics and pictures, to the bit.

Two kills on one device and two on eight are tried by default, without the losses of masks; the rest, about a
hundred runs with them, by `pytest -m slow tests/training/test_resume.py`.
"""

from __future__ import annotations

import random
import time

import pytest

from read_jax.errors import AGAIN
from read_jax.training.checkpoint import FOLDER
from read_jax.training.config import load_config
from read_jax.training.logs import EXAMPLES, METRICS
from read_jax.training.run import base_model, make_mixture
from tests.training.tiny_run import PATIENCE, Process, lines, results, write_recipe

UPDATES = 8  # a checkpoint after every second one
WITHOUT_MASKS = ("losses.bce=0.0", "losses.dice=0.0")  # most of what there is to compile


class Runs:
    """Runs of one recipe from one new model, each in a workdir of its own."""

    def __init__(self, folder):
        self.folder, self.recipe = folder, write_recipe(folder)
        config = load_config(str(self.recipe))
        model, _ = base_model(config, make_mixture(config.data), folder)
        self._changes = (
            f"start.model={model}",
            "start.scratch=None",
            f"optimizer.total_updates={UPDATES}",
        )
        self._processes, self._whole = [], {}

    def __call__(self, name, *changes, devices=1):
        """(workdir, process) of a run that was just started, or started again."""
        workdir = self.folder / name
        process = Process(
            self.recipe, workdir, self.folder / "cache", *self._changes, *changes, devices=devices
        )
        self._processes.append(process)
        return workdir, process

    def whole(self, devices, *changes):
        """What a run without interruption leaves."""
        key = devices, changes
        if key not in self._whole:
            workdir, process = self(f"whole-{devices}-{len(self._whole)}", *changes, devices=devices)
            process.finish()
            self._whole[key] = results(workdir)
        return self._whole[key]

    def stop(self):
        for process in self._processes:
            process.stop()


@pytest.fixture(scope="module")
def runs(tmp_path_factory):
    made = Runs(tmp_path_factory.mktemp("resume"))
    yield made
    made.stop()


def kill_after(process, workdir, updates, delay=0.0):
    """kill -9, `delay` seconds into the update after so many."""
    process.wait_for(lambda: len(lines(workdir / EXAMPLES)) >= updates)
    time.sleep(delay)
    process.kill()


def kill_while_saving(process, workdir, nth):
    """kill -9 while the nth checkpoint is being written, half of it on the disk."""
    seen = set()

    def saving():
        seen.update(folder.name for folder in (workdir / FOLDER).glob("*.orbax-checkpoint-tmp*"))
        return len(seen) >= nth

    process.wait_for(saving)
    process.kill()


def saved(workdir):
    return sorted(int(folder.name) for folder in (workdir / FOLDER).iterdir() if folder.name.isdigit())


@pytest.mark.timeout(4 * PATIENCE + 60)  # four processes, one after the other
@pytest.mark.parametrize("devices", [1, 8])
def test_killed_in_a_save_and_in_an_update_it_goes_on_to_the_same_end(devices, runs):
    wanted = runs.whole(devices, *WITHOUT_MASKS)
    workdir, process = runs(f"killed-{devices}", *WITHOUT_MASKS, devices=devices)
    kill_while_saving(process, workdir, 2)  # the one after four updates; the one after two is whole
    assert len(lines(workdir / EXAMPLES)) >= 4 and UPDATES not in saved(workdir)
    _, process = runs(workdir.name, *WITHOUT_MASKS, devices=devices)
    process.wait_for(lambda: "going on after" in process.said())
    kill_after(process, workdir, 5)
    assert UPDATES not in saved(workdir)
    runs(workdir.name, *WITHOUT_MASKS, devices=devices)[1].finish()
    assert results(workdir) == wanted


@pytest.mark.slow
@pytest.mark.parametrize("devices", [1, 8])
@pytest.mark.parametrize("seed", range(20))
def test_wherever_it_is_killed_and_however_often(seed, devices, runs):
    wanted = runs.whole(devices)
    draw = random.Random(seed)
    workdir, process = runs(f"random-{seed}-{devices}", devices=devices)
    for _ in range(draw.randint(1, 2)):
        if draw.random() < 0.3:
            kill_while_saving(process, workdir, 1)
        else:
            done = len(lines(workdir / EXAMPLES))
            kill_after(process, workdir, min(done + draw.randint(1, 2), UPDATES - 1), draw.uniform(0, 0.5))
        process = runs(workdir.name, devices=devices)[1]
    process.finish()
    assert results(workdir) == wanted


@pytest.mark.slow
def test_on_another_number_of_devices_it_goes_on_with_the_same_pictures_to_nearly_the_same(runs):
    wanted = runs.whole(1)
    workdir, process = runs("other-devices")
    process.wait_for(lambda: (workdir / FOLDER / "2" / "meta").exists())
    process.terminate()
    runs("other-devices", devices=8)[1].finish()
    found = results(workdir)
    assert found["examples"] == wanted["examples"]
    assert len(found["metrics"]) == len(wanted["metrics"]) == UPDATES
    for ours, theirs in zip(found["metrics"], wanted["metrics"], strict=True):
        for key in ("total", "ce", "bce", "dice", "parameter_norm"):
            assert ours[key] == pytest.approx(theirs[key], rel=1e-4), (ours["step"], key)


@pytest.mark.slow
def test_told_to_stop_it_saves_and_says_so_and_goes_on(runs):
    wanted = runs.whole(1)
    workdir, process = runs("stopped", "checkpoints.every=1000")
    process.wait_for(lambda: len(lines(workdir / EXAMPLES)) >= 3)
    assert process.terminate() == AGAIN, process.said()
    (updates,) = saved(workdir)
    assert 3 <= updates <= UPDATES
    assert f"saved after {updates} updates" in process.said()
    assert [line["step"] for line in lines(workdir / METRICS)] == list(range(1, updates + 1))
    runs("stopped")[1].finish()
    assert results(workdir) == wanted
