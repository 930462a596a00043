"""Everything a training run needs before its first update, made from its configuration."""

from __future__ import annotations

import dataclasses
import hashlib
from collections.abc import Callable
from pathlib import Path
from typing import Any

import jax
import numpy as np
import optax
from flax import nnx
from jax.sharding import AbstractMesh, Mesh, NamedSharding

from read_jax.config import ReadConfig
from read_jax.data.mixture import Mixture, load_mixture
from read_jax.data.packing import Packer
from read_jax.data.pipeline import TrainingLoader
from read_jax.data.prompts import templates_named
from read_jax.data.sources import load_source
from read_jax.errors import ConfigError
from read_jax.processes import batch_shares, check_shared, from_equals, is_first, together, wait_for_all
from read_jax.sharding import (
    batch_devices,
    batch_sharding,
    make_mesh,
    on_mesh,
    parameter_shardings,
    replicated,
    tree_shardings,
)
from read_jax.text.tokenizer import Tokenizer
from read_jax.training.checkpoint import digest, named_leaves
from read_jax.training.config import DataConfig, TrainConfig
from read_jax.training.features import open_features
from read_jax.training.lora import add_adapters
from read_jax.training.objective import LossWeights
from read_jax.training.optimizer import make_optimizer
from read_jax.training.scratch import check_scratch, write_scratch
from read_jax.training.step import (
    StepConfig,
    TrainState,
    init_state,
    is_chosen,
    make_train_step,
    split_model,
)
from read_jax.training.validation import Validator
from read_jax.weights.checkpoint import UPSTREAM, ModelRecord, load_record, model_folder, model_leaves
from read_jax.weights.model import load_model

START = "start"


@dataclasses.dataclass(frozen=True)
class Run:
    """The parts of a run.

    model_config: the architecture, with the run's point settings. frozen: parameters that stay. step: gives,
    for the number of updates done, the compiled function (state, frozen, batch) -> (state, metrics), which
    reuses the state's memory. loader: of the training data. sharding: of a batch's arrays. shares: into which
    the processes divide a batch. validator: None without validation. prefix_ids: tokens before every
    question. identity: what a checkpoint belongs to. description: in words.
    """

    model_config: ReadConfig
    frozen: Any
    step: Callable[[int], Callable[[Any, Any, Any], tuple[Any, dict[str, Any]]]]
    loader: TrainingLoader
    sharding: NamedSharding
    shares: int
    validator: Validator | None
    prefix_ids: np.ndarray
    identity: dict[str, Any]
    description: str


