"""The tables against the published checkpoints' names and shapes, and against the model itself."""

from __future__ import annotations

import hypothesis
import hypothesis.strategies as st
import numpy as np
import pytest
from flax import nnx

from read_jax.config import READ_PRESETS, ReadConfig, SamConfig
from read_jax.errors import CheckpointError
from read_jax.models.read import Read
from read_jax.weights import engine
from read_jax.weights.checkpoint import model_leaves
from read_jax.weights.tables import checkpoint_table, clip, llama, model_table, projector, sam
from tests.weights.manifests import FOLDER, load_manifest

PUBLISHED = {
    "read_sesame_7b": "read-7b",
    "read_sesame_13b": "read-13b",
    "lisa_v1_7b": "lisa-7b",
    "lisa_v1_13b": "lisa-13b",
}


@pytest.mark.parametrize("rotary", [True, False])
@pytest.mark.parametrize("name", PUBLISHED)
def test_every_tensor_of_a_published_checkpoint_is_accounted_for(name, rotary):
    config = ReadConfig.preset(PUBLISHED[name])
    tensors = load_manifest(name, optional=rotary)
    ledger = engine.settle(checkpoint_table(config), tensors, name)
    buffers = config.llama.num_layers if rotary else 0
    assert len(ledger.allowed) == buffers
    assert len(ledger.used) + buffers == len(tensors)


@pytest.mark.parametrize("name, preset", [("336_vision", "read-7b"), ("vision", "lisa-7b")])
def test_every_tensor_of_clip_is_accounted_for(name, preset):
    tensors = load_manifest(f"clip_vit_large_patch14_{name}")
    ledger = engine.settle(clip.table(ReadConfig.preset(preset).clip), tensors, name)
    assert ledger.reasons() == {
        "CLIP layers after the hidden state that LLaVA reads": 16,
        "CLIP's final norm: after the hidden state LLaVA reads": 2,
    }


@pytest.mark.parametrize("size", ["b", "l", "h"])
def test_sam_files_are_accounted_for_and_their_geometry_found(size):
    tensors = {sam.PREFIX + key: value for key, value in load_manifest(f"sam_vit_{size}").items()}
    config = sam.infer_config(tensors, "SAM")
    assert config == SamConfig.preset(f"vit_{size}")
    ledger = engine.settle(sam.table(config), tensors, "SAM")
    assert len(ledger.used) == len(tensors)


@pytest.mark.parametrize("size", ["7b", "13b"])
def test_every_tensor_of_llava_is_accounted_for(size):
    config = ReadConfig.preset(f"read-{size}")
    small = llama.LlamaConfig(**{**config.llama.to_dict(), "vocab_size": 32000})
    tables = (llama.table(small), projector.table(config), llama.head_table(small))
    table = engine.Table(
        tuple(row for t in tables for row in t.rows), tuple(entry for t in tables for entry in t.allowed)
    )
    tensors = load_manifest(f"llava_v1.5_{size}")
    ledger = engine.settle(table, tensors, "LLaVA")
    assert len(ledger.used) + config.llama.num_layers == len(tensors)


def test_all_manifests_are_readable():
    assert len(list(FOLDER.glob("*.json"))) == 11
    for file in FOLDER.glob("*.json"):
        assert load_manifest(file.stem)


@pytest.mark.parametrize("preset", READ_PRESETS)
def test_tables_fill_exactly_the_parameters_of_the_model(preset):
    config = ReadConfig.preset(preset)
    model = nnx.eval_shape(lambda: Read(config, rngs=nnx.Rngs(0)))
    wanted = {
        ".".join(map(str, k)): tuple(v.shape) for k, v in nnx.to_flat_state(nnx.state(model, nnx.Param))
    }
    assert {path: leaf.shape for path, leaf in model_leaves(config).items()} == wanted


@pytest.mark.parametrize("depth", [1, 3])
def test_deeper_projectors_follow_the_sequential_numbering(depth):
    config = ReadConfig.preset("read-7b").replace(projector=f"mlp{depth}x_gelu")
    keys = [row.key for row in projector.table(config).rows if row.key.endswith("weight")]
    assert keys == [f"model.mm_projector.{2 * i}.weight" for i in range(depth)]


def test_a_tied_head_has_no_leaf_and_its_tensor_is_allowed():
    config = ReadConfig.preset("read-7b")
    tied = llama.LlamaConfig(**{**config.llama.to_dict(), "tie_word_embeddings": True})
    table = llama.head_table(tied)
    assert not table.rows and table.allowed[0].matches("lm_head.weight")


RANKS = {"linear": 2, "row": 2, "grid": 4, "patches": 4, "conv": 4, "transposed_conv": 4, "same": 3}


@hypothesis.given(
    name=st.sampled_from(sorted(engine.TRANSFORMS)),
    sizes=st.lists(st.integers(1, 5), min_size=4, max_size=4),
    seed=st.integers(0, 99),
)
def test_every_transform_is_inverted_exactly(name, sizes, seed):
    shape = tuple(sizes[: RANKS[name]])
    if name in ("row", "grid"):
        shape = (1, *shape[1:])
    row = engine.Row("key", "path", name, shape)
    values = np.random.default_rng(seed).random(shape)
    ours = row.forward(values)
    assert ours.shape == row.slice_shape
    np.testing.assert_array_equal(row.inverse(ours), values)


def test_patches_are_flattened_row_then_column_then_channel():
    values = np.arange(2 * 3 * 4 * 5).reshape(2, 3, 4, 5)  # out, in, rows, columns
    ours = engine.Row("k", "p", "patches", values.shape).forward(values)
    assert ours[(1 * 5 + 2) * 3 + 1, 0] == values[0, 1, 1, 2]


def test_transposed_convolution_keeps_its_four_axes():
    values = np.arange(2 * 3 * 2 * 2).reshape(2, 3, 2, 2)  # in, out, rows, columns
    ours = engine.Row("k", "p", "transposed_conv", values.shape).forward(values)
    assert ours.shape == (2, 2, 2, 3) and ours[1, 0, 1, 2] == values[1, 2, 0, 1]


def test_a_leaf_filled_twice_or_not_fully_is_refused():
    first = engine.Row("a", "p", "same", (2,), index=0, count=2)
    with pytest.raises(AssertionError, match="exactly once"):
        engine.leaves(engine.Table((first,)))
    with pytest.raises(AssertionError, match="exactly once"):
        engine.leaves(engine.Table((first, engine.Row("b", "p", "same", (2,), index=0, count=2))))
    with pytest.raises(AssertionError, match="more than once"):
        engine.leaves(engine.Table((first, engine.Row("a", "q", "same", (2,)))))


def test_no_leaf_of_any_preset_is_missed_or_filled_twice():
    for preset in READ_PRESETS:
        table = model_table(ReadConfig.preset(preset))
        assert sum(len(leaf.rows) for leaf in engine.leaves(table).values()) == len(table.rows)


def test_sam_of_an_impossible_shape_is_refused():
    tensors = {sam.PREFIX + key: value for key, value in load_manifest("sam_vit_b").items()}
    tensors[sam.PREFIX + "image_encoder.pos_embed"].shape = (64, 64)
    with pytest.raises(CheckpointError, match="no SAM has"):
        sam.infer_config(tensors, "SAM")
