"""What `convert` writes is an Orbax checkpoint, and damage to it is noticed."""

from __future__ import annotations

import json
import shutil
import subprocess
import sys

import jax
import jax.numpy as jnp
import numpy as np
import orbax.checkpoint as ocp
import pytest
from flax import nnx
from hypothesis import given
from hypothesis import strategies as st

from read_jax.errors import CheckpointError, ConfigError
from read_jax.models.read import Read
from read_jax.weights import convert, inspect, load_config, load_params, store
from read_jax.weights.checkpoint import flatten, model_leaves
from read_jax.weights.engine import Leaf, Row, leaves
from tests.weights import synthetic
from tests.weights.synthetic import read_state, write_clip, write_read_checkpoint

# wide enough for leaves of several chunks, layer by layer
SIZES = synthetic.Sizes(hidden=1032, heads=12, inter=1100)


@pytest.fixture(scope="module")
def folders(tmp_path_factory):
    root = tmp_path_factory.mktemp("folders")
    source = write_read_checkpoint(root / "x", sizes=SIZES)
    convert(source, write_clip(root / "clip", sizes=SIZES), root / "model", sasp="off")
    return root


@pytest.fixture(scope="module")
def small(tmp_path_factory):
    root = tmp_path_factory.mktemp("small")
    source = write_read_checkpoint(root / "x")
    convert(source, write_clip(root / "clip"), root / "model", sasp="off")
    return root / "model"


def wanted(state):
    """A few leaves computed by hand from the upstream tensors."""

    def layers(name):
        return np.stack([state[f"model.layers.{i}.{name}.weight"].numpy().T for i in range(SIZES.layers)])

    points = "model.visual_model.prompt_encoder.point_embeddings"
    return {
        "llama.embed_tokens.embedding": state["model.embed_tokens.weight"].numpy(),
        "llama.layers.mlp.gate_proj.kernel": layers("mlp.gate_proj"),
        "llama.layers.attn.q_proj.kernel": layers("self_attn.q_proj"),
        "llama.lm_head.kernel": state["lm_head.weight"].numpy().T,
        "sam.prompt_encoder.point_embeddings": np.concatenate(
            [state[f"{points}.{i}.weight"].numpy() for i in range(4)]
        ),
    }


@pytest.mark.parametrize("restore", [ocp.StandardCheckpointer, ocp.PyTreeCheckpointer])
def test_stock_orbax_restores_it_without_being_told_anything(folders, restore):
    params = flatten(restore().restore(folders / "model" / "params"))
    assert set(params) == set(model_leaves(load_config(folders / "model")))
    for path, value in wanted(read_state(folders / "x")).items():
        np.testing.assert_array_equal(params[path], value)


def test_load_params_gives_jax_arrays_of_the_models_own_tree(folders):
    model = folders / "model"
    params = load_params(model)
    abstract = nnx.eval_shape(lambda: Read(load_config(model), rngs=nnx.Rngs(0)))
    expected = {".".join(map(str, k)): v.shape for k, v in nnx.to_flat_state(nnx.state(abstract, nnx.Param))}
    assert {k: v.shape for k, v in flatten(params).items()} == expected
    assert all(isinstance(v, jax.Array) and v.dtype == jnp.float32 for v in flatten(params).values())


def test_load_params_casts(small):
    params = load_params(small, dtype=jnp.bfloat16)
    exact = load_params(small)
    for path, value in flatten(params).items():
        assert value.dtype == jnp.bfloat16
        np.testing.assert_array_equal(value, flatten(exact)[path].astype(jnp.bfloat16))


def test_parts_of_a_model_are_restored_alone(small):
    whole = flatten(load_params(small))
    parts = flatten(load_params(small, dtype=jnp.bfloat16, only=("sam.mask_decoder", "text_projection.fc1")))
    assert {*parts} == {
        path for path in whole if path.startswith(("sam.mask_decoder.", "text_projection.fc1."))
    }
    for path, value in parts.items():
        np.testing.assert_array_equal(value, whole[path].astype(jnp.bfloat16))
    with pytest.raises(ConfigError, match=r"no part 'sam\.mask'; it has .*sam\.mask_decoder"):
        load_params(small, only=("sam.mask",))


