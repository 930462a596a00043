"""Words around a dataset's texts: the fixed evaluation templates, and varied ones for training."""

from __future__ import annotations

from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from read_jax.data.item import Query

SENTENCE_QUESTION = "{text} Please output segmentation mask."
PHRASE_QUESTION = "What is {text} in this image? Please output segmentation mask."
SEGMENTATION_ANSWER = "Sure, the segmentation result is [SEG]."
"""The evaluation strings: those the paper validates ReasonSeg with, which checkpoints were trained on."""


def evaluation_question(query: Query) -> str:
    """The fixed question: a sentence as it is, a phrase in lower case."""
    if query.question is not None:
        return query.question
    if query.is_sentence:
        return SENTENCE_QUESTION.format(text=query.phrase)
    return PHRASE_QUESTION.format(text=query.phrase.lower())


def evaluation_answer(query: Query) -> str:
    """The fixed answer; names what is there instead, where the dataset knows it."""
    if query.answer is not None:
        return query.answer
    if query.exists:
        return SEGMENTATION_ANSWER
    phrase, correction = query.phrase.strip().lower(), query.correction.strip().lower()
    if correction:
        return f"There is no {phrase} in this image, but there is {correction}."
    return f"There is no {phrase} in this image."
