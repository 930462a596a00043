"""Ablation of SAM's size: ViT-L.

Expected (the paper's ablation): ReasonSeg val gIoU 60.1, cIoU 65.2. Everything else is read_7b_reasonseg.

Start: SESAME-7B converted with `--sam sam_vit_l_0b3195.pth` to models/sesame-7b-sam-l.
"""

from read_jax.training.config import recipe


def get_config():
    config = recipe("read_7b_reasonseg")
    config.start.model = "models/sesame-7b-sam-l"
    return config
