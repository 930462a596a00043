"""Words around a dataset's texts: the fixed evaluation templates, and varied ones for training.

A user's own training templates are a TOML or JSON file with any of these lists (a list left out is the one
below); see `TemplateSet` for what may stand in each:

    phrase_questions = ["Where is the {phrase}? Mark it."]
    sentence_questions = ["{phrase} Show me in the picture."]
    affirmations = ["Here it is: [SEG]."]
    denials = ["I see no {phrase}.", "That is not in the picture."]
    corrections = ["I see no {phrase}, but a {correction}.", "What I see is rather {correction}."]
"""

from __future__ import annotations

import dataclasses
import difflib
import hashlib
import json
import re
import tomllib
from pathlib import Path
from typing import TYPE_CHECKING, Any, Protocol, Self

from read_jax.errors import DataError
from read_jax.text.conversation import RESERVED_TEXTS, TEMPLATES
from read_jax.text.tokenizer import SEG_TOKEN

if TYPE_CHECKING:
    from collections.abc import Mapping, Sequence

    from read_jax.data.item import Query

SENTENCE_QUESTION = "{text} Please output segmentation mask."
PHRASE_QUESTION = "What is {text} in this image? Please output segmentation mask."
SEGMENTATION_ANSWER = "Sure, the segmentation result is [SEG]."
"""The evaluation strings: those the paper validates ReasonSeg with, which checkpoints were trained on."""

_PLACEHOLDER = re.compile(r"\{([^{}]*)\}")


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
    if query.is_sentence:
        absent = "nothing of the kind"
    elif phrase.startswith(("the ", "a ", "an ")):
        absent = f"no sign of {phrase}"
    else:
        absent = f"no {phrase}"
    there = f", but there is {correction}" if correction else ""
    return f"There is {absent} in this image{there}."


class Chooser(Protocol):
    """Where the choice among templates comes from."""

    def choice(self, options: Sequence[str]) -> str:
        """One of the options."""
        ...


@dataclasses.dataclass(frozen=True)
class TemplateSet:
    """Templates for training; immutable and checked, so that every combination makes a sound example.

    Attributes:
        phrase_questions: ask for a thing by its name; {phrase} at least once.
        sentence_questions: put a whole sentence or question; {phrase} (the sentence) at least once.
        affirmations: answers when it is there: [SEG] exactly once, {phrase} as wished.
        denials: answers when it is not: {phrase} as wished; one at least without, for whole sentences.
        corrections: answers that also name what is there: {correction} at least once, {phrase} as wished;
            one at least without {phrase}.

    [SEG] stands in affirmations only; no template may hold a control token or what separates question from
    answer. Raises `DataError` naming the entry.
    """

    phrase_questions: tuple[str, ...]
    sentence_questions: tuple[str, ...]
    affirmations: tuple[str, ...]
    denials: tuple[str, ...]
    corrections: tuple[str, ...]

    def __post_init__(self) -> None:
        for field in dataclasses.fields(self):
            _check_templates(field.name, getattr(self, field.name), "the templates")

    @classmethod
    def load(cls, path: str | Path) -> Self:
        """Read a .toml or .json file of lists of templates; raises `DataError` naming a wrong entry."""
        lists = _read_lists(Path(path).expanduser())
        known = [field.name for field in dataclasses.fields(cls)]
        chosen = {name: getattr(TRAINING_TEMPLATES, name) for name in known}
        for name, templates in lists.items():
            if name not in known:
                near = difflib.get_close_matches(name, known, n=1, cutoff=0.0)[0]
                raise DataError(f"{path}: there is no list {name!r} of templates; the nearest is {near!r}.")
            _check_templates(name, templates, str(path))
            chosen[name] = tuple(templates)
        return cls(**chosen)

    def question(self, phrase: str, is_sentence: bool, draws: Chooser) -> str:
        """A question about a phrase (put in lower case) or a whole sentence (as it is)."""
        if is_sentence:
            return fill(draws.choice(self.sentence_questions), phrase=phrase.strip())
        return fill(draws.choice(self.phrase_questions), phrase=phrase.strip().lower())

    def answer(self, phrase: str, is_sentence: bool, exists: bool, correction: str, draws: Chooser) -> str:
        """Affirms with [SEG]; else names the correction where there is one; else denies."""
        correction = correction.strip().lower()
        templates = self.affirmations if exists else self.corrections if correction else self.denials
        if is_sentence:  # a sentence does not fit where a name is meant
            templates = tuple(t for t in templates if "{phrase}" not in t)
        return fill(draws.choice(templates), phrase=phrase.strip().lower(), correction=correction)

    def digest(self) -> str:
        """Short hash of the contents: equal sets give equal training examples."""
        return hashlib.sha256(json.dumps(dataclasses.asdict(self)).encode()).hexdigest()[:16]


