"""One picture and its questions as arrays of fixed shapes, behind one shared prefix.

    prefix    <s> system prompt <im_start> image <im_end>    the same for every question about every picture
    row q     "\\n" question ASSISTANT: answer </s> ...       one per question; sees the prefix and itself

Prefix and row together are exactly the tokens of the whole conversation. Everything here is numpy.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from typing import NamedTuple

import numpy as np

from read_jax.config import ReadConfig
from read_jax.data.item import Item
from read_jax.data.mixture import Row, Sample, picture
from read_jax.errors import DataError, PromptError
from read_jax.geometry import ImageGeometry, image_geometry, stack_geometries
from read_jax.images.masks import CompactMask
from read_jax.images.preprocess import clip_crop, sam_resize
from read_jax.text.conversation import RESERVED_TEXTS, Template, check_question, get_template, render
from read_jax.text.targets import IGNORE_INDEX, expand_image_placeholder, expand_labels, mask_targets
from read_jax.text.tokenizer import IMAGE_TOKEN, SEG_TOKEN, Tokenizer

_UNLIMITED = 1 << 30


@dataclasses.dataclass(frozen=True)
class Limits:
    """The static shapes of a batch.

    questions: rows Q per picture. tokens: length T of a row, the prefix not counted. mask_canvas: (height,
    width) of the targets; larger pictures' targets are scaled down to fit.
    """

    questions: int = 3
    tokens: int = 256
    mask_canvas: tuple[int, int] = (1024, 1024)


class PackedRow(NamedTuple):
    """A conversation's tokens after the prefix.

    ids, labels: int32 [t], t <= T; labels are the ids where they are to be predicted, else `IGNORE_INDEX`
    (the loss compares the state at i with label i + 1). seg_at: place in the row of the state that predicts
    [SEG], one before it; -1 without [SEG]. exists: whether what is asked for is there. mask: its target.
    """

    ids: np.ndarray
    labels: np.ndarray
    seg_at: int
    exists: bool
    mask: CompactMask | None


class PictureFeatures(NamedTuple):
    """What frozen encoders say of pictures, kept in bfloat16 (see `read_jax.data.features`).

    clip_features: [B, N, Dc], before the projector; image_embedding: [B, g, g, C], SAM's.
    """

    clip_features: np.ndarray
    image_embedding: np.ndarray


@dataclasses.dataclass(frozen=True, eq=False)
class PackedExample:
    """A picture's two forms (uint8), its size, and its questions as tokens; dropped: why rows are missing.

    features: what the encoders say of the picture, where that is known already; it then has no pixels.
    """

    key: str
    clip_pixels: np.ndarray | None  # [336, 336, 3]
    sam_pixels: np.ndarray | None  # [1024, 1024, 3]
    geometry: ImageGeometry
    rows: tuple[PackedRow, ...]
    dropped: tuple[str, ...] = ()
    features: PictureFeatures | None = None


class Batch(NamedTuple):
    """What a step takes; B pictures, Q questions, T tokens. Every field has the leading axis B.

    question_ids, labels: int32 [B, Q, T], padded with the tokenizer's padding and `IGNORE_INDEX`. lengths:
    int32 [B, Q], 0 where there is no question. seg_at: int32 [B, Q], place in the row of the state that
    predicts [SEG], 0 where has_mask is False. has_mask, exists: bool [B, Q]; a row has a mask when it has a
    [SEG] and a target. masks: uint8 [B, Q, Hm, Wm], 1 target, 255 ignore, at the top left of the canvas.
    mask_size: int32 [B, 2], height and width of the targets in the canvas: the original's unless it had to be
    scaled down. clip_pixels: uint8 [B, 336, 336, 3]. sam_pixels: uint8 [B, 1024, 1024, 3]. geometry: of the
    original picture, every field [B]. valid: bool [B], False for padding. features: what the encoders say of
    the pictures, where that is known already. Of pixels and features a batch has one; the other is the empty
    tuple, which whatever goes over a batch's arrays passes by.
    """

    question_ids: np.ndarray
    labels: np.ndarray
    lengths: np.ndarray
    seg_at: np.ndarray
    has_mask: np.ndarray
    exists: np.ndarray
    masks: np.ndarray
    mask_size: np.ndarray
    clip_pixels: np.ndarray | tuple[()]
    sam_pixels: np.ndarray | tuple[()]
    geometry: ImageGeometry
    valid: np.ndarray
    features: PictureFeatures | tuple[()] = ()


class Packer:
    """Makes the arrays of a model from samples.

    Attributes:
        prefix_ids: int32 [S], what stands before every row; image positions hold the placeholder.
        image_start: where in it the image begins.
        limits: shapes of the batches.
    """

    def __init__(
        self,
        config: ReadConfig,
        tokenizer: Tokenizer,
        template: str | Template = "llava_v1",
        limits: Limits | None = None,
    ) -> None:
        """Raises `PromptError` for an unknown template, `DataError` when T exceeds the model's context."""
        self.config, self.tokenizer, self.template = config, tokenizer, get_template(template)
        self.limits = limits or Limits()
        text = render([(f"{IMAGE_TOKEN}\n", None)], self.template, config.use_im_start_end)
        count = config.clip.num_image_tokens
        ids, self.image_start = expand_image_placeholder(tokenizer.encode(text), count)
        self.prefix_ids = ids[: self.image_start + count + config.use_im_start_end]
        room = config.llama.max_position_embeddings - len(self.prefix_ids)
        if not 0 < self.limits.tokens <= room:
            raise DataError(
                f"rows of {self.limits.tokens} tokens do not fit: the model's context has room for {room} "
                f"behind the {len(self.prefix_ids)} of the prompt and image."
            )

    def pack_row(self, row: Row) -> PackedRow:
        """Tokens and targets of a conversation, cut to T tokens, though never before a [SEG].

        The picture is put before the first question, wherever the dataset marks it.
        Raises `PromptError` when a text holds control tokens or the separator of question and answer, an
        answer is empty, there are several [SEG], or the only one, or all of the answers, lie beyond T.
        """
        for question, answer in row.turns:
            check_question(question, self.tokenizer, self.template)
            self._check_answer(answer)
        (question, answer), *later = row.turns
        turns = [(f"{IMAGE_TOKEN}\n{question}", answer), *later]
        text = render(turns, self.template, self.config.use_im_start_end)
        ids = self.tokenizer.encode(text)
        labels = mask_targets(ids, text, self.template, self.tokenizer, _UNLIMITED)
        count = self.config.clip.num_image_tokens
        all_ids, start = expand_image_placeholder(ids, count)
        stop = len(self.prefix_ids)
        own, own_labels = all_ids[stop:], expand_labels(labels, start, count)[stop:]
        places = np.flatnonzero(own == self.tokenizer.seg_id)
        if len(places) > 1:
            raise PromptError(f"the answers hold {len(places)} [SEG]; one conversation can hold one.")
        if len(places) and places[0] >= self.limits.tokens:
            raise PromptError(
                f"[SEG] is token {places[0] + 1} of its row, beyond the limit of {self.limits.tokens}."
            )
        if not np.any(own_labels[1 : self.limits.tokens] != IGNORE_INDEX):
            raise PromptError(
                f"the answer begins beyond the limit of {self.limits.tokens} tokens: nothing of it is left."
            )
        seg_at = int(places[0]) - 1 if len(places) else -1
        mask = row.mask if len(places) else None
        return PackedRow(
            own[: self.limits.tokens], own_labels[: self.limits.tokens], seg_at, row.exists, mask
        )

    def pack(self, sample: Sample) -> PackedExample:
        """A sample's arrays, without pixels if its picture was not looked at.

        A row that cannot be packed is left out and its reason noted in `dropped`.

        Raises:
            DataError: no row is left, there are more than Q, or a mask has not the picture's size.
            ImageError: the picture cannot be preprocessed.
        """
        rows, dropped = [], []
        for row in sample.rows:
            try:
                rows.append(self.pack_row(row))
            except PromptError as error:
                dropped.append(str(error))
        if not rows:
            raise DataError(f"none of its questions can be used: {'; '.join(dict.fromkeys(dropped))}")
        if len(rows) > self.limits.questions:
            raise DataError(f"{sample.key} has {len(rows)} questions; a batch holds {self.limits.questions}.")
        c = self.config
        height, width = sample.size if sample.image is None else sample.image.shape[:2]
        for row in rows:
            if row.mask is not None and (row.mask.height, row.mask.width) != (height, width):
                raise DataError(
                    f"a mask of {row.mask.height}x{row.mask.width} pixels for a picture of {height}x{width} "
                    "(height x width)."
                )
        return PackedExample(
            sample.key,
            None if sample.image is None else clip_crop(sample.image, c.clip.image_size),
            None if sample.image is None else sam_resize(sample.image, c.sam.image_size)[0],
            image_geometry(height, width, c.sasp, c.clip.grid_size, c.sam.image_size),
            tuple(rows),
            tuple(dropped),
        )

    def batch(self, examples: Sequence[PackedExample | None]) -> Batch:
        """Stack examples; None makes a place that is padding (valid False)."""
        return batch_examples(examples, self.config, self.limits, self.tokenizer.pad_id)

    def _check_answer(self, answer: str) -> None:
        if not answer.strip():
            raise PromptError("an answer is empty.")
        reserved = dict.fromkeys((*RESERVED_TEXTS, *self.tokenizer.reserved_texts))
        found = [text for text in reserved if text in answer and text != SEG_TOKEN]
        if self.template.separator in f" {answer} ":
            found.append(self.template.separator)
        if found:
            raise PromptError(f"an answer contains {found[0]!r}, which is not read as words; rephrase it.")


