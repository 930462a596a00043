"""Training examples from many sources at fixed rates, where example k depends on the seed and k alone.

    mixture = load_mixture("reasonseg", data_dir, seed=0, questions_per_image=3)
    mixture[123_456]         # a Sample: one picture, some questions about it with answers and masks
    load_mixture({"scenes|train": 3, "mine.jsonl": 1})

Every choice (source, picture, questions, templates) is read off a stream of random numbers of that example,
so an interrupted run goes on anywhere, and hosts and worker processes share the work without talking.
"""

from __future__ import annotations

import bisect
import dataclasses
import itertools
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple, TypeVar

import numpy as np

from read_jax.data.item import Compat, Item, Source
from read_jax.data.prompts import TRAINING_TEMPLATES, TemplateSet
from read_jax.data.recipes import PREMISE_KINDS, PREMISES, RECIPES, Group, Premises
from read_jax.data.sources import load_source
from read_jax.errors import DataError, ReadJaxError
from read_jax.images.masks import CompactMask
from read_jax.text.tokenizer import SEG_TOKEN

T = TypeVar("T")

MAX_TRIES = 64
"""Pictures drawn for one example before giving up: beyond this, hardly any picture can be used."""


class Row(NamedTuple):
    """One conversation about the picture.

    turns: (question, answer) pairs, without the mark of the picture; exists: whether what is asked for is
    there; mask: the target of its [SEG], None when it has none.
    """

    turns: tuple[tuple[str, str], ...]
    exists: bool
    mask: CompactMask | None


class Skipped(NamedTuple):
    """A drawn picture that could not be used, and why."""

    key: str
    reason: str


@dataclasses.dataclass(frozen=True, eq=False)
class Sample:
    """A picture with some questions and their answers, before tokens and preprocessing.

    key: "SOURCE:ITEM"; source: the source's name; image: uint8 [h, w, 3] RGB, or None where it was not looked
    at; rows: the conversations; size: height and width that the dataset says, where there is no image.
    """

    key: str
    source: str
    image: np.ndarray | None
    rows: tuple[Row, ...]
    size: tuple[int, int] = (0, 0)


class Choice(NamedTuple):
    """What an example draws first: the place in `Mixture.subsets`, and the item's number in its source."""

    subset: int
    index: int


class Subset(NamedTuple):
    """A source as a part of a mixture; chance: its share of the examples."""

    group: str
    source: Source
    chance: float
    premises: Premises | None


class Draws:
    """The random numbers of one example, the same on every machine and with every release of numpy.

    Philox is counter-based: each (seed, index) is a key with a stream of its own. Only its raw words are
    used; what numpy makes of them may change between releases.
    """

    def __init__(self, seed: int, index: int) -> None:
        self._words = np.random.Philox(key=np.array([seed, index], np.uint64))

    def _word(self) -> int:
        """64 random bits."""
        return int(self._words.random_raw())

    def below(self, count: int) -> int:
        """A whole number from 0 to count - 1, each alike (to within count / 2**64)."""
        return self._word() * count >> 64

    def weighted(self, bounds: Sequence[float]) -> int:
        """A place i with probability bounds[i] - bounds[i - 1]; bounds rise from above 0 to 1."""
        return bisect.bisect_right(bounds, (self._word() >> 11) * 2.0**-53, hi=len(bounds) - 1)

    def choice(self, options: Sequence[T]) -> T:
        """One of the options, each alike."""
        return options[self.below(len(options))]

    def sample(self, options: Sequence[T], count: int) -> list[T]:
        """`count` of the options in random order, no place twice; all, in their order, if there are fewer."""
        if len(options) <= count:
            return list(options)
        places = list(range(len(options)))
        for at in range(count):
            other = at + self.below(len(places) - at)
            places[at], places[other] = places[other], places[at]
        return [options[place] for place in places[:count]]


