"""The nano model in five minutes on two CPU cores: long enough to see it learn, too short to learn much.

It is `nano_scenes` with a few lessons, the easiest scenes (two or three things, and their attributes) and
masks from the beginning.

Expected: no score is known yet.
"""

from ml_collections import ConfigDict

from read_jax.training.config import recipe


def get_config() -> ConfigDict:
    config = recipe("nano_scenes")
    config.start.teaching.updates = 150
    config.start.teaching.warmup_updates = 50
    config.masks_from = 0
    config.data.rates = {"scenes|train|1": 1.0}
    config.data.questions = 4
    config.optimizer.total_updates = 160
    config.optimizer.warmup_updates = 20
    config.step.ema_decay = 0.95
    config.validation.dataset = "scenes|val|1"
    config.validation.limit = 48
    config.validation.every = 80
    config.checkpoints.every = 80
    config.log.every = 10
    return config
