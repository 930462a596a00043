"""READ-7B on false premises: the training of read_7b_refcoco, scored by what the model answers itself.

Expected (the paper's main results): FP-RefCOCO val See accuracy 82.87, cIoU 61.50; FP-RefCOCO+ cIoU 54.54;
FP-RefCOCOg cIoU 56.12; with `read-jax evaluate --compat read --mode generate --dataset 'fprefcoco|val'`, and
so on.
"""

from read_jax.training.config import recipe


def get_config():
    config = recipe("read_7b_refcoco")
    config.validation.dataset = "fprefcoco|val"
    return config
