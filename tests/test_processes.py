"""Two real processes of four devices each do what one process does; when one of them dies the job ends.

By default two evaluate; `pytest -m slow tests/test_processes.py` has two train, and kills them.
"""

from __future__ import annotations

import functools
import json
import re
import socket
from pathlib import Path

import jax
import numpy as np
import pytest
from jax.sharding import NamedSharding, PartitionSpec
from PIL import Image

from read_jax.errors import AGAIN, ConfigError, ReadJaxError
from read_jax.files import only_writer
from read_jax.planning.chips import topology_devices
from read_jax.processes import Share, batch_shares, from_equals, from_shares, join, own_rows
from read_jax.sharding import MeshConfig, batch_sharding, make_mesh
from read_jax.training.checkpoint import FOLDER
from read_jax.training.config import load_config
from read_jax.training.logs import METRICS
from read_jax.training.run import base_model, make_mixture
from read_jax.weights.checkpoint import BUNDLED_MODELS
from tests.training.tiny_run import PATIENCE, Command, Process, lines, results, write_recipe

UPDATES, EVERY = 20, 10
WITHOUT_MASKS = ("losses.bce=0.0", "losses.dice=0.0")  # most of what there is to compile
VALIDATED = (
    "validation.dataset=scenes|val",
    f"validation.every={EVERY}",
    "validation.limit=11",
    "validation.pictures=6",  # three of them are prepared by the second process
)
MINUTE = 60


class Jobs:
    """Jobs of one recipe from one new model, and evaluations; each in a folder of its own."""

    def __init__(self, folder):
        self.folder, self.recipe = folder, write_recipe(folder)
        self._started = []

    @functools.cached_property
    def _changes(self):
        config = load_config(str(self.recipe))
        model, _ = base_model(config, make_mixture(config.data), self.folder)
        return (
            f"start.model={model}",
            "start.scratch=None",
            "step.micro_batches=1",
            f"optimizer.total_updates={UPDATES}",
            f"checkpoints.every={EVERY}",
        )

    def train(self, name, *changes, processes=2):
        """The processes of a run of eight devices that was just started, or started again."""
        return self._start(
            processes,
            lambda job: Process(
                self.recipe,
                self.folder / name,
                self.folder / "cache",
                *self._changes,
                *changes,
                devices=8 // processes,
                job=job,
            ),
        )

    def evaluate(self, name, *options, processes=2, devices=1):
        """The processes of an evaluation."""
        arguments = ["evaluate", str(BUNDLED_MODELS / "nano"), "--dataset", "scenes|val", *options]
        arguments += ["--output", str(self.folder / name)]
        words = [self.folder / f"{name}.{process}.stderr" for process in range(processes)]
        return self._start(
            processes,
            lambda job: Command(
                arguments, words[job[2] if job else 0], self.folder / "cache", devices=devices, job=job
            ),
        )

    def _start(self, processes, make):
        with socket.socket() as free:
            free.bind(("localhost", 0))
            port = free.getsockname()[1]
        jobs = [(port, processes, process) for process in range(processes)] if processes > 1 else [None]
        started = [make(job) for job in jobs]
        self._started += started
        return started

    def stop(self):
        for process in self._started:
            process.stop()


@pytest.fixture(scope="module")
def jobs(tmp_path_factory):
    made = Jobs(tmp_path_factory.mktemp("jobs"))
    yield made
    made.stop()


def finish(processes):
    for process in processes:
        process.finish()


def scores(folder):
    summary = json.loads((folder / "summary.json").read_text())
    return {name: summary[name] for name in ("counts", "intervals", "overall", "groups", "iou")}


