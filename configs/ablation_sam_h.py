"""Ablation of SAM's size: ViT-H.

Expected (the paper's ablation): ReasonSeg val gIoU 59.8, cIoU 67.6. Everything else is read_7b_reasonseg.

Start: SESAME-7B converted with `--sam sam_vit_h_4b8939.pth` to models/sesame-7b-sam-h.
"""

from read_jax.training.config import recipe


def get_config():
    config = recipe("read_7b_reasonseg")
    config.start.model = "models/sesame-7b-sam-h"
    return config
