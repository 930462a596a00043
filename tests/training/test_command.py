"""`read-jax train` and `read-jax merge`: arguments, and errors in plain words."""

from __future__ import annotations

import pytest

from read_jax.cli import main


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (["--config", "read_7b"], "there is no recipe read_7b. Did you mean read_7b_"),
        (["--config", "read_7b_reasonseg", "--config.losses.dise=4"], "nearest known key is 'dice'"),
        (["--config=read_7b_reasonseg", "--config.updates=soon"], "config.updates must be int or None"),
        (["--config", "read_7b_reasonseg", "--config.start.model="], "start names no model folder"),
        (["--config", "read_7b_reasonseg", "--config.data.data_dir=/no/such"], "/no/such"),
        (
            ["--config", "read_7b_reasonseg:runlocal", "--config.data.global_batch=5"],
            "5 pictures cannot be cut into 2",
        ),
    ],
)
def test_what_is_wrong_is_said_in_one_line(arguments, words, tmp_path, capsys):
    scenes = ["--config.data.mixture=", "--config.data.rates={'scenes|train': 1}"]
    extra = scenes if "start.model" in arguments[-1] else []
    assert main(["train", *arguments, *extra, "--workdir", str(tmp_path / "run")]) == 1
    said = capsys.readouterr().err
    *before, error = said.splitlines()
    assert words in error and error.startswith("read-jax: error: ")
    assert set(before) <= {"opening the data and loading the model ..."}  # no stack, nothing said twice


def test_a_change_that_is_no_option_is_refused(tmp_path, capsys):
    with pytest.raises(SystemExit):
        main(["train", "--config", "x", "--workdir", str(tmp_path), "--confg.updates=1"])
    assert "--confg.updates=1" in capsys.readouterr().err


def test_a_folder_without_a_run_has_nothing_to_merge(tmp_path, capsys):
    assert main(["merge", str(tmp_path), "--output", str(tmp_path / "model")]) == 1
    assert "holds no checkpoint at all" in capsys.readouterr().err
