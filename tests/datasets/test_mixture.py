"""Mixtures: the paper's rates, examples that depend on (seed, k) alone, what each kind of source gives."""

from __future__ import annotations

import collections
import json
import math
import pickle
import re

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from read_jax.data.item import Query
from read_jax.data.mixture import Draws, Mixture, load_mixture
from read_jax.data.prompts import TRAINING_TEMPLATES
from read_jax.data.recipes import RECIPES, Group
from read_jax.errors import DataError
from tests.datasets.in_memory import Pictures, chats, five, reasoning, referring, things, vocabulary


def mixture_of(*sources, rates=None, **options) -> Mixture:
    """Every source a group of its own."""
    rates = rates or [1.0] * len(sources)
    recipe = [Group(s.name, r, (s.name,)) for s, r in zip(sources, rates, strict=True)]
    return Mixture(recipe, {s.name: s for s in sources}, **options)


def paper_mixture(recipe: str, seed: int = 0) -> Mixture:
    names = [name for group in RECIPES[recipe] for name in group.sources]
    sources = {name: referring(name, 1000 + place) for place, name in enumerate(names)}
    return Mixture(RECIPES[recipe], sources, seed=seed)


def assert_frequency(count: int, total: int, chance: float) -> None:
    """Within five standard deviations of a binomial count."""
    assert abs(count - total * chance) < 5 * math.sqrt(total * chance * (1 - chance))


def texts(sample) -> tuple:
    return sample.key, sample.rows


# rates


@pytest.mark.parametrize("recipe", RECIPES)
def test_sub_sets_are_drawn_at_the_papers_rates(recipe):
    mixture, total = paper_mixture(recipe), 100_000
    counts = collections.Counter(mixture.choose(k).subset for k in range(total))
    assert sum(s.chance for s in mixture.subsets) == pytest.approx(1)
    for place, subset in enumerate(mixture.subsets):
        assert_frequency(counts[place], total, subset.chance)


def test_the_recipes_hold_the_papers_rates():
    chances = paper_mixture("referseg").probabilities()
    assert chances["refer_seg/refcocog|train"] == pytest.approx(12 / 17 / 4)
    assert chances["correct_refer_seg/fprefcoco|train"] == pytest.approx(2 / 17 / 3)
    assert chances["vqa/llava_instruct|train"] == pytest.approx(2 / 17)
    assert chances["neg_refer_seg/R-refcoco+|train"] == pytest.approx(1 / 17 / 3)
    chances = paper_mixture("reasonseg").probabilities()
    assert chances["sem_seg/paco_lvis|train"] == pytest.approx(10 / 24 / 5)
    assert chances["refer_seg/refclef|train"] == pytest.approx(1 / 24 / 4)
    assert chances["reason_seg/ReasonSeg|train"] == pytest.approx(10 / 24)


def test_pictures_of_a_source_are_drawn_uniformly():
    mixture = mixture_of(referring(count=7))
    counts = collections.Counter(mixture.choose(k).index for k in range(7000))
    assert sorted(counts) == list(range(7))
    for count in counts.values():
        assert_frequency(count, 7000, 1 / 7)


def test_sources_of_a_group_may_have_rates_of_their_own():
    names = ("a|train", "b|train")
    group = Group("both", 2.0, names, (1.0, 3.0))
    mixture = Mixture([group], {name: referring(name) for name in names})
    assert mixture.probabilities() == {"both/a|train": 0.25, "both/b|train": 0.75}


# index-based


def test_an_example_does_not_depend_on_what_was_drawn_before():
    forward = mixture_of(referring(), reasoning(), vocabulary(), chats())
    backward = mixture_of(referring(), reasoning(), vocabulary(), chats())
    wanted = [texts(forward[k]) for k in range(40)]
    assert [texts(backward[k]) for k in reversed(range(40))] == wanted[::-1]


def test_a_pickled_mixture_gives_the_same_examples():
    mixture = mixture_of(reasoning(), vocabulary(), seed=3)
    copy = pickle.loads(pickle.dumps(mixture))
    assert [texts(copy[k]) for k in range(20)] == [texts(mixture[k]) for k in range(20)]


def test_another_seed_gives_other_examples():
    first, second = (mixture_of(referring(count=1000), seed=seed) for seed in (0, 1))
    assert [first.choose(k) for k in range(20)] != [second.choose(k) for k in range(20)]


def test_indices_have_no_end():
    mixture = mixture_of(referring())
    assert mixture[2**63 + 11].rows


def test_the_stream_of_an_example_never_changes():
    draws = Draws(5, 7)
    assert [draws.below(1000) for _ in range(5)] == [179, 721, 860, 103, 645]
    assert Draws(5, 7).sample(range(100), 4) == [17, 72, 86, 13]


