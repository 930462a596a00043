"""Expressions in words: a phrase without article ("small red circle"), or a sentence that asks for things.

Where an anchor carries a relation of its own, "that is" ties it to the anchor: "ball left of the star that is
above the ring". The vocabulary is `VOCABULARY`, all lower case but for the first word of a sentence.
"""

from __future__ import annotations

import itertools
import re

from read_jax.data.scenes.draws import Random
from read_jax.data.scenes.knowledge import USES
from read_jax.data.scenes.meaning import Between, Expression, Extreme, Nearest, Noun, Related, Riddle
from read_jax.data.scenes.shapes import PATTERNS, SHAPES
from read_jax.data.scenes.world import COLOURS

Ways = tuple[str, ...]
"""What may be said for the same, each as often."""
_NAMES: dict[str | None, Ways] = {
    **{shape: (shape,) for shape in SHAPES},
    **{None: ("thing", "object"), "cup": ("cup", "mug"), "boat": ("boat", "sailboat")},
}
_PLURALS = {"cross": "crosses", "fish": "fish"}  # the others take an s
_SIZES: dict[str, Ways] = {"small": ("small", "little"), "large": ("large", "big")}
_PLACES = {
    **{"left": "on the left", "right": "on the right", "top": "at the top"},
    **{"bottom": "at the bottom", "middle": "in the middle"},
}
_RELATIONS: dict[str, Ways] = {
    "left": ("left of", "to the left of"),
    "right": ("right of", "to the right of"),
    "above": ("above", "higher than"),
    "below": ("below", "lower than"),
    "behind": ("behind", "partly hidden by"),
    "in front": ("in front of", "partly covering"),
}
_EXTREMES: dict[str, Ways] = {
    "leftmost": ("leftmost",),
    "rightmost": ("rightmost",),
    "topmost": ("topmost", "highest"),
    "bottommost": ("bottommost", "lowest"),
    "largest": ("largest", "biggest"),
    "smallest": ("smallest",),
}
_NEAREST: dict[bool, Ways] = {False: ("closest to", "nearest to"), True: ("farthest from",)}
_ALIKE: dict[str, Ways] = {
    "colour": ("of the same color as", "with the same color as"),
    "shape": ("of the same shape as",),
}
_RIDDLES: dict[str, Ways] = {
    "odd": ("Which is the odd one out?", "Which one does not belong with the others?"),
    "twins": ("Which two look the same?", "Which two are exactly alike?"),
    "most corners": ("Which shape has the most corners?",),
    "fewest corners": ("Which shape has the fewest corners?",),
}
_ALL: Ways = ("Show all {plural}.", "Where are the {plural}?", "Find every {singular}.")
_BOTH: Ways = ("Show both {plural}.", "Where are the two {plural}?")
_TIE = " that is"
NO_TWINS = "No two things in this image look the same."


class Speaker:
    """Chooses among the ways to say a thing, and having chosen, stays with it."""

    def __init__(self, draws: Random):
        self._draws = draws
        self._said: dict[Ways, str] = {}

    def words(self, expression: Expression, tie: str = "") -> str:
        """The expression as a phrase without article; raises `ValueError` for a riddle, which has none.

        tie: what to put between the head and its relation, where it has one.
        """
        if isinstance(expression, Noun):
            return self._noun(expression)
        if isinstance(expression, Riddle):
            raise ValueError(f"the riddle {expression.name!r} is a sentence, not a phrase.")
        if isinstance(expression, Extreme):
            return f"{self._say(_EXTREMES[expression.which])} {self._noun(expression.head)}"
        head = self._noun(expression.head) + tie
        if isinstance(expression, Between):
            first, second = self.words(expression.first, _TIE), self.words(expression.second, _TIE)
            return f"{head} between the {first} and the {second}"
        if isinstance(expression, Related):
            link = self._say(_RELATIONS[expression.relation])
        elif isinstance(expression, Nearest):
            link = self._say(_NEAREST[expression.far])
        else:
            link = self._say(_ALIKE[expression.attribute])
        return f"{head} {link} the {self.words(expression.anchor, _TIE)}"

    def plural(self, noun: Noun) -> str:
        """The noun for several things: "small red circles"."""
        return self._noun(noun, many=True)

    def ask_for_all(self, noun: Noun, count: int) -> str:
        """A sentence asking for all the things the noun denotes, of which there are that many."""
        # "both" must not tell that there are any
        form = self._say(_ALL + _BOTH if count in (0, 2) else _ALL)
        return form.format(plural=self.plural(noun), singular=self._noun(noun))

    def ask_riddle(self, name: str) -> str:
        return self._say(_RIDDLES[name])

    def ask_use(self, use: str) -> tuple[str, str]:
        """A sentence asking for all that is good for it, and what to say where there is none."""
        question = self._say(tuple(USES[use].questions))
        return question, USES[use].questions[question]

    def _say(self, ways: Ways) -> str:
        if ways not in self._said:
            self._said[ways] = self._draws.choice(ways)
        return self._said[ways]

    def _noun(self, noun: Noun, many: bool = False) -> str:
        name = self._say(_NAMES[noun.shape])
        if many:
            name = _PLURALS.get(name, name + "s")
        parts = [
            self._say(_SIZES[noun.size]) if noun.size else None,
            noun.pattern,
            noun.colour,
            name,
            _PLACES[noun.place] if noun.place else None,
            USES[noun.use].clause if noun.use else None,
        ]
        return " ".join(part for part in parts if part)


def words_for(kind: str, value: str) -> Ways:
    """The words that say that a thing's "shape", "colour", "size" or "pattern" is of that value."""
    if kind == "shape":
        names = _NAMES[value]
        return (*names, *(_PLURALS.get(name, name + "s") for name in names))
    return _SIZES[value] if kind == "size" else (value,)


def _vocabulary() -> tuple[str, ...]:
    groups = itertools.chain(
        _NAMES.values(),
        _SIZES.values(),
        _RELATIONS.values(),
        _EXTREMES.values(),
        _NEAREST.values(),
        _ALIKE.values(),
        _RIDDLES.values(),
        (_ALL, _BOTH, tuple(_PLACES.values()), tuple(COLOURS), PATTERNS),
        ((*use.questions, *use.questions.values(), use.clause) for use in USES.values()),
        ((_PLURALS.get(n, n + "s") for n in names) for names in _NAMES.values()),
        (("between the and", "that is", "There are no in this image.", NO_TWINS),),
    )
    texts = " ".join(text for group in groups for text in group)
    return tuple(sorted(set(re.findall(r"[a-z]+", re.sub(r"{\w+}", "", texts).lower()))))


VOCABULARY = _vocabulary()
"""Every word of the phrases, questions, corrections and denials."""
