"""Drawn scenes as a dataset: the same everywhere, of the stated sizes and shares, held-out pairs held out."""

from __future__ import annotations

import hashlib
import itertools
import os
import pickle
import re
import subprocess
import sys
from collections import Counter
from functools import cache
from pathlib import Path

import numpy as np
import pytest

from read_jax.data import load_source
from read_jax.data.scenes import HELD_OUT, LENGTHS, SPLITS, Drawing, Scenes
from read_jax.data.scenes.drawing import NOTHING, draw
from read_jax.data.scenes.questions import KINDS
from read_jax.data.scenes.shapes import SHAPES
from read_jax.data.scenes.wording import VOCABULARY
from read_jax.data.scenes.world import COLOURS
from read_jax.errors import DataError
from read_jax.text.tokenizer import Tokenizer

TINY = Path(__file__).parents[1] / "data" / "tiny-read"
SYNONYMS = {"mug": "cup", "sailboat": "boat", "crosses": "cross"}


@cache
def drawings(split: str, count: int = 400) -> list[Drawing]:
    scenes = Scenes(split)
    return [scenes.drawing(i) for i in range(count)]


def digest(name: str, count: int) -> str:
    """Of the pictures, masks and texts of the first items."""
    source, hashed = load_source(name), hashlib.sha256()
    for i in range(count):
        item = source[i]
        hashed.update(item.image.tobytes())
        hashed.update(item.masks.tobytes())
        hashed.update(repr((item.key, item.image.shape)).encode())
        for q in item.queries:
            told = (q.phrase, q.exists, q.is_sentence, q.correction, q.answer, q.ref_id, q.sent_id, q.tags)
            hashed.update(repr(told).encode())
    return hashed.hexdigest()


def texts(drawing: Drawing) -> list[str]:
    return [t for q in drawing.questions for t in (q.phrase, q.correction, q.answer) if t]


def named_pairs(text: str) -> set[tuple[str, str]]:
    """(shape, colour) wherever a colour stands before a shape."""
    words = [SYNONYMS.get(w, w) for w in re.findall("[a-z]+", text.lower())]
    words = [w if w in SHAPES else w.removesuffix("s") for w in words]
    return {(b, a) for a, b in itertools.pairwise(words) if a in COLOURS and b in SHAPES}


@pytest.mark.parametrize("split", LENGTHS)
def test_splits_have_the_stated_length_without_a_folder(split):
    assert len(load_source(f"scenes|{split}")) == LENGTHS[split]
    assert len(load_source(f"scenes|{split}|2")) == LENGTHS[split]


@pytest.mark.parametrize("name", ["scenes", "scenes|tset", "scenes|test|5", "scenes|test|", "scenes||1"])
def test_an_unknown_split_lists_the_known(name):
    with pytest.raises(DataError) as error:
        load_source(name)
    assert all(f"scenes|{split}" in str(error.value) for split in SPLITS)


@pytest.mark.parametrize(
    "arguments", [{"split": "all"}, {"level": 0}, {"level": 5}, {"seed": -1}, {"seed": 2**64}, {"length": -1}]
)
def test_impossible_arguments_are_refused(arguments):
    with pytest.raises(DataError):
        Scenes(**arguments)


def test_an_index_beyond_the_length_is_refused():
    source = load_source("scenes|val")
    for index in (500, -501):
        with pytest.raises(IndexError):
            source[index]


def test_iteration_ends_with_the_length():
    assert [item.key for item in iter(Scenes("val", length=3))] == [f"val/00000{i}" for i in range(3)]


def test_negative_indices_count_from_the_end():
    source = load_source("scenes|test")
    assert source[-1].key == source[999].key == "test/000999"


def test_endless_scenes_take_any_index_and_have_no_length():
    endless = Scenes("train", seed=3)
    assert endless[10**12].image.ndim == 3
    with pytest.raises(TypeError):
        len(endless)
    with pytest.raises(IndexError):
        endless[-1]


