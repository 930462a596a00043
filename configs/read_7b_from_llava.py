"""READ-7B from LLaVA-1.5-7B and SAM ViT-H, without SESAME in between.

Expected: no score of its own was published; read_7b_reasonseg is the measure. Rank 64 and the dice weight 4
are what the released 7B settings say for this start.

Start: LLaVA-1.5-7B converted with `--sam sam_vit_h_4b8939.pth` to models/llava-1.5-7b.
"""

from read_jax.training.config import recipe


def get_config():
    config = recipe("read_7b_reasonseg")
    config.start.model = "models/llava-1.5-7b"
    config.lora.rank = 64
    config.lora.alpha = 128.0
    config.losses.dice = 4.0
    return config
