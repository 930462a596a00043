"""The loop: its order, what it writes, and how it ends when something goes wrong. The step takes no time."""

from __future__ import annotations

import errno
import gc
import json
import os
import signal
import time
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from read_jax.config import ReadConfig
from read_jax.data.loader import HostBatch
from read_jax.data.mixture import Skipped
from read_jax.errors import CheckpointError, ConfigError, DataError
from read_jax.files import only_writer
from read_jax.training import checkpoint, loop
from read_jax.training.checkpoint import FOLDER, read_meta, scores_in
from read_jax.training.config import CheckpointConfig, LogConfig, TrainConfig, ValidationConfig
from read_jax.training.logs import EXAMPLES, LOG, METRICS
from read_jax.training.loop import TrainingError, train
from read_jax.training.optimizer import OptimizerConfig
from read_jax.training.run import Run
from read_jax.training.step import StepConfig, TrainState
from tests.training.tiny_run import SCRATCH, lines

SHARDING = jax.sharding.SingleDeviceSharding(jax.devices()[0])


class Arrays(NamedTuple):
    lengths: np.ndarray
    number: np.ndarray


class Batches:
    """Stands in for the loader: batch k holds the number k; `vanish` is where the data are gone, and in the
    `torn` ones a picture cannot be used."""

    def __init__(self, vanish=None, torn=()):
        self.step, self.vanish, self.torn, self.closed = 0, vanish, torn, False

    def __next__(self):
        if self.step == self.vanish:
            raise DataError("pictures/7.jpg: there is no such file.")
        arrays = Arrays(np.array([[3, 2]]), np.float32(self.step))
        self.step += 1
        skipped = (Skipped("toy:torn", "it is cut short"),) if self.step - 1 in self.torn else ()
        return HostBatch(self.step - 1, arrays, (f"toy:{self.step - 1}",), skipped, ())

    def state(self):
        return {"step": self.step}

    def restore(self, state):
        self.step = state["step"]

    def close(self):
        self.closed = True


class Scores:
    """Stands in for the validator; its scores go up and down. `during(n)` happens in the nth validation."""

    def __init__(self, scores, during=None):
        self.scores, self.during, self.asked = list(scores), during, []

    def __call__(self, params, frozen, stop):
        self.asked.append(float(params["w"][0]))
        if self.during:
            self.during(len(self.asked))
        if stop():
            return None
        giou = self.scores[len(self.asked) - 1]
        return ({} if giou is None else {"giou": giou, "ciou": 0.5}) | {"masks": 3}, []


def config(updates=6, every=2, keep=2, best=None, validate=0, **others):
    return TrainConfig(
        optimizer=OptimizerConfig(total_updates=updates, warmup_updates=0),
        checkpoints=CheckpointConfig(every, keep, best),
        validation=ValidationConfig("toy|val", validate) if validate else ValidationConfig(),
        log=LogConfig(every=1, tensorboard=False),
        **others,
    )


@pytest.fixture
def toy(monkeypatch):
    """`toy(...)` makes the next `train` a run whose step adds the batch's number to a weight."""

    def make(bad=(), vanish=None, scores=(), at=None, base="sha256:aa", frozen="ab", torn=(), during=None):
        loader = Batches(vanish, torn)

        def step(state, frozen, arrays):
            number = int(arrays.number)
            if at:
                at(number)
            applied = number not in bad
            params = {"w": state.params["w"] + number * applied}
            after = TrainState(state.step + 1, params, (), None, state.skipped + (not applied))
            metrics = {
                "total": 1.0 if applied else float("nan"),
                "gradient_norm": 2.0,
                "applied": float(applied),
                "skipped": after.skipped,
                "masks": 2,
            }
            return after, jax.tree.map(jnp.asarray, metrics)

        def prepare(config, workdir):
            state = TrainState(jnp.int32(0), {"w": jnp.zeros(4)}, (), None, jnp.int32(0))
            run = Run(
                model_config=ReadConfig.from_dict(SCRATCH),
                frozen={},
                step=lambda updates: step,
                loader=loader,
                sharding=SHARDING,
                shares=1,
                validator=Scores(scores, during) if scores else None,
                prefix_ids=np.zeros(5, np.int32),
                identity={
                    "config": config.trajectory(),
                    "base": {"path": "toy", "fingerprint": base, "frozen": frozen},
                },
                description="a toy",
            )
            workdir.mkdir(parents=True, exist_ok=True)
            return run, jax.device_put(state, SHARDING)

        monkeypatch.setattr(loop, "prepare", prepare)
        return loader

    return make


