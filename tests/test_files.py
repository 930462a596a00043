"""Files are there whole or not at all, and a folder has one writer."""

from __future__ import annotations

import errno
import fcntl
import os

import pytest

from read_jax.files import only_writer, write_file


def test_a_file_is_replaced_and_nothing_stays_beside_it(tmp_path):
    path = tmp_path / "a.txt"
    write_file(path, b"one")
    write_file(path, b"two")
    assert path.read_bytes() == b"two" and list(tmp_path.iterdir()) == [path]


def test_a_write_that_fails_leaves_the_earlier_file(tmp_path, monkeypatch):
    path = tmp_path / "a.txt"
    write_file(path, b"one")

    def full(_):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(os, "fsync", full)
    with pytest.raises(OSError, match="No space"):
        write_file(path, b"two")
    assert path.read_bytes() == b"one" and list(tmp_path.iterdir()) == [path]


def test_a_folder_has_one_writer_at_a_time(tmp_path):
    folder = tmp_path / "new"
    with only_writer(folder, ValueError("busy")), pytest.raises(ValueError, match="busy"):
        only_writer(folder, ValueError("busy")).__enter__()
    with only_writer(folder, ValueError("busy")):
        pass


def test_where_there_are_no_locks_nobody_is_kept_out(tmp_path, monkeypatch):
    def unknown(*_):
        raise OSError(errno.ENOLCK, "No locks available")

    monkeypatch.setattr(fcntl, "flock", unknown)
    with only_writer(tmp_path, ValueError("busy")):
        pass