class Mixture:
    """An endless, random-access sequence of `Sample`.

    `mixture[k]`, k from 0 to 2**64 - 1, depends on the arguments and on k only. Of a picture n questions are
    drawn without replacement (all, in the dataset's order, if it has fewer). A picture that offers no
    question, or that cannot be read, is drawn again from the same source with the example's next random
    numbers.

    compat "read": a false premise replaces one of the picture's texts, so there are no more of them than
    texts; ignored pixels count as background; a picture without questions lets the source be drawn
    again too.

    Attributes:
        subsets: the sources with their chances, in the recipe's order.

    Raises:
        DataError: an argument is out of its range, or a source is empty.
    """

    def __init__(
        self,
        recipe: Sequence[Group],
        sources: Mapping[str, Source],
        *,
        seed: int = 0,
        questions_per_image: int = 3,
        templates: TemplateSet = TRAINING_TEMPLATES,
        premises: Mapping[str, Premises] = PREMISES,
        false_premises: bool = True,
        compat: Compat = None,
    ) -> None:
        """Mix.

        Args:
            recipe: groups with their rates.
            sources: by the names that the recipe uses.
            seed: 0 to 2**64 - 1.
            questions_per_image: n, at most so many questions of a picture in one example.
            templates: the words around names and sentences.
            premises: by dataset family (the part of a source's name before "|").
            false_premises: False: nothing is asked about what is not there, whatever the datasets state.
            compat: as above.
        """
        if not 0 <= seed < 2**64:
            raise DataError(f"the seed must be a whole number from 0 to 2**64 - 1, not {seed}.")
        if questions_per_image < 1:
            raise DataError(f"questions_per_image must be at least 1, not {questions_per_image}.")
        self.seed, self.questions_per_image = seed, questions_per_image
        self.templates, self.compat, self.false_premises = templates, compat, false_premises
        shares = _shares("the groups", [g.rate for g in recipe])
        self.subsets: list[Subset] = []
        self._places: list[range] = []  # of each group's sources in subsets
        self._source_bounds: list[list[float]] = []
        for group, share in zip(recipe, shares, strict=True):
            inner = _shares(f"group {group.name}", group.source_rates or [1.0] * len(group.sources))
            if len(inner) != len(group.sources):
                raise DataError(f"group {group.name}: {len(group.sources)} sources but {len(inner)} rates.")
            start = len(self.subsets)
            for name, part in zip(group.sources, inner, strict=True):
                source = sources[name]
                if not len(source):
                    raise DataError(f"{name} has no pictures; leave it out of the mixture.")
                rates = premises.get(name.partition("|")[0]) if false_premises else None
                self.subsets.append(Subset(group.name, source, share * part, rates))
            self._places.append(range(start, len(self.subsets)))
            self._source_bounds.append(list(itertools.accumulate(inner)))
        if len(self.probabilities()) < len(self.subsets):
            raise DataError("two groups of the same name hold the same source; join them or rename one.")
        self._group_bounds = list(itertools.accumulate(shares))
        self._premises = [_bounds(subset) for subset in self.subsets]

    def probabilities(self) -> dict[str, float]:
        """The chance of every source, by "GROUP/SOURCE"."""
        return {f"{subset.group}/{subset.source.name}": subset.chance for subset in self.subsets}

    def fingerprint(self) -> dict[str, Any]:
        """What determines the examples, ready for JSON: mixtures with equal ones give equal examples."""
        parts = {
            f"{group}/{source.name}": {
                "pictures": len(source),
                "chance": chance,
                "premises": dict(rates or {}),
            }
            for group, source, chance, rates in self.subsets
        }
        return {
            "seed": self.seed,
            "questions_per_image": self.questions_per_image,
            "templates": self.templates.digest(),
            "compat": self.compat,
            "sources": parts,
            **({} if self.false_premises else {"false_premises": False}),
        }

    def choose(self, k: int) -> Choice:
        """What example k draws first. Reads nothing; the picture is drawn again if it turns out useless."""
        return self._choose(Draws(self.seed, k))

    def __getitem__(self, k: int) -> Sample:
        return self.draw(k, lambda sample: sample)[0]

    def draw(self, k: int, use: Callable[[Sample], T], look: bool = True) -> tuple[T, tuple[Skipped, ...]]:
        """`use(mixture[k])`, and the pictures that failed before one could be used.

        What `use` refuses (any `ReadJaxError`) is drawn again like a picture that does not decode. look:
        False leaves the pictures alone: samples come without.

        Raises:
            DataError: `MAX_TRIES` pictures in a row were of no use; names the last of them.
        """
        draws = Draws(self.seed, k)
        chosen = self._choose(draws)
        skipped: list[Skipped] = []
        for _ in range(MAX_TRIES):
            source = self.subsets[chosen.subset].source
            key = f"{source.name}:{chosen.index}"
            try:
                item = source[chosen.index]
                key = f"{source.name}:{item.key}"
                rows = self._rows(item, chosen.subset, draws)
                if rows:
                    image = picture(item) if look else None
                    size = item.height, item.width
                    return use(Sample(key, source.name, image, rows, size)), tuple(skipped)
            except ReadJaxError as error:
                skipped.append(Skipped(key, str(error)))
            if self.compat == "read":
                group = next(i for i, places in enumerate(self._places) if chosen.subset in places)
                chosen = self._choose_source(group, draws)
            else:
                chosen = Choice(chosen.subset, draws.below(len(source)))
        last = "; ".join(dict.fromkeys(f"{key}: {reason}" for key, reason in skipped[-3:]))
        raise DataError(
            f"example {k} of the mixture: none of {MAX_TRIES} pictures drawn from "
            f"{self.subsets[chosen.subset].source.name} could be used; {MAX_TRIES - len(skipped)} offered no "
            f"question, {len(skipped)} could not be read{f' ({last})' if last else ''}."
        )

    def _choose(self, draws: Draws) -> Choice:
        return self._choose_source(draws.weighted(self._group_bounds), draws)

    def _choose_source(self, group: int, draws: Draws) -> Choice:
        subset = self._places[group][draws.weighted(self._source_bounds[group])]
        return Choice(subset, draws.below(len(self.subsets[subset].source)))

    def _rows(self, item: Item, subset: int, draws: Draws) -> tuple[Row, ...]:
        """Questions and answers about a picture; none when it offers none."""
        if item.conversation:
            return _conversation(item)
        rates = self._premises[subset]
        mode = rates.modes[draws.weighted(rates.bounds)] if rates else None
        there = [i for i, query in enumerate(item.queries) if query.exists]
        stated = [i for i, query in enumerate(item.queries) if not query.exists]
        n = self.questions_per_image
        if mode in ("deny", "correct") and item.absent:
            positives = draws.sample(there, n)
            names = draws.sample(range(len(item.absent)), len(positives))
            pairs = zip(names, positives, strict=False)  # a picture may lack fewer things than it shows
            return tuple(self._false_premise(item, name, i, mode == "correct", draws) for name, i in pairs)
        if not self.false_premises:
            pool = there
        elif mode is None:
            pool = range(len(item.queries))
        elif mode == "stated" and stated:
            pool = stated
            n = min(n, len(there)) if self.compat == "read" else n
        else:
            pool = there or stated
        return tuple(self._row(item, i, draws) for i in draws.sample(pool, n))

    def _row(self, item: Item, i: int, draws: Draws) -> Row:
        """Question i of a picture; what the dataset gives verbatim needs no template."""
        query = item.queries[i]
        phrase = draws.choice((query.phrase, *query.alternatives))
        question, answer = query.question, query.answer
        if question is None:
            question = self.templates.question(phrase, query.is_sentence, draws)
        if answer is None:
            answer = self.templates.answer(phrase, query.is_sentence, query.exists, query.correction, draws)
        mask = item.compact_mask(i) if query.exists else None
        if mask is not None and self.compat == "read":
            mask = dataclasses.replace(mask, planes=tuple(p for p in mask.planes if p[0] != 255))
        return Row(((question, answer),), query.exists, mask)

    def _false_premise(self, item: Item, name: int, there: int, correct: bool, draws: Draws) -> Row:
        """A question about absent name number `name`; denied, or corrected by question number `there`."""
        alternatives = item.absent_alternatives[name] if item.absent_alternatives else ()
        phrase = draws.choice((item.absent[name], *alternatives))
        query = item.queries[there]
        correction = draws.choice((query.phrase, *query.alternatives)) if correct else ""
        question = self.templates.question(phrase, False, draws)
        return Row(((question, self.templates.answer(phrase, False, False, correction, draws)),), False, None)