def saved(workdir):
    return sorted(int(f.name) for f in (workdir / FOLDER).iterdir() if f.name.isdigit())


def test_a_run_writes_every_update_and_keeps_the_last_checkpoints(toy, tmp_path):
    loader = toy()
    outcome = train(config(), tmp_path)
    assert (outcome.updates, outcome.stopped) == (6, False)
    assert saved(tmp_path) == [4, 6]
    assert [line["step"] for line in lines(tmp_path / METRICS)] == [1, 2, 3, 4, 5, 6]
    assert [line["examples"] for line in lines(tmp_path / EXAMPLES)] == [[f"toy:{k}"] for k in range(6)]
    assert json.loads((tmp_path / "config.json").read_text())["optimizer"]["total_updates"] == 6
    assert loader.closed


def test_the_best_checkpoint_is_kept_beside_the_latest(toy, tmp_path):
    toy(scores=[0.3, 0.9, 0.5, 0.4])
    outcome = train(config(updates=8, keep=1, best="giou", validate=2), tmp_path)
    assert saved(tmp_path) == [4, 8]
    assert outcome.scores["giou"] == 0.4
    assert [line["validation"]["giou"] for line in lines(tmp_path / METRICS) if "validation" in line] == [
        *(0.3, 0.9, 0.5, 0.4)
    ]


def test_the_best_checkpoint_is_still_known_when_a_run_goes_on(toy, tmp_path):
    def stop(number):
        if number == 5:
            os.kill(os.getpid(), signal.SIGTERM)

    toy(scores=[0.3, 0.9], at=stop)
    assert train(config(updates=10, keep=1, best="giou", validate=2), tmp_path).stopped
    toy(scores=[0.5, 0.4, 0.6])
    assert train(config(updates=10, keep=1, best="giou", validate=2), tmp_path).updates == 10
    assert saved(tmp_path) == [4, 10]


def test_validation_comes_after_the_update_that_it_is_named_for(toy, tmp_path):
    toy(scores=[0.1, 0.2])
    train(config(updates=4, validate=2), tmp_path)
    steps = [(line["step"], "validation" in line) for line in lines(tmp_path / METRICS)]
    assert steps == [(1, False), (2, False), (2, True), (3, False), (4, False), (4, True)]


def test_started_again_it_goes_on_where_it_was(toy, tmp_path):
    def stop(number):
        if number == 2:
            os.kill(os.getpid(), signal.SIGTERM)

    toy(at=stop)
    outcome = train(config(), tmp_path)
    assert (outcome.updates, outcome.stopped) == (3, True)
    assert saved(tmp_path) == [2, 3]
    toy()
    assert train(config(), tmp_path).updates == 6
    assert [line["examples"] for line in lines(tmp_path / EXAMPLES)] == [[f"toy:{k}"] for k in range(6)]
    assert "going on after 3 updates" in (tmp_path / LOG).read_text()


def test_bad_updates_are_skipped_and_counted_until_there_are_too_many(toy, tmp_path):
    toy(bad={1, 3, 4})
    with pytest.raises(TrainingError, match=r"3 of the latest 5 updates.*good update was 3.*toy:4"):
        train(config(max_skipped=3), tmp_path)
    metrics = lines(tmp_path / METRICS)
    assert [line["applied"] for line in metrics] == [1, 0, 1, 0, 0]
    assert metrics[1]["total"] is None
    words = (tmp_path / LOG).read_text()
    assert "update 2 was skipped (loss nan, gradient norm 2); its pictures: toy:1" in words
    assert "stopped: 3 of the latest 5" in words
    assert saved(tmp_path)[0] == 2


def test_a_few_bad_updates_do_not_stop_it(toy, tmp_path):
    toy(bad={1, 3})
    assert train(config(max_skipped=3), tmp_path).updates == 6


