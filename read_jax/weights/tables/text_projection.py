"""`text_hidden_fcs`: the two layers that turn a [SEG] state into SAM's prompt embedding."""

from __future__ import annotations

from read_jax.config import ReadConfig
from read_jax.weights.engine import Table, expand, linear


def table(config: ReadConfig) -> Table:
    """Hidden state -> hidden width -> prompt width."""
    width = config.llama.hidden_size
    specs = (
        *linear("0", "fc1", width, width),
        *linear("2", "fc2", width, config.prompt_dim),
    )
    return Table(tuple(expand("model.text_hidden_fcs.0.", "text_projection.", specs)))
