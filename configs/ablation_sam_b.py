"""Ablation of SAM's size: ViT-B.

Expected (the paper's ablation): ReasonSeg val gIoU 55.6, cIoU 61.9. Everything else is read_7b_reasonseg.

Start: SESAME-7B converted with `--sam sam_vit_b_01ec64.pth` to models/sesame-7b-sam-b.
"""

from read_jax.training.config import recipe


def get_config():
    config = recipe("read_7b_reasonseg")
    config.start.model = "models/sesame-7b-sam-b"
    return config
