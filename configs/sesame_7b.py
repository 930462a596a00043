"""A baseline in SESAME's style: [SEG] alone prompts SAM; false premises are part of the training.

Expected: no score of such a run is in the paper; read_7b_fprefcoco's scores are what points add to it.

Start: LLaVA-1.5-7B converted with `--sam sam_vit_h_4b8939.pth` to models/llava-1.5-7b.
"""

from read_jax.training.config import recipe


def get_config():
    config = recipe("read_7b_from_llava")
    config.start.sasp = "off"
    config.data.mixture = "referseg"
    config.validation.dataset = "fprefcoco|val"
    config.validation.limit = 500
    return config
