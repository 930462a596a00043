"""The questions about a scene: proposed at random, kept when their meaning in the scene is clear.

The sort of a question is "referring" (attributes and place), "relational" (other things, or rank), "multiple"
(all that fit), "reasoning" (takes knowledge), or "false premise": any of these about what is not there.

A false phrase is corrected where it is plain what was meant: exactly one thing of the named shape or use is
there (or of the named head, where only the relation is wrong), and the correction says what is true of it.
Elsewhere, and to every false sentence, the answer is a denial.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator

from read_jax.data.item import Query
from read_jax.data.scenes.draws import Random
from read_jax.data.scenes.knowledge import USES
from read_jax.data.scenes.meaning import (
    EXTREMES,
    OPPOSITE,
    PLACES,
    RELATIONS,
    RIDDLES,
    Alike,
    Between,
    Expression,
    Extreme,
    Nearest,
    Noun,
    Related,
    Riddle,
    Unclear,
    denote,
    is_at,
)
from read_jax.data.scenes.shapes import EVERYDAY, PATTERNS, SHAPES
from read_jax.data.scenes.wording import NO_TWINS, Speaker
from read_jax.data.scenes.world import COLOURS, HELD_OUT, SIZES, Scene, Thing

KINDS = ("referring", "relational", "multiple", "reasoning", "false premise")
_FALSE_PREMISES = 0.35  # as often tried; they fail more often
FEWEST, MOST = 3, 8
"""Questions about a scene."""
# of each level, how often which sort is tried (false premises too, before they are made false)
_MIX: dict[int, dict[str, int]] = {
    1: {"referring": 1},
    2: {"referring": 50, "multiple": 25, "relational": 25},
    3: {"referring": 25, "multiple": 15, "relational": 60},
    4: {"referring": 10, "multiple": 5, "relational": 25, "reasoning": 60},
}
_CORRECTABLE = 0.7  # how often a false phrase is sought that can be corrected
_ATTEMPTS = 25  # per question


@dataclasses.dataclass(frozen=True)
class Question:
    """What is asked, in words and in meaning.

    Attributes:
        expression: the meaning; `many`: all things it denotes, not the one.
        things: indices of the answer, ascending; () where the premise is false.
        phrase, is_sentence, correction, answer: as `Query` has them.
        corrected: the meaning of the correction.
    """

    expression: Expression
    many: bool
    things: tuple[int, ...]
    phrase: str
    is_sentence: bool = False
    correction: str = ""
    answer: str | None = None
    corrected: Expression | None = None

    @property
    def kind(self) -> str:
        return kind_of(self.expression, self.many) if self.things else "false premise"

    def nouns(self) -> Iterator[Noun]:
        """Every noun it speaks of, those of the correction too."""
        yield from _nouns(self.expression)
        if self.corrected is not None:
            yield from _nouns(self.corrected)

    def touches_held_out(self, scene: Scene) -> bool:
        """It names a pair of `HELD_OUT`, or a thing of such a pair is among the answer."""
        things = [scene.things[k] for k in self.things]
        return self.names_held_out() or any(HELD_OUT[t.shape] == t.colour for t in things)

    def names_held_out(self) -> bool:
        """It names a pair of `HELD_OUT`."""
        return any(noun.shape and HELD_OUT[noun.shape] == noun.colour for noun in self.nouns())


def make_questions(scene: Scene, draws: Random, held_out: bool) -> list[Question]:
    """Three to eight different questions about the scene; fewer only where it offers no more.

    held_out: pairs of `HELD_OUT` may be named.
    """
    wanted = draws.between(FEWEST, MOST)
    questions: list[Question] = []
    for _ in range(wanted * _ATTEMPTS):
        kind, is_false = draws.weighted(_MIX[scene.level]), draws.chance(_FALSE_PREMISES)
        correctable = is_false and draws.chance(_CORRECTABLE)
        for _ in range(_ATTEMPTS):  # the same sort again, so that hard ones do not give way to easy ones
            question = _propose(kind, is_false, scene, draws)
            if question is None or (question.names_held_out() and not held_out):
                continue
            if correctable and not question.correction and question.answer is None:
                continue
            if all(question.phrase != q.phrase and question.expression != q.expression for q in questions):
                questions.append(question)
                break
        if len(questions) == wanted:
            break
    return questions


def to_queries(questions: list[Question], scene: Scene, index: int, held_out: bool) -> tuple[Query, ...]:
    """The questions as a dataset gives them; every different answer, and every denial, has its own ref_id."""
    answers: list[tuple[int, ...]] = []
    counts: dict[int, int] = {}
    queries = []
    for question in questions:
        if not question.things or question.things not in answers:
            answers.append(question.things)
            number = len(answers) - 1
        else:
            number = answers.index(question.things)
        tags = (question.kind, f"level {scene.level}")
        if held_out:
            tags += ("held-out pair" if question.touches_held_out(scene) else "seen pairs",)
        queries.append(
            Query(
                phrase=question.phrase,
                exists=bool(question.things),
                is_sentence=question.is_sentence,
                correction=question.correction,
                answer=question.answer,
                ref_id=index * MOST + number,
                sent_id=counts.setdefault(number, 0),
                tags=tags,
            )
        )
        counts[number] += 1
    return tuple(queries)


def kind_of(expression: Expression, many: bool) -> str:
    """The sort of a question whose premise holds."""
    if isinstance(expression, Riddle) or any(noun.use for noun in _nouns(expression)):
        return "reasoning"
    if many:
        return "multiple"
    return "referring" if isinstance(expression, Noun) else "relational"


def _propose(kind: str, is_false: bool, scene: Scene, draws: Random) -> Question | None:
    """A question of that sort, true or false as asked; None when this one came out otherwise, or unclear."""
    try:
        if kind == "multiple":
            return _multiple(is_false, scene, draws)
        if kind == "reasoning" and draws.chance(0.65):
            return _sentence(is_false, scene, draws)
        make = {"referring": _referring, "relational": _relational, "reasoning": _by_use}[kind]
        expression = make(scene, draws)
        if is_false and draws.chance(0.8):
            expression = _twisted(expression, scene, draws)
        things = denote(expression, scene)
        if kind_of(expression, False) != kind or len(things) != (0 if is_false else 1):
            return None
        corrected = _correction(expression, scene) if is_false else None
    except Unclear:
        return None
    speaker = Speaker(draws)
    phrase = speaker.words(expression)
    correction = "the " + speaker.words(corrected) if corrected else ""
    return Question(expression, False, things, phrase, correction=correction, corrected=corrected)


def _referring(scene: Scene, draws: Random) -> Noun:
    """A noun true of some thing."""
    return _describe(draws.choice(scene.things), scene, draws, place=0.3 if scene.level > 1 else 0.0)


def _describe(thing: Thing, scene: Scene, draws: Random, place: float = 0.0) -> Noun:
    """Some of the thing's attributes, at least its shape or its colour."""
    shape, colour = draws.chance(0.85), draws.chance(0.6)
    places = [p for p in PLACES if is_at(p, thing, scene)] if draws.chance(place) else []
    patterned = any(t.pattern != "plain" for t in scene.things) and thing.shape not in EVERYDAY
    return Noun(
        shape=thing.shape if shape else None,
        colour=thing.colour if colour or not shape else None,
        size=thing.size if draws.chance(0.3) else None,
        pattern=thing.pattern if patterned and draws.chance(0.5) else None,
        place=draws.choice(places) if places else None,
    )


