"""Ablation of Similarity as Points: continuous points, the full method.

Expected (the paper's ablation): ReasonSeg val gIoU 59.8, cIoU 67.6. Everything else is read_7b_reasonseg.
"""

from read_jax.training.config import recipe


def get_config():
    config = recipe("read_7b_reasonseg")
    config.start.continuous = True
    return config