def test_when_data_vanish_what_was_done_is_saved(toy, tmp_path):
    toy(vanish=3)
    with pytest.raises(DataError, match=r"pictures/7\.jpg"):
        train(config(), tmp_path)
    assert saved(tmp_path) == [2, 3]
    assert "stopped: pictures/7.jpg" in (tmp_path / LOG).read_text()
    toy()
    assert train(config(), tmp_path).updates == 6


def full_disk(monkeypatch, steps):
    """Writing the checkpoints of these steps fails as on a full disk."""
    import orbax.checkpoint as ocp

    write = ocp.CheckpointManager.save

    def save(self, step, *args, **options):
        if step in steps:
            raise OSError(errno.ENOSPC, "No space left on device")
        return write(self, step, *args, **options)

    monkeypatch.setattr(ocp.CheckpointManager, "save", save)


def test_a_disk_that_is_full_for_a_while_costs_the_checkpoint_that_was_being_written(
    toy, tmp_path, monkeypatch
):
    from orbax.checkpoint._src.path import atomicity

    whole, failed = atomicity.AtomicRenameTemporaryPath.finalize, []

    async def finalize(self):  # the last thing that happens in the background
        if "4.orbax" in str(self.get()):
            failed.append(str(self.get()))
            raise OSError(errno.ENOSPC, "No space left on device")
        return await whole(self)

    monkeypatch.setattr(atomicity.AtomicRenameTemporaryPath, "finalize", finalize)
    toy(at=lambda number: number == 5 and time.sleep(1))  # the loop sees how it stands, and goes on
    assert train(config(updates=8, keep=5), tmp_path).updates == 8
    assert failed
    assert saved(tmp_path) == [2, 6, 8]
    assert not list((tmp_path / FOLDER).glob("*tmp*"))
    (line,) = [x for x in (tmp_path / LOG).read_text().splitlines() if "could not be written" in x]
    assert "checkpoint after 4 updates" in line and "the disk is full" in line


def test_a_checkpoint_that_is_whole_stays_when_an_older_one_cannot_be_removed(toy, tmp_path, monkeypatch):
    import orbax.checkpoint as ocp

    toy()
    original, failed = ocp.CheckpointManager.wait_until_finished, []

    def wait(self):
        original(self)
        if 4 in self.all_steps() and not failed:
            failed.append(4)
            raise OSError(errno.EBUSY, "Device or resource busy")

    monkeypatch.setattr(ocp.CheckpointManager, "wait_until_finished", wait)
    assert train(config(keep=3), tmp_path).updates == 6
    assert saved(tmp_path) == [2, 4, 6]
    assert "after 4 updates is written, but an older one could not be removed" in (tmp_path / LOG).read_text()


def test_a_full_disk_costs_a_checkpoint_and_no_more(toy, tmp_path, monkeypatch):
    toy()
    full_disk(monkeypatch, {4})
    assert train(config(updates=8), tmp_path).updates == 8
    assert saved(tmp_path) == [6, 8]
    words = (tmp_path / LOG).read_text()
    assert "checkpoint after 4 updates could not be written" in words and "the disk is full" in words


def test_a_disk_that_is_full_at_the_end_is_an_error_and_what_was_saved_stays(toy, tmp_path, monkeypatch):
    toy()
    full_disk(monkeypatch, {6})
    with pytest.raises(CheckpointError, match=r"after 6 updates could not be saved.*is 4"):
        train(config(), tmp_path)
    assert saved(tmp_path) == [2, 4]
    monkeypatch.undo()


@pytest.mark.parametrize(
    ("others", "dtype", "words"),
    [
        ({"base": "sha256:bb"}, "bfloat16", "another base"),
        ({}, "float32", "dtype was"),
        ({"frozen": "cd"}, "bfloat16", r"toy are not those .* they were changed, or are damaged"),
    ],
)
def test_a_checkpoint_of_something_else_is_refused(others, dtype, words, toy, tmp_path):
    toy()
    train(config(), tmp_path)
    toy(**others)
    with pytest.raises(CheckpointError, match=words):
        train(config(dtype=dtype), tmp_path)


def test_a_setting_that_did_not_exist_then_counts_as_its_default(toy, tmp_path, monkeypatch):
    trajectory = TrainConfig.trajectory

    def older(self):
        data = trajectory(self)
        del data["data"]["template"]
        return data

    toy()
    monkeypatch.setattr(TrainConfig, "trajectory", older)
    train(config(), tmp_path)
    monkeypatch.setattr(TrainConfig, "trajectory", trajectory)
    assert train(config(), tmp_path).updates == 6


