"""Building: the same items from the records as from the original files, and nothing by halves."""

from __future__ import annotations

import dataclasses
import json
import pickle
import resource
import signal
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from read_jax.data import build as building
from read_jax.data import load_source, records
from read_jax.data.build import build
from read_jax.data.item import Item, Query
from read_jax.data.sources import FAMILIES, SYNTHETIC, unknown_split
from read_jax.errors import DataError
from read_jax.images.decode import read_image
from read_jax.images.masks import CompactMask

CALLABLES = ("load_image", "load_mask")
EXIF_ROTATED = Image.Exif()
EXIF_ROTATED[0x0112] = 6


def assert_same(original: Item, built: Item) -> None:
    """Field by field, the pictures and masks by their pixels."""
    for field in dataclasses.fields(Item):
        if field.name not in CALLABLES:
            ours, theirs = getattr(built, field.name), getattr(original, field.name)
            if field.name in ("queries", "absent", "absent_alternatives"):
                ours, theirs = tuple(ours), tuple(theirs)
            assert ours == theirs, field.name
    assert np.array_equal(built.image, original.image)
    assert np.array_equal(built.masks, original.masks)
    assert (built.questions, built.answers) == (original.questions, original.answers)


def assert_same_source(original, built) -> None:
    assert isinstance(built, records.RecordSource)
    assert (len(built), built.name, built.compat) == (len(original), original.name, original.compat)
    for i in range(len(original)):
        assert_same(original[i], built[i])


class Drawings:
    """A source of pictures on disk, with a rotated JPEG, a grey one and a mask with ignored pixels."""

    def __init__(self, folder: Path, name: str = "refcoco|val", count: int = 5, compat=None) -> None:
        self.name, self.compat, self.count = name, compat, count
        self.folder = folder / "images"
        self.folder.mkdir(exist_ok=True)
        for i in range(count):
            pixels = np.random.default_rng(i).integers(0, 256, (30, 40, 3), np.uint8)
            picture = Image.fromarray(pixels if i != 2 else pixels[..., 0])
            exif = {"exif": EXIF_ROTATED} if i == 1 else {}
            picture.save(self.folder / f"{i}.jpg", **exif)

    def __len__(self) -> int:
        return self.count

    def __getitem__(self, index: int) -> Item:
        path = str(self.folder / f"{index}.jpg")
        height, width = (40, 30) if index == 1 else (30, 40)
        target = np.zeros((height, width), np.uint8)
        target[: index + 1], target[10:12] = 1, 255
        if self.compat == "read":
            target[0, :3] = 2
        return Item(
            key=f"{self.name}/{index}",
            height=height,
            width=width,
            image_path=path,
            queries=(Query("the cat", ref_id=index, sent_id=0), Query("dog", exists=False)),
            load_image=lambda: read_image(path),
            load_mask=lambda _: CompactMask.encode(target),
            absent=(f"bird {index}", "fish"),
        )


@pytest.fixture
def sources(monkeypatch, tmp_path) -> dict[str, Drawings]:
    """What `build` finds under tmp_path, by name; everything else is missing."""
    there: dict[str, Drawings] = {}

    def load(name, data_dir=None, compat=None, *, built=True):
        if name == "refcoco|testC":
            raise unknown_split("refcoco", "testC", ("val",))
        if name not in there or there[name].compat != compat:
            raise DataError(f"{name}: no such files.")
        return there[name]

    def add(name, **options):
        there[name] = Drawings(tmp_path, name, **options)

    monkeypatch.setattr(building, "load_source", load)
    add("refcoco|val")
    return there


def files_below(folder: Path) -> list[str]:
    return sorted(str(file.relative_to(folder)) for file in folder.rglob("*") if file.is_file())


def test_the_items_are_the_same(sources, tmp_path):
    build("refcoco|val", tmp_path)
    assert_same_source(sources["refcoco|val"], records.find("refcoco", "val", tmp_path, None))


def test_it_is_found_from_the_folder_of_builds_itself(sources, tmp_path):
    build("refcoco|val", tmp_path)
    assert_same_source(sources["refcoco|val"], records.find("refcoco", "val", tmp_path / "tfds", None))