def test_the_finite_split_is_the_beginning_of_the_endless_one():
    assert load_source("scenes|test")[7].queries == Scenes("test")[7].queries


def test_an_item_is_what_load_source_promises():
    item = load_source("scenes|test", compat="read")[5]
    k = len(item.queries)
    assert item.image.shape == (item.height, item.width, 3) and item.image.dtype == np.uint8
    assert item.masks.shape == (k, item.height, item.width) and item.masks.dtype == np.uint8
    assert set(np.unique(item.masks)) <= {0, 1}
    assert item.image_path is None
    assert [bool(m.any()) for m in item.masks] == item.exists
    assert all(q.endswith("Please output segmentation mask.") for q in item.questions)
    assert [("[SEG]" in a) for a in item.answers] == item.exists


def test_changing_a_picture_changes_no_other():
    source = load_source("scenes|test")
    item = source[0]
    item.load_image()[:] = 0
    assert item.load_image().any()


def test_the_same_index_gives_the_same_bytes_in_another_process():
    code = (
        f"import sys; sys.path[:0] = {sys.path!r}; from {__name__} import digest; "
        "print(digest('scenes|test', 6))"
    )
    out = subprocess.run(
        [sys.executable, "-c", code],
        capture_output=True,
        text=True,
        env={**os.environ, "PYTHONHASHSEED": "77"},
        timeout=300,
    )
    assert out.stdout.strip() == digest("scenes|test", 6), out.stderr


def test_the_scenes_are_those_of_the_first_release():
    # results on scenes are comparable only as long as this holds, on every machine
    assert digest("scenes|test", 24) == "f46f9070c0e17ec8ce0851549119ecedb479adf063d382444e7bde5fb74fa98d"


def test_items_do_not_depend_on_what_was_read_before():
    first, second = Scenes("val"), Scenes("val")
    forwards = [first[i].queries for i in range(5)]
    backwards = [second[i].queries for i in reversed(range(5))]
    assert forwards == backwards[::-1]


def test_splits_levels_and_seeds_share_no_picture():
    sources = [Scenes(s, seed=seed) for s in LENGTHS for seed in (0, 1)]
    sources += [Scenes("test", level=level) for level in (1, 2, 3, 4)]
    scenes = [source.drawing(i).scene for source in sources for i in range(30)]
    assert len(set(scenes)) == len(scenes)


def test_items_travel_between_processes():
    item = pickle.loads(pickle.dumps(Scenes("test")))[3]
    again = pickle.loads(pickle.dumps(item))
    np.testing.assert_array_equal(again.image, item.image)
    np.testing.assert_array_equal(again.masks, item.masks)


@pytest.mark.parametrize("split", ["train", "val"])
def test_held_out_pairs_are_neither_drawn_nor_named_before_the_test(split):
    held_out = set(HELD_OUT.items())
    for drawing in drawings(split):
        assert not held_out & {(t.shape, t.colour) for t in drawing.scene.things}
        assert not held_out & {pair for text in texts(drawing) for pair in named_pairs(text)}


def test_every_shape_and_every_colour_has_held_out_pairs():
    assert set(HELD_OUT) == set(SHAPES)
    assert set(Counter(HELD_OUT.values()).values()) == {2} and set(HELD_OUT.values()) == set(COLOURS)


def test_every_other_pair_is_seen_before_the_test():
    seen = {
        (t.shape, t.colour) for split in ("train", "val") for d in drawings(split) for t in d.scene.things
    }
    assert seen == {(s, c) for s in SHAPES for c in COLOURS} - set(HELD_OUT.items())


def test_the_test_split_tags_what_touches_held_out_pairs():
    held_out, source, shares = set(HELD_OUT.items()), Scenes("test"), Counter()
    for i, drawing in enumerate(drawings("test")):
        things = drawing.scene.things
        for question, query in zip(drawing.questions, source[i].queries, strict=True):
            answered = {(things[k].shape, things[k].colour) for k in question.things}
            named = named_pairs(query.phrase) | named_pairs(query.correction)
            touched = bool(held_out & (answered | named))
            assert query.tags[2:] == (("held-out pair",) if touched else ("seen pairs",))
            shares[touched, query.exists] += 1
    assert min(shares.values()) > 50  # enough of both, of what is there and what is not


