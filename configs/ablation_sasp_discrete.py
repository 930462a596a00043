"""Ablation of Similarity as Points: points at whole cells, without the differentiable shift.

Expected (the paper's ablation): ReasonSeg val gIoU 56.4, cIoU 64.6. Everything else is read_7b_reasonseg.
"""

from read_jax.training.config import recipe


def get_config():
    config = recipe("read_7b_reasonseg")
    config.start.continuous = False
    return config
