"""READ-7B on ReasonSeg, from SESAME-7B.

Expected (the paper's main results): ReasonSeg val gIoU 59.8, cIoU 67.6; test gIoU 58.5, cIoU 58.6. One run
gives both: `read-jax evaluate --compat read --dataset 'ReasonSeg|val'`, and `'ReasonSeg|test'`.

Start: SESAME-7B converted to models/sesame-7b. Points, rank, losses, schedule and learning rate are those of
the released 7B checkpoint; the batch of 160 pictures is this recipe's own choice.
"""

from read_jax.training.config import default_config


def get_config():
    config = default_config()
    config.start.model = "models/sesame-7b"
    config.start.sasp = "7b"
    config.data.mixture = "reasonseg"
    config.data.data_dir = "data"
    config.data.compat = "read"
    config.data.global_batch = 160
    config.step.micro_batches = 20
    config.optimizer.schedule = "deepspeed"
    config.validation.dataset = "ReasonSeg|val"
    config.checkpoints.best = "giou"
    return config
