"""Meshes, names of dimensions, and the place of every parameter. Nothing here needs more than one device."""

from __future__ import annotations

import dataclasses
import fnmatch
import math

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from flax import nnx
from hypothesis import given
from hypothesis import strategies as st
from jax.sharding import AbstractMesh, PartitionSpec
from jax.tree_util import tree_leaves_with_path

from read_jax.config import READ_PRESETS, ReadConfig, SamConfig
from read_jax.errors import ConfigError
from read_jax.models.read import Read
from read_jax.sharding import (
    AXES,
    RULES,
    TABLE,
    MeshConfig,
    batch_devices,
    constrain,
    constrain_parameters,
    device_grid,
    logical_axes,
    make_mesh,
    on_mesh,
    parameter_sharding,
    parameter_shardings,
    spec,
    tree_shardings,
)
from read_jax.training.config import TINY
from read_jax.training.lora import ATTENTION, TARGETS, LoraConfig, add_adapters
from read_jax.training.optimizer import OptimizerConfig, make_optimizer
from read_jax.weights.checkpoint import model_leaves

LARGE = 4 << 20
"""Bytes from which an array must not be whole on every device."""


def mesh_of(data=1, fsdp=1, tensor=1):
    return AbstractMesh((data, fsdp, tensor), AXES)


def shapes_of(config, rank=64):
    """Shapes of a model's parameters by path, with adapters everywhere."""
    shapes = {path: leaf.shape for path, leaf in model_leaves(config).items()}
    for name in TARGETS:
        layer = f"llama.layers.{'attn' if name in ATTENTION else 'mlp'}.{name}"
        depth, inputs, outputs = shapes[f"{layer}.kernel"]
        shapes[f"{layer}.lora_a"] = depth, inputs, rank
        shapes[f"{layer}.lora_b"] = depth, rank, outputs
    return shapes


@pytest.mark.parametrize("tensor", [1, 2, 4])
@pytest.mark.parametrize("fsdp", [16, 64])
@pytest.mark.parametrize("name", READ_PRESETS)
def test_every_parameter_of_a_published_model_divides_and_no_large_one_is_left_whole(name, fsdp, tensor):
    config = ReadConfig.preset(name)
    shapes = shapes_of(config)
    places = parameter_shardings(config, shapes, mesh_of(fsdp=fsdp, tensor=tensor))
    assert set(places) == set(shapes)
    shards = {path: math.prod(places[path].shard_shape(shape)) for path, shape in shapes.items()}
    for path, shape in shapes.items():
        assert math.prod(shape) * 4 <= LARGE or shards[path] * fsdp <= math.prod(shape), path
    total = sum(map(math.prod, shapes.values()))
    # the language model, nine tenths of it all, is shared by tensor too
    assert sum(shards.values()) < 1.1 * total / fsdp * (0.85 / tensor + 0.15)


@pytest.mark.parametrize("size", ["vit_b", "vit_l"])
def test_smaller_image_encoders_divide_too(size):
    config = ReadConfig.preset("read-7b").replace(sam=SamConfig.preset(size))
    assert parameter_shardings(config, shapes_of(config), mesh_of(fsdp=16, tensor=4))


def test_a_model_is_placed_by_the_paths_of_its_own():
    def make():
        model = Read(TINY, rngs=nnx.Rngs(0))
        add_adapters(model.llama, LoraConfig(rank=8, targets=TARGETS), nnx.Rngs(0))
        return model

    mesh = mesh_of(data=2, fsdp=2, tensor=2)
    _, state = nnx.split(nnx.eval_shape(make))
    places = nnx.to_flat_state(tree_shardings(state, mesh))
    by_path = {".".join(map(str, path)): leaf.get_value() for path, leaf in places}
    assert by_path == parameter_shardings(TINY, shapes_of(TINY, 8), mesh)


def test_every_rule_is_of_use():
    moments = make_optimizer(OptimizerConfig(name="muon")).init({"kernel": jnp.zeros((2, 2))})
    of_muon = [jax.tree_util.keystr(path[-1:], simple=True) for path, _ in tree_leaves_with_path(moments)]
    found = [*shapes_of(ReadConfig.preset("read-7b")), *of_muon]
    for pattern, names in RULES:
        assert any(fnmatch.fnmatchcase(path, pattern) for path in found), pattern
        assert names == "..." or set(names.split()) <= set(TABLE)


def test_heads_and_channels_are_shared_by_tensor_and_widths_by_fsdp():
    mesh = mesh_of(data=2, fsdp=4, tensor=2)

    def place(path, *shape):
        return parameter_sharding(path, shape, mesh).spec

    assert place("llama.layers.attn.k_proj.kernel", 2, 64, 32) == PartitionSpec(None, "fsdp", "tensor")
    assert place("llama.layers.mlp.down_proj.kernel", 2, 96, 64) == PartitionSpec(None, "tensor", "fsdp")
    assert place("llama.lm_head.kernel", 64, 32003) == PartitionSpec(("fsdp", "tensor"))
    assert place("llama.norm.scale", 64) == PartitionSpec()


def test_what_follows_a_parameter_lies_where_it_does():
    params = {"llama": {"lm_head": {"kernel": jax.ShapeDtypeStruct((64, 101), jnp.float32)}}}
    state = jax.eval_shape(optax.adamw(1e-3).init, params)
    mesh = mesh_of(fsdp=8)
    wanted = tree_shardings(params, mesh)["llama"]["lm_head"]["kernel"]
    assert wanted.spec == PartitionSpec("fsdp")
    moments = tree_shardings(state, mesh)[0]
    assert moments.mu["llama"]["lm_head"]["kernel"] == wanted
    assert moments.nu["llama"]["lm_head"]["kernel"] == wanted
    assert moments.count.spec == PartitionSpec()