def _head(scene: Scene, draws: Random, thing: Thing | None = None) -> Noun:
    """What stands before a relation: a shape, a colour, or just a thing."""
    thing = thing or draws.choice(scene.things)
    return draws.weighted(
        {
            Noun(shape=thing.shape): 50,
            Noun(shape=thing.shape, colour=thing.colour): 20,
            Noun(colour=thing.colour): 15,
            Noun(): 15,
        }
    )


def _relational(scene: Scene, draws: Random) -> Expression:
    """An expression about one thing by way of others, or of its rank."""
    form = draws.weighted(
        {"related": 50, "extreme": 50}
        if scene.level == 2
        else {"related": 45, "covers": 15, "extreme": 10, "nearest": 10, "between": 25, "alike": 10}
    )
    head = _head(scene, draws)
    if form == "extreme":
        return Extreme(head, draws.choice(EXTREMES))
    anchor: Expression = _describe(draws.choice(scene.things), scene, draws)
    if scene.level == 4 and draws.chance(0.6):
        ring = _head(scene, draws)
        anchor = (
            Related(ring, draws.choice(RELATIONS[:4]), anchor)
            if draws.chance(0.6)
            else Extreme(ring, draws.choice(EXTREMES))
        )
    if form == "covers":
        if not scene.covers:
            raise Unclear
        pair = scene.covers[0] if draws.chance(0.5) else scene.covers[0][::-1]
        head, anchor = (
            _head(scene, draws, scene.things[pair[0]]),
            _describe(scene.things[pair[1]], scene, draws),
        )
        return Related(head, "in front" if pair == scene.covers[0] else "behind", anchor)
    if form == "nearest":
        return Nearest(head, anchor, far=draws.chance(0.3))
    if form == "between":
        return Between(head, anchor, _describe(draws.choice(scene.things), scene, draws))
    if form == "alike":
        if draws.chance(0.6):
            return Alike(Noun(shape=head.shape, size=head.size), "colour", anchor)
        return Alike(Noun(colour=head.colour), "shape", anchor)
    if len(denote(head, scene)) == 1 and draws.chance(0.6):
        raise Unclear  # the relation would be idle
    return Related(head, draws.choice(RELATIONS[:4]), anchor)