def assert_like_one_process(several, one):
    """Losses and pictures of a run, of which `several` processes made at least the beginning."""
    ours, theirs = results(several), results(one)
    assert [line["step"] for line in ours["metrics"]] == [line["step"] for line in theirs["metrics"]]
    for line, wanted in zip(ours["metrics"], theirs["metrics"], strict=True):
        if "validation" in wanted:
            assert line["validation"] == pytest.approx(wanted["validation"], rel=1e-4), line["step"]
            continue
        for key in ("total", "ce", "bce", "dice", "gradient_norm", "parameter_norm"):
            assert line[key] == pytest.approx(wanted[key], rel=1e-5), (line["step"], key)
    others = {line["step"]: line["examples"] for line in lines(several / "examples-00001.jsonl")}
    assert others
    for line, wanted in zip(ours["examples"], theirs["examples"], strict=True):
        alone = len(line["examples"]) == len(wanted["examples"])  # after it went on as one process
        assert line["examples"] + ([] if alone else others[line["step"]]) == wanted["examples"]


@pytest.mark.slow
def test_a_job_of_which_one_process_dies_ends_and_goes_on_as_one_process_to_the_same_end(jobs):
    finish(jobs.train("one", *WITHOUT_MASKS, processes=1))
    workdir = jobs.folder / "two"
    first, second = jobs.train("two", *WITHOUT_MASKS)
    first.wait_for(lambda: (workdir / FOLDER / str(EVERY) / "meta").exists())
    second.kill()
    assert first.end(MINUTE) not in (0, 1, 2, AGAIN)  # whoever started them begins them again
    assert "distributed service detected fatal errors" in first.said()
    (alone,) = jobs.train("two", *WITHOUT_MASKS, processes=1)
    alone.finish()
    assert "going on after" in alone.said()
    assert_like_one_process(workdir, jobs.folder / "one")


@pytest.mark.slow
def test_masks_and_all_two_processes_train_as_one(jobs):
    finish(jobs.train("one-whole", *VALIDATED, processes=1))
    finish(jobs.train("two-whole", *VALIDATED))
    assert_like_one_process(jobs.folder / "two-whole", jobs.folder / "one-whole")
    drawn = {run: sorted((jobs.folder / run).glob("pictures/**/*.png")) for run in ("one-whole", "two-whole")}
    ours, theirs = ([np.asarray(Image.open(path), np.float32) for path in paths] for paths in drawn.values())
    assert len(ours) == len(theirs) == 6 * UPDATES // EVERY
    assert [path.name for path in drawn["one-whole"]] == [path.name for path in drawn["two-whole"]]
    for picture, wanted in zip(ours, theirs, strict=True):
        assert np.mean(picture != wanted) < 0.01  # here and there a pixel at the edge of a mask


@pytest.mark.slow
@pytest.mark.parametrize("dies", [0, 1])
def test_it_goes_on_as_two_processes_to_the_last_bit(jobs, dies):
    finish(jobs.train("whole"))
    workdir = jobs.folder / f"dies-{dies}"
    processes = jobs.train(workdir.name)
    processes[0].wait_for(lambda: (workdir / FOLDER / str(EVERY) / "meta").exists())
    processes[dies].kill()
    assert processes[1 - dies].end(MINUTE) != 0
    finish(jobs.train(workdir.name))
    assert results(workdir) == results(jobs.folder / "whole")


@pytest.mark.slow
def test_one_that_is_told_to_stop_stops_all_and_they_go_on(jobs):
    workdir = jobs.folder / "told"
    first, second = jobs.train("told", "optimizer.total_updates=400", "checkpoints.every=1000")
    first.wait_for(lambda: len(lines(workdir / METRICS)) >= 3)
    assert second.terminate() == AGAIN, second.said()
    assert first.end() == AGAIN, first.said()
    assert "told to stop: saved after" in first.said()
    assert [int(folder.name) for folder in (workdir / FOLDER).iterdir()] == [len(lines(workdir / METRICS))]


@pytest.mark.slow
def test_one_that_is_alone_with_an_error_ends_with_it_and_the_others_within_a_minute(jobs):
    with only_writer(jobs.folder / "busy", ValueError()):  # which the first process alone finds out
        first, second = jobs.train("busy")
        assert first.end() == 1
        assert "another run is writing" in first.said()
        assert second.end(MINUTE) not in (0, AGAIN)