def fill(template: str, **values: str) -> str:
    """Put values in the place of {names}, in one pass: braces inside a value stay what they are."""
    return _PLACEHOLDER.sub(lambda match: values[match[1]], template)


def _read_lists(path: Path) -> Mapping[str, Any]:
    try:
        text = path.read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        reason = getattr(error, "strerror", None) or error
        raise DataError(f"{path}: the templates cannot be read: {reason}.") from None
    try:
        lists = json.loads(text) if path.suffix == ".json" else tomllib.loads(text)
    except ValueError as error:  # of both parsers
        kind = "JSON" if path.suffix == ".json" else "TOML"
        raise DataError(f"{path} is not valid {kind}: {error}.") from None
    if not isinstance(lists, dict):
        raise DataError(f"{path} must hold lists of templates by name, not {type(lists).__name__}.")
    return lists


_NEEDED = {"phrase_questions": "{phrase}", "sentence_questions": "{phrase}", "corrections": "{correction}"}
_WITHOUT_PHRASE = ("affirmations", "denials", "corrections")
"""Lists that also answer whole sentences, which fit into no {phrase}."""


def _check_templates(name: str, templates: Any, where: str) -> None:
    if not isinstance(templates, list | tuple) or not templates:
        raise DataError(f"{where}: {name} must be a list of at least one text.")
    for number, template in enumerate(templates, start=1):
        problem = _problem(name, template)
        if problem:
            raise DataError(f"{where}: {name}, entry {number}, {template!r}: {problem}.")
    if name in _WITHOUT_PHRASE and all("{phrase}" in template for template in templates):
        raise DataError(
            f"{where}: {name} needs one entry without {{phrase}}, for questions that are sentences."
        )


def _problem(name: str, template: Any) -> str:
    """What is wrong with one template; "" if nothing."""
    if not isinstance(template, str) or not template.strip():
        return "it must be a text that is not empty"
    allowed = ("phrase", "correction") if name == "corrections" else ("phrase",)
    unknown = [found for found in _PLACEHOLDER.findall(template) if found not in allowed]
    if unknown:
        return f"unknown placeholder {{{unknown[0]}}}; known here: {', '.join(f'{{{a}}}' for a in allowed)}"
    if set("{}") & set(_PLACEHOLDER.sub("", template)):
        return "a brace without its partner"
    if _NEEDED.get(name, "") not in template:
        return f"it must hold {_NEEDED[name]}"
    wanted = 1 if name == "affirmations" else 0
    if template.count(SEG_TOKEN) != wanted:
        return (
            f"it must hold {SEG_TOKEN} exactly once"
            if wanted
            else f"{SEG_TOKEN} belongs into affirmations only"
        )
    reserved = [text for text in RESERVED_TEXTS if text in template.replace(SEG_TOKEN, "")]
    reserved += [t.separator for t in TEMPLATES.values() if t.cue.strip() in template]
    return f"{reserved[0]!r} has a meaning of its own in a conversation" if reserved else ""


