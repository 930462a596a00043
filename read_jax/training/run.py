"""Everything a training run needs before its first update, made from its configuration."""

from __future__ import annotations

import dataclasses
import hashlib
from collections.abc import Callable
from pathlib import Path
from typing import Any

import jax
import numpy as np
from flax import nnx
from jax.sharding import NamedSharding, PartitionSpec

from read_jax.config import ReadConfig
from read_jax.data.mixture import Mixture, load_mixture
from read_jax.data.packing import Packer
from read_jax.data.pipeline import TrainingLoader
from read_jax.data.sources import load_source
from read_jax.errors import ConfigError
from read_jax.text.tokenizer import Tokenizer
from read_jax.training.config import DataConfig, TrainConfig
from read_jax.training.lora import add_adapters
from read_jax.training.optimizer import make_optimizer
from read_jax.training.scratch import write_scratch
from read_jax.training.step import TrainState, init_state, is_chosen, make_train_step, split_model
from read_jax.training.validation import Validator
from read_jax.weights.checkpoint import UPSTREAM, ModelRecord, load_record
from read_jax.weights.model import load_model

START = "start"


@dataclasses.dataclass(frozen=True)
class Run:
    """The parts of a run.

    model_config: the architecture, with the run's point settings. frozen: parameters that stay. step: the
    compiled function (state, frozen, batch) -> (state, metrics), which reuses the state's memory. loader: of
    the training data. sharding: of a batch's arrays. validator: None without validation. prefix_ids: tokens
    before every question. identity: what a checkpoint belongs to. description: in words.
    """

    model_config: ReadConfig
    frozen: Any
    step: Callable[[Any, Any, Any], tuple[Any, dict[str, Any]]]
    loader: TrainingLoader
    sharding: NamedSharding
    validator: Validator | None
    prefix_ids: np.ndarray
    identity: dict[str, Any]
    description: str


def prepare(config: TrainConfig, workdir: Path) -> tuple[Run, TrainState]:
    """Open the data, load the model, and put the step together; nothing is compiled yet.

    Returns the run's parts, and the state before the first update.

    Raises `ConfigError`, `DataError` or `CheckpointError`.
    """
    devices = jax.devices()
    part = config.data.global_batch // config.step.micro_batches
    if part % len(devices):
        raise ConfigError(
            f"{len(devices)} devices cannot share micro-batches of {part} pictures (global_batch "
            f"{config.data.global_batch}, micro_batches {config.step.micro_batches}) evenly."
        )
    mesh = jax.make_mesh((len(devices),), ("data",), axis_types=(jax.sharding.AxisType.Auto,))
    everywhere, shared = (NamedSharding(mesh, PartitionSpec(*axes)) for axes in ((), ("data",)))

    mixture = make_mixture(config.data)
    folder, record = base_model(config, mixture, workdir)
    sasp = config.start.sasp_config()
    model_config = record.config.replace(sasp=sasp) if sasp else record.config
    tokenizer = Tokenizer.load(folder / UPSTREAM)
    packer = Packer(model_config, tokenizer, config.data.template, config.data.limits)
    model = load_model(
        folder,
        dtype=config.dtype,
        config=model_config,
        float32=lambda path: is_chosen(config.trainable, path),
        shardings=everywhere,
    )
    if config.lora:
        add_adapters(model.llama, config.lora, nnx.Rngs(config.start.seed))
    graphdef, params, frozen = split_model(model, config.trainable)
    params = jax.device_put(params, everywhere)
    del model
    optimizer = make_optimizer(config.optimizer)
    state = jax.device_put(init_state(params, optimizer, config.step), everywhere)
    step = make_train_step(
        graphdef, optimizer, packer.prefix_ids, packer.image_start, config.losses, config.step, len(devices)
    )
    validator = None
    if config.validation.dataset:
        source = load_source(config.validation.dataset, config.data.data_dir)
        batch = config.validation.batch or part
        validator = Validator(
            source,
            packer,
            graphdef,
            batch=-(-batch // len(devices)) * len(devices),
            sharding=shared,
            abreast=len(devices),
            limit=config.validation.limit,
            pictures=config.validation.pictures,
        )
    loader = TrainingLoader(
        mixture,
        packer,
        config.data.global_batch,
        workers=config.data.workers,
        buffer=config.data.buffer,
        max_bad_share=config.data.max_bad_share,
    )
    learned, kept = (sum(leaf.size for leaf in jax.tree.leaves(part)) for part in (params, frozen))
    run = Run(
        model_config=model_config,
        frozen=frozen,
        step=jax.jit(step, donate_argnums=0, out_shardings=everywhere),
        loader=loader,
        sharding=shared,
        validator=validator,
        prefix_ids=packer.prefix_ids,
        identity={
            "config": config.trajectory(),
            "base": {
                "path": str(folder),
                "fingerprint": record.fingerprint,
                "tokenizer": _digest(folder / UPSTREAM / "tokenizer.model"),
            },
        },
        description=(
            f"training {learned:,} of {learned + kept:,} parameters from {folder} on {len(devices)} "
            f"{devices[0].device_kind} device(s)"
        ),
    )
    return run, state


def make_mixture(data: DataConfig) -> Mixture:
    """The training data; raises `ConfigError` when none are named, `DataError` when they cannot be opened."""
    if not data.mixture and not data.rates:
        raise ConfigError("data names neither a mixture nor rates of sources: there is nothing to train on.")
    made_up = {} if data.false_premises else {"premises": {}}
    return load_mixture(
        data.mixture or data.rates,
        data.data_dir,
        **made_up,
        compat=data.compat,
        seed=data.seed,
        questions_per_image=data.questions,
    )


def base_model(config: TrainConfig, mixture: Mixture, workdir: Path) -> tuple[Path, ModelRecord]:
    """The model folder to start from; for a new model, made in the workdir if it is not there yet."""
    start = config.start
    if start.scratch is None and not start.model:
        raise ConfigError("start names no model folder: set start.model (or start.scratch, a new model).")
    folder = Path(start.model).expanduser().absolute() if start.model else workdir / START
    workdir.mkdir(parents=True, exist_ok=True)
    if start.scratch is not None and not folder.exists():
        write_scratch(folder, start, mixture, config.data.template)
    return folder, load_record(folder)


def _digest(path: Path) -> str:
    return hashlib.sha256(path.read_bytes()).hexdigest()
