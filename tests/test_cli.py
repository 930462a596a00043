"""The `read-jax` command as a stranger would use and break it."""

from __future__ import annotations

import errno
import json
import os
import re
import shutil
import struct
import subprocess
import sys
import zlib

import numpy as np
import pytest
from PIL import Image

import read_jax
from read_jax import cli
from read_jax.images.masks import rle_to_mask
from read_jax.inference import output
from tests.inference.conftest import (  # noqa: F401 - fixtures
    model_folder,
    picture,
    scripted_sources,
    segmenter,
)

pytestmark = pytest.mark.usefixtures("compiled_quickly")
NONE, ONE, TWO = "find apples", "find 1 apple", "find 2 apples"


@pytest.fixture
def photo(tmp_path):
    path = tmp_path / "photo.png"
    Image.fromarray(picture(48, 64)).save(path)
    return path


@pytest.fixture
def ready(monkeypatch, segmenter):  # noqa: F811
    """The command gets the model that is loaded already."""
    monkeypatch.setattr(read_jax, "load", lambda folder, dtype=None, devices=1: segmenter)


@pytest.fixture
def unloaded(monkeypatch):
    """Loading the model fails the test: what is wrong must be found before."""
    monkeypatch.setattr(read_jax, "load", lambda *_, **__: pytest.fail("the model was loaded"))


def run_segment(model, *arguments):
    return cli.main(["segment", str(model), *map(str, arguments), "--max-new-tokens", "8"])


def assert_refused(status, capsys, out, *words):
    """Status 1, one plain line that holds the words, and no output folder."""
    error = capsys.readouterr().err
    assert status == 1
    assert re.fullmatch(r"read-jax: error: [^\n]+\n", error), error
    for word in words:
        assert word in error
    assert not out.exists()


def results_of(folder):
    """The entries of result.json, after checking that it and the folder list the same pictures."""
    entries = json.loads((folder / "result.json").read_text())["results"]
    listed = [name for entry in entries for name in entry["files"].values()]
    assert sorted([*listed, "result.json"]) == sorted(path.name for path in folder.iterdir())
    return entries


def png(width, height, data=b""):
    def chunk(kind, body):
        return struct.pack(">I", len(body)) + kind + body + struct.pack(">I", zlib.crc32(kind + body))

    header = chunk(b"IHDR", struct.pack(">IIBBBBB", width, height, 8, 2, 0, 0, 0))
    return b"\x89PNG\r\n\x1a\n" + header + chunk(b"IDAT", zlib.compress(data)) + chunk(b"IEND", b"")


def test_segment_writes_masks_pictures_and_result(ready, model_folder, photo, tmp_path, capsys):  # noqa: F811
    out = tmp_path / "out"
    prompts = ("--prompt", TWO, "--prompt", NONE, "--prompt", ONE)
    assert run_segment(model_folder, photo, *prompts, "--output", out) == 0
    two, none, one = results_of(out)
    assert [entry["text"] for entry in (two, none, one)] == ["a [SEG] a [SEG]", "a", "a [SEG]"]
    assert [entry["present"] for entry in (two, none, one)] == [True, False, True]
    assert set(two["files"]) == {"mask", "mask1", "mask2", "overlay", "similarity"}
    assert set(none["files"]) == {"mask", "overlay"}
    assert set(one["files"]) == {"mask", "overlay", "similarity"}
    for entry in (two, none, one):
        assert entry["image"] == str(photo)
        assert entry["size"] == [48, 64]
        assert len(entry["masks"]) == len(entry["points"]) == len(entry["point_labels"]) == len(entry["iou"])
        for name in entry["files"].values():
            assert Image.open(out / name).size == (64, 48)
    masks = [rle_to_mask(rle) for rle in two["masks"]]
    shown = [np.asarray(Image.open(out / two["files"][kind])) for kind in ("mask1", "mask2", "mask")]
    for pixels, mask in zip(shown, [*masks, masks[0] | masks[1]], strict=True):
        np.testing.assert_array_equal(pixels, np.where(mask, 255, 0))
    assert not np.asarray(Image.open(out / none["files"]["mask"])).any()
    document = json.loads((out / "result.json").read_text())
    assert document["read_jax"] == read_jax.__version__
    assert document["model"] == str(model_folder)
    assert document["settings"]["max_new_tokens"] == 8
    printed = capsys.readouterr().out
    for text in (str(photo), "a [SEG] a [SEG]", "2 masks", "1 mask:", str(out / "result.json")):
        assert text in printed


