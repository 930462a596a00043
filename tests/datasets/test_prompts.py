"""Training templates: what they give, and what a user's file may hold."""

from __future__ import annotations

import dataclasses
import json

import pytest
from hypothesis import given
from hypothesis import strategies as st

from read_jax.data.item import Query
from read_jax.data.prompts import (
    PHRASE_QUESTION,
    SEGMENTATION_ANSWER,
    SHORT_TEMPLATES,
    TRAINING_TEMPLATES,
    TemplateSet,
    evaluation_answer,
    evaluation_question,
    fill,
    templates_named,
)
from read_jax.errors import DataError
from read_jax.text.conversation import RESERVED_TEXTS, TEMPLATES

LISTS = [field.name for field in dataclasses.fields(TemplateSet)]


class Always:
    """Takes the option at one place, or the last."""

    def __init__(self, place: int) -> None:
        self.place = place

    def choice(self, options):
        return options[min(self.place, len(options) - 1)]


@pytest.mark.parametrize("name", LISTS)
def test_every_list_has_a_dozen_different_templates(name):
    templates = getattr(TRAINING_TEMPLATES, name)
    assert len(set(templates)) == len(templates) >= 12


@pytest.mark.parametrize("place", range(20))
@pytest.mark.parametrize("is_sentence", [False, True])
@pytest.mark.parametrize("exists", [False, True])
@pytest.mark.parametrize("correction", ["", "A Mule "])
def test_answers_point_with_seg_exactly_when_the_thing_exists(place, is_sentence, exists, correction):
    answer = TRAINING_TEMPLATES.answer("A Horse", is_sentence, exists, correction, Always(place))
    assert answer.count("[SEG]") == exists
    assert not set("{}") & set(answer)
    if correction and not exists:
        assert "a mule" in answer


@pytest.mark.parametrize("place", range(20))
def test_a_phrase_is_asked_for_in_lower_case(place):
    assert "the red cup" in TRAINING_TEMPLATES.question(" The RED cup ", False, Always(place))


@pytest.mark.parametrize("place", range(20))
def test_a_sentence_is_asked_as_it_is(place):
    assert "What can Roll?" in TRAINING_TEMPLATES.question("What can Roll?", True, Always(place))


@pytest.mark.parametrize("place", range(20))
@pytest.mark.parametrize("correction", ["", "a mule"])
def test_the_answer_to_a_sentence_does_not_repeat_it_as_a_name(place, correction):
    assert "rolls" not in TRAINING_TEMPLATES.answer("what rolls?", True, False, correction, Always(place))


@given(st.text(alphabet="ab{}|phrasecotn \\g<1>", max_size=20), st.integers(0, 20))
def test_any_phrase_stands_in_question_and_answer_as_it_is(phrase, place):
    wanted = phrase.strip().lower()
    assert wanted in TRAINING_TEMPLATES.question(phrase, False, Always(place))
    assert wanted in TRAINING_TEMPLATES.answer("x", False, False, phrase + "x", Always(place))


def test_a_placeholder_within_a_phrase_is_not_filled_again():
    assert (
        fill("{phrase}/{correction}", phrase="{correction}", correction="{phrase}") == "{correction}/{phrase}"
    )


def test_the_evaluation_strings_are_the_fixed_ones():
    assert evaluation_question(Query("The CAT")) == (
        "What is the cat in this image? Please output segmentation mask."
    )
    assert evaluation_question(Query("Who Sleeps?", is_sentence=True)) == (
        "Who Sleeps? Please output segmentation mask."
    )
    assert evaluation_answer(Query("The CAT")) == "Sure, the segmentation result is [SEG]."


@pytest.mark.parametrize("suffix", [".toml", ".json"])
def test_a_file_replaces_the_lists_it_names(tmp_path, suffix):
    path = tmp_path / f"mine{suffix}"
    lists = {"phrase_questions": ["Wo ist {phrase}?"], "denials": ["Nein, kein {phrase}.", "Nein."]}
    toml = "\n".join(f"{name} = {json.dumps(texts)}" for name, texts in lists.items())
    path.write_text(json.dumps(lists) if suffix == ".json" else toml, encoding="utf-8")
    templates = TemplateSet.load(path)
    assert templates.question("Ü", False, Always(0)) == "Wo ist ü?"
    assert templates.denials == ("Nein, kein {phrase}.", "Nein.")
    assert templates.affirmations == TRAINING_TEMPLATES.affirmations
    assert templates.digest() != TRAINING_TEMPLATES.digest()


