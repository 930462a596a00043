"""The encoders' cache: the same training with it as without, and what it refuses."""

from __future__ import annotations

import dataclasses
import itertools
import json
import sys
from functools import partial
from pathlib import Path

import jax
import numpy as np
import pytest
from PIL import Image

from read_jax.cli import main
from read_jax.data import features as files
from read_jax.data import mixture
from read_jax.data.features import BFLOAT16, FeatureStore, shard_path
from read_jax.data.pipeline import TrainingLoader
from read_jax.errors import ConfigError, DataError
from read_jax.training import features
from read_jax.training.config import DataConfig, StartConfig
from read_jax.training.config import TrainConfig as Config
from read_jax.training.features import cache, open_features
from read_jax.training.flops import clip_forward, sam_encoder_forward, train_step_flops
from read_jax.training.objective import LossWeights, count, objective, picture_features
from read_jax.training.optimizer import OptimizerConfig
from read_jax.training.run import make_mixture, prepare
from read_jax.training.step import StepConfig
from read_jax.weights.checkpoint import load_record
from read_jax.weights.model import load_model
from tests.training.tiny import packer_of, write_model

pytestmark = pytest.mark.usefixtures("compiled_quickly")

PICTURES = 7
BROKEN, TWIN = 2, 5
"""One that does not decode, and one that looks like picture 0."""


def write_pictures(folder):
    """A dataset of the user's own: a few coloured pictures of different sizes; its file."""
    folder.mkdir(exist_ok=True)
    lines = []
    for i in range(PICTURES):
        look = 0 if i == TWIN else i
        random = np.random.default_rng(look)
        pixels = random.integers(0, 255, (40 + 5 * look, 60 - 3 * look, 3), np.uint8)
        Image.fromarray(pixels).save(folder / f"{i}.png")
        polygon = [[5, 5], [30, 5], [30, 30], [5, 30]]
        lines.append(json.dumps({"image": f"{i}.png", "class": f"thing {i}", "mask": polygon}))
    (folder / f"{BROKEN}.png").write_bytes(b"\x89PNG no picture")
    (folder / "own.jsonl").write_text("\n".join(lines) + "\n")
    return folder / "own.jsonl"


def config_of(model, data, **changes):
    return Config(
        start=StartConfig(model=str(model)),
        optimizer=OptimizerConfig(learning_rate=1e-3, warmup_updates=0, total_updates=3),
        step=StepConfig(remat=False),
        data=DataConfig(
            **{
                "rates": {str(data): 1.0},
                "global_batch": 4,
                "tokens": 64,
                "mask_canvas": (64, 64),
                "workers": 0,
                "max_bad_share": 0.5,
                **changes,
            }
        ),
    )


def fill(config, output):
    """A cache of two items per shard, without a word."""
    folder = Path(config.start.model)
    card = features.make_card(config, folder, load_record(folder).config, [])
    return cache(
        config, make_mixture(config.data), output, say=lambda text: None, shard_bytes=2 * card.record_bytes
    )


SHARDS = 4


@pytest.fixture(scope="module")
def made(tmp_path_factory):
    """(model folder, data file, configuration, folder of the cache, what was told of it)."""
    folder = tmp_path_factory.mktemp("cached")
    model, data = write_model(folder, dtype="bfloat16"), write_pictures(folder / "data")
    config = config_of(model, data)
    return model, data, config, folder / "cache", fill(config, folder / "cache")


@pytest.fixture
def copy(made, tmp_path):
    """The cache's files elsewhere, to be spoilt."""
    for file in made[3].iterdir():
        (tmp_path / file.name).write_bytes(file.read_bytes())
    return tmp_path


def using(config, folder, **changes):
    return dataclasses.replace(config, data=dataclasses.replace(config.data, features=str(folder), **changes))


def opened(config):
    record = load_record(config.start.model)
    return open_features(config, Path(config.start.model), record.config, make_mixture(config.data))


def loader_of(config, **options):
    packer = packer_of(Path(config.start.model), config.data.limits)
    given = {"max_bad_share": 0.9, "features": opened(config), **options}
    return TrainingLoader(make_mixture(config.data), packer, 4, **given)


def content(folder):
    return {file.name: file.read_bytes() for file in folder.iterdir()}


def test_every_distinct_picture_is_stored_once_and_the_unusable_noted(made):
    folder, told = made[3], made[4]
    assert (told.items, told.pictures) == (PICTURES, PICTURES - 2)
    assert len(told.unusable) == 1
    store = FeatureStore(folder)
    keys = [
        key for key, *_ in itertools.chain(*(files._read_items(folder, n)["items"] for n in range(SHARDS)))
    ]
    assert len(keys) == PICTURES
    np.testing.assert_array_equal(store[keys[0]].image_embedding, store[keys[TWIN]].image_embedding)
    assert not np.array_equal(store[keys[0]].image_embedding, store[keys[1]].image_embedding)
    with pytest.raises(DataError):
        store.check_usable(keys[BROKEN])
    store.check_usable(keys[0])


