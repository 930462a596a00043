"""Drawn scenes: a dataset without end and without a download, to train and evaluate on first.

A scene is 2 to 7 things of 20 shapes (8 geometric, 12 everyday), 10 colours, 2 sizes and, in harder scenes,
3 patterns, on a pale background; its pictures are 96 to 256 pixels a side. All things lie in the picture's
central square, which is what CLIP sees of it. About it go three to eight questions, each answered from the
scene itself; a question on which people could disagree is not asked.

    level 1   2 or 3 things apart; attributes
    level 2   3 to 6 things; attributes and places, all of a sort, leftmost, largest, left of, above ...
    level 3   3 to 7 things, some partly hidden, patterns; mostly relations
    level 4   3 to 7 things; mostly reasoning ("Which of these could roll away?"), and chains of relations

Names: "scenes|train" (100,000 pictures), "scenes|val" (500) and "scenes|test" (1,000), each a random mixture
of the four levels in equal parts; "scenes|test|3" is as long, and all of level 3. `Scenes` gives other seeds
and lengths, or no end.

Queries carry tags: the sort ("referring" 33 %, "relational" 19 %, "multiple" 8 %, "reasoning" 10 %, "false
premise" 30 %), the level ("level 2"), and in test, "held-out pair" where a pair of `HELD_OUT` (a shape and a
colour never seen together in train and val) is named or among the answer, else "seen pairs".

    draws      the random stream              knowledge   what things are good for
    shapes     outlines                       meaning     what an expression denotes
    world      attributes and layout          wording     expressions in words
    drawing    pixels and masks               questions   what is asked
"""

from __future__ import annotations

import dataclasses
from functools import cached_property
from pathlib import Path

import numpy as np

from read_jax.data.item import Compat, Item
from read_jax.data.scenes.drawing import draw
from read_jax.data.scenes.draws import Random
from read_jax.data.scenes.questions import FEWEST, Question, make_questions, to_queries
from read_jax.data.scenes.world import HELD_OUT, LEVELS, Scene, make_scene
from read_jax.errors import DataError
from read_jax.images.masks import CompactMask

LENGTHS = {"train": 100_000, "val": 500, "test": 1_000}
SPLITS = (*LENGTHS, *(f"{split}|{level}" for split in LENGTHS for level in LEVELS))
_INDICES = 2**48  # indices have 48 bits of the key

__all__ = ["HELD_OUT", "LENGTHS", "SPLITS", "Drawing", "Scenes", "load"]


def load(family: str, split: str, data_dir: Path | None, compat: Compat) -> Scenes:
    """The scenes of that split; raises `DataError` when there is none of that name. `data_dir` is not used.

    compat: makes no difference, the original has no such dataset.
    """
    if split not in SPLITS:
        what = f"has no split {split!r}" if split else "needs a split"
        raise DataError(f"{family} {what}; known: {', '.join(f'{family}|{s}' for s in SPLITS)}.")
    name, _, level = split.partition("|")
    return Scenes(name, length=LENGTHS[name], level=int(level) if level else None, compat=compat)


@dataclasses.dataclass(frozen=True, eq=False)
class Drawing:
    """A scene with its questions; draws when pixels are asked for."""

    scene: Scene
    questions: list[Question]

    @cached_property
    def _pixels(self) -> tuple[np.ndarray, np.ndarray]:
        return draw(self.scene)

    def image(self) -> np.ndarray:
        """uint8 [h, w, 3] RGB."""
        return self._pixels[0].copy()

    def labels(self) -> np.ndarray:
        """uint8 [h, w]: which of the scene's things every pixel shows, as `drawing` numbers them."""
        return self._pixels[1].copy()

    def mask(self, index: int) -> CompactMask:
        """The visible pixels of all that question `index` asks for (`drawing` says which those are)."""
        return CompactMask.encode(np.isin(self._pixels[1], self.questions[index].things))


class Scenes:
    """Scenes by number: picture i of a split, level and seed is the same everywhere and always.

    Splits, levels and seeds share no picture. Only "test" holds the pairs of `HELD_OUT`.
    """

    def __init__(
        self,
        split: str = "train",
        *,
        seed: int = 0,
        length: int | None = None,
        level: int | None = None,
        compat: Compat = None,
    ):
        """
        Args:
            split: "train", "val" or "test".
            seed: 0 to 2^64 - 1.
            length: how many there are; None: without end, `len` then raises `TypeError`.
            level: 1 to 4; None: all, mixed.

        Raises:
            DataError: one of these is not so.
        """
        if split not in LENGTHS:
            raise DataError(f"scenes has no split {split!r}; known: {', '.join(LENGTHS)}.")
        if level is not None and level not in LEVELS:
            raise DataError(f"scenes has no level {level!r}; known: {', '.join(map(str, LEVELS))}.")
        if not 0 <= seed < 2**64:
            raise DataError(f"the seed of scenes must lie in 0 to 2^64 - 1, not {seed}.")
        if length is not None and not 0 <= length <= _INDICES:
            raise DataError(f"the length of scenes must lie in 0 to 2^48, not {length}.")
        self.name = f"scenes|{split}" + (f"|{level}" if level else "")
        self.compat: Compat = compat
        self.split, self.seed, self.length, self.level = split, seed, length, level

    def __len__(self) -> int:
        if self.length is None:
            raise TypeError("these scenes have no end.")
        return self.length

    def __getitem__(self, index: int) -> Item:
        end = _INDICES if self.length is None else self.length
        if index < 0 and self.length is not None:
            index += self.length
        if not 0 <= index < end:
            raise IndexError(f"{self.name} has no picture {index}; it has {end}.")
        index = int(index)
        drawing = self.drawing(index)
        scene = drawing.scene
        return Item(
            key=f"{self.name.removeprefix('scenes|').replace('|', '/')}/{index:06d}",
            height=scene.height,
            width=scene.width,
            image_path=None,
            queries=to_queries(drawing.questions, scene, index, self.split == "test"),
            load_image=drawing.image,
            load_mask=drawing.mask,
        )

    def drawing(self, index: int) -> Drawing:
        """The scene itself, and the meaning of its questions."""
        number = list(LENGTHS).index(self.split)
        draws = Random((self.seed, number << 56 | (self.level or 0) << 48 | index))
        held_out = self.split == "test"
        while True:
            scene = make_scene(draws, self.level or draws.choice(LEVELS), held_out)
            questions = make_questions(scene, draws, held_out)
            if len(questions) >= FEWEST:
                return Drawing(scene, questions)