def test_the_smallest_and_the_thinnest_picture(ready, model_folder, tmp_path):  # noqa: F811
    paths = []
    for name, (height, width) in {"dot": (1, 1), "line": (10, 30000), "tower": (30000, 10)}.items():
        paths.append(tmp_path / f"{name}.png")
        Image.fromarray(picture(height, width)).save(paths[-1])
    assert run_segment(model_folder, *paths, "--prompt", ONE, "--output", tmp_path / "out") == 0
    for entry in results_of(tmp_path / "out"):
        assert rle_to_mask(entry["masks"][0]).shape == tuple(entry["size"])


def test_pictures_of_one_name_do_not_overwrite_each_other(ready, model_folder, tmp_path):  # noqa: F811
    paths = []
    for folder, name, width in (
        ("a", "x.png", 30),
        ("b", "x.png", 40),
        ("b", "X.jpg", 50),
        ("a", "x_1.png", 60),
    ):
        path = tmp_path / folder / name
        path.parent.mkdir(exist_ok=True)
        Image.fromarray(picture(20, width)).save(path)
        paths.append(path)
    out = tmp_path / "out"
    assert run_segment(model_folder, *paths, "--prompt", ONE, "--prompt", NONE, "--output", out) == 0
    entries = results_of(out)
    names = [name.casefold() for entry in entries for name in entry["files"].values()]
    assert len(names) == len(set(names))
    for entry in entries:
        assert Image.open(out / entry["files"]["mask"]).size == tuple(entry["size"][::-1])


def test_a_very_long_file_name(ready, model_folder, tmp_path):  # noqa: F811
    path = tmp_path / ("ä" * 120 + ".png")
    Image.fromarray(picture(20, 30)).save(path)
    assert run_segment(model_folder, path, "--prompt", ONE, "--output", tmp_path / "out") == 0
    assert results_of(tmp_path / "out")[0]["image"] == str(path)


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (["--prompt", ""], ["question is empty"]),
        (["--prompt", " \n"], ["question is empty"]),
        (["--prompt", ONE, "--prompt", "where is [SEG]?"], ["[SEG]"]),
        (["--prompt", "what is in <image>?"], ["<image>"]),
        (["--prompt", "x" * 3000], ["context of 2048"]),
        (["--prompt", "\udcff"], ["Unicode"]),
        (["--prompt", ONE, "--conversation", "v9"], ["v9", "llava_v1"]),
        (["--prompt", ONE, "--max-new-tokens", "-3"], ["max_new_tokens", "-3"]),
        (["--prompt", ONE, "--top-p", "0"], ["top_p"]),
        (["--prompt", ONE, "--temperature", "nan"], ["temperature"]),
        (["--prompt", ONE, "--seed", "-1"], ["seed"]),
    ],
)
def test_a_bad_request_is_refused_before_the_model_is_loaded(
    unloaded, model_folder, photo, tmp_path, capsys, arguments, words  # noqa: F811
):  # fmt: skip
    out = tmp_path / "out"
    status = cli.main(["segment", str(model_folder), str(photo), *arguments, "--output", str(out)])
    assert_refused(status, capsys, out, *words)


