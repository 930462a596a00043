"""From a model folder to the `Read` module with its parameters."""

from __future__ import annotations

from pathlib import Path

from flax import nnx

from read_jax.errors import CheckpointError, ConfigError
from read_jax.models.read import Read
from read_jax.weights.checkpoint import flatten, load_config, load_params


def load_model(model_dir: str | Path, *, dtype: str | None = None) -> Read:
    """The model of a folder made by `read-jax convert`.

    Args:
        model_dir: the folder.
        dtype: "float32" or "bfloat16" to compute and keep parameters in; None: as stored.

    Raises:
        CheckpointError: the folder is missing, incomplete or corrupt.
        ConfigError: an unknown dtype.
    """
    if dtype not in (None, "float32", "bfloat16"):
        raise ConfigError(f"dtype must be 'float32' or 'bfloat16', not {dtype!r}.")
    config = load_config(model_dir)
    leaves = flatten(load_params(model_dir, dtype=dtype))
    kind = next(iter(leaves.values())).dtype
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
