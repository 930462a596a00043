"""The prompt formats the checkpoints were trained with, and what a question may not contain.

The strings are wire formats (LLaVA's and LISA's conversation templates): one character more or less gives
other tokens than the weights know.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Iterable, Sequence
from typing import Final

from read_jax.errors import PromptError
from read_jax.text.tokenizer import IM_END_TOKEN, IM_START_TOKEN, IMAGE_TOKEN, READ_TOKENS, Tokenizer

ROUND_END: Final = "</s>"
"""Ends every answered round, in all the templates."""
RESERVED_TEXTS: Final = (IMAGE_TOKEN, *READ_TOKENS, "<s>", ROUND_END, "<unk>")
"""Texts that turn into something else than text when a prompt is tokenised."""

Turn = tuple[str, str | None]
"""(question, answer); the answer of the last turn may be None: the model is to give it."""


@dataclasses.dataclass(frozen=True)
class Template:
    """A conversation is, per round, `start` question `cue`, then " " answer `end` when it is answered.

    first_start begins the first round (it holds the system line), next_start the later ones; cue asks
    for the answer and is the last thing in an open prompt.
    """

    name: str
    first_start: str
    next_start: str
    cue: str
    end: str

    @property
    def separator(self) -> str:
        """What stands between question and answer; it must occur exactly once in a round."""
        return self.cue + " "


def _vicuna(name: str, who: str) -> Template:
    system = (
        f"A chat between a curious {who} and an artificial intelligence assistant. "
        f"The assistant gives helpful, detailed, and polite answers to the {who}'s questions."
    )
    return Template(name, f"{system} USER: ", "USER: ", " ASSISTANT:", ROUND_END)


_LLAMA_2_SYSTEM = (
    "You are a helpful language and vision assistant. "
    "You are able to understand the visual content that the user provides, "
    "and assist the user with a variety of tasks using natural language."
)

TEMPLATES: Final[dict[str, Template]] = {
    "llava_v1": _vicuna("llava_v1", "human"),  # READ's training and validation
    "vicuna_v1": _vicuna("vicuna_v1", "user"),  # what the original's test script and demo fall back to
    "llava_llama_2": Template(
        "llava_llama_2",
        f"[INST] <<SYS>>\n{_LLAMA_2_SYSTEM}\n<</SYS>>\n\n",
        "<s>[INST] ",
        " [/INST]",
        " " + ROUND_END,
    ),
}
_ALIASES = {"v1": "vicuna_v1"}


def get_template(template: str | Template) -> Template:
    """A template by name ("llava_v1", "vicuna_v1" or "v1", "llava_llama_2"); raises `PromptError`."""
    if isinstance(template, Template):
        return template
    name = _ALIASES.get(template, template)
    if name not in TEMPLATES:
        raise PromptError(
            f"no conversation template {template!r}; known: {', '.join((*TEMPLATES, *_ALIASES))}."
        )
    return TEMPLATES[name]


def render(
    turns: Sequence[Turn], template: str | Template = "llava_v1", use_im_start_end: bool = True
) -> str:
    """The text of a conversation, ready for `Tokenizer.encode`.

    turns: (question, answer) pairs; a question holds `<image>` where the picture goes, by custom as
    "<image>\\n" before the words of the first one. Only the last answer may be None (or empty), then the
    text ends by asking for it. use_im_start_end: put `<im_start>` and `<im_end>` around every `<image>`.
    Raises `PromptError` for an unknown template, no turns, or a missing answer in the middle.
    """
    form = get_template(template)
    if not turns:
        raise PromptError("a conversation needs at least one question.")
    text = ""
    for number, (question, answer) in enumerate(turns):
        text += (form.next_start if number else form.first_start) + question + form.cue
        if answer:
            text += " " + answer + form.end
        elif number < len(turns) - 1:
            raise PromptError(
                f"turn {number + 1} of {len(turns)} has no answer; only the last one may be open."
            )
    return (
        text.replace(IMAGE_TOKEN, IM_START_TOKEN + IMAGE_TOKEN + IM_END_TOKEN) if use_im_start_end else text
    )


def open_prompt(question: str, template: str | Template = "llava_v1", use_im_start_end: bool = True) -> str:
    """The prompt that asks one question about the picture; the model's answer follows it."""
    return render([(f"{IMAGE_TOKEN}\n{question}", None)], template, use_im_start_end)


def check_question(
    question: str,
    reserved: Tokenizer | Iterable[str] = RESERVED_TEXTS,
    template: str | Template | None = None,
) -> None:
    """Refuse a question (plain words, without `<image>`) that the model would not read as it is written.

    reserved: a tokenizer, or the texts a question must not contain. A template's separator (" ASSISTANT: ")
    inside a question is harmless when the model answers, so it is accepted by default: people quote chats.
    It breaks the masking of training targets; give `template` to refuse it there.
    Raises `PromptError` saying what was found and what to do.
    """
    if not isinstance(question, str):
        raise PromptError(f"a question must be text, not {type(question).__name__}.")
    if not question.strip():
        raise PromptError("the question is empty; say what to look for in the picture.")
    texts = reserved.reserved_texts if isinstance(reserved, Tokenizer) else reserved
    found = [text for text in dict.fromkeys((*RESERVED_TEXTS, *texts)) if text in question]
    if found:
        raise PromptError(
            f"the question contains {', '.join(found)}, which the tokenizer reads as a control token, not as "
            f"words; remove it (the picture is placed into the prompt for you)."
        )
    if template is not None and get_template(template).separator in f" {question} ":
        separator = get_template(template).separator
        raise PromptError(
            f"the question contains {separator!r}, which separates question from answer in a training "
            f"conversation ({get_template(template).name}); rephrase it."
        )