@pytest.mark.parametrize("kind", ["empty", "truncated", "bomb", "text", "missing", "directory"])
def test_a_bad_picture_is_refused_before_the_model_is_loaded(
    unloaded, model_folder, photo, tmp_path, capsys, kind  # noqa: F811
):  # fmt: skip
    bad = tmp_path / f"{kind}.jpg"
    if kind == "directory":
        bad.mkdir()
    elif kind != "missing":
        contents = {
            "empty": b"",
            "truncated": photo.read_bytes()[: photo.stat().st_size // 2],
            "bomb": png(100_000, 100_000),
            "text": b"This is no picture.\n" * 20,
        }
        bad.write_bytes(contents[kind])
    out = tmp_path / "out"
    status = run_segment(model_folder, photo, bad, "--prompt", ONE, "--output", out)
    assert_refused(status, capsys, out, bad.name)


def test_a_missing_model_folder(unloaded, photo, tmp_path, capsys):
    out = tmp_path / "out"
    status = run_segment(tmp_path / "nowhere", photo, "--prompt", ONE, "--output", out)
    assert_refused(status, capsys, out, "nowhere", "read-jax convert")


@pytest.mark.parametrize("damage", ["no config", "bad config", "no parameter", "short chunk", "no tokenizer"])
def test_a_damaged_model_folder(model_folder, photo, tmp_path, capsys, damage):  # noqa: F811
    model, out = tmp_path / "model", tmp_path / "out"
    shutil.copytree(model_folder, model)
    if damage == "no config":
        (model / "config.json").unlink()
    elif damage == "bad config":
        (model / "config.json").write_text('{"read_jax_version": "0')
    elif damage == "no parameter":
        shutil.rmtree(model / "params" / "llama.norm.scale")
    elif damage == "short chunk":
        chunk = model / "params" / "llama.norm.scale" / "0"
        chunk.write_bytes(chunk.read_bytes()[:-4])
    else:
        (model / "upstream" / "tokenizer.model").unlink()
    status = run_segment(model, photo, "--prompt", ONE, "--output", out)
    assert_refused(status, capsys, out, str(model))


def test_an_output_that_is_a_file(unloaded, model_folder, photo, tmp_path, capsys):  # noqa: F811
    for out in (photo, photo / "below"):
        assert run_segment(model_folder, photo, "--prompt", ONE, "--output", out) == 1
        assert re.fullmatch(r"read-jax: error: the output [^\n]+\n", capsys.readouterr().err)
    assert Image.open(photo).size == (64, 48)


def test_earlier_results_are_kept_unless_overwritten(ready, model_folder, photo, tmp_path, capsys):  # noqa: F811
    out = tmp_path / "out"
    assert run_segment(model_folder, photo, "--prompt", TWO, "--output", out) == 0
    before = {path.name: path.read_bytes() for path in out.iterdir()}
    assert run_segment(model_folder, photo, "--prompt", NONE, "--output", out) == 1
    assert "--overwrite" in capsys.readouterr().err
    assert {path.name: path.read_bytes() for path in out.iterdir()} == before
    (out / "note.txt").write_text("mine")
    assert run_segment(model_folder, photo, "--prompt", NONE, "--output", out, "--overwrite") == 0
    assert (out / "note.txt").read_text() == "mine"
    (out / "note.txt").unlink()
    assert [entry["prompt"] for entry in results_of(out)] == [NONE]


@pytest.mark.parametrize("text", ["[]", "{", '{"results": [{"files": {"mask": "../photo.png"}}]}'])
def test_a_foreign_result_file_is_never_replaced(
    unloaded, model_folder, photo, tmp_path, capsys, text  # noqa: F811
):  # fmt: skip
    out = tmp_path / "out"
    out.mkdir()
    (out / "result.json").write_text(text)
    assert run_segment(model_folder, photo, "--prompt", ONE, "--output", out, "--overwrite") == 1
    assert "not overwritten" in capsys.readouterr().err
    assert (out / "result.json").read_text() == text
    assert photo.exists()


@pytest.mark.parametrize("after", [0, 1, 3, 4, 5, 7])
def test_a_full_disk_leaves_what_was_finished(
    ready, model_folder, photo, tmp_path, capsys, monkeypatch, after  # noqa: F811
):  # fmt: skip
    """Each answer takes four files: mask, overlay, similarity, result.json."""
    out, written = tmp_path / "out", []
    replace = os.replace

    def full(source, target):
        if len(written) == after:
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC), str(source))
        written.append(target)
        replace(source, target)

    monkeypatch.setattr(output.os, "replace", full)
    status = run_segment(model_folder, photo, "--prompt", ONE, "--prompt", ONE, "--output", out)
    error = capsys.readouterr().err
    assert status == 1
    assert re.fullmatch(r"read-jax: error: no space left on the device[^\n]+\n", error)
    if after < 4:
        assert not out.exists()
    else:
        assert len(results_of(out)) == 1


def test_an_interruption_leaves_what_was_finished(
    ready, model_folder, segmenter, photo, tmp_path, capsys, monkeypatch  # noqa: F811
):  # fmt: skip
    other = tmp_path / "other.png"
    Image.fromarray(picture(30, 20)).save(other)
    segment_batch = segmenter.segment_batch
    calls = []

    def interrupted(requests, **settings):
        calls.append(requests)
        if len(calls) == 2:
            raise KeyboardInterrupt
        return segment_batch(requests, **settings)

    monkeypatch.setattr(segmenter, "segment_batch", interrupted)
    out = tmp_path / "out"
    assert run_segment(model_folder, photo, other, "--prompt", ONE, "--output", out) == 130
    assert capsys.readouterr().err == "read-jax: interrupted\n"
    assert [entry["image"] for entry in results_of(out)] == [str(photo)]


def test_an_interruption_before_the_first_answer_leaves_nothing(
    model_folder, photo, tmp_path, monkeypatch  # noqa: F811
):  # fmt: skip
    def interrupted(*_, **__):
        raise KeyboardInterrupt

    monkeypatch.setattr(read_jax, "load", interrupted)
    out = tmp_path / "deep" / "out"
    assert run_segment(model_folder, photo, "--prompt", ONE, "--output", out) == 130
    assert not out.parent.exists()


def test_running_out_of_memory_is_said_plainly(model_folder, photo, tmp_path, capsys, monkeypatch):  # noqa: F811
    def exhausted(*_, **__):
        raise RuntimeError("RESOURCE_EXHAUSTED: out of memory while trying to allocate 99 bytes")

    monkeypatch.setattr(read_jax, "load", exhausted)
    status = run_segment(model_folder, photo, "--prompt", ONE, "--output", tmp_path / "out")
    assert_refused(status, capsys, tmp_path / "out", "out of memory", "bfloat16")


