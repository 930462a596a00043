"""READ-7B fine-tuned on ReasonSeg alone.

Expected (the paper's main results): ReasonSeg val gIoU 62.3, cIoU 70.7.

Start: what read_7b_reasonseg gave (`read-jax merge`), in models/read-7b. The learning rate of fine-tuning is
the released one.
"""

from read_jax.training.config import recipe


def get_config():
    config = recipe("read_7b_reasonseg")
    config.start.model = "models/read-7b"
    config.data.mixture = ""
    config.data.rates = {"ReasonSeg|train": 1.0}
    config.optimizer.learning_rate = 1e-4
    return config