@given(st.integers(0, 2**64 - 1), st.integers(0, 40), st.integers(1, 12))
def test_sampling_takes_different_places(seed, size, count):
    options = list(range(size))
    taken = Draws(seed, 0).sample(options, count)
    assert len(set(taken)) == len(taken) == min(size, count)
    assert set(taken) <= set(options)
    assert count < size or taken == options


def test_every_pair_of_questions_is_equally_likely():
    pairs = collections.Counter(tuple(sorted(Draws(0, k).sample(range(5), 2))) for k in range(10_000))
    assert len(pairs) == 10
    for count in pairs.values():
        assert_frequency(count, 10_000, 0.1)


# what sources of each kind give


def test_questions_are_drawn_without_replacement_up_to_n():
    mixture = mixture_of(referring(), questions_per_image=3)
    for k in range(30):
        questions = [row.turns[0][0] for row in mixture[k].rows]
        names = {name for name in range(5) for q in questions if f"-{name}" in q}
        assert len(questions) == len(names) == 3


def test_all_questions_in_their_order_when_there_are_no_more_than_n():
    mixture = mixture_of(referring(), questions_per_image=5)
    for k in range(10):
        assert [q.find(f"-{i}") > 0 for i, q in enumerate(r.turns[0][0] for r in mixture[k].rows)] == [
            True
        ] * 5


def test_a_row_has_the_target_of_its_own_question():
    mixture = mixture_of(referring())
    for k in range(10):
        for row in mixture[k].rows:
            column = next(i for i in range(5) if f"-{i}" in row.turns[0][0])
            mask = row.mask.decode()
            assert (mask[:-1, column] == 1).all() and (mask[-1] == 255).all() and row.exists


def test_referring_texts_say_themselves_what_exists():
    def queries(index):
        return (Query("cup"), Query("Fork", False), Query("Spoon", False, correction="Ladle"))

    rows = mixture_of(Pictures("fprefcoco|train", 3, queries))[0].rows
    assert [row.exists for row in rows] == [True, False, False]
    assert [row.mask is None for row in rows] == [False, True, True]
    assert ["[SEG]" in row.turns[0][1] for row in rows] == [True, False, False]
    assert "ladle" in rows[2].turns[0][1]


def test_reasoning_pictures_are_asked_for_false_premises_at_the_papers_rate():
    mixture, total, false, some = mixture_of(reasoning()), 2000, 0, 0
    for k in range(total):
        sample = mixture[k]
        assert len({row.exists for row in sample.rows}) == 1 and len(sample.rows) == 2
        if int(sample.key.rpartition("p")[2]) % 2:
            assert sample.rows[0].exists  # it has no false premise to ask for
        else:
            some += 1
            false += not sample.rows[0].exists
    assert_frequency(false, some, 0.15)


@pytest.mark.parametrize("compat", [None, "read"])
def test_without_false_premises_everything_that_is_asked_about_is_there(compat):
    def queries(index):
        return tuple(Query(f"thing {place}", place <= index) for place in range(3))

    sources = reasoning(), vocabulary(), Pictures("fprefcoco|train", 3, queries), Pictures("mine", 3, queries)
    mixture = mixture_of(*sources, false_premises=False, compat=compat)
    rows = [row for k in range(400) for row in mixture[k].rows]
    assert all(row.exists and row.mask is not None for row in rows)
    assert mixture.fingerprint() != mixture_of(*sources, compat=compat).fingerprint()


def test_a_stated_false_premise_is_answered_in_the_datasets_words():
    mixture = mixture_of(reasoning())
    sample = next(s for s in map(mixture.__getitem__, range(200)) if not s.rows[0].exists)
    assert [row.turns[0][1] for row in sample.rows] == ["No zebra.", "No cat."]
    assert [row.mask for row in sample.rows] == [None, None]
    assert "Where is the cat?" in sample.rows[1].turns[0][0]


def test_vocabulary_sets_deny_and_correct_at_the_papers_rates():
    mixture, total = mixture_of(vocabulary()), 4000
    counts = collections.Counter()
    for k in range(total):
        rows = mixture[k].rows
        assert len(rows) == 3
        if rows[0].exists:
            counts["true"] += 1
            continue
        asked = {name for name in ("zebra", "lamp", "sea") for row in rows if name in row.turns[0][0]}
        assert asked == {"zebra", "lamp", "sea"}
        named = [re.search(r"thing \d", row.turns[0][1]) is not None for row in rows]
        assert all(named) or not any(named)
        counts["correct" if named[0] else "deny"] += 1
    assert_frequency(counts["deny"], total, 0.07)
    assert_frequency(counts["correct"], total, 0.08)


