"""From tokenised conversations to training arrays: targets, padding, the room for the image tokens."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Literal, NamedTuple

import numpy as np

from read_jax.errors import PromptError
from read_jax.text.conversation import ROUND_END, Template, get_template
from read_jax.text.tokenizer import IMAGE_TOKEN_ID, Tokenizer

IGNORE_INDEX = -100
"""Target of a position that the loss leaves out."""


class PaddedBatch(NamedTuple):
    """ids int32, mask bool (id is not padding), labels int32 or None; all [B, T]."""

    ids: np.ndarray
    mask: np.ndarray
    labels: np.ndarray | None


def mask_targets(
    ids: Sequence[int] | np.ndarray,
    text: str,
    template: str | Template,
    tokenizer: Tokenizer,
    model_max_length: int | None = None,
) -> np.ndarray:
    """Targets of a conversation: answers and their `</s>` are supervised, all else is `IGNORE_INDEX`.

    ids: [T] `tokenizer.encode(text)`, right padding allowed; text: from `render`, every round answered.
    Returns int32 [T]. The lengths are found by tokenising each round on its own, as the checkpoints were
    trained; the instruction of a round is everything up to its cue ("ASSISTANT:").
    Raises `PromptError` when a round does not hold exactly one separator, or when the rounds do not add up
    to the ids (the latter only below model_max_length, default the tokenizer's).
    Source: LLaVA's and LISA's target masking.
    """
    separator = get_template(template).separator
    labels = np.array(ids, np.int32)
    length = int((labels != tokenizer.pad_id).sum())
    labels[:1] = IGNORE_INDEX  # <s>
    at = 1
    for number, round_text in enumerate(text.split(ROUND_END), start=1):
        if not round_text:
            break
        parts = round_text.split(separator)
        if len(parts) != 2:
            found = "no" if len(parts) < 2 else f"{len(parts) - 1} times the"
            raise PromptError(
                f"round {number} of the conversation holds {found} separator {separator!r}; it must stand "
                f"exactly once, between question and answer: {_excerpt(round_text)}."
            )
        # Both counts include a <s>. The round's stands for its </s>; the instruction ends in a lone "▁".
        round_length = len(tokenizer.encode(round_text))
        instruction_length = len(tokenizer.encode(parts[0] + separator)) - 2
        labels[at : at + instruction_length] = IGNORE_INDEX
        at += round_length
    labels[at:] = IGNORE_INDEX
    if at != length and at < (model_max_length or tokenizer.model_max_length):
        raise PromptError(
            f"the rounds of the conversation make {at} tokens, its ids are {length}: the text and the ids "
            f"differ, the last round is not answered, or the text contains <unk>: {_excerpt(text)}."
        )
    return labels


def truncation_columns(model_max_length: int) -> int:
    """Columns the original keeps of a training batch: room for 256 image tokens in the place of one."""
    return model_max_length - 255


def pad_batch(
    ids: Sequence[Sequence[int] | np.ndarray],
    labels: Sequence[Sequence[int] | np.ndarray] | None = None,
    *,
    pad_id: int = 0,
    side: Literal["right", "left"] = "right",
    max_columns: int | None = None,
) -> PaddedBatch:
    """Stack rows of different lengths; labels are padded with `IGNORE_INDEX`.

    max_columns: cut the batch to so many columns, on the right (`truncation_columns` gives the original's
    number); only with right padding, where this cuts the ends of the longest rows. Beware: it can cut [SEG].
    """
    if side not in ("right", "left"):
        raise ValueError(f"side must be 'right' or 'left', not {side!r}.")
    if max_columns is not None and (max_columns < 1 or side == "left"):
        raise ValueError(f"cannot cut a {side}-padded batch to {max_columns} columns.")
    if labels is not None and [len(row) for row in labels] != [len(row) for row in ids]:
        raise ValueError("labels and ids differ in length.")
    padded = _pad(ids, pad_id, side)[:, :max_columns]
    padded_labels = None if labels is None else _pad(labels, IGNORE_INDEX, side)[:, :max_columns]
    return PaddedBatch(padded, padded != pad_id, padded_labels)


def _pad(rows: Sequence[Sequence[int] | np.ndarray], value: int, side: str) -> np.ndarray:
    width = max((len(row) for row in rows), default=0)
    out = np.full((len(rows), width), value, np.int32)
    for line, row in zip(out, rows, strict=True):
        start = width - len(row) if side == "left" else 0
        line[start : start + len(row)] = row
    return out


def expand_image_placeholder(
    ids: Sequence[int] | np.ndarray, num_image_tokens: int
) -> tuple[np.ndarray, int]:
    """Make room for the image tokens: the placeholder repeated, and the position of the first.

    ids: [T] with exactly one `IMAGE_TOKEN_ID`. Returns (int32 [T - 1 + N], start): the image tokens take
    the positions start .. start + N - 1, so that the merge on the device is a gather.
    Raises `PromptError` when there is no placeholder or more than one.
    """
    row = np.asarray(ids, np.int32)
    places = np.flatnonzero(row == IMAGE_TOKEN_ID)
    if len(places) != 1:
        raise PromptError(
            f"the prompt holds {len(places)} <image> placeholders; the model reads exactly one picture."
        )
    start = int(places[0])
    image = np.full(num_image_tokens, IMAGE_TOKEN_ID, np.int32)
    return np.concatenate([row[:start], image, row[start + 1 :]]), start


def expand_labels(labels: Sequence[int] | np.ndarray, start: int, num_image_tokens: int) -> np.ndarray:
    """Targets [T] -> int32 [T - 1 + N] to match `expand_image_placeholder`; image positions are ignored."""
    row = np.asarray(labels, np.int32)
    image = np.full(num_image_tokens, IGNORE_INDEX, np.int32)
    return np.concatenate([row[:start], image, row[start + 1 :]])


def _excerpt(text: str, limit: int = 120) -> str:
    return repr(text if len(text) <= limit else f"{text[:40]} … {text[-(limit - 40) :]}")
