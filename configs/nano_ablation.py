"""What Similarity as Points is worth to the nano model: its masks learned anew, in a few hundred updates.

`tests/benchmarks/ablation.py` runs it with points off, at whole cells, and moved to their expectation, three
seeds each, from a nano model that answers and points but whose mask decoder, prompt encoder and projection
are new: `start.model` names it. (The shipped one, which stands there otherwise, draws its masks already.)

Expected: measured on 300 pictures of scenes|test, right answers given, questions whose target exists, mean
and deviation of three seeds, gIoU / cIoU: off 35.6 ± 1.5 / 39.9 ± 1.2, discrete 68.3 ± 0.3 / 67.1 ± 0.6,
continuous 68.3 ± 0.3 / 67.2 ± 0.7.
"""

from ml_collections import ConfigDict

from read_jax.training.config import StartConfig, recipe


def get_config() -> ConfigDict:
    config = recipe("nano_scenes")
    config.start = ConfigDict(StartConfig(model="nano").to_dict())
    config.masks_from = 0
    config.data.rates = {"scenes|train": 1.0}
    config.optimizer.learning_rate = 1e-3
    config.optimizer.warmup_updates = 20
    config.optimizer.total_updates = 200
    config.step.ema_decay = 0.98
    config.validation.every = 200
    config.checkpoints.every = 200
    return config
