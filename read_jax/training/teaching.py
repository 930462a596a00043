"""Lessons for a new vision tower, before a language model looks through it.

Published models begin with a CLIP that has seen hundreds of millions of pictures. A new one has seen none,
and a language model that looks through it stands still: it tells colours apart within minutes, shapes not
within hours. So the tower first learns on its own what drawn scenes show: every cell of its grid names the
thing it sees (shape, colour, size, pattern, or nothing), and points to its centre. The heads that name are
thrown away afterwards.
"""

from __future__ import annotations

import io
import json
import sys
import zipfile
from pathlib import Path
from typing import Any, NamedTuple, cast

import jax
import jax.numpy as jnp
import numpy as np
import optax
from flax import nnx

from read_jax.config import ClipVisionConfig
from read_jax.data.loader import ENDLESS, Loader, Notes
from read_jax.data.packing import Batch
from read_jax.data.scenes import Scenes
from read_jax.data.scenes.shapes import PATTERNS, SHAPES
from read_jax.data.scenes.world import COLOURS, SIZES
from read_jax.files import write_file
from read_jax.images.preprocess import clip_crop
from read_jax.models.clip import ClipVision, normalize_clip
from read_jax.training.config import TeachingConfig

Array = jax.Array

CLASSES = {
    "shape": tuple(SHAPES),
    "colour": tuple(COLOURS),
    "size": tuple(SIZES),
    "pattern": tuple(PATTERNS),
    "anything": ("no", "yes"),
}
_WEIGHTS = {"shape": 2.0, "colour": 1.0, "size": 1.0, "pattern": 1.0, "anything": 0.5}
_OUTPUTS = sum(map(len, CLASSES.values())) + 2  # and the way to the centre
_SEEN, _UNSEEN = 0.25, 0.02
"""A cell that a thing covers more than the first shows it; one covered less than the second shows nothing."""
_EXAM_SEED, _EXAM_PICTURES = 2**63, 128
_EVERY = 250  # updates between two saves


class Lesson(NamedTuple):
    """Pictures, and what every cell of the grid shows.

    pixels: uint8 [B, s, s, 3]; classes: int8 [B, N, 5], in the order of `CLASSES`, -1 where there is nothing
    to learn; centres: float32 [B, N, 2], the way to the centre of the cell's thing, in quarters of the side.
    """

    pixels: np.ndarray
    classes: np.ndarray
    centres: np.ndarray


def make_lesson(scenes: Scenes, index: int, config: ClipVisionConfig) -> Lesson:
    """Scene number `index`, without the leading B."""
    drawing = scenes.drawing(index)
    image, labels, things = drawing.image(), drawing.labels(), drawing.scene.things
    height, width = labels.shape
    side, grid = min(height, width), config.grid_size
    top, left = (height - side) // 2, (width - side) // 2
    square = labels[top : top + side, left : left + side]
    average = _averages(side, grid)
    cover = np.stack([average @ (square == k).astype(np.float32) @ average.T for k in range(len(things))])
    nearest, amount = cover.argmax(axis=0), cover.max(axis=0)

    classes = np.full((grid, grid, len(CLASSES)), -1, np.int8)
    for at, name in enumerate(("shape", "colour", "size", "pattern")):
        said = np.array([CLASSES[name].index(getattr(thing, name)) for thing in things], np.int8)
        classes[..., at] = np.where(amount > _SEEN, said[nearest], -1)
    classes[..., -1] = np.where(amount > _SEEN, 1, np.where(amount < _UNSEEN, 0, -1))

    centre = np.array([[thing.x / 64 - left, thing.y / 64 - top] for thing in things], np.float32) / side
    cells = (np.arange(grid, dtype=np.float32) + 0.5) / grid
    here = np.stack(np.meshgrid(cells, cells), axis=-1)  # x, y
    way = 4 * (centre[nearest] - here)
    pixels = clip_crop(image, config.image_size)
    return Lesson(pixels, classes.reshape(grid**2, -1), way.reshape(grid**2, 2).astype(np.float32))


