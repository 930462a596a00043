"""The programs that a run compiles, over abstract arrays: nothing is loaded, nothing is held."""

from __future__ import annotations

import dataclasses
import math
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple, cast

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from jax.sharding import Mesh

from read_jax.config import READ_PRESETS, ReadConfig, SamConfig
from read_jax.data.packing import batch_examples
from read_jax.errors import ConfigError
from read_jax.models.read import Read
from read_jax.sharding import batch_sharding, parameter_shardings, tree_shardings
from read_jax.training.config import TrainConfig
from read_jax.training.lora import add_adapters
from read_jax.training.optimizer import make_optimizer
from read_jax.training.run import check_shares, jit_step
from read_jax.training.step import TrainState, init_state, split_model
from read_jax.weights.checkpoint import is_model_folder, load_config

PROMPT_TOKENS = 36
"""Before the image, of the published models' tokenizer and the template llava_v1, <im_start> included."""


@dataclasses.dataclass(frozen=True)
class Setup:
    """A training run in the abstract.

    config: of the run; model: the architecture, with the run's point settings; graphdef, params, frozen:
    the model's structure, trainable leaves and frozen leaves.
    """

    config: TrainConfig
    model: ReadConfig
    graphdef: Any
    params: Any
    frozen: Any

    def with_step(self, **changes: Any) -> Setup:
        """The same with other values in `config.step`."""
        step = dataclasses.replace(self.config.step, **changes)
        return dataclasses.replace(self, config=dataclasses.replace(self.config, step=step))

    def with_batch(self, pictures: int) -> Setup:
        """The same with so many pictures in an update, in one part."""
        data = dataclasses.replace(self.config.data, global_batch=pictures)
        step = dataclasses.replace(self.config.step, micro_batches=1)
        return dataclasses.replace(self, config=dataclasses.replace(self.config, data=data, step=step))


class Program(NamedTuple):
    """A jitted function, and abstract arguments for it that are placed on a mesh."""

    function: Callable[..., Any]
    arguments: tuple[Any, ...]


def architecture(config: TrainConfig, preset: str | None = None) -> ReadConfig:
    """Of the model that a run starts from; the folder need not be there if its name tells.

    preset: "read-7b" and the like; None: by the run's own new model, its folder, or the folder's name.
    Raises `ConfigError` when none of them tells.
    """
    start = config.start
    if preset:
        return ReadConfig.preset(preset)
    if start.scratch is not None:
        return start.scratch
    folder = Path(start.model).expanduser()
    if is_model_folder(folder) or start.model == "nano":
        return load_config(start.model)
    name = folder.name.replace("llava-1.5-", "sesame-")  # the same parts, before they were trained
    match = re.fullmatch(r"(\w+-\d+b)(?:-sam-([blh]))?", name)
    if not match or match[1] not in READ_PRESETS:
        raise ConfigError(
            f"no model folder at {start.model!r}, and its name tells no architecture: say which with "
            f"--model, one of {', '.join(READ_PRESETS)}."
        )
    model = ReadConfig.preset(match[1])
    sam = {"b": "vit_b", "l": "vit_l", "h": "vit_h"}.get(match[2] or "")
    return model.replace(sam=SamConfig.preset(cast(Any, sam))) if sam else model


def set_up(config: TrainConfig, model: ReadConfig) -> Setup:
    """A run that starts from such a model; raises `ConfigError` for one that reads the encoders' features."""
    if config.data.features:
        raise ConfigError("a plan is of a step that runs the encoders: leave data.features empty.")
    model = model.replace(sasp=config.start.sasp_config(model.sasp))
    kind = jnp.dtype(config.dtype)

    def build() -> Read:
        module = Read(model, dtype=kind, param_dtype=kind, rngs=nnx.Rngs(0))
        if config.lora:
            add_adapters(module.llama, config.lora, nnx.Rngs(0))
        return module

    graphdef, params, frozen = split_model(nnx.eval_shape(build), config.trainable)
    params = jax.tree.map(lambda x: jax.ShapeDtypeStruct(x.shape, jnp.float32), params)
    return Setup(config, model, graphdef, params, frozen)


def prefix_length(config: ReadConfig) -> int:
    """Tokens before every question."""
    return PROMPT_TOKENS + config.clip.num_image_tokens + config.use_im_start_end


def train_program(setup: Setup, mesh: Mesh) -> Program:
    """One update.

    Raises `ConfigError` when the mesh cannot share the model or the batch.
    """
    config, model = setup.config, setup.model
    check_mesh(setup, mesh)
    state = abstract_state(setup, mesh)
    step = jit_step(
        setup.graphdef,
        make_optimizer(config.optimizer),
        np.zeros(prefix_length(model), np.int32),
        PROMPT_TOKENS,
        config.losses,
        config.step,
        mesh=mesh,
        places=jax.tree.map(lambda leaf: leaf.sharding, state),
    )
    return Program(step, (state, placed(setup.frozen, mesh), abstract_batch(setup, mesh)))


def check_mesh(setup: Setup, mesh: Mesh) -> None:
    """Raise `ConfigError` when the mesh cannot share the batch evenly, or the heads."""
    check_shares(setup.config, mesh)
    shapes = {
        ".".join(map(str, path)): leaf.shape
        for part in (setup.params, setup.frozen)
        for path, leaf in nnx.to_flat_state(part)
    }
    parameter_shardings(setup.model, shapes, mesh)


def abstract_state(setup: Setup, mesh: Mesh) -> TrainState:
    """What an update changes."""
    optimizer = make_optimizer(setup.config.optimizer)
    return placed(jax.eval_shape(lambda p: init_state(p, optimizer, setup.config.step), setup.params), mesh)


def abstract_batch(setup: Setup, mesh: Mesh) -> Any:
    """A batch of the run's shapes."""
    pictures, place = setup.config.data.global_batch, batch_sharding(mesh)
    one = batch_examples([None], setup.model, setup.config.data.limits)
    return jax.tree.map(
        lambda x: jax.ShapeDtypeStruct((pictures, *np.shape(x)[1:]), np.asarray(x).dtype, sharding=place), one
    )


def placed(tree: Any, mesh: Mesh) -> Any:
    """Abstract arrays with their places on a mesh."""
    return jax.tree.map(
        lambda x, place: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=place),
        tree,
        tree_shardings(tree, mesh),
    )


def bytes_per_device(tree: Any) -> float:
    """Of abstract arrays with places."""
    leaves = jax.tree.leaves(tree)
    return float(
        sum(math.prod(leaf.sharding.shard_shape(leaf.shape)) * leaf.dtype.itemsize for leaf in leaves)
    )