def test_settings_that_change_no_parameter_may_change(toy, tmp_path):
    toy()
    train(config(updates=6), tmp_path)
    toy()
    again = config(every=1, keep=5, step=StepConfig(micro_batches=4, remat=False))
    assert train(again, tmp_path).updates == 6


def test_without_a_checkpoint_that_can_be_read_it_does_not_start_over(toy, tmp_path):
    toy()
    train(config(), tmp_path)
    for step in saved(tmp_path):
        for file in (tmp_path / FOLDER / str(step) / "meta").rglob("*"):
            if file.is_file():
                file.write_bytes(b"{")
    toy()
    with pytest.raises(CheckpointError, match=r"none of the checkpoints.*6: .*4: .*left as they were"):
        train(config(), tmp_path)
    assert saved(tmp_path) == [4, 6]


@pytest.mark.parametrize("error", [MemoryError(), PermissionError(13, "Permission denied")])
def test_what_cannot_be_read_now_does_not_count_as_damaged(error, toy, tmp_path, monkeypatch):
    def fail(*_):
        raise error

    toy()
    train(config(), tmp_path)
    toy()
    monkeypatch.setattr(checkpoint, "_load_leaves", fail)
    with pytest.raises(CheckpointError, match=r"after 6 updates.* cannot be read.*left as it was"):
        train(config(), tmp_path)
    assert saved(tmp_path) == [4, 6]
    assert not (tmp_path / "damaged").exists()


def test_what_is_saved_is_logged_before_the_next_update_begins(toy, tmp_path):
    found = {}

    def look(number):
        if number % 2 == 0:
            found[number] = [line["step"] for line in lines(tmp_path / METRICS)]

    toy(at=look)
    train(config(), tmp_path)
    assert found == {0: [], 2: [1, 2], 4: [1, 2, 3, 4]}


def test_a_run_that_is_refused_leaves_what_the_folder_says_of_its_own(toy, tmp_path):
    toy()
    train(config(), tmp_path)
    before = (tmp_path / "config.json").read_bytes()
    toy()
    with pytest.raises(CheckpointError, match="another configuration"):
        train(config(dtype="float32"), tmp_path)
    assert (tmp_path / "config.json").read_bytes() == before


def test_a_second_run_in_the_same_folder_is_refused(toy, tmp_path):
    toy()
    with only_writer(tmp_path, ValueError()), pytest.raises(ConfigError, match="another run is writing"):
        train(config(), tmp_path)
    assert not (tmp_path / FOLDER).exists()


def test_a_validation_without_the_score_costs_no_checkpoint(toy, tmp_path):
    toy(scores=[None, 0.5, None, None])
    train(config(updates=8, keep=1, best="giou", validate=2), tmp_path)
    assert saved(tmp_path) == [4, 8]


def test_told_to_stop_while_it_loads_it_ends_at_once(toy, tmp_path, monkeypatch, capsys):
    toy()
    prepare = loop.prepare

    def told(*args):
        os.kill(os.getpid(), signal.SIGTERM)
        return prepare(*args)

    monkeypatch.setattr(loop, "prepare", told)
    outcome = train(config(), tmp_path)
    assert (outcome.updates, outcome.stopped) == (0, True)
    assert "before the first update" in capsys.readouterr().err
    assert not (tmp_path / FOLDER).exists()


def test_told_to_stop_during_a_validation_it_saves_and_validates_when_it_goes_on(toy, tmp_path):
    def told(number):
        if number == 2:
            os.kill(os.getpid(), signal.SIGTERM)

    toy(scores=[0.1, 0.2, 0.3], during=told)
    outcome = train(config(updates=6, validate=2, keep=5), tmp_path)
    assert (outcome.updates, outcome.stopped) == (4, True)
    assert saved(tmp_path) == [2, 4]
    toy(scores=[0.2, 0.3])
    assert train(config(updates=6, validate=2, keep=5), tmp_path).updates == 6
    found = [line for line in lines(tmp_path / METRICS) if "validation" in line]
    scored = [(line["step"], line["validation"]["giou"]) for line in found]
    assert scored == [(2, 0.1), (4, 0.2), (6, 0.3)]


