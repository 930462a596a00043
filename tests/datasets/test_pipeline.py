"""Loaders: the same batches on any number of hosts and workers, restored exactly, ending cleanly."""

from __future__ import annotations

import json
import multiprocessing
import os
import shutil
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from read_jax.data.item import Query
from read_jax.data.loader import HostBatch
from read_jax.data.mixture import Mixture
from read_jax.data.pipeline import EvaluationLoader, TrainingLoader, evaluation_shares
from read_jax.data.recipes import Group
from read_jax.errors import DataError, DataWorkerError
from tests.datasets.in_memory import Pictures, chats, reasoning, referring, things, tiny_packer, vocabulary

PACKER = tiny_packer()


def mixture(seed: int = 0, **options) -> Mixture:
    sources = [referring(), reasoning(), vocabulary(), chats()]
    recipe = [Group(s.name, 1 + i, (s.name,)) for i, s in enumerate(sources)]
    return Mixture(recipe, {s.name: s for s in sources}, seed=seed, **options)


def loader(batch: int = 4, m: Mixture | None = None, **options) -> TrainingLoader:
    return TrainingLoader(m or mixture(), PACKER, batch, **options)


def take(batches, count: int) -> list[HostBatch]:
    return [next(batches) for _ in range(count)]


def leaves(tree) -> list[np.ndarray]:
    return [leaf for field in tree for leaf in (leaves(field) if isinstance(field, tuple) else [field])]


def assert_same(first: HostBatch, second: HostBatch) -> None:
    assert first.step == second.step and first.keys == second.keys and first.skipped == second.skipped
    for a, b in zip(leaves(first.arrays), leaves(second.arrays), strict=True):
        np.testing.assert_array_equal(a, b)


def assert_shares(shares: list[HostBatch], whole: HostBatch) -> None:
    """The hosts' shares, one after the other, are the global batch."""
    assert sum((share.keys for share in shares), ()) == whole.keys
    for field in range(len(leaves(whole.arrays))):
        together = np.concatenate([leaves(share.arrays)[field] for share in shares])
        np.testing.assert_array_equal(together, leaves(whole.arrays)[field])


@pytest.fixture(scope="module")
def uninterrupted() -> list[HostBatch]:
    """Ten steps of one host."""
    return take(loader(), 10)


# training


def test_step_s_holds_examples_s_times_g_and_following(uninterrupted):
    m = mixture()
    for s, batch in enumerate(uninterrupted):
        examples = [PACKER.pack(m[k]) for k in range(4 * s, 4 * s + 4)]
        assert batch.step == s and batch.keys == tuple(example.key for example in examples)
        for a, b in zip(leaves(batch.arrays), leaves(PACKER.batch(examples)), strict=True):
            np.testing.assert_array_equal(a, b)


@pytest.mark.parametrize("hosts", [1, 2, 4])
def test_hosts_share_every_step(uninterrupted, hosts):
    loaders = [loader(host_index=h, host_count=hosts) for h in range(hosts)]
    for whole in uninterrupted[:4]:
        assert_shares([next(one) for one in loaders], whole)


@pytest.mark.parametrize("step", [1, 3, 4, 7])
@pytest.mark.parametrize("hosts", [1, 2, 4])
def test_a_restored_run_goes_on_like_the_uninterrupted_one(uninterrupted, step, hosts):
    first = loader()
    take(first, step)
    state = json.loads(json.dumps(first.state()))
    loaders = [loader(host_index=h, host_count=hosts) for h in range(hosts)]
    for one in loaders:
        one.restore(state)
    for whole in uninterrupted[step : step + 3]:
        assert_shares([next(one) for one in loaders], whole)


def test_a_loader_can_be_set_back(uninterrupted):
    batches = loader()
    state = batches.state()
    take(batches, 3)
    batches.restore(state)
    assert_same(next(batches), uninterrupted[0])


@pytest.mark.parametrize("size", [1, 2, 4])
def test_the_size_of_a_workers_task_does_not_matter(uninterrupted, size):
    for whole, other in zip(uninterrupted[:2], take(loader(task_examples=size), 2), strict=True):
        assert_same(whole, other)


