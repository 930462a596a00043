"""What is asked of a model, checked and tokenised on the host: nothing here touches a device."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence

import numpy as np

from read_jax.config import ReadConfig
from read_jax.errors import PromptError
from read_jax.text.conversation import Template, check_question, open_prompt, render
from read_jax.text.targets import expand_image_placeholder
from read_jax.text.tokenizer import IMAGE_TOKEN, Tokenizer


@dataclasses.dataclass(frozen=True)
class PreparedPrompt:
    """A prompt's tokens, cut where the part shared by all questions about an image ends."""

    prefix: np.ndarray  # int32 [S], image positions hold the placeholder
    question: np.ndarray  # int32 [T]
    image_start: int


@dataclasses.dataclass(frozen=True)
class PreparedAnswer:
    """A question with its answer; `prompt.question` holds the tokens of both.

    text: the answer; output_ids: int32 [n], its tokens, end token included.
    """

    prompt: PreparedPrompt
    text: str
    output_ids: np.ndarray


def prepare_prompt(
    prompt: str, template: str | Template, config: ReadConfig, tokenizer: Tokenizer
) -> PreparedPrompt:
    """Tokens of an open prompt.

    Raises `PromptError`: an empty prompt, one with control tokens, or one beyond the context length.
    """
    check_question(prompt, tokenizer)
    text = open_prompt(prompt, template, config.use_im_start_end)
    return split_prompt(tokenizer.encode(text), config)


def prepare_answer(
    prompt: str, answer: str, template: str | Template, config: ReadConfig, tokenizer: Tokenizer
) -> PreparedAnswer:
    """Tokens of a question and the answer that is given to it.

    Raises `PromptError` as `prepare_prompt`, the answer included.
    """
    check_question(prompt, tokenizer)
    asked = tokenizer.encode(open_prompt(prompt, template, config.use_im_start_end))
    turn = (f"{IMAGE_TOKEN}\n{prompt}", answer)
    ids = tokenizer.encode(render([turn], template, config.use_im_start_end))
    return PreparedAnswer(split_prompt(ids, config, room=0), answer, np.asarray(ids[len(asked) :], np.int32))


def split_prompt(ids: Sequence[int], config: ReadConfig, room: int = 1) -> PreparedPrompt:
    """Expand the image placeholder and cut after the image.

    Raises `PromptError` when fewer than `room` tokens of the context are left after it.
    """
    count = config.clip.num_image_tokens
    expanded, start = expand_image_placeholder(ids, count)
    context = config.llama.max_position_embeddings
    if len(expanded) + room > context:
        raise PromptError(
            f"the prompt is {len(expanded)} tokens long, {count} of them the picture, and leaves no room "
            f"for an answer in the model's context of {context}; shorten the question."
        )
    stop = start + count + config.use_im_start_end
    return PreparedPrompt(expanded[:stop], expanded[stop:], start)


def check_sampling(max_new_tokens: int, temperature: float, top_p: float, seed: int) -> None:
    """Raise `PromptError` for a setting outside its range."""
    if not isinstance(max_new_tokens, int | np.integer) or max_new_tokens < 1:
        raise PromptError(f"max_new_tokens must be a whole number of at least 1, not {max_new_tokens}.")
    if not 0 <= temperature < float("inf"):
        raise PromptError(f"temperature must be 0 (greedy) or a positive number, not {temperature}.")
    if not 0 < top_p <= 1:
        raise PromptError(f"top_p must be above 0 and at most 1, not {top_p}.")
    if not isinstance(seed, int | np.integer) or not 0 <= seed < 2**32:
        raise PromptError(f"seed must be a whole number from 0 to {2**32 - 1}, not {seed}.")