def test_what_is_kept_is_what_the_model_computes_in_bfloat16(made):
    model, _, config, folder, _ = made
    with loader_of(config) as pixels, loader_of(using(config, folder)) as kept:
        batch, cached = next(pixels).arrays, next(kept).arrays
    assert cached.clip_pixels == cached.sam_pixels == batch.features == ()
    assert cached.features.clip_features.dtype == cached.features.image_embedding.dtype == BFLOAT16
    read = load_model(model, dtype="bfloat16")
    computed, known = jax.jit(picture_features)(read, batch), jax.jit(picture_features)(read, cached)
    for ours, theirs in zip(known, computed, strict=True):
        assert ours.dtype == theirs.dtype
        ours, theirs = np.asarray(ours, np.float32), np.asarray(theirs, np.float32)
        # other programs round differently: by a few units of bfloat16's last place, 2**-8
        assert np.linalg.norm(ours - theirs) <= 2**-8 * np.linalg.norm(theirs)


def test_the_loaders_give_the_same_examples_with_it(made):
    config, folder = made[2], made[3]
    with loader_of(config) as pixels, loader_of(using(config, folder)) as kept:
        for _ in range(3):
            one, other = next(pixels), next(kept)
            assert (one.keys, one.skipped) == (other.keys, other.skipped)
            for name in one.arrays._fields:
                if name not in ("clip_pixels", "sam_pixels", "features"):
                    jax.tree.map(
                        np.testing.assert_array_equal, getattr(one.arrays, name), getattr(other.arrays, name)
                    )
        assert pixels.skipped_count  # the broken picture among them
        assert pixels.state() == kept.state()


def test_with_it_no_picture_is_decoded(made, monkeypatch):
    def picture(item):
        raise AssertionError(f"{item.key} is decoded")

    monkeypatch.setattr(mixture, "picture", picture)
    with loader_of(using(made[2], made[3])) as loader:
        assert next(loader).arrays.features.clip_features.shape[0] == 4
    with loader_of(made[2]) as loader, pytest.raises(AssertionError, match="is decoded"):
        next(loader)


def test_a_worker_process_reads_it(made):
    config = using(made[2], made[3])
    with loader_of(config) as here, loader_of(config, workers=1) as there:
        jax.tree.map(np.testing.assert_array_equal, next(here).arrays, next(there).arrays)


def test_the_losses_are_the_same_with_it(made):
    model, _, config, folder, _ = made
    with loader_of(config) as pixels, loader_of(using(config, folder)) as kept:
        batches = next(pixels).arrays, next(kept).arrays
    read, packer = load_model(model, dtype="bfloat16"), packer_of(model, config.data.limits)

    def losses(read, batch):
        weights = LossWeights()
        return objective(
            read, batch, count(batch), packer.prefix_ids, packer.image_start, weights, remat=False
        )

    one, other = (jax.jit(losses)(read, batch) for batch in batches)
    for name in ("total", "ce", "bce", "dice"):
        assert float(getattr(other, name)) == pytest.approx(float(getattr(one, name)), rel=2**-8), name


@pytest.mark.slow
def test_training_goes_the_same_way_with_it(made, tmp_path):
    config, folder = made[2], made[3]
    metrics = []
    for number, one in enumerate((config, using(config, folder))):
        run, state = prepare(one, tmp_path / str(number))
        for step in range(3):
            arrays = jax.device_put(next(run.loader).arrays, run.sharding)
            state, values = run.step(step)(state, run.frozen, arrays)
            metrics.append({name: float(value) for name, value in values.items()})
    without, with_it = metrics[:3], metrics[3:]
    for one, other in zip(without, with_it, strict=True):
        for name in ("total", "ce", "bce", "dice", "gradient_norm"):
            assert other[name] == pytest.approx(one[name], rel=1e-2), name
        assert other["tokens"] == one["tokens"]


@pytest.mark.parametrize("at", [1, 4])
def test_killed_and_continued_it_is_the_same(made, tmp_path, monkeypatch, at):
    calls, original = itertools.count(), files.ShardWriter.add

    def add(*args):
        if next(calls) == at:
            raise KeyboardInterrupt
        original(*args)

    with monkeypatch.context() as patch:
        patch.setattr(files.ShardWriter, "add", add)
        patch.setattr(files.ShardWriter, "__exit__", lambda *args: None)  # kill -9 cleans nothing up
        with pytest.raises(KeyboardInterrupt):
            fill(made[2], tmp_path)
    assert list(tmp_path.glob(".*.partial"))
    with pytest.raises(DataError, match="incomplete"):
        FeatureStore(tmp_path)
    fill(made[2], tmp_path)
    assert content(tmp_path) == content(made[3])


def test_a_full_disk_is_said_and_leaves_whole_shards(made, tmp_path, monkeypatch):
    calls, original = itertools.count(), files.shutil.disk_usage

    def disk_usage(path):
        usage = original(path)
        return usage._replace(free=0) if next(calls) >= 3 else usage

    with monkeypatch.context() as patch:
        patch.setattr(files.shutil, "disk_usage", disk_usage)
        with pytest.raises(DataError, match="full"):
            fill(made[2], tmp_path)
    fill(made[2], tmp_path)
    assert content(tmp_path) == content(made[3])


