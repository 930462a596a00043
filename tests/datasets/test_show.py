"""`read-jax data`: pictures to look at, and errors that say what to do."""

from __future__ import annotations

import numpy as np
from PIL import Image

from read_jax import cli
from read_jax.data import load_source
from read_jax.data.show import draw_item


def test_every_asked_for_picture_is_drawn_with_its_number(tmp_path, capsys):
    status = cli.main(
        ["data", "show", "scenes|val", "--output", str(tmp_path / "out"), "--start", "3", "--count", "2"]
    )
    assert status == 0
    assert sorted(p.name for p in (tmp_path / "out").iterdir()) == [
        "scenes_val_000003.png",
        "scenes_val_000004.png",
    ]
    assert f"{len(load_source('scenes|val'))} pictures" in capsys.readouterr().out


def test_targets_are_coloured_and_the_rest_is_left_alone(tmp_path):
    item = load_source("scenes|val")[0]
    drawn = draw_item(item)
    scale = 640 / max(item.height, item.width)
    size = round(item.width * scale), round(item.height * scale)
    plain = np.asarray(Image.fromarray(item.image).resize(size, Image.Resampling.BILINEAR))
    left = (drawn.shape[1] - size[0]) // 2
    changed = (drawn[: size[1], left : left + size[0]] != plain).any(axis=-1)
    union = (item.masks == 1).any(axis=0)
    grown = np.asarray(Image.fromarray(union).resize(size, Image.Resampling.NEAREST))
    assert 0.9 < (changed & grown).sum() / grown.sum() <= 1
    assert (changed & ~grown).mean() < 0.02


def test_a_range_beyond_the_dataset_is_refused(tmp_path, capsys):
    status = cli.main(["data", "show", "scenes|val", "--output", str(tmp_path / "out"), "--start", "100000"])
    assert status == 1
    assert "has the pictures 0 to" in capsys.readouterr().err
    assert not (tmp_path / "out").exists()


def test_check_ends_with_1_when_a_record_is_broken(tmp_path, capsys):
    file = tmp_path / "mine.jsonl"
    Image.new("RGB", (4, 4)).save(tmp_path / "a.png")
    file.write_text('{"image": "a.png", "class": "cat", "exists": false}\n')
    assert cli.main(["data", "check", str(file)]) == 0
    file.write_text(
        '{"image": "a.png", "class": "cat", "exists": false}\n{"image": "b.png", "class": "dog"}\n'
    )
    assert cli.main(["data", "check", str(file)]) == 1
    assert "mine.jsonl:2" in capsys.readouterr().out


def test_an_unknown_split_is_told_the_known_ones(tmp_path, capsys):
    assert cli.main(["data", "show", "scenes|tset", "--output", str(tmp_path / "out")]) == 1
    assert "scenes|test" in capsys.readouterr().err