def test_workers_give_the_same_batches_and_a_state_of_what_was_handed_out(uninterrupted):
    with loader(workers=2, buffer=2, task_examples=2) as batches:
        for whole, other in zip(uninterrupted[:3], take(batches, 3), strict=True):
            assert_same(whole, other)
        state = batches.state()  # the workers are ahead by now
        assert state["step"] == 3
        resumed = loader()
        resumed.restore(state)
        assert_same(next(resumed), uninterrupted[3])
        batches.restore({**state, "step": 6})
        assert_same(next(batches), uninterrupted[6])
    assert not multiprocessing.active_children()


@pytest.mark.parametrize(
    ("other", "message"),
    [
        (lambda: loader(8), "global_batch was 4 and is 8"),
        (lambda: loader(m=mixture(seed=9)), "seed was 0 and is 9"),
        (lambda: loader(m=mixture(questions_per_image=2)), "questions_per_image was 3 and is 2"),
        (
            lambda: loader(
                m=Mixture([Group("g", 1, ("refcoco|train",))], {"refcoco|train": referring(count=9)})
            ),
            r"refcoco\|train/refcoco\|train was in the saved run and is not here",
        ),
    ],
)
def test_a_state_of_other_data_is_refused_with_what_differs(other, message):
    with pytest.raises(DataError, match=message):
        other().restore(loader().state())


@pytest.mark.parametrize("state", [{}, {"step": -1}, {"step": "3"}, [], None])
def test_what_is_no_state_is_refused(state):
    with pytest.raises(DataError, match="not the state of a data loader"):
        loader().restore(state)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"host_count": 3}, "cannot be shared evenly by 3"),
        ({"host_count": 2, "host_index": 2}, "no host 2 among 2"),
        ({"batch": 0}, "batch of 0"),
        ({"task_examples": 3}, "do not divide"),
        ({"workers": -1}, "workers"),
        ({"buffer": 0}, "buffer"),
        ({"m": mixture(questions_per_image=4)}, "up to 4 questions per picture, the batches hold 3"),
    ],
)
def test_arguments_out_of_range_are_errors(options, message):
    with pytest.raises(DataError, match=message):
        loader(**options)


# bad pictures


def damaged(bad: set[int], count: int = 100) -> Mixture:
    source = referring(count=count, bad=frozenset(bad))
    return Mixture([Group("g", 1, (source.name,))], {source.name: source})


def test_a_few_damaged_pictures_are_skipped_counted_and_listed():
    batches = loader(8, damaged({3, 50}))
    skipped = [one for batch in take(batches, 40) for one in batch.skipped]
    assert {one.key for one in skipped} == {"refcoco|train:p3", "refcoco|train:p50"}
    assert batches.skipped_count == len(skipped) == len(batches.skipped)
    assert "picture" in skipped[0].reason


def test_too_many_damaged_pictures_stop_the_run():
    batches = loader(8, damaged(set(range(20))))
    with pytest.raises(
        DataError, match=r"\d+ of 1\d\d pictures could not be used.*share of 0.05.*is damaged"
    ):
        take(batches, 40)


def test_the_allowed_share_can_be_raised():
    assert len(take(loader(8, damaged(set(range(20))), max_bad_share=0.5), 20)) == 20


def test_a_question_that_cannot_be_tokenised_is_dropped_and_told():
    source = Pictures("mine|train", 3, lambda i: (*things(1), Query("a </s> b")))
    m = Mixture([Group("g", 1, (source.name,))], {source.name: source})
    (batch,) = take(loader(2, m), 1)
    assert [one.key for one in batch.dropped] == list(batch.keys) and "</s>" in batch.dropped[0].reason


# workers


def test_an_error_in_a_worker_arrives_with_its_message():
    batches = loader(2, damaged(set(range(100))), workers=1)
    with pytest.raises(DataError, match=r"none of 64 pictures drawn from refcoco\|train.*is damaged"):
        next(batches)
    assert not multiprocessing.active_children()


