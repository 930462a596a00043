"""A baseline in LISA's style: [SEG] alone prompts SAM, and every question is about something that is there.

Expected: ReasonSeg val gIoU 51.2, cIoU 57.6 is what the paper's ablation gives for [SEG] alone; it keeps the
false premises that are left out here.

Start: LLaVA-1.5-7B converted with `--sam sam_vit_h_4b8939.pth` to models/llava-1.5-7b. The groups have
the shares that they have in READ's own mixture.
"""

from read_jax.training.config import recipe


def get_config():
    config = recipe("read_7b_from_llava")
    config.start.sasp = "off"
    config.data.mixture = ""
    config.data.rates = {
        "ade20k|train": 2.0,
        "cocostuff|train": 2.0,
        "pascal_part|train": 2.0,
        "paco_lvis|train": 2.0,
        "mapillary|train": 2.0,
        "refclef|train": 0.25,
        "refcoco|train": 0.25,
        "refcoco+|train": 0.25,
        "refcocog|train": 0.25,
        "llava_instruct|train": 1.0,
        "ReasonSeg|train": 10.0,
    }
    config.data.false_premises = False
    return config