@pytest.mark.parametrize("split", LENGTHS)
def test_sorts_and_levels_come_as_often_as_stated(split):
    tags = Counter(q.kind for d in drawings(split) for q in d.questions)
    stated = {
        "referring": 0.33,
        "relational": 0.19,
        "multiple": 0.08,
        "reasoning": 0.10,
        "false premise": 0.30,
    }
    assert set(stated) == set(KINDS)
    for kind, share in stated.items():
        assert tags[kind] / tags.total() == pytest.approx(share, abs=0.04), kind
    levels = Counter(d.scene.level for d in drawings(split))
    assert all(levels[level] / 400 == pytest.approx(0.25, abs=0.08) for level in (1, 2, 3, 4))


@pytest.mark.parametrize("level", [1, 2, 3, 4])
def test_a_level_can_be_asked_for_alone(level):
    source = load_source(f"scenes|test|{level}")
    for i in range(20):
        item = source[i]
        assert item.key == f"test/{level}/{i:06d}"
        assert {query.tags[1] for query in item.queries} == {f"level {level}"}


def test_pictures_and_numbers_stay_within_the_stated_bounds():
    counts = {1: (2, 3), 2: (3, 6), 3: (3, 7), 4: (3, 7)}
    for drawing in drawings("train"):
        scene = drawing.scene
        assert 96 <= min(scene.height, scene.width) <= max(scene.height, scene.width) <= 256
        assert 3 / 4 <= scene.width / scene.height <= 4 / 3
        assert counts[scene.level][0] <= len(scene.things) <= counts[scene.level][1]
        assert 3 <= len(drawing.questions) <= 8
        assert not scene.covers or scene.level >= 3


def test_all_things_lie_in_the_central_square():
    for i in range(60):
        drawing = Scenes("train").drawing(i)
        rows, columns = np.nonzero(draw(drawing.scene)[1] != NOTHING)
        height, width = drawing.scene.height, drawing.scene.width
        side = min(height, width)
        for places, size in ((rows, height), (columns, width)):
            start = (size - side) // 2
            assert start <= places.min() and places.max() < start + side


def test_no_picture_asks_the_same_twice():
    for drawing in drawings("train"):
        phrases = [q.phrase for q in drawing.questions]
        assert len(set(phrases)) == len(phrases)


def test_ref_ids_name_answers_and_sent_ids_count_their_texts():
    seen: dict[int, bytes] = {}
    for i in range(60):
        item = Scenes("val")[i]
        counts: Counter[int] = Counter()
        for query, mask in zip(item.queries, item.masks, strict=True):
            assert query.sent_id == counts[query.ref_id]
            counts[query.ref_id] += 1
            assert seen.setdefault(query.ref_id, mask.tobytes()) == mask.tobytes()
            assert query.exists or query.sent_id == 0
        assert {r // 8 for r in counts} == {i}


def test_the_vocabulary_is_small_and_complete():
    said = {
        w
        for split in LENGTHS
        for d in drawings(split)
        for t in texts(d)
        for w in re.findall("[a-z]+", t.lower())
    }
    assert said <= set(VOCABULARY)
    assert len(VOCABULARY) < 220
    assert len(said) > 0.95 * len(VOCABULARY)


def test_the_texts_are_plain():
    for drawing in drawings("test"):
        for question in drawing.questions:
            pattern = r"[A-Z][a-z ]+[.?]" if question.is_sentence else r"[a-z ]+"
            assert re.fullmatch(pattern, question.phrase)
            assert "  " not in question.phrase
            assert re.fullmatch(r"(the [a-z ]+)?", question.correction)


def test_every_word_survives_the_tokenizer():
    tokenizer = Tokenizer.load(TINY)
    for word in VOCABULARY:
        assert tokenizer.decode(tokenizer.encode(word, bos=False)).strip() == word
