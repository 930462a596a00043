"""LLaVA's `mm_projector`: one Linear, or a Sequential of Linear and GELU."""

from __future__ import annotations

from read_jax.config import ReadConfig
from read_jax.weights.engine import Table, expand, linear


def table(config: ReadConfig) -> Table:
    """CLIP's width to the language model's; in the Sequential the activations take the odd numbers."""
    width, out = config.clip.hidden_size, config.llama.hidden_size
    if config.projector == "linear":
        return Table(tuple(expand("model.", "projector.", linear("mm_projector", "layers.0", width, out))))
    specs = (
        spec
        for i in range(config.projector_depth)
        for spec in linear(str(2 * i), f"layers.{i}", width if i == 0 else out, out)
    )
    return Table(tuple(expand("model.mm_projector.", "projector.", specs)))
