"""From a run's checkpoint to a model folder: trained parameters in their places, adapters merged."""

from __future__ import annotations

import json
import shutil
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import jax
import numpy as np

from read_jax.errors import CheckpointError, ConfigError
from read_jax.training.checkpoint import FOLDER, best_of, quiet, read_leaves, read_meta, reason, scores_in
from read_jax.training.config import TrainConfig
from read_jax.weights import store
from read_jax.weights.checkpoint import (
    PARAMS,
    UPSTREAM,
    ModelRecord,
    check_content,
    load_record,
    model_folder,
    model_leaves,
)
from read_jax.weights.engine import Row
from read_jax.weights.model import save_model


def finish(
    workdir: str | Path,
    output: str | Path,
    *,
    step: int | None = None,
    best: bool = False,
    average: bool = False,
    dtype: str | None = None,
    base: str | Path | None = None,
    overwrite: bool = False,
) -> ModelRecord:
    """Write a checkpoint as a model folder, which `read_jax.load` and `read-jax export` take.

    Args:
        workdir: of the run.
        output: the model folder to make.
        step: updates after which; None: the newest checkpoint.
        best: the checkpoint that the run kept for its score, `checkpoints.best`, with the parameters that
            were scored: the moving average, where the run kept one.
        average: the moving average of the parameters instead of the last ones.
        dtype: "float32" or "bfloat16"; None: as the base is stored.
        base: where the model folder is now that training started from, if it was moved.
        overwrite: replace an existing model folder.

    Raises `CheckpointError` when there is no such checkpoint, or it or the base is damaged, or another.
    """
    folder = Path(workdir).expanduser().absolute() / FOLDER
    steps = sorted(int(f.name) for f in folder.glob("*") if f.name.isdigit())
    if not steps or (step is not None and step not in steps):
        what = f"after {step} updates" if steps else "at all"
        raise CheckpointError(
            f"{folder} holds no checkpoint {what}; there: {', '.join(map(str, steps)) or 'none'}."
        )
    if best:
        score = _kept_for(workdir)
        step = best_of(scores_in(folder, score))
        if step is None:
            raise CheckpointError(f"no checkpoint in {folder} was scored: there is no {score} of any.")
    chosen = folder / str(steps[-1] if step is None else step)
    meta = read_meta(chosen)
    identity = meta["identity"]
    try:
        model_dir = model_folder(base or identity["base"]["path"])
    except CheckpointError as error:
        if base is not None:
            raise
        raise CheckpointError(
            f"{workdir} was trained from {identity['base']['path']}, which is not on this machine: say with "
            "--base where that model folder is now."
        ) from error
    record = load_record(model_dir)
    if record.fingerprint != identity["base"]["fingerprint"]:
        raise CheckpointError(
            f"{model_dir} is not the model that {workdir} was trained from: its fingerprint is "
            f"{record.fingerprint}, not {identity['base']['fingerprint']}."
        )
    check_content(model_dir)
    config = TrainConfig.from_dict(identity["config"])
    average = average or (best and config.step.ema_decay > 0)
    trained = _trained(chosen, meta, "ema" if average else "params")
    if not trained:
        raise CheckpointError(f"{chosen} holds no moving average: the run kept none (step.ema_decay 0).")
    scale = config.lora.scale if config.lora else 0.0
    known = model_leaves(record.config)
    strange = [path for path in trained if path not in known and not path.endswith((".lora_a", ".lora_b"))]
    if strange:
        raise CheckpointError(f"{chosen} holds parameters the model does not know: {', '.join(strange[:5])}.")

    def read(row: Row) -> np.ndarray:
        def of(values: np.ndarray) -> np.ndarray:
            return values if row.index is None else values[row.index]

        value = (
            of(trained[row.path])
            if row.path in trained
            else store.read_slice(model_dir / PARAMS, row.path, row.index)
        )
        module = row.path.removesuffix(".kernel")
        if row.path.endswith(".kernel") and f"{module}.lora_a" in trained:
            a, b = (of(trained[f"{module}.{half}"]) for half in ("lora_a", "lora_b"))
            value = np.asarray(value, np.float32) + np.float32(scale) * (a @ b)
        return value

    return save_model(
        output,
        record.config.replace(sasp=config.start.sasp_config(record.config.sasp)),
        dtype or record.dtype,
        {**record.source, "trained_updates": meta["step"], "base_fingerprint": record.fingerprint},
        read,
        lambda upstream: shutil.copytree(model_dir / UPSTREAM, upstream) and None,
        inputs=[model_dir],
        overwrite=overwrite,
    )


def _kept_for(workdir: str | Path) -> str:
    """The score that the run keeps its best checkpoint for."""
    file = Path(workdir).expanduser() / "config.json"
    try:
        config = TrainConfig.from_dict(json.loads(file.read_bytes()))
    except (OSError, ValueError, ConfigError) as error:
        raise CheckpointError(f"{file} does not tell what the run was: {reason(error)}") from error
    if config.checkpoints.best is None:
        raise CheckpointError(f"the run in {workdir} kept no best checkpoint: set checkpoints.best for that.")
    return config.checkpoints.best


def _trained(checkpoint: Path, meta: Mapping[str, Any], part: str) -> dict[str, np.ndarray]:
    """The trained leaves by their dotted path in the model."""
    import orbax.checkpoint as ocp

    names = [name for name in meta["checksums"] if name.startswith(f"{part}.")]
    if not names:
        return {}
    here = jax.sharding.SingleDeviceSharding(jax.devices("cpu")[0])
    try:
        with quiet(), ocp.PyTreeCheckpointer() as checkpointer:
            stored = checkpointer.metadata(checkpoint / "state").item_metadata.tree
        abstract = {
            name: jax.ShapeDtypeStruct(stored[name].shape, stored[name].dtype, sharding=here)
            for name in names
        }
        leaves = read_leaves(checkpoint, abstract, meta["checksums"])
    except (ValueError, OSError, KeyError, AttributeError) as error:  # Orbax gives None for what is not there
        raise CheckpointError(f"the checkpoint {checkpoint} is damaged: {reason(error)}") from error
    return {name.removeprefix(f"{part}."): np.asarray(leaf) for name, leaf in leaves.items()}