SHARDED = """
import sys, json, jax, numpy as np, jax.numpy as jnp
from jax.sharding import NamedSharding, PartitionSpec
from read_jax.weights import load_params, load_config
from read_jax.weights.checkpoint import abstract_params, flatten
model = sys.argv[1]
mesh = jax.make_mesh((2, 4), ("fsdp", "tensor"))
def spec(leaf):
    names = [None] * len(leaf.shape)
    for axis, name in ((-1, "tensor"), (-2, "fsdp")):
        if len(leaf.shape) >= -axis and leaf.shape[axis] % mesh.shape[name] == 0:
            names[axis] = name
    return NamedSharding(mesh, PartitionSpec(*names))
target = abstract_params(load_config(model), jnp.float32)
shardings = jax.tree.map(spec, target)
whole, sharded = flatten(load_params(model)), flatten(load_params(model, jnp.bfloat16, shardings))
for path, value in sharded.items():
    assert value.sharding == flatten(shardings)[path], path
    np.testing.assert_array_equal(np.asarray(value), np.asarray(whole[path].astype(jnp.bfloat16)))
kernel = sharded["llama.layers.mlp.gate_proj.kernel"]
print(json.dumps([len(jax.devices()), kernel.shape, kernel.addressable_shards[0].data.shape]))
"""