def test_what_does_not_divide_is_named_with_shape_and_axis():
    with pytest.raises(
        ConfigError,
        match=r"llama\.layers\.mlp\.up_proj\.kernel \[32, 4096, 11008\].*axis 2 \(mlp: 11008\).*tensor 3",
    ):
        parameter_sharding("llama.layers.mlp.up_proj.kernel", (32, 4096, 11008), mesh_of(tensor=3))


@pytest.mark.parametrize("heads", [{"num_kv_heads": 4}, {"num_heads": 12, "num_kv_heads": 12}])
def test_heads_are_not_cut_even_where_their_channels_would_divide(heads):
    config = ReadConfig.preset("read-7b")
    llama = dataclasses.replace(config.llama, **heads)
    shapes = {
        f"llama.layers.attn.{name}_proj.kernel": (32, 4096, count * 128)
        for name, count in (("q", llama.num_heads), ("k", llama.num_kv_heads))
    }
    with pytest.raises(ConfigError, match=rf"_proj\.kernel \[32, 4096, \d+\].*{min(heads.values())} heads"):
        parameter_shardings(config.replace(llama=llama), shapes, mesh_of(tensor=8))


@pytest.mark.parametrize("path", ["llama.layers.attn.gate.kernel", "sam.image_encoder.tokens"])
def test_a_parameter_that_no_rule_knows_is_named(path):
    with pytest.raises(ConfigError, match=f"{path} fits no rule"):
        logical_axes(path, 2)


def test_a_parameter_of_other_dimensions_than_its_rule_is_named():
    with pytest.raises(ConfigError, match=r"llama\.lm_head\.kernel has 3 dimensions"):
        logical_axes("llama.lm_head.kernel", 3)


@given(
    st.integers(1, 4),
    st.integers(1, 4),
    st.integers(1, 4),
    st.integers(1, 3),
    st.sampled_from([None, 0, 1, -1]),
)
def test_the_mesh_has_all_devices_or_is_refused(data, fsdp, tensor, slices, change):
    config = MeshConfig(data=data, fsdp=fsdp, tensor=tensor, slices=slices)
    needed = data * fsdp * tensor * slices
    if not change:
        assert config.shape(needed) == (data, fsdp, tensor)
        assert MeshConfig(fsdp=fsdp, tensor=tensor, slices=slices).shape(needed) == (data, fsdp, tensor)
    else:
        with pytest.raises(ConfigError, match=f"needs {needed} devices; there are {needed + change}"):
            config.shape(needed + change)


def test_a_rest_that_does_not_divide_is_refused():
    with pytest.raises(ConfigError, match="needs a multiple of 6 devices; there are 8"):
        MeshConfig(fsdp=3, tensor=2).shape(8)


@pytest.mark.parametrize("change", [{"fsdp": 0}, {"tensor": -1}, {"slices": 0}, {"data": 0}, {"data": -2}])
def test_a_mesh_of_nothing_is_refused(change):
    with pytest.raises(ConfigError):
        MeshConfig(**change)


@dataclasses.dataclass(frozen=True)
class Device:
    """Stands in for a device of a larger machine."""

    id: int
    process_index: int
    slice_index: int | None = None
    platform: str = "cpu"
    device_kind: str = "cpu"


def test_slices_lie_along_data_alone():
    devices = [Device(i, i // 4, slice_index=i // 8) for i in range(16)]
    grid = device_grid(MeshConfig(fsdp=4, tensor=2, slices=2), devices[::-1])
    assert grid.shape == (2, 4, 2)
    assert [{d.slice_index for d in part.flat} for part in grid] == [{0}, {1}]


def test_machines_without_slices_are_cut_at_their_processes():
    devices = [Device(i, i // 4) for i in range(8)]
    grid = device_grid(MeshConfig(fsdp=2, slices=2), devices)
    assert grid.shape == (4, 2, 1)
    assert [{d.process_index for d in part.flat} for part in np.split(grid, 2)] == [{0}, {1}]


def test_a_pod_of_slices_needs_a_mesh_of_slices():
    devices = [Device(i, i // 4, slice_index=i // 4, platform="tpu") for i in range(8)]
    with pytest.raises(ConfigError, match="in 2 slices, the mesh has 1"):
        device_grid(MeshConfig(fsdp=8), devices)


def test_axes_of_one_device_are_left_out():
    assert spec(("batch", None, "table"), mesh_of(data=8)) == PartitionSpec("data")
    assert spec(("batch",), mesh_of(2, 2, 2)) == PartitionSpec(("data", "fsdp"))
    assert spec(("embed", "heads"), mesh_of(data=8)) == PartitionSpec()


def test_pictures_are_shared_over_data_and_fsdp():
    assert batch_devices(mesh_of(2, 3, 4)) == 6


def test_without_a_mesh_nothing_is_said():
    x = jnp.ones((3, 2))
    assert constrain(x, "batch") is x
    assert constrain_parameters({"llama": x}) == {"llama": x}


def test_a_batch_that_does_not_divide_is_refused():
    def function(x):
        with jax.sharding.use_abstract_mesh(mesh_of(2, 2)):
            return constrain(x, "batch")

    with pytest.raises(ConfigError, match=r"\[6, 2\].*axis 0 \(batch: 6\).*data 2 x fsdp 2"):
        jax.eval_shape(function, jnp.ones((6, 2)))


def test_a_function_on_a_mesh_is_the_same_function():
    mesh = make_mesh(MeshConfig(), jax.devices()[:1])
    assert float(jax.jit(on_mesh(lambda x: constrain(2 * x, "batch").sum(), mesh))(jnp.ones(4))) == 8