def prepare(config: TrainConfig, workdir: Path) -> tuple[Run, TrainState]:
    """Open the data, load the model, and put the step together; nothing is compiled yet.

    Returns the run's parts, and the state before the first update.

    Raises `ConfigError`, `DataError` or `CheckpointError`.
    """
    mesh = make_mesh(config.mesh)
    abreast, shared = batch_devices(mesh), batch_sharding(mesh)
    part = config.data.global_batch // config.step.micro_batches
    check_shares(config, mesh)

    mixture = make_mixture(config.data)
    folder, record = base_model(config, mixture, workdir)
    model_config = record.config.replace(sasp=config.start.sasp_config(record.config.sasp))
    features = open_features(config, folder, model_config, mixture)
    tokenizer = Tokenizer.load(folder / UPSTREAM)
    packer = Packer(model_config, tokenizer, config.data.template, config.data.limits)
    model = load_model(
        folder,
        dtype=config.dtype,
        config=model_config,
        float32=lambda path: is_chosen(config.trainable, path),
        shardings=parameter_shardings(
            model_config, {path: leaf.shape for path, leaf in model_leaves(model_config).items()}, mesh
        ),
    )
    if config.lora:
        add_adapters(model.llama, config.lora, nnx.Rngs(config.start.seed))
    graphdef, params, frozen = split_model(model, config.trainable)
    params = from_equals(tree_shardings(params, mesh), params)  # the adapters
    del model
    optimizer = make_optimizer(config.optimizer)
    state = init_state(params, optimizer, config.step)
    places = tree_shardings(state, mesh)
    state = from_equals(places, state)

    def compiled(weights: LossWeights) -> Callable[..., Any]:
        return jit_step(
            graphdef,
            optimizer,
            packer.prefix_ids,
            packer.image_start,
            weights,
            config.step,
            mesh=mesh,
            places=places,
        )

    whole = compiled(config.losses)
    early = compiled(config.losses.without_masks()) if config.masks_from else whole
    validator = None
    if config.validation.dataset:
        source = load_source(config.validation.dataset, config.data.data_dir)
        batch = config.validation.batch or part
        validator = Validator(
            source,
            packer,
            graphdef,
            batch=-(-batch // abreast) * abreast,
            sharding=shared,
            abreast=abreast,
            limit=config.validation.limit,
            pictures=config.validation.pictures,
            max_bad_share=config.data.max_bad_share,
        )
    share = batch_shares(shared)[jax.process_index()]
    loader = TrainingLoader(
        mixture,
        packer,
        config.data.global_batch,
        host_index=share.index,
        host_count=share.count,
        workers=config.data.workers,
        buffer=config.data.buffer,
        max_bad_share=config.data.max_bad_share,
        features=features,
    )
    learned, kept = (sum(leaf.size for leaf in jax.tree.leaves(part)) for part in (params, frozen))
    run = Run(
        model_config=model_config,
        frozen=frozen,
        step=lambda updates: early if updates < config.masks_from else whole,
        loader=loader,
        sharding=shared,
        shares=share.count,
        validator=validator,
        prefix_ids=packer.prefix_ids,
        identity={
            "config": config.trajectory(),
            "base": {
                "path": str(folder),
                "fingerprint": record.fingerprint,
                "tokenizer": _digest(folder / UPSTREAM / "tokenizer.model"),
                "frozen": digest(named_leaves(frozen)),
            },
        },
        description=(
            f"training {learned:,} of {learned + kept:,} parameters from {folder} on {mesh.size} "
            f"{mesh.devices.flat[0].device_kind} device(s), {_shape(mesh)}"
        ),
    )
    return run, state


def check_shares(config: TrainConfig, mesh: Mesh | AbstractMesh) -> None:
    """Raise `ConfigError` when the devices of a mesh cannot share every part of a batch evenly, or its
    processes the making of it."""
    if isinstance(mesh, Mesh):
        batch_shares(batch_sharding(mesh))
    pictures, parts, abreast = config.data.global_batch, config.step.micro_batches, batch_devices(mesh)
    if pictures % (parts * abreast) == 0:
        return
    suited = [n for n in range(1, pictures + 1) if pictures % (n * abreast) == 0]
    way = (
        f"step.micro_batches can be {', '.join(map(str, suited))}"
        if suited
        else (f"data.global_batch must be a multiple of {abreast}")
    )
    raise ConfigError(
        f"{abreast} devices (data x fsdp of the mesh) cannot share {parts} micro-batches of "
        f"{pictures} pictures in all evenly: {way}."
    )


def jit_step(
    graphdef: Any,
    optimizer: optax.GradientTransformation,
    prefix_ids: np.ndarray,
    image_start: int,
    weights: LossWeights,
    config: StepConfig,
    *,
    mesh: Mesh,
    places: Any,
) -> Callable[..., Any]:
    """`make_train_step` for a mesh, to be compiled when it is first called.

    places: of the state, which leaves as it came: one program for the whole run, in the same memory.
    """
    step = make_train_step(graphdef, optimizer, prefix_ids, image_start, weights, config, batch_devices(mesh))
    return together(jax.jit(on_mesh(step, mesh), donate_argnums=0, out_shardings=(places, replicated(mesh))))


def make_mixture(data: DataConfig) -> Mixture:
    """The training data; raises `ConfigError` when none are named, `DataError` when they cannot be opened."""
    if not data.mixture and not data.rates:
        raise ConfigError("data names neither a mixture nor rates of sources: there is nothing to train on.")
    return load_mixture(
        data.mixture or data.rates,
        data.data_dir,
        false_premises=data.false_premises,
        templates=templates_named(data.templates),
        compat=data.compat,
        seed=data.seed,
        questions_per_image=data.questions,
    )


def base_model(config: TrainConfig, mixture: Mixture, workdir: Path) -> tuple[Path, ModelRecord]:
    """The model folder to start from; for a new model, made in the workdir if it is not there yet."""
    start = config.start
    if start.scratch is None and not start.model:
        raise ConfigError("start names no model folder: set start.model (or start.scratch, a new model).")
    folder = model_folder(start.model).absolute() if start.model else workdir / START
    workdir.mkdir(parents=True, exist_ok=True)
    check_shared(workdir)
    if start.scratch is not None and is_first() and not folder.exists():
        write_scratch(folder, start, mixture, config.data.template, workers=config.data.workers)
    wait_for_all("the model to start from")
    record = load_record(folder)
    if start.scratch is not None:
        check_scratch(folder, record, start)
    return folder, record


def _shape(mesh: Mesh) -> str:
    return " x ".join(f"{axis} {size}" for axis, size in mesh.shape.items())


def _digest(path: Path) -> str:
    return hashlib.sha256(path.read_bytes()).hexdigest()
