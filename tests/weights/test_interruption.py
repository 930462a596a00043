"""Outputs appear whole or not at all, whatever happens."""

from __future__ import annotations

import errno
import json
import os
import shutil
import signal
import subprocess
import sys

import pytest

from read_jax.errors import CheckpointError
from read_jax.weights import convert, export, folders, load_record, store
from tests.weights.synthetic import differences, read_state, write_clip, write_read_checkpoint


@pytest.fixture(scope="module")
def sources(tmp_path_factory):
    root = tmp_path_factory.mktemp("sources")
    return write_read_checkpoint(root / "x"), write_clip(root / "clip")


@pytest.fixture(scope="module")
def model(sources, tmp_path_factory):
    folder = tmp_path_factory.mktemp("models") / "model"
    convert(*sources, folder, sasp="off")
    return folder


def stop_after(count, error):
    """A progress callback that raises in the middle."""
    calls = []

    def progress(done, total, what):
        calls.append(what)
        if len(calls) == count:
            raise error

    return progress


@pytest.mark.parametrize("error", [KeyboardInterrupt(), RuntimeError("boom"), SystemExit(1)])
def test_an_interrupted_conversion_leaves_nothing_and_can_be_run_again(sources, model, tmp_path, error):
    with pytest.raises(type(error)):
        convert(*sources, tmp_path / "out", sasp="off", progress=stop_after(40, error))
    assert list(tmp_path.iterdir()) == []
    again = convert(*sources, tmp_path / "out", sasp="off")
    assert again.fingerprint == load_record(model).fingerprint


CONVERT = """
import os, signal, sys
from read_jax.weights import convert
def progress(done, total, what):
    if done > total // 2:
        os.kill(os.getpid(), int(sys.argv[4]))
convert(sys.argv[1], sys.argv[2], sys.argv[3], sasp="off", progress=progress)
"""


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGKILL])
def test_a_killed_conversion_never_shows_as_an_output(sources, tmp_path, number):
    command = [sys.executable, "-c", CONVERT, *map(str, sources), str(tmp_path / "out"), str(int(number))]
    done = subprocess.run(command, check=False, capture_output=True, timeout=120)
    assert done.returncode == (-number if number == signal.SIGKILL else 128 + number), done.stderr
    assert not (tmp_path / "out").exists()
    left = list(tmp_path.iterdir())
    assert len(left) == (1 if number == signal.SIGKILL else 0)  # a hard kill cannot clean up ...
    convert(*sources, tmp_path / "out", sasp="off")
    assert [p.name for p in tmp_path.iterdir()] == ["out"]  # ... so the next run does


def test_leftovers_of_other_outputs_are_not_touched(sources, tmp_path):
    other = tmp_path / ".other.read-jax-partial-1234"
    other.mkdir()
    convert(*sources, tmp_path / "out", sasp="off")
    assert other.exists()


def test_two_runs_into_one_output_do_not_meet(sources, tmp_path):
    with (
        folders.atomic_folder(tmp_path / "out"),
        pytest.raises(CheckpointError, match="another run is writing"),
    ):
        convert(*sources, tmp_path / "out", sasp="off")


def test_an_output_moved_aside_by_a_killed_run_comes_back(tmp_path):
    (tmp_path / ".out.read-jax-old-1").mkdir()
    (tmp_path / ".out.read-jax-old-1" / "file").write_text("kept")
    folders.clean_leftovers(tmp_path / "out")
    assert (tmp_path / "out" / "file").read_text() == "kept"


@pytest.fixture
def full_disk(monkeypatch):
    """The 60th file of a run does not fit any more."""
    write, calls = store.write_bytes, []

    def failing(path, data):
        calls.append(path)
        if len(calls) >= 60:
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC), str(path))
        write(path, data)

    monkeypatch.setattr(store, "write_bytes", failing)


def test_a_disk_that_fills_up_is_reported_and_cleaned(sources, tmp_path, full_disk):
    with pytest.raises(CheckpointError, match="became full"):
        convert(*sources, tmp_path / "out", sasp="off")
    assert list(tmp_path.iterdir()) == []


def test_a_real_full_disk_is_reported_and_cleaned(sources, tmp_path, monkeypatch):
    small = tmp_path / "small"
    small.mkdir()
    mount = ["mount", "-t", "tmpfs", "-o", "size=512k", "tmpfs", str(small)]
    if shutil.which("mount") is None or subprocess.run(mount, capture_output=True, timeout=60).returncode:
        pytest.skip("mounting a small tmpfs needs privileges that this user lacks")
    try:
        with pytest.raises(CheckpointError, match="not enough space"):
            convert(*sources, small / "out", sasp="off")
        from read_jax.weights.convert import convert as function

        monkeypatch.setitem(function.__globals__, "check_space", lambda output, needed: None)
        with pytest.raises(CheckpointError, match="became full"):
            convert(*sources, small / "out", sasp="off")
        assert list(small.iterdir()) == []
    finally:
        subprocess.run(["umount", str(small)], check=True, timeout=60)


