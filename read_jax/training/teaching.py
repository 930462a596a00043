"""Lessons for new eyes, before a language model looks through them.

Published models begin with a CLIP that has seen hundreds of millions of pictures with their captions, and a
projector that has learned to put what it says among the words of the language model. New ones have seen
nothing, and a language model that looks through them stands still: it tells colours apart within minutes,
shapes not within hours. So tower and projector first learn on their own what drawn scenes show: the image
token of every cell comes to resemble the embeddings of the words for the thing that the cell shows (its
shape, colour, size, pattern), and tells where the thing is; and so do, to heads that are thrown away
afterwards, the tower's own features. To ask whether something is there, the language
model then has to look for like tokens, and no more.
"""

from __future__ import annotations

import io
import json
import sys
import zipfile
from collections.abc import Sequence
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
from read_jax.data.scenes.wording import words_for
from read_jax.data.scenes.world import COLOURS, SIZES
from read_jax.errors import ConfigError
from read_jax.files import write_file
from read_jax.images.preprocess import clip_crop
from read_jax.models.clip import normalize_clip
from read_jax.models.read import Read
from read_jax.text.tokenizer import Tokenizer
from read_jax.training.config import TeachingConfig
from read_jax.training.initial import seek_tokens, word_to_token
from read_jax.training.optimizer import OptimizerConfig, make_optimizer

Array = jax.Array

CLASSES = {
    "shape": tuple(SHAPES),
    "colour": tuple(COLOURS),
    "size": tuple(SIZES),
    "pattern": tuple(PATTERNS),
    "anything": ("no", "yes"),
}
_NAMED = tuple(CLASSES)[:-1]
_WEIGHTS = {"shape": 2.0, "colour": 1.0, "size": 1.0, "pattern": 1.0, "anything": 0.5}
_SEEN, _UNSEEN = 0.25, 0.02
"""A cell that a thing covers more than the first shows it; one covered less than the second shows nothing."""
_EXAM_SEED, _EXAM_PICTURES = 2**63, 128
_EVERY = 250  # updates between two saves


class Lesson(NamedTuple):
    """Pictures, and what every cell of the grid shows.

    pixels: uint8 [B, s, s, 3]; classes: int8 [B, N, 5], in the order of `CLASSES`, -1 where there is nothing
    to learn; centres: float32 [B, N, 2], x and y of the centre of the cell's thing, from the middle of the
    picture, in quarters of its side.
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
    where = 4 * (centre[nearest] - 0.5)
    pixels = clip_crop(image, config.image_size)
    return Lesson(pixels, classes.reshape(grid**2, -1), where.reshape(grid**2, 2).astype(np.float32))


def class_words(tokenizer: Tokenizer) -> dict[str, list[list[int]]]:
    """Of every kind of class but "anything", the ids of the words for each class.

    Raises `ConfigError` where a class has no word that is one token.
    """
    ids: dict[str, list[list[int]]] = {}
    for kind in _NAMED:
        ids[kind] = []
        for name in CLASSES[kind]:
            encoded = [tokenizer.encode(word, bos=False) for word in words_for(kind, name)]
            ids[kind].append([pieces[0] for pieces in encoded if len(pieces) == 1])
            if not ids[kind][-1]:
                raise ConfigError(
                    f"start.teaching needs a word for {kind} {name!r} that is one token, and the tokenizer "
                    "has none. Train on scenes, with a larger start.vocabulary."
                )
    return ids


def teach(
    model: Read,
    words: dict[str, list[list[int]]],
    config: TeachingConfig,
    save: Path,
    *,
    workers: int = 0,
    buffer: int = 2,
) -> dict[str, float]:
    """Teach the vision tower, the projector, and the embeddings of the words, in place.

    Args:
        model: the model.
        words: as `class_words` gives them.
        config: how long, and how.
        save: file that keeps what was learned so far: interrupted, the lessons go on from there. It may be
            deleted afterwards.
        workers, buffer: as for `TrainingLoader`.

    Returns:
        The share of cells named rightly in pictures not seen in the lessons, by the names of `CLASSES`.
    """
    from tqdm import tqdm

    clip = model.clip
    graphdef, eyes = nnx.split((clip, model.projector))
    random = nnx.Rngs(config.seed)
    features, tokens = clip.config.hidden_size, model.config.llama.hidden_size
    params = {
        "eyes": eyes,
        "embeddings": jnp.copy(model.llama.embed_tokens.embedding[...]),  # the steps take what they are given
        "of_features": _head(features, sum(map(len, CLASSES.values())) + 2, random),
        "of_tokens": _head(tokens, len(CLASSES["anything"]) + 2, random),
    }
    rotation = jnp.asarray(word_to_token(tokens, config.seed))
    means = {kind: _means(ids, model.config.llama.vocab_size) for kind, ids in words.items()}
    optimizer = make_optimizer(
        OptimizerConfig(
            name="muon",
            learning_rate=config.learning_rate,
            warmup_updates=config.warmup_updates,
            total_updates=config.updates,
        )
    )
    state = (params, optimizer.init(params))

    def loss(params: Any, lesson: Lesson) -> tuple[Array, Array]:
        tower, projector = nnx.merge(graphdef, params["eyes"], copy=True)
        features = tower(normalize_clip(lesson.pixels))[:, -lesson.classes.shape[1] :]
        *seen, centres = _told(features, params["of_features"], tuple(CLASSES))
        of_features, _ = _loss(dict(zip(CLASSES, seen, strict=True)), centres, lesson)
        tokens = _unit(projector(features))
        logits = {kind: tokens @ (mean @ params["embeddings"] @ rotation).T for kind, mean in means.items()}
        logits["anything"], centres = _told(tokens, params["of_tokens"], ("anything",))
        of_tokens, right = _loss(logits, centres, lesson)
        return of_features + of_tokens, right

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

    settings = json.dumps([config.to_dict(), model.config.to_dict(), words], sort_keys=True)
    step, state = _load(save, state, settings)
    with (
        _Lessons(clip.config, config, workers, buffer) as lessons,
        tqdm(
            desc="teaching the eyes",
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
    nnx.update((clip, model.projector), state[0]["eyes"])
    model.llama.embed_tokens.embedding[...] = state[0]["embeddings"]
    seek_tokens(model.llama, np.asarray(rotation), config.seed)
    _level(model, questions.pixels)
    return _scores(exam(state[0], questions))


def _head(width: int, outputs: int, random: nnx.Rngs) -> dict[str, Array]:
    """A linear layer that is thrown away in the end."""
    return {"weight": random.normal((width, outputs)) * width**-0.5, "bias": jnp.zeros(outputs)}


def _unit(x: Array) -> Array:
    """[..., D] -> the same with a mean square of 1, as a language model's layers see it."""
    return x * jax.lax.rsqrt(jnp.mean(jnp.square(x), axis=-1, keepdims=True) + 1e-6)