@pytest.mark.timeout(120)
@pytest.mark.parametrize("seconds", [0, 2])
def test_a_worker_that_dies_is_told_and_the_loader_can_go_on(uninterrupted, seconds):
    with loader(workers=1) as batches:
        assert_same(next(batches), uninterrupted[0])
        (worker,) = multiprocessing.active_children()
        # as far ahead as it gets after a while, it must not be waiting in the midst of a message
        time.sleep(seconds)
        os.kill(worker.pid, signal.SIGKILL)
        with pytest.raises(DataWorkerError, match="died before batch"):
            take(batches, 20)  # those on their way arrive first
        step = batches.step
        assert step < len(uninterrupted)
        assert_same(next(batches), uninterrupted[step])


def test_too_little_shared_memory_is_told_before_workers_start(monkeypatch):
    monkeypatch.setattr(shutil, "disk_usage", lambda path: shutil._ntuple_diskusage(10, 10, 1000))
    with pytest.raises(DataError, match=r"/dev/shm has 0 MB free, but 2 workers need about"):
        next(loader(workers=2))


SCRIPT = """
import signal
signal.signal(signal.SIGINT, signal.default_int_handler)  # ignored where the tests run in the background
import time
from read_jax.data.mixture import Mixture
from read_jax.data.pipeline import TrainingLoader
from read_jax.data.recipes import Group
from tests.datasets.in_memory import referring, tiny_packer

if __name__ == "__main__":
    source = referring()
    mixture = Mixture([Group("g", 1, (source.name,))], {source.name: source})
    batches = TrainingLoader(mixture, tiny_packer(), 32, workers=1)
    batch = next(batches)
    print("ready", flush=True)
    while input() != "end":
        batch = next(batches)
"""


def group_alive(group: int) -> bool:
    try:
        os.killpg(group, 0)
    except ProcessLookupError:
        return False
    return True


@pytest.fixture
def running(tmp_path) -> Iterator[subprocess.Popen[str]]:
    """A script in a session of its own, that has got its first batch from a worker."""
    script = tmp_path / "script.py"
    script.write_text(SCRIPT)
    process = subprocess.Popen(
        [sys.executable, script],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        env={**os.environ, "PYTHONPATH": str(Path(__file__).parents[2])},
        text=True,
        start_new_session=True,
    )
    patience = threading.Timer(120, os.killpg, (process.pid, signal.SIGKILL))  # ends the wait for a line
    patience.start()
    try:
        assert process.stdout is not None and process.stdout.readline() == "ready\n"
        patience.cancel()
        yield process
    finally:
        patience.cancel()
        if group_alive(process.pid):
            os.killpg(process.pid, signal.SIGKILL)


def wait_for_all(process: subprocess.Popen[str], say: str = "") -> str:
    """Standard error, once the script and its workers are gone."""
    _, errors = process.communicate(say, timeout=60)
    deadline = time.monotonic() + 30
    while group_alive(process.pid) and time.monotonic() < deadline:
        time.sleep(0.1)
    assert not group_alive(process.pid)
    return errors


def test_ctrl_c_ends_the_workers_and_only_the_main_process_tells(running):
    os.killpg(running.pid, signal.SIGINT)  # as a terminal does: to every process
    assert wait_for_all(running).count("KeyboardInterrupt") == 1


def test_workers_do_not_outlive_a_killed_main_process(running):
    running.kill()
    wait_for_all(running)


def test_a_script_that_ends_without_closing_ends_without_a_word(running):
    assert wait_for_all(running, "on\nend\n") == "" and running.returncode == 0


# evaluation


@given(st.integers(0, 50), st.integers(1, 6), st.integers(1, 4))
def test_evaluation_shares_cover_every_place_once(length, per_host, hosts):
    shares = [evaluation_shares(length, per_host * hosts, h, hosts) for h in range(hosts)]
    assert len({share.shape for share in shares}) == 1
    steps = np.stack(shares, axis=1).reshape(-1)
    assert steps[:length].tolist() == list(range(length))
    assert (steps[length:] == -1).all() and len(steps) - length < per_host * hosts