def test_premises_may_be_set_by_the_user():
    mixture = mixture_of(vocabulary("mine|train"), premises={"mine": {"correct": 1}})
    assert not any(row.exists for k in range(20) for row in mixture[k].rows)


def test_other_wordings_are_as_likely_as_the_phrase():
    def queries(index):
        return (Query("dog leg", alternatives=("the leg of the dog",)),)

    mixture, total = mixture_of(Pictures("pascal_part|train", 2, queries)), 2000
    long = sum("the leg of the dog" in mixture[k].rows[0].turns[0][0] for k in range(total))
    assert_frequency(long, total, 0.5)


def test_absent_names_may_have_other_wordings():
    fields = {"absent": ("cat ear",), "absent_alternatives": (("the ear of the cat",),)}
    source = Pictures("paco_lvis|train", 2, five, fields=fields)
    mixture, total = mixture_of(source, premises={"paco_lvis": {"deny": 1}}), 2000
    long = sum("the ear of the cat" in mixture[k].rows[0].turns[0][0] for k in range(total))
    assert_frequency(long, total, 0.5)


def test_a_conversation_is_one_row_of_all_its_turns():
    (row,) = mixture_of(chats())[0].rows
    assert [turn[0] for turn in row.turns] == ["What is it?", "Of what?", "Thanks"]
    assert not row.exists and row.mask is None


def test_a_question_and_answer_given_verbatim_are_not_put_into_templates():
    def queries(index):
        return (Query("x", question="Where?", answer="Here [SEG]"),)

    (row,) = mixture_of(Pictures("mine.jsonl", 1, queries))[0].rows
    assert row.turns == (("Where?", "Here [SEG]"),) and row.mask is not None


# compat


def test_ignored_pixels_are_kept_by_default_and_background_in_compat_mode():
    source = referring()
    assert 255 in mixture_of(source)[0].rows[0].mask.decode()
    assert set(np.unique(mixture_of(source, compat="read")[0].rows[0].mask.decode())) == {0, 1}


@pytest.mark.parametrize(("compat", "count"), [(None, 2), ("read", 1)])
def test_in_compat_mode_false_premises_are_no_more_than_the_texts(compat, count):
    def queries(index):
        return (Query("cup"), Query("fork", False, answer="No."), Query("spoon", False, answer="No."))

    source = Pictures("ReasonSeg|train", 2, queries)
    (sizes,) = {
        len(m[k].rows)
        for m in [mixture_of(source, compat=compat, premises={"ReasonSeg": {"stated": 1}})]
        for k in range(10)
    }
    assert sizes == count


def test_a_picture_without_questions_is_replaced_from_the_same_source():
    empty = Pictures("a|train", 50, lambda i: things(1) if i % 5 == 0 else ())
    mixture, total = mixture_of(empty, referring("b|train")), 1000
    sources = collections.Counter(mixture[k].source for k in range(total))
    assert_frequency(sources["a|train"], total, 0.5)


def test_in_compat_mode_the_source_is_drawn_again_within_its_group():
    names = ("a|train", "b|train")
    sources = {"a|train": Pictures("a|train", 50, lambda i: ()), "b|train": referring("b|train")}
    mixture = Mixture([Group("both", 1, names)], sources, compat="read")
    assert {mixture[k].source for k in range(30)} == {"b|train"}


# what cannot be used


def test_a_damaged_picture_is_replaced_and_reported():
    mixture = mixture_of(referring(bad=frozenset({2, 5})))
    skipped = []
    for k in range(200):
        sample, bad = mixture.draw(k, lambda sample: sample)
        assert sample.key not in ("refcoco|train:p2", "refcoco|train:p5")
        skipped += bad
    assert {s.key for s in skipped} == {"refcoco|train:p2", "refcoco|train:p5"}
    assert "is damaged" in skipped[0].reason


def test_a_replacement_does_not_move_other_examples():
    good, bad = mixture_of(referring()), mixture_of(referring(bad=frozenset({2})))
    for k in range(60):
        if good[k].key != "refcoco|train:p2":
            assert texts(bad[k]) == texts(good[k])
        assert texts(bad[k]) == texts(bad[k])


def test_pictures_that_are_all_damaged_are_an_error_that_names_them():
    mixture = mixture_of(referring(bad=frozenset(range(7))))
    with pytest.raises(
        DataError, match=r"none of 64 pictures drawn from refcoco\|train.*picture \d is damaged"
    ):
        mixture[0]


def test_pictures_without_any_question_are_an_error():
    with pytest.raises(DataError, match="64 offered no question, 0 could not be read"):
        mixture_of(Pictures("a|train", 3, lambda i: ()))[0]