def test_tfds_opens_it(sources, tmp_path):
    import tensorflow_datasets as tfds

    (result,) = build("refcoco|val", tmp_path).built
    builder = tfds.builder_from_directory(result.folder)
    assert list(builder.info.splits) == ["val"] and builder.info.splits["val"].num_examples == 5
    example = builder.as_data_source("val")[3]
    assert example["image"] == (tmp_path / "images" / "3.jpg").read_bytes()
    assert example["image_path"] == b"images/3.jpg"
    assert list(example["queries"]["phrase"]) == [b"the cat", b"dog"]
    assert tfds.builder("refcoco", data_dir=tmp_path / "tfds").info.config_name == "default"


def test_tensorflow_is_not_imported(sources, tmp_path):
    build("refcoco|val", tmp_path)
    code = (
        "import sys; from read_jax.data import load_source, build\n"
        f"print(len(load_source('refcoco|val', {str(tmp_path)!r})[0].image), 'tensorflow' in sys.modules)"
    )
    command = [sys.executable, "-c", code]
    done = subprocess.run(command, capture_output=True, text=True, check=True, timeout=300)
    assert done.stdout.split() == ["30", "False"]
    assert "tensorflow" not in sys.modules


def test_a_source_of_several_files_is_in_order(sources, tmp_path, monkeypatch):
    monkeypatch.setattr(building, "SHARD_BYTES", 5000)
    (result,) = build("refcoco|val", tmp_path).built
    assert len(list(result.folder.glob("*.array_record-*"))) > 1
    assert_same_source(sources["refcoco|val"], records.find("refcoco", "val", tmp_path, None))


def test_it_travels_to_worker_processes(sources, tmp_path):
    build("refcoco|val", tmp_path)
    source = records.find("refcoco", "val", tmp_path, None)
    assert source is not None
    _ = source[0]  # files are open now
    assert_same_source(sources["refcoco|val"], pickle.loads(pickle.dumps(source)))


def test_an_index_beyond_the_end_is_an_index_error(sources, tmp_path):
    build("refcoco|val", tmp_path)
    source = records.find("refcoco", "val", tmp_path, None)
    assert source is not None
    with pytest.raises(IndexError, match="val has 5 items"):
        source[5]
    assert len(list(source)) == 5


def test_splits_are_added_to_one_dataset(sources, tmp_path):
    import tensorflow_datasets as tfds

    sources["refcoco|testA"] = Drawings(tmp_path, "refcoco|testA", count=7)
    build("refcoco|val", tmp_path)
    (result,) = build("refcoco|testA", tmp_path).built
    assert set(tfds.builder_from_directory(result.folder).info.splits) == {"val", "testA"}
    for name, source in sources.items():
        assert_same_source(source, records.find(*name.split("|"), tmp_path, None))


def test_a_family_is_built_whole_and_says_what_it_has_not(sources, tmp_path):
    sources["refcoco|train"] = Drawings(tmp_path, "refcoco|train")
    sources["refcoco|testA"] = Drawings(tmp_path, "refcoco|testA")
    sources["refcoco|test"] = Drawings(tmp_path, "refcoco|test")  # the union of testA and testB
    report = build("refcoco", tmp_path)
    assert [one.name for one in report.built] == ["refcoco|train", "refcoco|val", "refcoco|testA"]
    assert set(report.skipped) == {"refcoco|testB"}
    assert "refcoco|testB not built: refcoco|testB: no such files." in str(report)


def test_all_is_what_there_is(sources, tmp_path):
    sources["fprefcocog|test"] = Drawings(tmp_path, "fprefcocog|test")
    report = build("all", tmp_path)
    assert [one.name for one in report.built] == ["refcoco|val", "fprefcocog|test"]
    assert not any(name.startswith("scenes") for name in report.skipped)


def test_both_modes_lie_side_by_side(sources, tmp_path):
    right = sources["refcoco|val"]
    build("refcoco|val", tmp_path)
    sources["refcoco|val"] = defect = Drawings(tmp_path, compat="read")
    build("refcoco|val", tmp_path, compat="read")
    assert_same_source(right, records.find("refcoco", "val", tmp_path, None))
    assert_same_source(defect, records.find("refcoco", "val", tmp_path, "read"))
    assert records.built(tmp_path) == ["refcoco|val", "refcoco|val (compat read)"]


def test_the_other_mode_is_never_taken_for_the_asked_one(sources, tmp_path):
    build("refcoco|val", tmp_path, tmp_path / "built")
    with pytest.raises(DataError, match=r"Built there: refcoco\|val\.$"):
        load_source("refcoco|val", tmp_path / "built", "read")