def test_an_evaluation_batch_that_hosts_cannot_share_is_an_error():
    with pytest.raises(DataError, match="cannot be shared evenly"):
        evaluation_shares(10, 4, 0, 3)


def several(count: int = 7, **options) -> Pictures:
    """Pictures with 0, 1, 2, ... questions; a batch holds 3."""
    return Pictures("refcoco|val", count, lambda i: things(i, i), **options)


def asked(batches: list[HostBatch]) -> list[tuple[str, list[int]]]:
    """(key, ids) of every question of the batches."""
    out = []
    for batch in batches:
        for i, key in enumerate(batch.keys):
            lengths = batch.arrays.lengths[i]
            rows = [batch.arrays.question_ids[i, j, :n].tolist() for j, n in enumerate(lengths) if n]
            assert batch.arrays.valid[i] == bool(rows) == bool(key)
            out += [(key.partition("#")[0], row) for row in rows]
    return out


@pytest.mark.parametrize("hosts", [1, 2, 4])
def test_every_question_is_evaluated_exactly_once_over_the_hosts(hosts):
    source = several()
    loaders = [EvaluationLoader(source, PACKER, 4, host_index=h, host_count=hosts) for h in range(hosts)]
    steps = [list(one) for one in loaders]
    assert len({len(one) for one in steps}) == 1 and len(steps[0]) == len(loaders[0])
    in_order = [share for step in zip(*steps, strict=True) for share in step]
    wanted = [
        (f"refcoco|val:p{i}", f"thing {i}-{j}")
        for i in range(len(source))
        for j in range(len(source[i].queries))
    ]
    got = [(key, PACKER.tokenizer.decode(ids)) for key, ids in asked(in_order)]
    assert [key for key, _ in got] == [key for key, _ in wanted]
    assert all(phrase in text for (_, text), (_, phrase) in zip(got, wanted, strict=True))


def test_an_evaluation_can_be_resumed_on_another_number_of_hosts():
    whole = list(EvaluationLoader(several(), PACKER, 2))
    first = EvaluationLoader(several(), PACKER, 2)
    take(first, 2)
    state = json.loads(json.dumps(first.state()))
    loaders = [EvaluationLoader(several(), PACKER, 2, host_index=h, host_count=2) for h in range(2)]
    for one in loaders:
        one.restore(state)
    for batch in whole[2:]:
        assert_shares([next(one) for one in loaders], batch)
    with pytest.raises(StopIteration):
        next(loaders[0])


def test_evaluation_with_workers_is_the_same():
    with EvaluationLoader(several(), PACKER, 2, workers=2) as batches:
        got = list(batches)
    whole = list(EvaluationLoader(several(), PACKER, 2))
    assert len(got) == len(whole)
    for one, other in zip(got, whole, strict=True):
        assert_same(one, other)


def test_a_damaged_picture_leaves_padding_in_evaluation():
    batches = EvaluationLoader(several(bad=frozenset({2})), PACKER, 3, max_bad_share=0.2)
    (first, *_) = list(batches)
    assert first.arrays.valid.tolist() == [True, False, True]
    assert [one.key for one in first.skipped] == ["refcoco|val:p2#0"] and batches.skipped_count == 1


def test_too_many_damaged_pictures_stop_an_evaluation():
    with pytest.raises(DataError, match=r"2 of 9 pictures could not be used.*share of 0.2"):
        list(EvaluationLoader(several(bad=frozenset({1, 2})), PACKER, 3, max_bad_share=0.2))


def test_what_could_not_be_used_is_counted_anew_in_every_evaluation():
    batches = EvaluationLoader(several(bad=frozenset({2})), PACKER, 3, max_bad_share=0.2)
    start = batches.state()
    for _ in range(4):
        batches.restore(start)
        assert len(list(batches)) == len(batches)
        assert batches.skipped_count == 1


def test_a_state_of_another_source_is_refused():
    state = EvaluationLoader(several(), PACKER, 2).state()
    with pytest.raises(DataError, match="pictures was 7 and is 6"):
        EvaluationLoader(several(6), PACKER, 2).restore(state)
