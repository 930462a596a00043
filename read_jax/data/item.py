"""What every dataset gives: a picture with all its questions, decoded only as far as it is looked at."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Sequence
from functools import cached_property
from typing import Literal, Protocol

import numpy as np

from read_jax.data import prompts
from read_jax.images.masks import CompactMask

Compat = Literal["read"] | None
"""None: the right thing; "read": the original's defects, where a published number depends on them."""


@dataclasses.dataclass(frozen=True)
class Query:
    """One thing asked about a picture, before a template makes it a question.

    Attributes:
        phrase: the dataset's own text, untouched.
        exists: whether what it speaks of is in the picture.
        is_sentence: the text is a whole question or sentence, not the name of a thing.
        correction: of a false premise, what is there instead; "" when the dataset does not say.
        question: a question to ask verbatim; None: a template applied to the phrase.
        answer: an answer to give verbatim; None: one from the templates.
        ref_id: the dataset's number of the referred object; the picture's position where it has none.
        sent_id: position of the text among those of its object.
        tags: groups that results are reported by, the sort of question first; () when the dataset names none.
        alternatives: other wordings of the same phrase.
        shows_image: of a conversation's turn, that the picture is shown with it.
    """

    phrase: str
    exists: bool = True
    is_sentence: bool = False
    correction: str = ""
    question: str | None = None
    answer: str | None = None
    ref_id: int = -1
    sent_id: int = -1
    tags: tuple[str, ...] = ()
    alternatives: tuple[str, ...] = ()
    shows_image: bool = False


@dataclasses.dataclass(frozen=True, eq=False)
class Item:
    """One picture with all its questions; k of them.

    Attributes:
        key: names the item within its source for good, whatever the order ("val/291248").
        height, width: pixels of the upright picture and of its masks.
        image_path: where the picture is; None when it was drawn.
        queries: what is asked.
        load_image: gives the picture, uint8 [h, w, 3] RGB; raises `ImageError`.
        load_mask: gives the target of query i; asked only where it exists.
        absent: names of things of the dataset's vocabulary that are not in the picture, for false premises.
        conversation: the questions and answers are the turns of one conversation, in order.
        absent_alternatives: other wordings of each name in `absent`; empty when there are none at all.
    """

    key: str
    height: int
    width: int
    image_path: str | None
    queries: tuple[Query, ...]
    load_image: Callable[[], np.ndarray]
    load_mask: Callable[[int], CompactMask]
    absent: Sequence[str] = ()
    conversation: bool = False
    absent_alternatives: Sequence[tuple[str, ...]] = ()

    @cached_property
    def image(self) -> np.ndarray:
        """uint8 [h, w, 3] RGB, decoded on first access; raises `ImageError`."""
        return self.load_image()

    @property
    def phrases(self) -> list[str]:
        """The dataset's own texts."""
        return [query.phrase for query in self.queries]

    @property
    def questions(self) -> list[str]:
        """What `Segmenter.segment` takes: the fixed evaluation template applied."""
        return [prompts.evaluation_question(query) for query in self.queries]

    @property
    def answers(self) -> list[str]:
        """The answer to each question, with [SEG] where something exists."""
        return [prompts.evaluation_answer(query) for query in self.queries]

    @property
    def exists(self) -> list[bool]:
        """Whether what is asked for is in the picture."""
        return [query.exists for query in self.queries]

    @property
    def ref_ids(self) -> list[int]:
        """The dataset's number of the object each question is about."""
        return [query.ref_id for query in self.queries]

    @property
    def sent_ids(self) -> list[int]:
        """Position of each text among those of its object."""
        return [query.sent_id for query in self.queries]

    def compact_mask(self, index: int) -> CompactMask:
        """The target of one question, encoded; empty where nothing exists."""
        if not self.queries[index].exists:
            return CompactMask(self.height, self.width)
        return self.load_mask(index)

    @cached_property
    def masks(self) -> np.ndarray:
        """uint8 [k, h, w]: 1 target, 255 ignore, zeros where nothing exists."""
        out = np.zeros((len(self.queries), self.height, self.width), np.uint8)
        for index in range(len(self.queries)):
            out[index] = self.compact_mask(index).decode()
        return out


class Source(Protocol):
    """A dataset's split: random access, the same item for the same index every time."""

    name: str
    """As given to `load_source`, such as "refcoco|val"."""
    compat: Compat

    def __len__(self) -> int: ...

    def __getitem__(self, index: int) -> Item: ...