def test_a_missing_picture_stops_the_run(made, copy):
    file = copy / "shard-00000.json"
    data = json.loads(file.read_text())
    data["items"][0][0] += " of another day"
    file.write_text(json.dumps(data))
    with loader_of(using(made[2], copy)) as loader, pytest.raises(DataError, match=r"no features of .*anew"):
        for _ in range(20):
            next(loader)


def test_data_that_grew_are_refused(made, tmp_path):
    more = write_pictures(tmp_path / "data")
    assert more != made[1]
    with pytest.raises(ConfigError, match="nothing of"):
        opened(using(config_of(made[0], more), made[3]))


def test_other_weights_are_refused(made, tmp_path):
    other = write_model(tmp_path, dtype="bfloat16", seed=7)
    config = using(config_of(other, made[1]), made[3])
    with pytest.raises(ConfigError, match="encoders is sha256"):
        opened(config)
    with pytest.raises(ConfigError, match="another folder"):
        fill(config_of(other, made[1]), made[3])


def test_another_type_of_computation_is_refused(made):
    with pytest.raises(ConfigError, match="dtype is bfloat16 there, float32"):
        opened(dataclasses.replace(using(made[2], made[3]), dtype="float32"))


@pytest.mark.parametrize("name", ["clip", "sam", "sam.image_encoder.neck", "all"])
def test_encoders_that_are_trained_are_refused(made, tmp_path, name):
    config = dataclasses.replace(made[2], trainable=("lora", name))
    with pytest.raises(ConfigError, match="are trained"):
        fill(config, tmp_path)
    with pytest.raises(ConfigError, match="are trained"):
        using(config, made[3])


def test_a_mask_decoder_that_is_trained_is_no_encoder(made):
    assert made[2].trained_encoders == ()
    assert "sam.mask_decoder" in made[2].trainable


def test_a_shard_cut_short_is_told_at_once(made, copy):
    path = shard_path(copy, 1)
    path.write_bytes(path.read_bytes()[:-7])
    with pytest.raises(DataError, match="shard-00001"):
        opened(using(made[2], copy))


def test_a_corrupt_record_is_told_and_made_again(made, copy):
    path = shard_path(copy, 0)
    items = json.loads(path.with_suffix(".json").read_text())["items"]
    data = bytearray(path.read_bytes())
    data[data.index(bytes.fromhex(items[1][1])) - 100] ^= 1  # a bit of the second picture's arrays
    path.write_bytes(data)
    store = FeatureStore(copy)
    assert store[items[0][0]].clip_features.dtype == BFLOAT16
    with pytest.raises(DataError, match=r"record 1 of .*shard-00000.* is damaged.*Delete"):
        store[items[1][0]]
    path.unlink()
    path.with_suffix(".json").unlink()
    fill(made[2], copy)
    assert content(copy) == content(made[3])


def test_its_path_is_not_part_of_the_trajectory_but_its_use_is(made):
    plain, used = made[2], using(made[2], made[3])
    assert plain.trajectory() != used.trajectory()
    assert used.trajectory() == using(made[2], "/elsewhere").trajectory()


def test_the_command_says_the_size_first_and_then_what_there_is(made, tmp_path, capsys):
    recipe = tmp_path / "own.py"
    recipe.write_text(
        "from read_jax.training.config import default_config\n"
        "def get_config():\n"
        "    config = default_config()\n"
        f"    config.start.model = {str(made[0])!r}\n"
        "    return config\n"
    )
    rates = {str(made[1]): 1.0}
    changes = [f"--config.data.rates={rates}", "--config.data.workers=0", "--config.data.max_bad_share=0.5"]
    changes += ["--config.data.global_batch=4"]
    assert main(["cache", "--config", str(recipe), "--output", str(tmp_path / "cache"), *changes]) == 0
    first, last, unusable = capsys.readouterr().out.splitlines()
    assert first.startswith(f"{PICTURES} of {PICTURES} pictures") and "at most" in first
    assert "5 pictures" in last and "data.features=" in last and "cannot be used" in unusable


def test_without_the_package_it_says_what_to_install(made, tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "array_record.python.array_record_module", None)
    with pytest.raises(DataError, match=r"pip install 'read-jax\[data\]'"):
        fill(made[2], tmp_path)
    with pytest.raises(DataError, match=r"pip install 'read-jax\[data\]'"):
        opened(using(made[2], made[3]))


def test_encoders_that_do_not_run_are_no_work(made):
    config, lengths = load_record(made[0]).config, np.full((2, 3), 50)
    of = partial(train_step_flops, config, made[2].trainable, 600, lengths, 4)
    encoders = clip_forward(config.clip) + sam_encoder_forward(config.sam)
    assert of() - of(encoders=False) == pytest.approx(2 * encoders)
