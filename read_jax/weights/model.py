"""Between a model folder and the `Read` module with its parameters."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import jax.numpy as jnp
import numpy as np
from flax import nnx

import read_jax
from read_jax.config import ReadConfig
from read_jax.errors import CheckpointError, ConfigError
from read_jax.models.read import Read
from read_jax.weights import checkpoint, store
from read_jax.weights.checkpoint import PARAMS, ModelRecord, flatten, load_params
from read_jax.weights.engine import Row
from read_jax.weights.folders import atomic_folder, check_output, check_space, fsync

DTYPES = {"float32": jnp.float32, "bfloat16": jnp.bfloat16}
_SPARE = 64 << 20  # for the small files


def load_model(
    model_dir: str | Path,
    *,
    dtype: str | None = None,
    config: ReadConfig | None = None,
    float32: Callable[[str], bool] = lambda path: False,
    shardings: Any = None,
) -> Read:
    """The model of a folder made by `read-jax convert`.

    Args:
        model_dir: the folder.
        dtype: "float32" or "bfloat16" to compute and keep parameters in; None: as stored.
        config: used instead of the folder's: the same parameters, other point settings.
        float32: whether the parameter at a dotted path is kept in float32, whatever is computed in.
        shardings: as for `load_params`; every array goes straight into its shards.

    Raises:
        CheckpointError: the folder is missing, incomplete or corrupt.
        ConfigError: an unknown dtype.
    """
    if dtype not in (None, *DTYPES):
        raise ConfigError(f"dtype must be 'float32' or 'bfloat16', not {dtype!r}.")
    record = checkpoint.load_record(model_dir)
    kind = DTYPES[dtype or record.dtype]
    config = config or record.config
    kinds = {path: jnp.float32 if float32(path) else kind for path in checkpoint.model_leaves(record.config)}
    leaves = flatten(load_params(model_dir, dtype=kinds, shardings=shardings))
    model = nnx.eval_shape(lambda: Read(config, dtype=kind, param_dtype=kind, rngs=nnx.Rngs(0)))
    graphdef, abstract = nnx.split(model)
    flat = {}
    for path, variable in nnx.to_flat_state(abstract):
        name = ".".join(map(str, path))
        leaf = leaves.pop(name, None)
        if leaf is None or leaf.shape != variable.shape:
            found = "missing" if leaf is None else f"of shape {leaf.shape}"
            raise CheckpointError(
                f"{model_dir}: parameter {name} is {found}, expected {variable.shape}; convert the model "
                "again."
            )
        flat[path] = variable.replace(leaf)
    if leaves:
        raise CheckpointError(
            f"{model_dir}: parameters the model does not know: {', '.join(sorted(leaves)[:5])}."
        )
    return nnx.merge(graphdef, nnx.from_flat_state(flat))


def save_model(
    output: str | Path,
    config: ReadConfig,
    dtype: str,
    source: Mapping[str, Any],
    read: Callable[[Row], np.ndarray],
    write_upstream: Callable[[Path], None],
    *,
    inputs: list[Path] | None = None,
    overwrite: bool = False,
) -> ModelRecord:
    """Write a model folder, slice by slice; it appears whole or not at all.

    Args:
        output: the folder to make.
        config: the architecture.
        dtype: "float32" or "bfloat16" to store.
        source: what it was made of, for the record.
        read: our slice of the parameter that a row of the table names, in any float type.
        write_upstream: fills the folder's upstream/, given its path.
        inputs: folders that are read meanwhile.
        overwrite: replace an existing model folder.

    Raises `CheckpointError` when the output cannot be written.
    """
    output = Path(output).expanduser()
    check_output(
        output,
        inputs or [],
        overwrite=overwrite,
        replaceable=checkpoint.is_model_folder,
        kind="a model folder of this package",
    )
    leaves, stored = checkpoint.model_leaves(config), np.dtype(store.DTYPES[dtype])
    check_space(output, store.stored_bytes(leaves, stored) + _SPARE)
    with atomic_folder(output) as folder:
        writer = store.ParamsWriter(folder / PARAMS, leaves, stored)
        for leaf in leaves.values():
            for row in leaf.rows:
                writer.write(row.path, row.index, np.asarray(read(row)).astype(stored, copy=False))
        fingerprint = writer.finish()
        write_upstream(folder / checkpoint.UPSTREAM)
        record = ModelRecord(
            config=config,
            dtype=dtype,
            source=dict(source),
            parameters=sum(math.prod(leaf.shape) for leaf in leaves.values()),
            fingerprint=fingerprint,
            version=read_jax.__version__,
        )
        record.save(folder)
        fsync(folder / checkpoint.CONFIG)
    return record