def test_building_again_changes_nothing_and_says_so(sources, tmp_path):
    (first,) = build("refcoco|val", tmp_path).built
    before = {file: file.stat().st_mtime_ns for file in first.folder.iterdir()}
    (second,) = build("refcoco|val", tmp_path).built
    assert (first.fresh, second.fresh, second.items) == (True, False, 5)
    assert "there already" in str(second)
    assert {file: file.stat().st_mtime_ns for file in first.folder.iterdir()} == before


@pytest.mark.parametrize("beside", [(), ("refcoco|testA",)])
def test_overwriting_replaces_a_split_and_leaves_the_others(sources, tmp_path, beside):
    for name in beside:
        sources[name] = Drawings(tmp_path, name)
        build(name, tmp_path)
    build("refcoco|val", tmp_path)
    sources["refcoco|val"] = Drawings(tmp_path, count=9)
    (result,) = build("refcoco|val", tmp_path, overwrite=True).built
    assert result.fresh and len(list(result.folder.glob("*.array_record-*"))) == 1 + len(beside)
    for name, source in sources.items():
        assert_same_source(source, records.find(*name.split("|"), tmp_path, None))


def test_progress_is_told(sources, tmp_path):
    calls = []
    build("refcoco|val", tmp_path, progress=lambda *call: calls.append(call))
    assert calls == [(i, 5, "refcoco|val") for i in range(1, 6)]


def test_sizes_are_told(sources, tmp_path):
    (result,) = build("refcoco|val", tmp_path).built
    assert result.image_bytes == sum(file.stat().st_size for file in (tmp_path / "images").iterdir())
    assert result.record_bytes > result.image_bytes


def test_a_failing_build_leaves_nothing(sources, tmp_path):
    (tmp_path / "images" / "3.jpg").unlink()
    with pytest.raises(DataError, match=r"3\.jpg.*No such file"):
        build("refcoco|val", tmp_path)
    assert files_below(tmp_path / "tfds") == []
    assert records.find("refcoco", "val", tmp_path, None) is None


def test_a_failing_overwrite_leaves_what_was_there(sources, tmp_path):
    build("refcoco|val", tmp_path)
    before = files_below(tmp_path / "tfds")

    def stop(*_):
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        build("refcoco|val", tmp_path, overwrite=True, progress=stop)
    assert files_below(tmp_path / "tfds") == before
    assert_same_source(sources["refcoco|val"], records.find("refcoco", "val", tmp_path, None))


def test_a_killed_build_looks_like_none_and_is_reported(sources, tmp_path):
    kill = (
        "import os, signal, sys; from pathlib import Path\n"
        "from tests.datasets import test_build as t\n"
        "folder = Path(sys.argv[1])\n"
        "t.building.load_source = lambda *a, **k: t.Drawings(folder)\n"
        "t.build('refcoco|val', folder,"
        " progress=lambda done, *_: done == 3 and os.kill(os.getpid(), signal.SIGKILL))"
    )
    command = [sys.executable, "-c", kill, str(tmp_path)]
    done = subprocess.run(command, cwd=Path(__file__).parents[2], timeout=300)
    assert done.returncode == -signal.SIGKILL
    assert records.find("refcoco", "val", tmp_path, None) is None and records.built(tmp_path) == []
    report = build("refcoco|val", tmp_path)
    assert len(report.leftovers) == 1 and report.leftovers[0].is_dir()
    assert_same_source(sources["refcoco|val"], records.find("refcoco", "val", tmp_path, None))


def test_a_disk_that_cannot_take_it_is_told_before_writing(sources, tmp_path, monkeypatch):
    usage = building.shutil.disk_usage(tmp_path)
    monkeypatch.setattr(building.shutil, "disk_usage", lambda _: usage._replace(free=100))
    with pytest.raises(DataError, match=r"0\.0 GiB free"):
        build("refcoco|val", tmp_path)
    assert files_below(tmp_path / "tfds") == []


def test_a_write_that_fails_midway_is_told_and_leaves_nothing(sources, tmp_path):
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    handler = signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
    try:
        resource.setrlimit(resource.RLIMIT_FSIZE, (3000, before[1]))
        with pytest.raises(DataError, match="cannot be"):
            build("refcoco|val", tmp_path)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)
        signal.signal(signal.SIGXFSZ, handler)
    assert files_below(tmp_path / "tfds") == []