def test_where_nobody_listens_is_said(capsys):
    with socket.socket() as free:
        free.bind(("localhost", 0))
        address = f"localhost:{free.getsockname()[1]}"
        with pytest.raises(ReadJaxError, match=f"nobody listens at {address} after 1 s"):
            join(address, 2, 1, wait=1)
    assert f"waiting at most 1 s for 2 processes at {address}" in capsys.readouterr().err


@pytest.mark.timeout(3 * PATIENCE)
@pytest.mark.parametrize("mode", ["generate", pytest.param("forced", marks=pytest.mark.slow)])
def test_an_evaluation_shared_by_two_gives_the_scores_and_texts_of_one(jobs, mode):
    options = ("--limit", "6", "--mode", mode)
    finish(jobs.evaluate(f"one-{mode}", *options, processes=1))
    finish(jobs.evaluate(f"two-{mode}", *options))
    one, two = jobs.folder / f"one-{mode}", jobs.folder / f"two-{mode}"
    shares = [lines(two / f"answers-0000{process}.jsonl")[1:] for process in range(2)]
    assert [len(share) for share in shares] == [3, 3]
    answers = sorted(shares[0] + shares[1], key=lambda record: record["index"])
    assert answers == sorted(lines(one / "answers-00000.jsonl")[1:], key=lambda record: record["index"])
    assert scores(one) == scores(two)


@pytest.mark.slow
def test_copies_of_a_model_that_devices_share_give_the_answers_of_one(jobs):
    options = ("--limit", "5", "--mode", "generate", "--devices", "2")
    finish(jobs.evaluate("copy", *options, "--copies", "1", processes=1, devices=2))
    finish(jobs.evaluate("copies", *options, processes=1, devices=4))  # two, as many as there can be
    copy, copies = (lines(jobs.folder / name / "answers-00000.jsonl") for name in ("copy", "copies"))
    assert copies[0]["environment"]["copies_per_host"] == 2
    assert copies[1:] == copy[1:]


@pytest.mark.timeout(3 * PATIENCE)
def test_devices_that_share_a_model_answer_as_one(jobs, tmp_path):
    questions = ["the wheel above the blue lamp", "Which of these could roll away?", "the red ball"]
    results = []
    for devices in (1, 4):
        out = tmp_path / str(devices)
        arguments = [
            "segment",
            str(BUNDLED_MODELS / "nano"),
            str(Path(__file__).parent / "data" / "drawn.png"),
            "--output",
            str(out),
        ]
        arguments += [part for question in questions for part in ("--prompt", question)]
        arguments += ["--devices", str(devices)]
        process = Command(arguments, tmp_path / f"{devices}.stderr", jobs.folder / "cache", devices=devices)
        process.finish()
        results.append(json.loads((out / "result.json").read_text()))
    one, four = (result["results"] for result in results)
    assert len(one) == len(questions)
    assert any(answer["present"] for answer in one)
    for ours, theirs in zip(four, one, strict=True):
        assert (ours["text"], ours["present"]) == (theirs["text"], theirs["present"])
        assert np.array(ours["points"]) == pytest.approx(np.array(theirs["points"]), abs=0.01)
        assert ours["point_labels"] == theirs["point_labels"]


@pytest.mark.slow
@pytest.mark.parametrize("dies", [0, 1])
def test_an_evaluation_of_which_one_process_dies_ends_and_goes_on(jobs, dies):
    options = ("--limit", "60", "--mode", "generate")
    if not (jobs.folder / "undisturbed").exists():
        finish(jobs.evaluate("undisturbed", *options, processes=1))
    folder = jobs.folder / f"disturbed-{dies}"
    processes = jobs.evaluate(folder.name, *options)
    processes[0].wait_for(lambda: len(lines(folder / "answers-00001.jsonl")) > 3)
    processes[dies].kill()
    left = processes[1 - dies]
    assert left.end(MINUTE) not in (0, 1, 2, AGAIN)  # whoever started them begins them again
    # where it waits for the other it says so itself; elsewhere JAX ends it
    assert re.search("another process of this job|distributed service detected fatal", left.said())
    finish(jobs.evaluate(folder.name, *options))
    assert scores(jobs.folder / "undisturbed") == scores(folder)