def test_convert_inspect_export(scripted_sources, tmp_path, capsys):  # noqa: F811
    checkpoint, tower = map(str, scripted_sources)
    model, back = str(tmp_path / "model"), str(tmp_path / "back")
    convert = ["convert", checkpoint, "--vision-tower", tower, "--output", model, "--sasp", "7b"]
    assert cli.main(convert) == 0
    assert "SasP: 7b" in capsys.readouterr().out
    assert cli.main(["inspect", model]) == 0
    printed = capsys.readouterr().out
    assert "[SEG]" in printed
    assert "576 image tokens" in printed
    assert cli.main(["export", model, "--output", back]) == 0
    assert (tmp_path / "back" / "config.json").is_file()
    capsys.readouterr()
    for again in (convert, ["export", model, "--output", back]):
        assert cli.main(again) == 1
        assert re.fullmatch(r"read-jax: error: [^\n]*exists already[^\n]*\n", capsys.readouterr().err)
        assert cli.main([*again, "--overwrite"]) == 0
        capsys.readouterr()


def test_convert_asks_for_the_point_settings_of_an_unpublished_width(
    scripted_sources, tmp_path, capsys  # noqa: F811
):  # fmt: skip
    checkpoint, tower = map(str, scripted_sources)
    out = tmp_path / "model"
    status = cli.main(["convert", checkpoint, "--vision-tower", tower, "--output", str(out)])
    assert_refused(status, capsys, out, "--sasp", "7b", "13b", "paper", "off")


@pytest.mark.parametrize("command", ["inspect", "export"])
def test_a_folder_that_is_no_model(command, tmp_path, capsys):
    out = tmp_path / "out"
    more = ["--output", str(out)] if command == "export" else []
    assert_refused(cli.main([command, str(tmp_path), *more]), capsys, out, "not a model folder")


@pytest.mark.parametrize(
    "command",
    [
        "",
        "convert",
        "export",
        "inspect",
        "segment",
        "evaluate",
        "data",
        "data show",
        "data check",
        "data build",
    ],
)
def test_help_says_no_nonsense_defaults(command, capsys):
    with pytest.raises(SystemExit) as stop:
        cli.main([*command.split(), "--help"])
    assert stop.value.code == 0
    printed = capsys.readouterr().out
    assert "None" not in printed
    assert "False" not in printed


def test_wrong_usage_exits_with_2(capsys):
    for arguments in (
        [],
        ["segment"],
        ["paint"],
        ["segment", "m", "i", "--prompt", "x", "--output", "o", "--seed", "x"],
    ):
        with pytest.raises(SystemExit) as stop:
            cli.main(arguments)
        assert stop.value.code == 2
        assert "usage: read-jax" in capsys.readouterr().err


def shell(*arguments, **options):
    command = [sys.executable, *map(str, arguments)]
    return subprocess.run(command, capture_output=True, text=True, timeout=300, **options)


def test_neither_import_nor_help_loads_jax():
    code = (
        "import sys, read_jax, read_jax.cli\n"
        "try:\n    read_jax.cli.main(['--help'])\n"
        "except SystemExit:\n    pass\n"
        "print([name for name in ('jax', 'flax', 'torch', 'numpy') if name in sys.modules])"
    )
    out = shell("-c", code)
    assert out.stdout.splitlines()[-1] == "[]"
    assert "segment" in out.stdout


def test_the_command_in_a_process_of_its_own(model_folder, photo, tmp_path):  # noqa: F811
    arguments = ["segment", model_folder, photo, "--prompt", ONE, "--output", tmp_path / "out"]
    ascii_only = {**os.environ, "PYTHONIOENCODING": "ascii"}
    renamed = photo.rename(tmp_path / "gr\u00fcn.png")
    arguments[2] = renamed
    done = shell("-m", "read_jax.cli", *arguments, env=ascii_only)
    assert done.returncode == 0, done.stderr
    assert done.stderr == ""
    assert "a [SEG]" in done.stdout
    assert [entry["text"] for entry in results_of(tmp_path / "out")] == ["a [SEG]"]


def test_an_error_in_a_process_of_its_own(photo, tmp_path):
    arguments = ["segment", tmp_path, photo, "--prompt", ONE, "--output", tmp_path / "out"]
    done = shell("-m", "read_jax.cli", *arguments)
    assert done.returncode == 1
    assert re.fullmatch(r"read-jax: error: [^\n]+\n", done.stderr)
    assert done.stdout == ""
