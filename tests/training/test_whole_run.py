"""From a model folder through training with validation to a model folder that answers, and its export."""

from __future__ import annotations

import gc

import numpy as np
import pytest
from PIL import Image

import read_jax
from read_jax.errors import CheckpointError
from read_jax.training import loop
from read_jax.training.checkpoint import FOLDER
from read_jax.training.config import CheckpointConfig, DataConfig, LogConfig, StartConfig, ValidationConfig
from read_jax.training.config import TrainConfig as Config
from read_jax.training.finish import finish
from read_jax.training.logs import METRICS, PICTURES
from read_jax.training.loop import train
from read_jax.training.lora import LoraConfig
from read_jax.training.optimizer import OptimizerConfig
from read_jax.training.step import StepConfig
from read_jax.weights import export
from read_jax.weights.checkpoint import PARAMS, load_record, model_leaves
from read_jax.weights.store import read_slice
from tests.training.tiny import write_model
from tests.training.tiny_run import TIMES, lines

pytestmark = [pytest.mark.slow, pytest.mark.usefixtures("compiled_quickly")]  # two minutes of compilation

LORA = LoraConfig(rank=2, alpha=6.0, dropout=0.1)


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    """(the start's folder, the run's folder, how it ended): three updates in bfloat16."""
    folder = tmp_path_factory.mktemp("whole")
    start = write_model(folder, dtype="bfloat16")
    config = Config(
        start=StartConfig(model=str(start), sasp="paper"),
        lora=LORA,
        optimizer=OptimizerConfig(learning_rate=1e-2, warmup_updates=0, total_updates=3),
        step=StepConfig(remat=False, ema_decay=0.5, micro_batches=2),
        data=DataConfig(
            rates={"scenes|train": 1.0}, global_batch=4, tokens=320, mask_canvas=(256, 256), workers=0
        ),
        validation=ValidationConfig("scenes|val", every=3, limit=3, batch=2, pictures=2),
        checkpoints=CheckpointConfig(every=3, best="giou"),
        log=LogConfig(every=1),
        dtype="bfloat16",
    )
    runs, original = [], loop.prepare

    def prepare(*args):
        runs.append(original(*args))
        return runs[0]

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(loop, "prepare", prepare)
        outcome = train(config, folder / "run")
    assert runs[0][0].step(0)._cache_size() == 1  # pictures of all sizes, one program
    return start, folder / "run", outcome


def test_it_learns_finite_numbers_and_validates(run):
    _, workdir, outcome = run
    assert outcome.updates == 3
    assert 0 <= outcome.scores["giou"] <= 1 and outcome.scores["masks"] > 0
    trained = [line for line in lines(workdir / METRICS) if "validation" not in line]
    assert [line["applied"] for line in trained] == [1, 1, 1]
    assert trained[-1]["total"] < trained[0]["total"]
    assert {*trained[1]} >= TIMES


def test_it_draws_the_first_pictures_with_masks_and_points(run):
    pictures = sorted((run[1] / PICTURES / "0000003").iterdir())
    assert len(pictures) == 2
    for picture in pictures:
        pixels = np.asarray(Image.open(picture))
        assert pixels.shape[1] >= 2 * 96  # answer and map, side by side
        assert pixels.std() > 5


def trained_changes(folder, start):
    """Paths whose values differ between two model folders, with the largest difference."""
    changed = {}
    for path, leaf in model_leaves(load_record(start).config).items():
        for row in leaf.rows:
            ours, theirs = (
                np.asarray(read_slice(f / PARAMS, path, row.index), np.float32) for f in (folder, start)
            )
            if not np.array_equal(ours, theirs):
                changed[path] = max(changed.get(path, 0.0), float(np.abs(ours - theirs).max()))
    return changed


@pytest.mark.parametrize("average", [False, True])
def test_what_was_trained_is_in_the_model_folder_and_nothing_else(average, run, tmp_path):
    start, workdir, _ = run
    record = finish(workdir, tmp_path / "model", average=average)
    changed = trained_changes(tmp_path / "model", start)
    tops = {".".join(path.split(".")[:2]) for path in changed}
    assert tops == {
        *("llama.embed_tokens", "llama.lm_head", "llama.layers", "sam.mask_decoder"),
        *("text_projection.fc1", "text_projection.fc2"),
    }
    layers = {path for path in changed if path.startswith("llama.layers")}
    assert layers == {f"llama.layers.attn.{name}.kernel" for name in LORA.targets}
    assert record.config.sasp.threshold == "mean_std"  # the run's points, not the start's
    assert record.dtype == "bfloat16"


def test_the_trained_model_answers_and_is_exported(run, tmp_path):
    finish(run[1], tmp_path / "model", dtype="float32")
    segmenter = read_jax.load(tmp_path / "model")
    image = np.full((100, 120, 3), 128, np.uint8)
    (answer,) = segmenter.segment_forced([(image, "Where is it?", "Here: [SEG].")])
    assert answer.masks.shape == (1, 100, 120)
    summary = export(tmp_path / "model", tmp_path / "exported")
    assert summary.tensors > 100


def test_a_start_that_changed_since_is_refused(run, tmp_path):
    other = write_model(tmp_path, dtype="bfloat16", seed=7)
    with pytest.raises(CheckpointError, match="is not the model that"):
        finish(run[1], tmp_path / "merged", base=other)
    assert not (tmp_path / "merged").exists()


def test_a_step_that_was_not_saved_is_named_with_those_that_were(run, tmp_path):
    with pytest.raises(CheckpointError, match="no checkpoint after 2 updates; there: 3"):
        finish(run[1], tmp_path / "model", step=2)


@pytest.mark.filterwarnings("ignore::pytest.PytestUnraisableExceptionWarning")
def test_a_damaged_checkpoint_makes_no_model(run, tmp_path):
    for file in (run[1] / FOLDER / "3" / "state").rglob("*"):
        if file.is_file() and file.parent.name == "d":
            file.write_bytes(bytes(file.stat().st_size))
    with pytest.raises(CheckpointError, match="is damaged"):
        finish(run[1], tmp_path / "model")
    assert not (tmp_path / "model").exists()
    gc.collect()  # what Orbax leaves of a failed read complains here, where it is expected