def load_mixture(
    recipe: str | Sequence[Group] | Mapping[str, float],
    data_dir: str | Path | None = None,
    *,
    compat: Compat = None,
    **options: Any,
) -> Mixture:
    """A mixture with its sources opened by `load_source`.

    Args:
        recipe: a name of `RECIPES` ("referseg", "reasonseg"), groups of your own, or simply rates by source
            name, such as {"scenes|train": 3, "mine.jsonl": 1}.
        data_dir: the folder with the datasets.
        compat: for the sources and the mixture.
        options: what else `Mixture` takes: seed, questions_per_image, templates, premises,
            false_premises.

    Raises:
        DataError: an unknown recipe or source, or files that are missing or malformed.
    """
    if isinstance(recipe, str):
        if recipe not in RECIPES:
            raise DataError(
                f"there is no mixture {recipe!r}; known: {', '.join(RECIPES)}; or give rates by source name, "
                'such as {"scenes|train": 1}.'
            )
        recipe = RECIPES[recipe]
    elif isinstance(recipe, Mapping):
        recipe = [Group(name.partition("|")[0], rate, (name,)) for name, rate in recipe.items()]
    names = dict.fromkeys(name for group in recipe for name in group.sources)
    sources = {name: load_source(name, data_dir, compat) for name in names}
    return Mixture(recipe, sources, compat=compat, **options)


