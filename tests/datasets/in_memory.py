"""Sources of made-up pictures, for tests of what is done with items; picklable, as workers need them."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Mapping
from functools import partial
from pathlib import Path

import numpy as np

from read_jax.config import ClipVisionConfig, LlamaConfig, ReadConfig, SamConfig, SaspConfig
from read_jax.data.item import Compat, Item, Query
from read_jax.data.packing import Limits, Packer
from read_jax.errors import DataError, ImageError
from read_jax.images.masks import CompactMask
from read_jax.text.tokenizer import Tokenizer

SIZE = (12, 20)


@dataclasses.dataclass
class Pictures:
    """`count` pictures; queries(i) are what is asked about number i.

    bad: numbers of the pictures that do not decode. More of an item's fields in `fields`.
    """

    name: str
    count: int
    queries: Callable[[int], tuple[Query, ...]]
    bad: frozenset[int] = frozenset()
    size: tuple[int, int] = SIZE
    fields: Mapping[str, object] = dataclasses.field(default_factory=dict)
    compat: Compat = None

    def __len__(self) -> int:
        return self.count

    def __getitem__(self, index: int) -> Item:
        if not 0 <= index < self.count:
            raise DataError(f"no picture {index}")
        return Item(
            f"p{index}",
            *self.size,
            None,
            self.queries(index),
            partial(self.image, index),
            partial(self.mask, index),
            **self.fields,
        )

    def image(self, index: int) -> np.ndarray:
        if index in self.bad:
            raise ImageError(f"picture {index} is damaged")
        return np.full((*self.size, 3), index % 256, np.uint8)

    def mask(self, index: int, query: int) -> CompactMask:
        """Column `query` is the target, the last row is to be ignored."""
        mask = np.zeros(self.size, np.uint8)
        mask[:, query % self.size[1]] = 1
        mask[-1] = 255
        return CompactMask.encode(mask)


def things(count: int, index: int = 0) -> tuple[Query, ...]:
    """`count` phrases of things that are there."""
    return tuple(Query(f"Thing {index}-{i}", ref_id=i) for i in range(count))


def five(index: int) -> tuple[Query, ...]:
    """Five things in every picture."""
    return things(5, index)


def referring(name: str = "refcoco|train", count: int = 7, **options: object) -> Pictures:
    """Five phrases in every picture, all of things that are there."""
    return Pictures(name, count, five, **options)  # type: ignore[arg-type]


def _reasoning(index: int) -> tuple[Query, ...]:
    texts = tuple(Query(f"What rolls, {i}?", is_sentence=True) for i in range(2))
    if index % 2:
        return texts
    lies = (
        Query("a zebra", False, answer="No zebra."),
        Query("Where is the cat?", False, True, answer="No cat."),
    )
    return texts + lies


def reasoning(count: int = 6) -> Pictures:
    """As ReasonSeg: two sentences; every other picture also has two false premises with their answers."""
    return Pictures("ReasonSeg|train", count, _reasoning)


def vocabulary(name: str = "ade20k|train", count: int = 6) -> Pictures:
    """As the semantic sets: five things, and three names of what is not there."""
    return Pictures(name, count, five, fields={"absent": ("Zebra", "Lamp", "Sea")})


def _chat(index: int) -> tuple[Query, ...]:
    turns = [
        ("What is it?", "A picture."),
        ("Of what?", f"Of number {index}."),
        ("Thanks", "You are welcome."),
    ]
    return tuple(Query(q, False, question=q, answer=a) for q, a in turns)


def chats(count: int = 4) -> Pictures:
    """As LLaVA's: conversations of three turns."""
    return Pictures("llava_instruct|train", count, _chat, fields={"conversation": True})


def tiny_packer(
    limits: Limits | None = None, template: str = "llava_v1", use_im_start_end: bool = True
) -> Packer:
    """A packer with the small tokenizer, 4 image tokens, CLIP at 28 pixels and SAM at 64."""
    config = ReadConfig(
        LlamaConfig(803, 16, 16, 1, 2, 2, 8, 1e-5, max_position_embeddings=1024),
        ClipVisionConfig(16, 16, 2, 2, image_size=28),
        SamConfig(16, 1, 2, (0,), 16, image_size=64),
        SaspConfig(enabled=False),
        use_im_start_end=use_im_start_end,
    )
    tokenizer = Tokenizer.load(Path(__file__).parents[1] / "data" / "tiny-read")
    return Packer(
        config, tokenizer, template, limits or Limits(questions=3, tokens=128, mask_canvas=(32, 32))
    )