def _told(x: Array, head: dict[str, Array], kinds: Sequence[str]) -> list[Array]:
    """What a head says: logits of the kinds of classes, and last the centre."""
    ends = np.cumsum([len(CLASSES[kind]) for kind in kinds])
    return jnp.split(_unit(x) @ head["weight"] + head["bias"], ends, axis=-1)


def _level(model: Read, pixels: np.ndarray) -> None:
    """Scale image tokens and embeddings to a mean square of 1; the lessons saw neither's size.

    One that is much the smaller is lost in what the layers add to it.
    """
    tokens = model.projector(model.clip(normalize_clip(pixels)))
    last = model.projector.layers[-1]
    scale = jax.lax.rsqrt(jnp.mean(jnp.square(tokens)))
    nnx.update(last, jax.tree.map(lambda x: x * scale, nnx.state(last)))
    table = model.llama.embed_tokens.embedding
    table[...] = table[...] * jax.lax.rsqrt(jnp.mean(jnp.square(table[...])))


def _loss(logits: dict[str, Array], centres: Array, lesson: Lesson) -> tuple[Array, Array]:
    """The loss, and the share of rightly named cells per kind of class, float32 [5]."""
    total, right = jnp.float32(0), []
    for kind, name in enumerate(CLASSES):
        wanted = lesson.classes[..., kind].astype(jnp.int32)
        counts = wanted >= 0
        number = jnp.maximum(jnp.sum(counts), 1)
        each = optax.losses.softmax_cross_entropy_with_integer_labels(logits[name], jnp.maximum(wanted, 0))
        total += _WEIGHTS[name] * jnp.sum(jnp.where(counts, each, 0.0)) / number
        right.append(jnp.sum((jnp.argmax(logits[name], axis=-1) == wanted) & counts) / number)
    shown = lesson.classes[..., -1] == 1
    miss = jnp.sum(jnp.abs(centres - lesson.centres), axis=-1)
    total += jnp.sum(jnp.where(shown, miss, 0.0)) / jnp.maximum(jnp.sum(shown), 1)
    return total, jnp.stack(right)


def _means(ids: list[list[int]], vocabulary: int) -> Array:
    """float32 [classes, V]: row i averages the words of class i."""
    mean = np.zeros((len(ids), vocabulary), np.float32)
    for row, words in zip(mean, ids, strict=True):
        row[words] = 1 / len(words)
    return jnp.asarray(mean)


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