TRAINING_TEMPLATES = TemplateSet(
    phrase_questions=(
        "Where in the picture is {phrase}? Give its mask.",
        "Find {phrase} and outline it.",
        "Can you mark {phrase} for me?",
        "Show me which pixels belong to {phrase}.",
        "I am looking for {phrase}. Segment it, please.",
        "Draw a mask over {phrase}.",
        "Locate {phrase} in this photo and answer with its mask.",
        "Please cut {phrase} out of the picture.",
        "Which part of the image shows {phrase}?",
        "Could you highlight {phrase}?",
        "Segmentation mask wanted: {phrase}.",
        "Point out {phrase} with a mask.",
        "Do you see {phrase}? If you do, segment it; if not, tell me so.",
        "Can {phrase} be seen anywhere in here? Mark it, or say that it is missing.",
        "Mask {phrase}, provided the image really shows it.",
        "Check whether the scene has {phrase}, and segment it if so.",
    ),
    sentence_questions=(
        "{phrase} Answer with a mask.",
        "{phrase} Show it by a segmentation mask.",
        "{phrase} Mark the place in the picture.",
        "{phrase} Please segment what you mean.",
        "{phrase} Reply by outlining it.",
        "{phrase} Give me the pixels.",
        "{phrase} Highlight your answer in the image.",
        "{phrase} I would like to see the mask.",
        "Look at the picture closely. {phrase} Segment the answer.",
        "Here is a riddle about this image: {phrase} Solve it with a mask.",
        "{phrase} Draw the mask of it.",
        "Think about the scene, then segment. {phrase}",
        "{phrase} If the picture shows it, mask it; otherwise explain.",
        "{phrase} Should nothing here fit, say so; else give the mask.",
    ),
    affirmations=(
        "Here is the mask: [SEG].",
        "I have marked it: [SEG].",
        "It is here, [SEG].",
        "Found it: [SEG].",
        "[SEG] covers it.",
        "Yes, this is it: [SEG].",
        "Certainly. The mask is [SEG].",
        "These are the pixels: [SEG].",
        "You can see it at [SEG].",
        "The region you want is [SEG].",
        "My answer is [SEG].",
        "It is outlined by [SEG].",
        "There it is; I segmented it as [SEG].",
    ),
    denials=(
        "I cannot find {phrase} in this picture.",
        "I do not see {phrase} here.",
        "The image does not show {phrase}.",
        "I looked for {phrase}, but it is not there.",
        "The scene is without {phrase}.",
        "I see nothing that could be {phrase}.",
        "{phrase} does not appear in this image.",
        "As far as I can tell, {phrase} is missing from the picture.",
        "Nothing in this picture fits that description.",
        "What you ask for is not in the image.",
        "I am afraid it is not here, so there is no mask.",
        "The picture does not contain it.",
        "There is nothing of the kind to segment.",
    ),
    corrections=(
        "I do not see {phrase}, but I do see {correction}.",
        "The picture does not show {phrase}; what it shows is {correction}.",
        "I cannot make out {phrase} here. Perhaps you mean {correction}?",
        "{phrase} is not in the image, though {correction} is.",
        "Instead of {phrase}, the scene has {correction}.",
        "I could not find {phrase}. You may be thinking of {correction}.",
        "The scene is without {phrase}; it does show {correction}, however.",
        "It is not {phrase} that the image shows but {correction}.",
        "I looked for {phrase} and found only {correction}.",
        "Nothing here is {phrase}. The nearest thing is {correction}.",
        "That is not in the picture; {correction} is.",
        "You may mean {correction}: what you describe is not here.",
        "What I find instead is {correction}.",
    ),
)
"""The training templates of this project."""

SHORT_TEMPLATES = TemplateSet(
    phrase_questions=(
        *[PHRASE_QUESTION.format(text="{phrase}")] * 8,
        *["{phrase}", "the {phrase}"] * 2,
        "Segment the {phrase}.",
        "Where is the {phrase}?",
        "Find the {phrase} in this image.",
        "Show me the {phrase}.",
    ),
    sentence_questions=(*[SENTENCE_QUESTION.format(text="{phrase}")] * 3, "{phrase}"),
    affirmations=(SEGMENTATION_ANSWER,),
    denials=("There is no {phrase} in this image.", "There is nothing of the kind in this image."),
    corrections=(
        "There is no {phrase} in this image, but there is {correction}.",
        "There is nothing of the kind in this image, but there is {correction}.",
    ),
)
"""The fixed evaluation templates half of the time, and short questions: for models too small for variety."""

_NAMED = {"varied": TRAINING_TEMPLATES, "short": SHORT_TEMPLATES}


def templates_named(name: str) -> TemplateSet:
    """The project's own templates "varied" or "short", or those of a file; raises `DataError`."""
    return _NAMED[name] if name in _NAMED else TemplateSet.load(name)