def test_a_picture_of_another_size_than_stated_is_replaced():
    class Wrong(Pictures):
        def image(self, index):
            return super().image(index)[: 5 if index == 0 else None]

    mixture = mixture_of(Wrong("a|train", 2, five))
    skipped = [one for k in range(40) for one in mixture.draw(k, lambda s: s)[1]]
    assert {s.key for s in skipped} == {"a|train:p0"} and "5 pixels high" in skipped[0].reason


def test_what_the_user_of_a_sample_refuses_is_replaced():
    def use(sample):
        if sample.key.endswith("p1"):
            raise DataError("not this one")
        return sample.key

    mixture = mixture_of(referring())
    drawn = [mixture.draw(k, use) for k in range(60)]
    assert "refcoco|train:p1" not in {key for key, _ in drawn}
    assert {s.reason for _, skipped in drawn for s in skipped} == {"not this one"}


@pytest.mark.parametrize(
    ("recipe", "options", "message"),
    [
        ([], {}, "rates of the groups"),
        ([Group("g", 0, ("a|train",))], {}, "positive"),
        ([Group("g", math.nan, ("a|train",))], {}, "positive"),
        ([Group("g", 1, ())], {}, "group g"),
        ([Group("g", 1, ("a|train",), (1.0, 2.0))], {}, "1 sources but 2 rates"),
        ([Group("g", 1, ("empty|train",))], {}, "no pictures"),
        ([Group("g", 1, ("a|train",)), Group("g", 2, ("a|train",))], {}, "same name"),
        ([Group("g", 1, ("a|train",))], {"seed": -1}, "seed"),
        ([Group("g", 1, ("a|train",))], {"questions_per_image": 0}, "questions_per_image"),
        ([Group("g", 1, ("a|train",))], {"premises": {"a": {"maybe": 1}}}, "unknown kind of premise 'maybe'"),
    ],
)
def test_arguments_out_of_range_are_errors(recipe, options, message):
    sources = {"a|train": referring("a|train"), "empty|train": referring("empty|train", 0)}
    with pytest.raises(DataError, match=message):
        Mixture(recipe, sources, **options)


# identity


def test_the_fingerprint_is_json_and_tells_every_setting_that_changes_examples():
    base = mixture_of(referring(), reasoning())
    assert json.loads(json.dumps(base.fingerprint())) == base.fingerprint()
    templates = TRAINING_TEMPLATES.__class__(
        **{**TRAINING_TEMPLATES.__dict__, "affirmations": ("Here: [SEG]",)}
    )
    others = [
        mixture_of(referring(), reasoning(), seed=1),
        mixture_of(referring(), reasoning(), questions_per_image=2),
        mixture_of(referring(), reasoning(), compat="read"),
        mixture_of(referring(), reasoning(), templates=templates),
        mixture_of(referring(), reasoning(), premises={}),
        mixture_of(referring(), reasoning(), rates=[1, 2]),
        mixture_of(referring(count=8), reasoning()),
        mixture_of(referring("refcoco+|train"), reasoning()),
    ]
    prints = [json.dumps(m.fingerprint()) for m in (base, *others)]
    assert len(set(prints)) == len(prints)


@pytest.mark.parametrize("compat", [None, "read"])
@pytest.mark.parametrize("recipe", RECIPES)
def test_the_papers_mixtures_open_on_the_datasets(fixtures, recipe, compat):
    mixture = load_mixture(recipe, fixtures / "dataset", compat=compat, seed=2)
    assert list(mixture.probabilities()) == [f"{g.name}/{s}" for g in RECIPES[recipe] for s in g.sources]
    for k in range(60):
        sample, skipped = mixture.draw(k, lambda sample: sample)
        assert not skipped and 1 <= len(sample.rows) <= 3
        for row in sample.rows:
            assert (row.mask is not None) == row.exists == ("[SEG]" in row.turns[0][1])
            assert row.mask is None or row.mask.decode().shape == sample.image.shape[:2]


def test_a_mixture_of_ones_own_needs_no_recipe():
    mixture = load_mixture({"scenes|train": 1}, seed=4)
    assert mixture.probabilities() == {"scenes/scenes|train": 1.0}
    assert mixture[0].key.startswith("scenes|train:") and mixture[0].rows


def test_an_unknown_mixture_is_an_error_that_lists_the_known_ones():
    with pytest.raises(DataError, match="no mixture 'refseg'; known: referseg, reasonseg"):
        load_mixture("refseg", ".")


def test_an_unknown_source_in_a_mixture_is_an_error():
    with pytest.raises(DataError, match="unknown dataset 'refkoko'"):
        load_mixture({"refkoko|train": 1}, ".")