def batch_examples(
    examples: Sequence[PackedExample | None], config: ReadConfig, limits: Limits, pad_id: int = 0
) -> Batch:
    """Stack examples to the static shapes of `limits`; all come with pixels, or all with features.

    None makes padding: valid False, and the geometry of some square picture. Raises `MaskError` for a damaged
    target.
    """
    b, q, t = len(examples), limits.questions, limits.tokens
    clip, sam = config.clip.image_size, config.sam.image_size
    blank = image_geometry(clip, clip, config.sasp, config.clip.grid_size, sam)
    known = next((example.features for example in examples if example), None)
    batch = Batch(
        question_ids=np.full((b, q, t), pad_id, np.int32),
        labels=np.full((b, q, t), IGNORE_INDEX, np.int32),
        lengths=np.zeros((b, q), np.int32),
        seg_at=np.zeros((b, q), np.int32),
        has_mask=np.zeros((b, q), bool),
        exists=np.zeros((b, q), bool),
        masks=np.zeros((b, q, *limits.mask_canvas), np.uint8),
        mask_size=np.ones((b, 2), np.int32),
        clip_pixels=() if known else np.zeros((b, clip, clip, 3), np.uint8),
        sam_pixels=() if known else np.zeros((b, sam, sam, 3), np.uint8),
        geometry=stack_geometries([example.geometry if example else blank for example in examples]),
        valid=np.array([example is not None for example in examples]),
        features=PictureFeatures(*(np.zeros((b, *x.shape), x.dtype) for x in known)) if known else (),
    )
    for i, example in enumerate(examples):
        if example is None:
            continue
        looks = zip(
            (batch.clip_pixels, batch.sam_pixels, *batch.features),
            (example.clip_pixels, example.sam_pixels, *(example.features or ())),
            strict=True,
        )
        for stacked, own in looks:
            if isinstance(stacked, np.ndarray):
                stacked[i] = own
        size = int(example.geometry.height), int(example.geometry.width)
        batch.mask_size[i] = fitted = fitted_size(size, limits.mask_canvas)
        for j, row in enumerate(example.rows):
            length = len(row.ids)
            batch.question_ids[i, j, :length], batch.labels[i, j, :length] = row.ids, row.labels
            batch.lengths[i, j], batch.exists[i, j] = length, row.exists
            if row.mask is None:
                continue
            batch.seg_at[i, j], batch.has_mask[i, j] = row.seg_at, True
            batch.masks[i, j, : fitted[0], : fitted[1]] = scaled_mask(row.mask.decode(), fitted)
    return batch


