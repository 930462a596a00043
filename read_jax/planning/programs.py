"""The programs that a run compiles, over abstract arrays: nothing is loaded, nothing is held."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from jax.sharding import AbstractMesh, Mesh, NamedSharding

from read_jax.config import ReadConfig
from read_jax.data.packing import Limits, batch_examples
from read_jax.errors import ConfigError
from read_jax.models.read import Read
from read_jax.sharding import batch_devices, batch_sharding, parameter_shardings, tree_shardings
from read_jax.training.config import TrainConfig
from read_jax.training.lora import add_adapters
from read_jax.training.objective import LossWeights
from read_jax.training.optimizer import make_optimizer
from read_jax.training.run import jit_step
from read_jax.training.step import init_state, is_chosen, split_model

PROMPT_TOKENS = 36
"""Before the image, of the published models' tokenizer and the template llava_v1, <im_start> included."""


class Program(NamedTuple):
    """A jitted function and abstract arguments for it, placed on a mesh."""

    name: str
    function: Callable[..., Any]
    arguments: tuple[Any, ...]


def prefix_length(config: ReadConfig) -> int:
    """Tokens before every question."""
    return PROMPT_TOKENS + config.clip.num_image_tokens + config.use_im_start_end


def train_program(config: TrainConfig, model: ReadConfig, mesh: Mesh) -> Program:
    """One update of a run that starts from such a model.

    Raises `ConfigError` when the mesh cannot share the model or the batch.
    """
    abreast = batch_devices(mesh)
    part = config.data.global_batch // config.step.micro_batches
    if part % abreast:
        raise ConfigError(
            f"{abreast} devices (data x fsdp of the mesh) cannot share micro-batches of {part} pictures "
            f"(global_batch {config.data.global_batch}, micro_batches {config.step.micro_batches}) evenly."
        )
    model = model.replace(sasp=config.start.sasp_config(model.sasp))
    graphdef, params, frozen = abstract_model(config, model, mesh)
    optimizer = make_optimizer(config.optimizer)
    state = jax.eval_shape(lambda p: init_state(p, optimizer, config.step), params)
    places = tree_shardings(state, mesh)
    prefix = np.zeros(prefix_length(model), np.int32)
    step = jit_step(
        graphdef, optimizer, prefix, PROMPT_TOKENS, config.losses, config.step, mesh=mesh, places=places
    )
    arguments = (placed(state, places), frozen, abstract_batch(config, model, batch_sharding(mesh)))
    return Program("train", step, arguments)


def abstract_model(config: TrainConfig, model: ReadConfig, mesh: Mesh) -> tuple[Any, Any, Any]:
    """(graphdef, trainable leaves, frozen leaves) as a run has them, on the mesh."""
    kind = jnp.dtype(config.dtype)

    def build() -> Any:
        module = Read(model, dtype=kind, param_dtype=kind, rngs=nnx.Rngs(0))
        if config.lora:
            add_adapters(module.llama, config.lora, nnx.Rngs(0))
        return module

    graphdef, params, frozen = split_model(nnx.eval_shape(build), config.trainable)
    shapes = {
        ".".join(map(str, path)): leaf.shape
        for part in (params, frozen)
        for path, leaf in nnx.to_flat_state(part)
    }
    parameter_shardings(model, shapes, mesh)  # for its checks of the heads
    params = jax.tree.map(lambda x: jax.ShapeDtypeStruct(x.shape, jnp.float32), params)
    return graphdef, *(placed(part, tree_shardings(part, mesh)) for part in (params, frozen))


def abstract_batch(config: TrainConfig, model: ReadConfig, place: NamedSharding) -> Any:
    """A batch of the run's shapes."""
    one, pictures = batch_examples([None], model, config.data.limits), config.data.global_batch
    return jax.tree.map(
        lambda x: jax.ShapeDtypeStruct((pictures, *np.shape(x)[1:]), np.asarray(x).dtype, sharding=place), one
    )


def placed(tree: Any, places: Any) -> Any:
    """Abstract arrays with their shardings."""
    return jax.tree.map(
        lambda x, place: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=place), tree, places
    )
