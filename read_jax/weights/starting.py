"""What a plain LLaVA lacks to become READ: rows for the added tokens, and a [SEG] projection.

The original's training starts the same way: new vocabulary rows near the mean of the present ones,
projection layers as torch initialises a Linear. Fixed seeds: the same source gives the same model.
"""

from __future__ import annotations

import math
from pathlib import Path

import numpy as np

from read_jax.weights.sources import Tensor

_SEED = 0
EMBED, HEAD = "model.embed_tokens.weight", "lm_head.weight"
PROJECTION = "model.text_hidden_fcs.0."
_BLOCK = 1024  # rows averaged at a time, to stay small


def extend_rows(tensor: Tensor, rows: int, deviation: float) -> Tensor:
    """`tensor` [V, D] with rows appended up to `rows`: the mean of the present ones + N(0, deviation)."""
    seed = [_SEED, *tensor.key.encode()]
    count, width = tensor.shape

    def read() -> np.ndarray:
        values = tensor.read()
        total = np.zeros(width, np.float64)
        for start in range(0, count, _BLOCK):
            total += values[start : start + _BLOCK].astype(np.float32).sum(0, dtype=np.float64)
        noise = np.random.default_rng(seed).normal(0.0, deviation, (rows - count, width))
        result = np.empty((rows, width), tensor.dtype)
        result[:count] = values
        result[count:] = (total / count + noise).astype(tensor.dtype)
        return result

    return Tensor(tensor.key, (rows, width), tensor.dtype, tensor.origin, read)


def new_projection(width: int, out: int) -> dict[str, Tensor]:
    """Fresh `text_hidden_fcs` weights (D -> D -> C) by upstream key, as torch draws a Linear's."""
    shapes = {"0.weight": (width, width), "0.bias": (width,), "2.weight": (out, width), "2.bias": (out,)}

    def tensor(name: str, shape: tuple[int, ...]) -> Tensor:
        key, bound = PROJECTION + name, 1.0 / math.sqrt(width)

        def read() -> np.ndarray:
            draws = np.random.default_rng([_SEED, *key.encode()])
            return draws.uniform(-bound, bound, shape).astype(np.float32)

        return Tensor(key, shape, np.dtype(np.float32), Path(), read)

    return {PROJECTION + name: tensor(name, shape) for name, shape in shapes.items()}
