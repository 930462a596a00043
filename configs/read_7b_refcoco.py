"""READ-7B on referring segmentation and false premises, from SESAME-7B.

Expected (the paper's main results): val cIoU of RefCOCO 78.1, RefCOCO+ 68.4, RefCOCOg 70.1; with
`read-jax evaluate --compat read --mode forced --dataset 'refcoco|val'`, and so on.

Start: SESAME-7B converted to models/sesame-7b.
"""

from read_jax.training.config import default_config


def get_config():
    config = default_config()
    config.start.model = "models/sesame-7b"
    config.start.sasp = "7b"
    config.data.mixture = "referseg"
    config.data.data_dir = "data"
    config.data.compat = "read"
    config.data.global_batch = 160
    config.step.micro_batches = 20
    config.optimizer.schedule = "deepspeed"
    config.validation.dataset = "refcoco|val"
    config.validation.limit = 500
    config.checkpoints.best = "ciou"
    return config