def test_it_restores_onto_eight_devices_with_a_cast(folders):
    import os

    flags = {"XLA_FLAGS": "--xla_force_host_platform_device_count=8", "JAX_PLATFORMS": "cpu"}
    command = [sys.executable, "-c", SHARDED, str(folders / "model")]
    done = subprocess.run(command, env={**os.environ, **flags}, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr
    assert json.loads(done.stdout.splitlines()[-1]) == [8, [2, 1032, 1100], [2, 516, 275]]


def test_shardings_must_cover_the_tree(small):
    with pytest.raises(ValueError, match=r"no entry for clip\.class_embed"):
        load_params(small, shardings={"llama": {}})


def test_large_stacked_leaves_are_stored_layer_by_layer_in_small_chunks():
    row = Row("k.0", "p", "linear", (11008, 4096), index=0, count=2)
    rows = (row, Row("k.1", "p", "linear", (11008, 4096), index=1, count=2))
    (leaf,) = leaves(type("T", (), {"rows": rows})).values()
    chunks = store.chunk_shape(leaf, 2)
    assert chunks[0] == 1 and np.prod(chunks) * 2 <= store.CHUNK_BYTES
    assert chunks == (1, 2048, 1376)


@given(st.data())
def test_no_shard_touches_more_chunks_than_were_reserved_for_it(data):
    shards = data.draw(st.tuples(*(st.integers(1, 16) for _ in range(3))))
    parts = data.draw(st.tuples(st.integers(1, 6), st.integers(1, 2000), st.integers(1, 2000)))
    shape = tuple(n * part for n, part in zip(shards, parts, strict=True))
    chunks = data.draw(st.tuples(*(st.integers(1, size) for size in shape)))
    touched = 2
    for n, part, chunk in zip(shards, parts, chunks, strict=True):
        start = part * data.draw(st.integers(0, n - 1))
        touched *= (-(-(start + part) // chunk) - start // chunk) * chunk
    assert touched <= store.bytes_to_read(shape, parts, chunks, 2)


def test_leaves_whose_size_no_chunk_divides_are_written_exactly(tmp_path):
    values = np.random.default_rng(0).random((1501, 2003)).astype(np.float32)
    row = Row("k", "p.x", "linear", values.shape)
    writer = store.ParamsWriter(
        tmp_path / "params", {"p.x": Leaf("p.x", (2003, 1501), (row,))}, np.dtype(np.float32)
    )
    writer.write("p.x", None, row.forward(values))
    writer.finish()
    assert len(list((tmp_path / "params" / "p.x").glob("[0-9]*"))) > 1
    np.testing.assert_array_equal(store.read_slice(tmp_path / "params", "p.x", None), values.T)


def test_a_leaf_that_was_not_filled_is_a_bug_and_said_so(tmp_path):
    leaf = Leaf("p", (2,), (Row("k", "p", "same", (2,)),))
    writer = store.ParamsWriter(tmp_path / "params", {"p": leaf}, np.dtype(np.float32))
    with pytest.raises(AssertionError, match="not filled"):
        writer.finish()


class TestDamage:
    @pytest.fixture
    def model(self, small, tmp_path):
        return shutil.copytree(small, tmp_path / "model")

    @pytest.fixture(params=[load_config, load_params, inspect])
    def reader(self, request):
        return request.param

    def test_no_such_folder(self, tmp_path, reader):
        with pytest.raises(CheckpointError, match="no model folder"):
            reader(tmp_path / "none")

    def test_no_config(self, model, reader):
        (model / "config.json").unlink()
        with pytest.raises(CheckpointError, match=r"no config\.json"):
            reader(model)

    @pytest.mark.parametrize("text", ["", "{", "[1]", '{"read_jax_version": "1", "format": 1}'])
    def test_a_damaged_config(self, model, reader, text):
        (model / "config.json").write_text(text)
        with pytest.raises(CheckpointError):
            reader(model)

    def test_a_hugging_face_folder_says_to_convert_it(self, model, reader):
        (model / "config.json").write_text('{"model_type": "llava"}')
        with pytest.raises(CheckpointError, match="convert it first"):
            reader(model)

    def test_a_newer_format(self, model, reader):
        data = json.loads((model / "config.json").read_text())
        (model / "config.json").write_text(json.dumps({**data, "format": 2}))
        with pytest.raises(CheckpointError, match="format 2"):
            reader(model)

    def test_an_unknown_config_key_is_named(self, model, reader):
        data = json.loads((model / "config.json").read_text())
        data["config"]["llama"]["hiden_size"] = 3
        (model / "config.json").write_text(json.dumps(data))
        with pytest.raises(CheckpointError, match="hiden_size"):
            reader(model)

    @pytest.mark.parametrize("reader", [load_params, inspect])
    @pytest.mark.parametrize(
        "damage, message",
        [
            (lambda p: shutil.rmtree(p), "no _METADATA"),
            (lambda p: (p / "_METADATA").unlink(), "no _METADATA"),
            (lambda p: shutil.rmtree(p / "llama.norm.scale"), "llama.norm.scale is missing"),
            (lambda p: (p / "llama.norm.scale" / "0").unlink(), "lacks chunk 0"),
            (lambda p: (p / "llama.norm.scale" / "0").write_bytes(b"abc"), "has 3 bytes, not 64"),
            (lambda p: (p / "llama.norm.scale" / ".zarray").write_text("{"), "unreadable"),
        ],
    )
    def test_damaged_parameters(self, model, reader, damage, message):
        damage(model / "params")
        with pytest.raises(CheckpointError, match=message):
            reader(model)

    def test_a_config_of_another_model(self, model):
        data = json.loads((model / "config.json").read_text())
        data["config"]["llama"]["intermediate_size"] = 25
        (model / "config.json").write_text(json.dumps(data))
        with pytest.raises(CheckpointError, match=r"config\.json says"):
            load_params(model)


def test_a_checkpoint_that_says_it_is_sesame_has_no_points_unless_asked(tmp_path):
    source, clip = write_read_checkpoint(tmp_path / "x", kind="sesame"), write_clip(tmp_path / "clip")
    convert(source, clip, tmp_path / "m")
    assert not load_config(tmp_path / "m").sasp.enabled
