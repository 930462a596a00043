"""Prompt texts and the questions that may not be asked."""

from __future__ import annotations

import pytest

from read_jax.errors import PromptError
from read_jax.text.conversation import RESERVED_TEXTS, TEMPLATES, check_question, open_prompt, render
from read_jax.text.tokenizer import Tokenizer


def test_open_prompt_ends_by_asking_for_the_answer():
    text = open_prompt("Where is it?")
    assert text.startswith("A chat between a curious human and an artificial intelligence assistant. ")
    assert text.endswith("USER: <im_start><image><im_end>\nWhere is it? ASSISTANT:")


def test_the_two_vicuna_templates_differ_in_one_word_only():
    human, user = open_prompt("Q", "llava_v1"), open_prompt("Q", "vicuna_v1")
    assert user == human.replace("curious human", "curious user").replace("the human's", "the user's")
    assert open_prompt("Q", "v1") == user


def test_image_stays_bare_without_start_and_end_tokens():
    assert "USER: <image>\nQ" in open_prompt("Q", use_im_start_end=False)


def test_llama_2_rounds_are_written_as_lisa_was_trained():
    text = render([("<image>\nQ", "A"), ("R", "B")], "llava_llama_2", use_im_start_end=False)
    system = (
        "You are a helpful language and vision assistant. You are able to understand the visual content that "
        "the user provides, and assist the user with a variety of tasks using natural language."
    )
    assert (
        text == f"[INST] <<SYS>>\n{system}\n<</SYS>>\n\n<image>\nQ [/INST] A </s><s>[INST] R [/INST] B </s>"
    )


def test_llama_2_open_prompt_ends_with_the_instruction():
    assert open_prompt("Q", "llava_llama_2").endswith("\nQ [/INST]")


@pytest.mark.parametrize("name", TEMPLATES)
def test_an_open_last_turn_is_the_start_of_the_answered_one(name):
    turns = [("Q", "A"), ("R", "B")]
    assert render(turns, name).startswith(render([("Q", "A"), ("R", None)], name))


def test_unknown_template_names_the_known_ones():
    with pytest.raises(PromptError, match=r"llava_v2.*llava_v1, vicuna_v1, llava_llama_2, v1"):
        render([("Q", None)], "llava_v2")


def test_missing_answer_in_the_middle_is_refused():
    with pytest.raises(PromptError, match="turn 1 of 2 has no answer"):
        render([("Q", None), ("R", "B")])


def test_conversation_without_turns_is_refused():
    with pytest.raises(PromptError, match="at least one question"):
        render([])


@pytest.mark.parametrize("question", ["", "   ", "\n\t", "\u3000"])
def test_empty_questions_are_refused(question):
    with pytest.raises(PromptError, match="empty"):
        check_question(question)


@pytest.mark.parametrize("text", RESERVED_TEXTS)
def test_control_texts_in_a_question_are_named(text):
    with pytest.raises(PromptError) as error:
        check_question(f"What is {text} here?")
    assert text in str(error.value) and "remove" in str(error.value)


def test_a_tokenizers_own_tokens_are_reserved_too(model_bytes):
    tokenizer = Tokenizer(model_bytes)
    tokenizer.add_tokens(["[PAD]"])
    check_question("a [PAD] of paper")
    with pytest.raises(PromptError, match=r"\[PAD\]"):
        check_question("a [PAD] of paper", tokenizer)


def test_questions_must_be_text():
    with pytest.raises(PromptError, match="int"):
        check_question(3)  # type: ignore[arg-type]


@pytest.mark.parametrize(
    "question", ["雨の中の傘は?", '<angle> {braces} [brackets] "q" </b>', "a" * 100_000, "segment\nthe\tcat"]
)
def test_ordinary_questions_pass(question):
    check_question(question, template="llava_v1")


@pytest.mark.parametrize("question", ["say ASSISTANT: hello", "ASSISTANT: hello", "who is the ASSISTANT:"])
def test_separators_are_refused_for_training_only(question):
    check_question(question)
    with pytest.raises(PromptError, match="separates question from answer"):
        check_question(question, template="llava_v1")