BAD = {
    "no placeholder": ("phrase_questions", ["Where is it?"], r"entry 1, 'Where is it\?'.*\{phrase\}"),
    "unknown placeholder": ("denials", ["No.", "No {thing}."], r"entry 2.*unknown placeholder \{thing\}"),
    "positional placeholder": ("denials", ["No.", "No {}."], r"entry 2.*unknown placeholder \{\}"),
    "half a placeholder": ("sentence_questions", ["{phrase} {"], "entry 1.*brace"),
    "correction missing": ("corrections", ["No {phrase}."], r"entry 1.*\{correction\}"),
    "correction elsewhere": ("denials", ["But {correction}."], r"unknown placeholder \{correction\}"),
    "no SEG": ("affirmations", ["Yes: [SEG]", "Yes."], r"entry 2, 'Yes\.'.*\[SEG\] exactly once"),
    "two SEG": ("affirmations", ["[SEG] [SEG]"], r"\[SEG\] exactly once"),
    "SEG in a denial": ("denials", ["No [SEG]."], "affirmations only"),
    "control token": ("denials", ["No.</s>"], "'</s>' has a meaning"),
    "separator": ("denials", ["No. ASSISTANT: yes"], "ASSISTANT"),
    "not a text": ("denials", [7], "entry 1, 7: it must be a text"),
    "empty text": ("denials", [" "], "not empty"),
    "empty list": ("denials", [], "denials must be a list"),
    "a text for a list": ("denials", "No.", "denials must be a list"),
    "nothing for sentences": ("corrections", ["No {phrase}, {correction}."], "needs one entry without"),
    "unknown list": ("denial", ["No."], "no list 'denial'.*nearest is 'denials'"),
}


@pytest.mark.parametrize("case", BAD)
def test_a_wrong_entry_is_refused_by_name(tmp_path, case):
    name, templates, message = BAD[case]
    path = tmp_path / "mine.json"
    path.write_text(json.dumps({name: templates}))
    with pytest.raises(DataError, match=message) as caught:
        TemplateSet.load(path)
    assert str(path) in str(caught.value)


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("absent.toml", None, "No such file"),
        ("bad.toml", b"denials = [", "not valid TOML"),
        ("bad.json", b"{", "not valid JSON"),
        ("list.json", b"[]", "must hold lists of templates by name, not list"),
        ("latin.toml", b"denials = ['\xe9']", "cannot be read"),
    ],
)
def test_an_unreadable_file_is_an_error(tmp_path, name, content, message):
    if content is not None:
        (tmp_path / name).write_bytes(content)
    with pytest.raises(DataError, match=message):
        TemplateSet.load(tmp_path / name)


def test_no_template_of_ours_holds_a_control_text():
    texts = [text for name in LISTS for text in getattr(TRAINING_TEMPLATES, name)]
    for text in texts:
        assert not [r for r in RESERVED_TEXTS if r in text.replace("[SEG]", "")]
        assert not [t for t in TEMPLATES.values() if t.separator in text]


def test_templates_are_named_or_read_from_a_file(tmp_path):
    file = tmp_path / "own.json"
    file.write_text(json.dumps({"affirmations": ["Look: [SEG]."]}))
    assert templates_named("varied") is TRAINING_TEMPLATES
    assert templates_named("short") is SHORT_TEMPLATES
    assert templates_named(str(file)).affirmations == ("Look: [SEG].",)
    with pytest.raises(DataError, match="shrot"):
        templates_named("shrot")


def test_short_templates_ask_as_evaluation_does_half_of_the_time():
    asked = SHORT_TEMPLATES.phrase_questions
    assert asked.count(PHRASE_QUESTION.format(text="{phrase}")) == len(asked) / 2
    assert SHORT_TEMPLATES.affirmations == (SEGMENTATION_ANSWER,)
