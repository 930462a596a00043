"""What every upstream tensor is called, and where it goes: one module per upstream family.

`model_table(config)` is all of a model: CLIP's folder and the checkpoint's own tensors (SAM's keys
carry the prefix they have inside a READ checkpoint; a SAM file of its own has them without).
"""

from __future__ import annotations

from read_jax.config import ReadConfig
from read_jax.weights.engine import Table
from read_jax.weights.tables import clip, llama, projector, sam, text_projection


def checkpoint_table(config: ReadConfig) -> Table:
    """The tensors of a READ checkpoint, in its own order: everything but CLIP."""
    parts = (
        llama.table(config.llama),
        projector.table(config),
        sam.table(config.sam),
        text_projection.table(config),
        llama.head_table(config.llama),
    )
    return Table(
        tuple(row for part in parts for row in part.rows),
        tuple(entry for part in parts for entry in part.allowed),
    )


def model_table(config: ReadConfig) -> Table:
    """Every tensor of a model: CLIP's, then the checkpoint's."""
    vision, rest = clip.table(config.clip), checkpoint_table(config)
    return Table((*vision.rows, *rest.rows), (*vision.allowed, *rest.allowed))