def picture(item: Item) -> np.ndarray:
    """The item's image, uint8 [h, w, 3] RGB; `DataError` when it has not the size that its masks have."""
    image = item.load_image()
    if image.shape[:2] != (item.height, item.width):
        raise DataError(
            f"{item.image_path or item.key}: the picture is {image.shape[0]} pixels high, {image.shape[1]} "
            f"pixels wide, but the dataset says {item.height} and {item.width}; its masks do not fit."
        )
    return image


def _conversation(item: Item) -> tuple[Row, ...]:
    """All the turns as one row; a target where one of the answers points at something."""
    turns = tuple((q.phrase if q.question is None else q.question, q.answer or "") for q in item.queries)
    if not turns:
        return ()
    pointing = [i for i, q in enumerate(item.queries) if q.exists and SEG_TOKEN in (q.answer or "")]
    return (Row(turns, bool(pointing), item.compact_mask(pointing[0]) if pointing else None),)


class _Rates(NamedTuple):
    modes: tuple[str, ...]
    bounds: list[float]


def _bounds(subset: Subset) -> _Rates | None:
    if subset.premises is None:
        return None
    unknown = set(subset.premises) - set(PREMISE_KINDS)
    if unknown:
        raise DataError(
            f"{subset.source.name}: unknown kind of premise {min(unknown)!r}; "
            f"known: {', '.join(PREMISE_KINDS)}."
        )
    shares = _shares(f"the premises of {subset.source.name}", list(subset.premises.values()))
    return _Rates(tuple(subset.premises), list(itertools.accumulate(shares)))


def _shares(what: str, rates: Sequence[float]) -> list[float]:
    """Rates that add up to 1."""
    if not rates or not all(isinstance(r, int | float) and 0 < r < float("inf") for r in rates):
        raise DataError(f"the rates of {what} must be positive numbers, at least one, not {list(rates)}.")
    return [rate / sum(rates) for rate in rates]
