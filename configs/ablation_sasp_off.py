"""Ablation of Similarity as Points: [SEG] alone, no points.

Expected (the paper's ablation): ReasonSeg val gIoU 51.2, cIoU 57.6. Everything else is read_7b_reasonseg.
"""

from read_jax.training.config import recipe


def get_config():
    config = recipe("read_7b_reasonseg")
    config.start.sasp = "off"
    return config