@pytest.mark.parametrize("stopped", [2, 3])
def test_the_best_checkpoint_may_be_one_that_was_stopped_in_its_validation(stopped, toy, tmp_path):
    def told(number):
        if number == stopped:
            os.kill(os.getpid(), signal.SIGTERM)

    scores = [0.9 if number == stopped else 0.1 for number in range(1, 4)]
    settings = config(updates=6, validate=2, keep=1, best="giou")
    toy(scores=scores, during=told)
    assert train(settings, tmp_path).stopped
    again = toy(scores=scores[stopped - 1 :])
    assert not train(settings, tmp_path).stopped
    assert scores_in(tmp_path / FOLDER, "giou")[2 * stopped] == 0.9
    toy(scores=[])
    assert train(settings, tmp_path).updates == 6  # there is nothing left to do
    validations = [line["step"] for line in lines(tmp_path / METRICS) if "validation" in line]
    assert validations == [2, 4, 6] and again.closed


def test_when_a_validation_fails_what_was_done_is_saved(toy, tmp_path):
    def broken(number):
        raise DataError("7 of 100 pictures could not be used")

    toy(scores=[0.1], during=broken)
    with pytest.raises(DataError, match="7 of 100"):
        train(config(validate=3), tmp_path)
    assert saved(tmp_path) == [2, 3]
    toy(scores=[0.1, 0.2])
    assert train(config(validate=3), tmp_path).updates == 6
    scored = [line["step"] for line in lines(tmp_path / METRICS) if "validation" in line]
    assert scored == [3, 6]


def test_pictures_that_cannot_be_used_are_told_and_counted(toy, tmp_path):
    toy(torn={2})
    train(config(), tmp_path)
    assert "update 3: toy:torn could not be used (it is cut short)" in (tmp_path / LOG).read_text()
    assert [line["unusable"] for line in lines(tmp_path / METRICS)] == [0, 0, 1, 0, 0, 0]


def test_speed_is_told_for_updates_before_a_validation_and_a_save_too(toy, tmp_path):
    toy(scores=[0.1] * 6)
    train(config(validate=1, every=1), tmp_path)
    trained = [line for line in lines(tmp_path / METRICS) if "validation" not in line]
    assert all(line["tokens_per_second"] > 0 for line in trained)


DAMAGE = {
    "cut": lambda file: file.write_bytes(file.read_bytes()[: file.stat().st_size // 2]),
    "gone": lambda file: file.unlink(),
    "zeroed": lambda file: file.write_bytes(bytes(file.stat().st_size)),
    "one bit": lambda file: file.write_bytes(file.read_bytes()[:-1] + bytes([file.read_bytes()[-1] ^ 1])),
}


@pytest.mark.filterwarnings("ignore::pytest.PytestUnraisableExceptionWarning")
@pytest.mark.parametrize("damage", DAMAGE)
@pytest.mark.parametrize("part", ["state", "meta"])
def test_a_damaged_checkpoint_gives_way_to_the_one_before(part, damage, toy, tmp_path):
    toy()
    train(config(), tmp_path)
    before = read_meta(tmp_path / FOLDER / "6")
    for file in list((tmp_path / FOLDER / "6" / part).rglob("*")):
        if file.is_file() and (part == "meta" or file.parent.name == "d"):  # where the values are
            DAMAGE[damage](file)
    toy()
    assert train(config(), tmp_path).updates == 6
    words = (tmp_path / LOG).read_text()
    assert "the checkpoint after 6 updates is damaged" in words
    assert "going on from the one before it, after 4 updates" in words
    assert read_meta(tmp_path / FOLDER / "6") == before
    assert (tmp_path / "damaged" / "6").is_dir()
    gc.collect()  # what Orbax leaves of a failed read complains here, where it is expected
    assert [line["step"] for line in lines(tmp_path / METRICS)] == [1, 2, 3, 4, 5, 6]


def test_a_run_that_is_over_is_left_as_it_is(toy, tmp_path):
    toy()
    train(config(), tmp_path)
    before = (tmp_path / METRICS).read_text()
    toy()
    assert train(config(), tmp_path).updates == 6
    assert (tmp_path / METRICS).read_text() == before
    assert saved(tmp_path) == [4, 6]