def test_another_dataset_of_the_same_tfds_name_is_not_overwritten(sources, tmp_path):
    build("refcoco|val", tmp_path)
    metadata = tmp_path / "tfds/refcoco/default/1.0.0/metadata.json"
    metadata.write_text(json.dumps({**json.loads(metadata.read_text()), "source": "RefCOCO"}))
    assert records.find("refcoco", "val", tmp_path, None) is None
    with pytest.raises(DataError, match="holds RefCOCO already"):
        build("refcoco|val", tmp_path, overwrite=True)


def test_records_of_a_newer_version_are_refused(sources, tmp_path):
    build("refcoco|val", tmp_path)
    metadata = tmp_path / "tfds/refcoco/default/1.0.0/metadata.json"
    content = json.loads(metadata.read_text())
    metadata.write_text(json.dumps({**content, "query_fields": [*content["query_fields"], "mood"]}))
    with pytest.raises(DataError, match="newer version of read_jax: its records hold mood"):
        records.find("refcoco", "val", tmp_path, None)


def test_a_damaged_file_is_named(sources, tmp_path):
    (result,) = build("refcoco|val", tmp_path).built
    (shard,) = result.folder.glob("*.array_record-*")
    source = records.find("refcoco", "val", tmp_path, None)
    assert source is not None
    shard.write_bytes(shard.read_bytes()[:2000])
    with pytest.raises(DataError, match=r"record 4 of .* cannot be read"):
        source[4]


def test_a_damaged_description_is_named(sources, tmp_path):
    (result,) = build("refcoco|val", tmp_path).built
    (result.folder / "dataset_info.json").write_text('{"name": ')
    with pytest.raises(DataError, match=r"dataset_info\.json cannot be read"):
        records.find("refcoco", "val", tmp_path, None)


def test_what_is_missing_says_why(sources, tmp_path):
    with pytest.raises(DataError, match=r"refclef: none of its splits.*refclef\|train: no such files"):
        build("refclef", tmp_path)


def test_nothing_is_made_where_there_is_nothing_to_build(tmp_path):
    with pytest.raises(DataError, match="there is no such"):
        build("refcoco|val", tmp_path / "nowhere")
    assert not (tmp_path / "nowhere").exists()


def test_an_unknown_name_lists_the_known(tmp_path):
    with pytest.raises(DataError, match="Did you mean refcoco"):
        build("refcocoo", tmp_path)


def test_a_bucket_is_not_written_to(tmp_path):
    with pytest.raises(DataError, match="then copy it to the bucket"):
        build("refcoco|val", tmp_path, "gs://bucket/tfds")


def test_drawn_pictures_are_stored_without_loss(sources, tmp_path, monkeypatch):
    class Drawn(Drawings):
        def __getitem__(self, index):
            return dataclasses.replace(super().__getitem__(index), image_path=None)

    sources["scenes|val"] = Drawn(tmp_path, "scenes|val")
    build("scenes|val", None, tmp_path / "built")
    assert_same_source(sources["scenes|val"], load_source("scenes|val", tmp_path / "built"))


def test_a_users_file_is_found_by_its_name(sources, tmp_path):
    name = str(tmp_path / "mine.jsonl")
    sources[name] = Drawings(tmp_path, name)
    build(name, tmp_path)
    source = load_source("elsewhere/mine.jsonl", tmp_path)
    assert (len(source), source.name) == (5, "mine.jsonl")
    assert_same(sources[name][1], source[1])


@pytest.mark.parametrize("compat", [None, "read"])
@pytest.mark.parametrize("family", [family for family in FAMILIES if family not in SYNTHETIC])
def test_every_dataset_gives_the_same_items_either_way(fixtures, tmp_path, family, compat):
    data = tmp_path / "data"
    data.symlink_to(fixtures / "dataset", target_is_directory=True)
    report = build(family, data, tmp_path / "built", compat)
    assert report.built
    for one in report.built:
        split = one.name.partition("|")[2]
        built = records.find(family, split, tmp_path / "built", compat)
        original = load_source(one.name, data, compat, built=False)
        assert built is not None and (len(built), built.name, built.compat) == (
            len(original),
            one.name,
            compat,
        )
        for i in range(len(original)):
            expected = original[i]
            # the originals' folder is another than the builds'
            path = Path(str(expected.image_path)).relative_to(data)
            assert_same(dataclasses.replace(expected, image_path=str(tmp_path / "built" / path)), built[i])
