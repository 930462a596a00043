"""Fill one of our modules from named arrays, for parity tests against the PyTorch implementations."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import jax.numpy as jnp
import numpy as np
from flax import nnx


def fill(make: Any, values: Mapping[str, np.ndarray]) -> Any:
    """The module `make()` with every parameter set from `values` (dotted paths); all must match."""
    graphdef, abstract = nnx.split(nnx.eval_shape(make))
    flat = {}
    left = dict(values)
    for path, variable in nnx.to_flat_state(abstract):
        name = ".".join(map(str, path))
        value = left.pop(name)
        assert value.shape == variable.shape, f"{name}: {value.shape} is not {variable.shape}"
        flat[path] = variable.replace(jnp.asarray(value))
    assert not left, f"values without a parameter: {sorted(left)}"
    return nnx.merge(graphdef, nnx.from_flat_state(flat))


def stacked(state: Mapping[str, Any], pattern: str, count: int, *, transpose: bool = False) -> np.ndarray:
    """One array per layer of a torch state dict, stacked; `pattern` holds `{i}`."""
    arrays = [state[pattern.format(i=i)].detach().numpy() for i in range(count)]
    return np.stack([a.T if transpose else a for a in arrays])


def assert_close(ours: Any, theirs: Any, relative: float = 1e-4) -> None:
    """Largest difference within `relative` of the largest magnitude."""
    ours, theirs = np.asarray(ours, np.float64), np.asarray(theirs, np.float64)
    assert ours.shape == theirs.shape, f"{ours.shape} is not {theirs.shape}"
    error, size = np.abs(ours - theirs).max(), np.abs(theirs).max()
    assert error <= relative * size, f"differs by {error:.3g} where the largest value is {size:.3g}"