@pytest.mark.parametrize(
    "given", [("localhost:1", None, None), (None, 2, 0), ("localhost:1", 2, None)], ids=str
)
def test_half_of_what_finds_the_others_is_refused(given):
    with pytest.raises(ConfigError, match="together, or none"):
        join(*given)


@pytest.mark.parametrize("process", [0, 1])
@pytest.mark.parametrize(
    "address", ["foo", "localhost:", ":80", "localhost:0", "localhost:99999", "http://h:80"]
)
def test_what_is_no_address_is_refused_before_anybody_waits(address, process, capsys):
    with pytest.raises(ConfigError, match="must be HOST:PORT with a port from 1 to 65535"):
        join(address, 2, process)
    assert "waiting" not in capsys.readouterr().err


def test_a_number_beyond_the_processes_is_refused():
    with pytest.raises(ConfigError, match="no process 2 among 2"):
        join("localhost:1", 2, 2)


def test_a_machine_of_no_cluster_is_told_what_to_give(tmp_path):
    arguments = [
        "evaluate",
        "nano",
        "--dataset",
        "scenes|val",
        "--output",
        str(tmp_path / "out"),
        "--distributed",
    ]
    process = Command(arguments, tmp_path / "stderr", tmp_path / "cache")
    assert process.end() == 1
    assert "part of no cluster" in process.said() and "--coordinator HOST:PORT" in process.said()


def test_one_process_has_the_whole_batch():
    mesh = make_mesh(MeshConfig(), jax.devices()[:1])
    assert batch_shares(batch_sharding(mesh)) == {0: Share(0, 1, (0,), 1)}


def test_rows_of_a_share_go_to_its_own_places_in_the_batch():
    share, rows = Share(1, 2, (1, 2), 4), np.array([[10], [11], [12], [13]])
    np.testing.assert_array_equal(own_rows(share, rows, (slice(2, 4), slice(None))), [[10], [11]])
    np.testing.assert_array_equal(own_rows(share, rows, (slice(4, 6), slice(None))), [[12], [13]])


@pytest.mark.parametrize(
    ("topology", "mesh"),
    [
        ("v5e:4x4", MeshConfig(fsdp=16)),
        ("v5e:4x4", MeshConfig(fsdp=4)),
        ("v5e:4x4", MeshConfig(fsdp=4, tensor=4)),
        ("v5e:4x4", MeshConfig(fsdp=2, tensor=8)),
        ("v6e:4x4", MeshConfig(fsdp=16)),
        ("v5p:2x2x4", MeshConfig(fsdp=16)),
        ("v5e:16x16", MeshConfig(fsdp=16)),
        ("v5e:4x4", MeshConfig(fsdp=16, slices=2)),
    ],
    ids=str,
)
def test_the_machines_of_a_pod_make_every_picture_once(topology, mesh, compiler):
    devices = topology_devices(topology, mesh.slices)
    place = batch_sharding(make_mesh(mesh, devices))
    shares = batch_shares(place)
    assert set(shares) == {device.process_index for device in devices}
    of, count = shares[0].of, shares[0].count
    made = {share.index: share.blocks for share in shares.values()}  # equal ones are made more than once
    assert sorted(made) == list(range(count))
    assert sorted(block for blocks in made.values() for block in blocks) == list(range(of))
    # two pictures for every block: each device finds its own among those of its process
    for device, index in place.devices_indices_map((2 * of,)).items():
        share = shares[device.process_index]
        pictures = np.array([(share.index, k) for k in range(2 * len(share.blocks))])
        assert own_rows(share, pictures, index).shape == (2, 2)


def test_on_one_process_arrays_only_move():
    mesh = make_mesh(MeshConfig(), jax.devices()[:1])
    place, whole = batch_sharding(mesh), NamedSharding(mesh, PartitionSpec())
    tree = {"a": np.arange(8.0), "b": np.ones((8, 2))}
    for moved in (
        from_shares(place, tree),
        from_equals(whole, tree),
        from_equals({"a": place, "b": whole}, tree),
    ):
        for name, value in tree.items():
            np.testing.assert_array_equal(moved[name], value)
