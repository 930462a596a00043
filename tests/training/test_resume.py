"""Six updates equal k updates, a kill and the rest: parameters, metrics and pictures, to the bit."""

from __future__ import annotations

import random
import shutil
import signal
import time

import pytest

from read_jax.training.checkpoint import FOLDER
from read_jax.training.logs import EXAMPLES, METRICS
from read_jax.training.loop import AGAIN
from tests.training.tiny_run import lines, results, start, write_recipe

pytestmark = pytest.mark.slow  # minutes of compilation

UPDATES = 6
PATIENCE = 400


class Runs:
    """Runs of one recipe, each in a workdir of its own; all but the first find the new model made."""

    def __init__(self, folder):
        self.folder, self.recipe = folder, write_recipe(folder)

    def __call__(self, name, *changes, devices=1):
        """(workdir, process) of a run that was just started."""
        workdir = self.folder / name
        if not workdir.exists() and name != "first":
            shutil.copytree(self.folder / "first" / "start", workdir / "start")
        return workdir, start(self.recipe, workdir, self.folder / "cache", *changes, devices=devices)


@pytest.fixture(scope="module")
def tiny(tmp_path_factory):
    return Runs(tmp_path_factory.mktemp("resume"))


def finish(process):
    said = process.communicate(timeout=PATIENCE)[1]
    assert process.returncode == 0, said
    return said


@pytest.fixture(scope="module")
def whole(tiny):
    """What runs without interruption leave, by number of devices."""
    known = {}

    def of(devices):
        if devices not in known:
            workdir, process = tiny("first" if devices == 1 else f"first-{devices}", devices=devices)
            finish(process)
            known[devices] = results(workdir)
        return known[devices]

    of(1)
    return of


def wait_for(process, condition):
    deadline = time.monotonic() + PATIENCE
    while not condition():
        assert process.poll() is None, process.stderr.read()
        assert time.monotonic() < deadline
        time.sleep(0.001)


def kill_after(process, workdir, updates, delay):
    """kill -9, `delay` seconds into the update after so many."""
    wait_for(process, lambda: len(lines(workdir / EXAMPLES)) >= updates)
    time.sleep(delay)
    process.kill()
    process.communicate()


def kill_while_saving(process, workdir, nth):
    """kill -9 while the nth checkpoint is being written, half of it on the disk."""
    seen = set()

    def saving():
        seen.update(folder.name for folder in (workdir / FOLDER).glob("*.orbax-checkpoint-tmp*"))
        return len(seen) >= nth

    wait_for(process, saving)
    process.kill()
    process.communicate()


@pytest.mark.parametrize("devices", [1, 8])
@pytest.mark.parametrize("where", ["in an update", "in a save"])
def test_a_killed_run_goes_on_to_the_same_end(where, devices, tiny, whole):
    wanted = whole(devices)
    draw = random.Random(f"{where} {devices}")
    workdir, process = tiny(f"{where.replace(' ', '-')}-{devices}", devices=devices)
    if where == "in a save":
        kill_while_saving(process, workdir, draw.randint(1, 2))
    else:
        kill_after(process, workdir, draw.randint(2, UPDATES - 1), draw.uniform(0, 0.3))
    finish(tiny(workdir.name, devices=devices)[1])
    assert results(workdir) == wanted


@pytest.mark.slow
@pytest.mark.parametrize("devices", [1, 8])
@pytest.mark.parametrize("seed", range(18))
def test_wherever_it_is_killed_and_however_often(seed, devices, tiny, whole):
    wanted = whole(devices)
    draw = random.Random(seed)
    workdir, process = tiny(f"random-{seed}-{devices}", devices=devices)
    for _ in range(draw.randint(1, 2)):
        if draw.random() < 0.3:
            kill_while_saving(process, workdir, 1)
        else:
            done = len(lines(workdir / EXAMPLES))
            kill_after(process, workdir, min(done + draw.randint(1, 2), UPDATES - 1), draw.uniform(0, 0.5))
        process = tiny(workdir.name, devices=devices)[1]
    finish(process)
    assert results(workdir) == wanted


def test_on_another_number_of_devices_it_goes_on_with_the_same_pictures_to_nearly_the_same(tiny, whole):
    wanted = whole(1)
    workdir, process = tiny("other-devices")
    wait_for(process, lambda: (workdir / FOLDER / "2" / "meta").exists())
    process.send_signal(signal.SIGTERM)
    process.communicate()
    finish(tiny("other-devices", devices=8)[1])
    found = results(workdir)
    assert found["examples"] == wanted["examples"]
    assert len(found["metrics"]) == len(wanted["metrics"]) == UPDATES
    for ours, theirs in zip(found["metrics"], wanted["metrics"], strict=True):
        for key in ("total", "ce", "bce", "dice", "parameter_norm"):
            assert ours[key] == pytest.approx(theirs[key], rel=1e-4), (ours["step"], key)


def test_told_to_stop_it_saves_and_says_so_and_goes_on(tiny, whole):
    wanted = whole(1)
    workdir, process = tiny("stopped", "checkpoints.every=1000")
    wait_for(process, lambda: len(lines(workdir / EXAMPLES)) >= 3)
    process.send_signal(signal.SIGTERM)
    said = process.communicate(timeout=PATIENCE)[1]
    assert process.returncode == AGAIN, said
    saved = [int(folder.name) for folder in (workdir / FOLDER).iterdir()]
    assert len(saved) == 1 and 3 <= saved[0] <= UPDATES
    assert f"saved after {saved[0]} updates" in said
    assert [line["step"] for line in lines(workdir / METRICS)] == list(range(1, saved[0] + 1))
    finish(tiny("stopped")[1])
    assert results(workdir) == wanted