def test_too_small_a_disk_is_refused_before_any_work(sources, tmp_path, monkeypatch):
    usage = shutil.disk_usage(tmp_path)
    monkeypatch.setattr(shutil, "disk_usage", lambda path: usage._replace(free=1000))
    with pytest.raises(CheckpointError, match=r"not enough space .* needed, 0\.0 GB free"):
        convert(*sources, tmp_path / "out", sasp="off")
    assert list(tmp_path.iterdir()) == []


def test_an_existing_output_is_refused_without_overwrite(sources, model):
    before = {p: p.stat().st_mtime_ns for p in model.rglob("*")}
    with pytest.raises(CheckpointError, match="exists already"):
        convert(*sources, model, sasp="off")
    assert {p: p.stat().st_mtime_ns for p in model.rglob("*")} == before


def test_overwriting_replaces_only_after_the_new_one_is_complete(sources, tmp_path):
    out = tmp_path / "out"
    first = convert(*sources, out, sasp="off")
    with pytest.raises(KeyboardInterrupt):
        convert(
            *sources,
            out,
            sasp="off",
            dtype="bfloat16",
            overwrite=True,
            progress=stop_after(50, KeyboardInterrupt()),
        )
    assert load_record(out).fingerprint == first.fingerprint
    convert(*sources, out, sasp="off", dtype="bfloat16", overwrite=True)
    assert load_record(out).dtype == "bfloat16"
    assert [p.name for p in tmp_path.iterdir()] == ["out"]


def test_an_output_that_cannot_be_created_is_refused(sources, tmp_path):
    (tmp_path / "file").write_text("")
    with pytest.raises(CheckpointError, match="cannot create"):
        convert(*sources, tmp_path / "file" / "out", sasp="off")


def test_overwrite_does_not_touch_a_folder_of_something_else(sources, tmp_path):
    out = tmp_path / "precious"
    out.mkdir()
    (out / "thesis.tex").write_text("years of work")
    with pytest.raises(CheckpointError, match="not a model folder"):
        convert(*sources, out, sasp="off", overwrite=True)
    assert (out / "thesis.tex").read_text() == "years of work"


@pytest.mark.parametrize("place", ["itself", "inside", "around"])
def test_an_output_that_overlaps_a_source_is_refused(sources, place):
    output = {"itself": sources[0], "inside": sources[0] / "new", "around": sources[0].parent}[place]
    with pytest.raises(CheckpointError, match="inside one another"):
        convert(*sources, output, sasp="off", overwrite=True)


class TestExport:
    def test_an_interrupted_export_leaves_nothing(self, model, tmp_path):
        with pytest.raises(KeyboardInterrupt):
            export(model, tmp_path / "y", max_shard_bytes=50_000, progress=stop_after(2, KeyboardInterrupt()))
        assert list(tmp_path.iterdir()) == []

    def test_an_existing_export_is_replaced_only_when_asked(self, sources, model, tmp_path):
        export(model, tmp_path / "y")
        with pytest.raises(CheckpointError, match="exists already"):
            export(model, tmp_path / "y")
        export(model, tmp_path / "y", overwrite=True, format="bin")
        assert not (tmp_path / "y" / "model.safetensors").exists()
        assert differences(read_state(sources[0]), read_state(tmp_path / "y")) == []

    def test_a_model_folder_is_not_overwritten_by_an_export(self, model, tmp_path):
        shutil.copytree(model, tmp_path / "other")
        with pytest.raises(CheckpointError, match="not a Hugging Face checkpoint"):
            export(model, tmp_path / "other", overwrite=True)

    @pytest.mark.parametrize(
        "options, message", [({"format": "gguf"}, "gguf"), ({"max_shard_bytes": 0}, "positive")]
    )
    def test_unusable_options_are_refused(self, model, tmp_path, options, message):
        with pytest.raises(CheckpointError, match=message):
            export(model, tmp_path / "y", **options)

    def test_a_full_disk_while_exporting_is_reported_and_cleaned(self, model, tmp_path, monkeypatch):
        def failing(path, data):
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC), str(path))

        monkeypatch.setattr(store, "write_bytes", failing)
        with pytest.raises(CheckpointError, match="became full"):
            export(model, tmp_path / "y")
        assert list(tmp_path.iterdir()) == []


def test_the_record_of_a_model_is_plain_json(model):
    data = json.loads((model / "config.json").read_text())
    assert data["format"] == 1 and set(data["config"]) >= {"llama", "clip", "sam", "sasp"}
