"""The smallest model there is, as a folder, and batches of drawn scenes for it."""

from __future__ import annotations

from pathlib import Path

import numpy as np

from read_jax.data.mixture import load_mixture
from read_jax.data.packing import Limits, Packer
from read_jax.text.tokenizer import Tokenizer
from read_jax.weights.checkpoint import UPSTREAM, load_config
from read_jax.weights.convert import convert
from tests.weights.synthetic import moderate, write_clip, write_read_checkpoint

SCENES = {"scenes|train": 1.0}
LIMITS = Limits(questions=3, tokens=320, mask_canvas=(48, 64))


def write_model(folder: Path, dtype: str = "float32", seed: int = 0) -> Path:
    """A model folder: READ with random weights, pictures of 64 pixels for SAM."""
    source = write_read_checkpoint(folder / "source", format="safetensors-single", scale=moderate, seed=seed)
    clip = write_clip(folder / "clip", scale=moderate, seed=seed + 1)
    convert(source, clip, folder / "model", dtype=dtype, sasp="7b")
    return folder / "model"


def packer_of(model: Path, limits: Limits = LIMITS) -> Packer:
    """A packer of the model's own tokens."""
    return Packer(load_config(model), Tokenizer.load(model / UPSTREAM), limits=limits)


def scenes_batch(packer: Packer, pictures: int, seed: int = 0):
    """The first examples of the scenes."""
    mixture = load_mixture(SCENES, seed=seed, questions_per_image=packer.limits.questions)
    return packer.batch([mixture.draw(k, packer.pack)[0] for k in range(pictures)])


def separate(batch):
    """The same questions as a batch of one question per picture; places without a question are padding."""
    questions = batch.has_mask.shape[1]

    def repeat(x):
        return np.repeat(x, questions, axis=0)

    def own(x):
        return x.reshape(-1, 1, *x.shape[2:])

    kept = batch._replace(
        **{
            name: own(getattr(batch, name))
            for name in ("question_ids", "labels", "lengths", "seg_at", "has_mask", "exists", "masks")
        },
        **{name: repeat(getattr(batch, name)) for name in ("mask_size", "clip_pixels", "sam_pixels")},
        geometry=batch.geometry._replace(
            **{name: repeat(getattr(batch.geometry, name)) for name in batch.geometry._fields[:-1]},
            sasp=type(batch.geometry.sasp)(*map(repeat, batch.geometry.sasp)),
        ),
    )
    return kept._replace(valid=repeat(batch.valid) & (kept.lengths[:, 0] > 0))