def _by_use(scene: Scene, draws: Random) -> Expression:
    """A thing by what it is good for, with its colour or size, or as what another stands beside."""
    noun = Noun(use=draws.choice(_known_uses(scene)))
    form = draws.below(3)
    if form == 0:
        return Related(_head(scene, draws), draws.choice(RELATIONS[:4]), noun)
    if form == 1:
        return Nearest(_head(scene, draws), noun)
    thing = draws.choice(scene.things)
    size = thing.size if draws.chance(0.3) else None
    return dataclasses.replace(
        noun, colour=thing.colour if not size or draws.chance(0.5) else None, size=size
    )


def _known_uses(scene: Scene) -> list[str]:
    """The uses that something in the scene has."""
    shapes = [t.shape for t in scene.things]
    uses = [name for name, use in USES.items() if any(s in use.yes for s in shapes)]
    if not uses:
        raise Unclear
    return uses


def _sentence(is_false: bool, scene: Scene, draws: Random) -> Question | None:
    """A riddle, or all that is good for something."""
    if draws.chance(0.35):
        name = draws.choice(RIDDLES)
        things = denote(Riddle(name), scene)
        if bool(things) == is_false:
            return None
        answer = NO_TWINS if is_false else None
        return Question(Riddle(name), True, things, Speaker(draws).ask_riddle(name), True, answer=answer)
    use = draws.choice(tuple(USES) if is_false else _known_uses(scene))
    things = denote(Noun(use=use), scene)
    if bool(things) == is_false:
        return None
    phrase, denial = Speaker(draws).ask_use(use)
    return Question(Noun(use=use), True, things, phrase, True, answer=denial if is_false else None)


def _multiple(is_false: bool, scene: Scene, draws: Random) -> Question | None:
    """All the things of a sort, of which there are several, or none."""
    noun = _describe(draws.choice(scene.things), scene, draws)
    if is_false:
        noun = _twisted_noun(noun, draws)
    things = denote(noun, scene)
    if bool(things) == is_false or len(things) == 1:
        return None
    speaker = Speaker(draws)
    phrase = speaker.ask_for_all(noun, len(things))
    answer = f"There are no {speaker.plural(noun)} in this image." if is_false else None
    return Question(noun, True, things, phrase, True, answer=answer)


def _twisted(expression: Expression, scene: Scene, draws: Random) -> Expression:
    """The expression with one thing about it changed."""
    if isinstance(expression, Noun):
        return _twisted_noun(expression, draws)
    if isinstance(expression, Related) and draws.chance(0.6):
        return dataclasses.replace(expression, relation=OPPOSITE[expression.relation])
    if isinstance(expression, Related | Nearest | Alike) and draws.chance(0.3):
        other = _twisted_noun(_describe(draws.choice(scene.things), scene, draws), draws)
        return dataclasses.replace(expression, anchor=other)
    if isinstance(expression, Riddle):
        raise Unclear
    return dataclasses.replace(expression, head=_twisted_noun(expression.head, draws))


def _twisted_noun(noun: Noun, draws: Random) -> Noun:
    """The noun with another value of one attribute it names, most often the colour or the shape."""
    values = {"shape": SHAPES, "colour": tuple(COLOURS), "size": tuple(SIZES), "pattern": PATTERNS}
    options: dict[str, tuple[str, ...]] = {**values, "place": PLACES, "use": tuple(USES)}
    weights = {"shape": 30, "colour": 50, "size": 15, "pattern": 20, "place": 20, "use": 20}
    named = {name: weight for name, weight in weights.items() if getattr(noun, name) is not None}
    if not named:
        raise Unclear
    name = draws.weighted(named)
    value = draws.choice([v for v in options[name] if v != getattr(noun, name)])
    return dataclasses.replace(noun, **{name: value})


def _correction(expression: Expression, scene: Scene) -> Expression | None:
    """What is there instead, of which exactly one thing could be meant; None where nothing could."""
    if isinstance(expression, Noun):
        return _corrected_noun(expression, scene)
    if isinstance(expression, Related) and denote(expression.anchor, scene):
        heads = denote(expression.head, scene)
        opposite = dataclasses.replace(expression, relation=OPPOSITE[expression.relation])
        return opposite if len(heads) == 1 and denote(opposite, scene) == heads else None
    return None


def _corrected_noun(noun: Noun, scene: Scene) -> Noun | None:
    if noun.shape is None and noun.use is None:
        return None
    found = denote(Noun(shape=noun.shape, use=noun.use), scene)
    if len(found) != 1:
        return None
    thing = scene.things[found[0]]
    place = next((p for p in PLACES if is_at(p, thing, scene)), None) if noun.place else None
    if noun.place and is_at(noun.place, thing, scene):
        place = noun.place
    if noun.place and place is None:
        raise Unclear
    return Noun(
        shape=noun.shape,
        colour=noun.colour and thing.colour,
        size=noun.size and thing.size,
        pattern=noun.pattern and thing.pattern,
        place=place,
        use=noun.use,
    )


def _nouns(expression: Expression) -> Iterator[Noun]:
    if isinstance(expression, Noun):
        yield expression
    elif not isinstance(expression, Riddle):
        for field in dataclasses.fields(expression):
            part = getattr(expression, field.name)
            if not isinstance(part, str | bool):
                yield from _nouns(part)