def fitted_size(size: tuple[int, int], canvas: tuple[int, int]) -> tuple[int, int]:
    """(height, width) of a target on the canvas: its own, or scaled down in proportion, at least 1."""
    scale = min(canvas[0] / size[0], canvas[1] / size[1], 1.0)
    return max(int(size[0] * scale), 1), max(int(size[1] * scale), 1)


def scaled_mask(mask: np.ndarray, size: tuple[int, int]) -> np.ndarray:
    """Nearest neighbour (pixel centres): values stay what they are; [h, w] -> [size]."""
    if mask.shape == size:
        return mask
    rows, columns = ((2 * np.arange(n) + 1) * old // (2 * n) for n, old in zip(size, mask.shape, strict=True))
    return mask[rows[:, None], columns]


def evaluation_sample(item: Item, source: str, first: int = 0, count: int | None = None) -> Sample:
    """Questions first .. first + count - 1 of an item with the fixed templates and answers (teacher-forced).

    Raises `ImageError` or `DataError` when the picture cannot be read or has not the stated size.
    """
    if item.conversation:
        raise DataError(f"{item.key} is a conversation; there is nothing to segment in it.")
    questions, answers = item.questions, item.answers
    rows = tuple(
        Row(((questions[i], answers[i]),), item.queries[i].exists, item.compact_mask(i))
        for i in range(len(questions))[first:][:count]
    )
    return Sample(f"{source}:{item.key}", source, picture(item), rows)
