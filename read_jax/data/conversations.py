"""LLaVA-Instruct: conversations about a picture, without masks.

Layout, under the data folder:

    llava_dataset/llava_instruct_150k.json      [{id, image, conversations: [{from: human | gpt, value}]}]
    coco/train2017/<image>

An item is one conversation, in the file's order; its questions are the turns, in order (`conversation` is
true), and nothing is to be segmented (`exists` is false). A human text that holds `<image>` loses it and the
white space around the rest, and `shows_image` remembers: a prompt puts "<image>\\n" before it. All other
texts, and the answers, are verbatim.

As in the original, an opening turn that is not the human's is left out. A question at the end that nobody
answers teaches nothing, so it is left out too. Turns that do not alternate raise `DataError` when the item is
asked for, so that one broken record does not take the other 150,000 with it.

Reference: LLaVA's data format; the original's `utils/vqa_dataset.py`. `compat` changes nothing here.
"""

from __future__ import annotations

import dataclasses
from functools import partial
from pathlib import Path
from typing import Any

from read_jax.data.files import read_json
from read_jax.data.item import Compat, Item, Query
from read_jax.data.sources import unknown_split
from read_jax.errors import DataError
from read_jax.images.decode import image_size, read_image
from read_jax.images.masks import CompactMask

IMAGE_TOKEN = "<image>"
HUMAN, ASSISTANT = "human", "gpt"


@dataclasses.dataclass(frozen=True)
class Conversations:
    """The conversations of one file; see the module."""

    name: str
    compat: Compat
    file: Path
    folder: Path
    """What the names of pictures are relative to."""
    records: tuple[tuple[Any, Any], ...]
    """(image, conversations) of each record, as in the file."""

    def __len__(self) -> int:
        return len(self.records)

    def __getitem__(self, index: int) -> Item:
        """Raises `DataError` when the record is malformed, `ImageError` when its picture has no size."""
        index = range(len(self.records))[index]  # from the end too; it becomes part of the item
        image, turns = self.records[index]
        where = f"{self.file}: record {index}"
        if not isinstance(image, str) or not image:
            raise DataError(f"{where} has no text 'image', the picture's file name.")
        queries = _queries(turns, index, where)
        path = str(self.folder / image)
        height, width = image_size(path)
        return Item(
            key=f"train/{index}",
            height=height,
            width=width,
            image_path=path,
            queries=queries,
            load_image=partial(read_image, path),
            load_mask=partial(_no_mask, height, width),
            conversation=True,
        )


def load(family: str, split: str, data_dir: Path, compat: Compat) -> Conversations:
    """The source of llava_instruct. Raises `DataError`: unknown split, a missing or malformed file."""
    if split != "train":
        raise unknown_split(family, split, ("train",))
    file = data_dir / "llava_dataset" / "llava_instruct_150k.json"
    content = read_json(file, "LLaVA-Instruct's conversations")
    if not isinstance(content, list) or not all(isinstance(record, dict) for record in content):
        raise DataError(f"{file} must hold a list of records.")
    return Conversations(
        f"{family}|{split}",
        compat,
        file,
        data_dir / "coco" / "train2017",
        tuple((record.get("image"), record.get("conversations")) for record in content),
    )


def _queries(turns: Any, index: int, where: str) -> tuple[Query, ...]:
    if not isinstance(turns, list):
        raise DataError(f"{where} has no list 'conversations'.")
    said = [_turn(turn, f"{where}, turn {number}") for number, turn in enumerate(turns)]
    if said and said[0][0] != HUMAN:
        del said[0]
    for number, (who, _) in enumerate(said):
        expected = ASSISTANT if number % 2 else HUMAN
        if who != expected:
            raise DataError(
                f"{where}: turns must alternate between {HUMAN} and {ASSISTANT}; {who} speaks where it is "
                f"{expected}'s turn."
            )
    if len(said) < 2:
        raise DataError(f"{where} has no answered question.")
    return tuple(
        _query(question, answer, index, position)
        for position, ((_, question), (_, answer)) in enumerate(zip(said[::2], said[1::2], strict=False))
    )


def _turn(turn: Any, where: str) -> tuple[str, str]:
    if not isinstance(turn, dict) or not isinstance(turn.get("value"), str):
        raise DataError(f"{where} has no text 'value'.")
    if turn.get("from") not in (HUMAN, ASSISTANT):
        raise DataError(f"{where} is from {turn.get('from')!r}; known: {HUMAN}, {ASSISTANT}.")
    return turn["from"], turn["value"]


def _query(question: str, answer: str, index: int, position: int) -> Query:
    shows_image = IMAGE_TOKEN in question
    if shows_image:
        question = question.replace(IMAGE_TOKEN, "").strip()
    return Query(
        question,
        exists=False,
        is_sentence=True,
        question=question,
        answer=answer,
        ref_id=index,
        sent_id=position,
        shows_image=shows_image,
    )


def _no_mask(height: int, width: int, index: int) -> CompactMask:
    return CompactMask(height, width)