def teach_vision(
    clip: ClipVision, config: TeachingConfig, save: Path, *, workers: int = 0, buffer: int = 2
) -> dict[str, float]:
    """Teach the tower, in place.

    Args:
        clip: the tower.
        config: how long, and how.
        save: file that keeps what was learned so far: interrupted, the lessons go on from there. It may be
            deleted afterwards.
        workers, buffer: as for `TrainingLoader`.

    Returns:
        The share of cells named rightly in pictures not seen in the lessons, by the names of `CLASSES`.
    """
    from tqdm import tqdm

    graphdef, tower = nnx.split(clip)
    width = clip.config.hidden_size
    heads = jax.random.normal(jax.random.key(config.seed), (width, _OUTPUTS)) * width**-0.5
    params = {"tower": tower, "heads": heads, "bias": jnp.zeros(_OUTPUTS)}
    rate = optax.schedules.join_schedules(
        [
            optax.schedules.linear_schedule(0.0, config.learning_rate, config.warmup_updates),
            optax.schedules.constant_schedule(config.learning_rate),
            optax.schedules.linear_schedule(config.learning_rate, 0.0, config.updates // 2),
        ],
        [config.warmup_updates, config.updates - config.updates // 2],
    )
    optimizer = optax.chain(optax.clip_by_global_norm(1.0), optax.adam(rate, b2=0.98))
    state = (params, optimizer.init(params))

    def loss(params: Any, lesson: Lesson) -> tuple[Array, Array]:
        features = nnx.merge(graphdef, params["tower"], copy=True)(normalize_clip(lesson.pixels))
        features = features[:, -lesson.classes.shape[1] :]
        features *= jax.lax.rsqrt(jnp.mean(jnp.square(features), axis=-1, keepdims=True) + 1e-6)
        return _loss(features @ params["heads"] + params["bias"], lesson)

    def update(state: Any, lesson: Lesson) -> tuple[Any, Array]:
        params, moments = state
        (value, _), gradients = jax.value_and_grad(loss, has_aux=True)(params, lesson)
        updates, moments = optimizer.update(gradients, moments, params)
        return (optax.apply_updates(params, updates), moments), value

    update = jax.jit(update, donate_argnums=0)
    exam = jax.jit(lambda params, lesson: loss(params, lesson)[1])
    unseen = [
        make_lesson(Scenes(seed=_EXAM_SEED, length=None), i, clip.config) for i in range(_EXAM_PICTURES)
    ]
    questions = Lesson(*map(np.stack, zip(*unseen, strict=True)))

    settings = json.dumps([config.to_dict(), clip.config.to_dict()], sort_keys=True)
    step, state = _load(save, state, settings)
    with (
        _Lessons(clip.config, config, workers, buffer) as lessons,
        tqdm(
            desc="teaching the vision tower",
            initial=step,
            total=config.updates,
            file=sys.stderr,
            disable=None,
        ) as bar,
    ):
        lessons.restore({"step": step, **lessons.fingerprint()})
        while step < config.updates:
            state, value = update(state, cast(Any, next(lessons).arrays))
            step += 1
            bar.update()
            if step % _EVERY == 0 or step == config.updates:
                right = _scores(exam(state[0], questions))
                named = ", ".join(f"{name} {share:.0%}" for name, share in right.items())
                bar.write(
                    f"{step} lessons: loss {float(value):.3f}; cells named rightly: {named}", sys.stderr
                )
                _save(save, step, state, settings)
    nnx.update(clip, state[0]["tower"])
    return _scores(exam(state[0], questions))


def _loss(outputs: Array, lesson: Lesson) -> tuple[Array, Array]:
    """The loss, and the share of rightly named cells per kind of class, float32 [5]."""
    total, right, at = jnp.float32(0), [], 0
    for kind, (name, names) in enumerate(CLASSES.items()):
        logits = outputs[..., at : at + len(names)]
        at += len(names)
        wanted = lesson.classes[..., kind].astype(jnp.int32)
        counts = wanted >= 0
        number = jnp.maximum(jnp.sum(counts), 1)
        each = optax.losses.softmax_cross_entropy_with_integer_labels(logits, jnp.maximum(wanted, 0))
        total += _WEIGHTS[name] * jnp.sum(jnp.where(counts, each, 0.0)) / number
        right.append(jnp.sum((jnp.argmax(logits, axis=-1) == wanted) & counts) / number)
    shown = lesson.classes[..., -1] == 1
    miss = jnp.sum(jnp.abs(outputs[..., at:] - lesson.centres), axis=-1)
    total += jnp.sum(jnp.where(shown, miss, 0.0)) / jnp.maximum(jnp.sum(shown), 1)
    return total, jnp.stack(right)


def _scores(right: Array) -> dict[str, float]:
    return dict(zip(CLASSES, np.asarray(right).tolist(), strict=True))


def _averages(side: int, grid: int) -> np.ndarray:
    """float32 [grid, side]: row i averages the pixels of cell i."""
    edges, at = np.arange(grid + 1) * side / grid, np.arange(side)
    covered = np.clip(np.minimum(at + 1, edges[1:, None]) - np.maximum(at, edges[:-1, None]), 0, None)
    return (covered * (grid / side)).astype(np.float32)


class _Task:
    """Lesson t: `batch` scenes that no other lesson has."""

    def __init__(self, vision: ClipVisionConfig, batch: int, seed: int) -> None:
        self._vision, self._batch = vision, batch
        self._scenes = Scenes(seed=seed + 1, length=None)  # 0 is what is trained on later

    def __call__(self, t: int) -> tuple[Batch, Notes]:
        lessons = [
            make_lesson(self._scenes, i, self._vision) for i in range(t * self._batch, (t + 1) * self._batch)
        ]
        notes = Notes()
        notes.skipped = [()] * self._batch
        # a Loader hands on whatever arrays a task makes
        return cast(Batch, Lesson(*map(np.stack, zip(*lessons, strict=True)))), notes


class _Lessons(Loader):
    """Endless lessons."""

    def __init__(self, vision: ClipVisionConfig, config: TeachingConfig, workers: int, buffer: int) -> None:
        super().__init__(_Task(vision, config.batch, config.seed), 1, ENDLESS, workers, buffer)
        self._vision, self._config = vision, config

    def fingerprint(self) -> dict[str, Any]:
        return {"lessons": self._config.to_dict(), "vision": self._vision.to_dict()}

    def _check_share(self, per_example: list[Any]) -> None:
        """Drawn scenes are never unusable."""

    def _task_bytes(self) -> int:
        cells = self._vision.grid_size**2
        return self._config.batch * (3 * self._vision.image_size**2 + cells * (len(CLASSES) + 8))


def _save(path: Path, step: int, state: Any, settings: str) -> None:
    data = io.BytesIO()
    arrays: dict[str, Any] = {f"leaf{i:04d}": np.asarray(x) for i, x in enumerate(jax.tree.leaves(state))}
    np.savez(data, step=np.int64(step), settings=np.array(settings), **arrays)
    path.parent.mkdir(parents=True, exist_ok=True)
    write_file(path, data.getvalue())


def _load(path: Path, state: Any, settings: str) -> tuple[int, Any]:
    """What was saved, if it is whole and of the same lessons; otherwise the beginning."""
    if not path.is_file():
        return 0, state
    leaves, structure = jax.tree.flatten(state)
    try:
        with np.load(path, allow_pickle=False) as saved:
            if str(saved["settings"]) != settings:
                print(f"{path} is of other lessons; they begin anew", file=sys.stderr)
                return 0, state
            step = int(saved["step"])
            loaded = [jnp.asarray(saved[f"leaf{i:04d}"]) for i in range(len(leaves))]
    except (OSError, ValueError, KeyError, EOFError, zipfile.BadZipFile) as error:
        print(f"{path} cannot be read ({error}); the lessons begin anew", file=sys.stderr)
        return 0, state
    return step, jax.tree.unflatten(structure, loaded)
