"""New models: their words, their first values, and the lessons of their vision tower."""

from __future__ import annotations

import dataclasses
import itertools

import numpy as np
import pytest
from flax import nnx

from read_jax.config import ClipVisionConfig, SaspConfig
from read_jax.data.mixture import load_mixture
from read_jax.data.prompts import SHORT_TEMPLATES
from read_jax.data.scenes import Scenes
from read_jax.data.scenes.wording import VOCABULARY
from read_jax.errors import ConfigError
from read_jax.models.clip import ClipVision
from read_jax.models.read import Read
from read_jax.text.conversation import render
from read_jax.text.targets import mask_targets
from read_jax.training import teaching
from read_jax.training.config import StartConfig, TeachingConfig, load_config
from read_jax.training.initial import (
    mimetic_attention,
    position_codes,
    seek_tokens,
    whiten_patches,
    word_to_token,
)
from read_jax.training.run import make_mixture, prepare
from read_jax.training.scratch import fixed_texts, make_tokenizer, texts
from read_jax.training.teaching import CLASSES, class_words, make_lesson, teach

pytestmark = pytest.mark.usefixtures("compiled_quickly", "short_exam")

VISION = ClipVisionConfig(
    hidden_size=16,
    intermediate_size=16,
    num_layers=2,
    num_heads=2,
    image_size=48,
    patch_size=12,
    select_layer=-1,
)
SCENES = Scenes(seed=5, length=None)


@pytest.fixture
def short_exam(monkeypatch):
    monkeypatch.setattr(teaching, "_EXAM_PICTURES", 4)


@pytest.fixture(scope="module")
def tokenizer():
    mixture = load_mixture({"scenes|train": 1.0}, templates=SHORT_TEMPLATES)
    return make_tokenizer(texts(mixture), 720, fixed_texts("llava_v1"))


def test_every_word_of_the_scenes_is_one_token(tokenizer):
    broken = [w for w in VOCABULARY if len(tokenizer.encode(w, bos=False)) > 1]
    # these only begin sentences, with a capital
    assert set(broken) <= {"find", "show", "what", "where", "which"}
    capitals = [w.capitalize() for w in broken]
    assert all(len(tokenizer.encode(w, bos=False)) == 1 for w in capitals)


@pytest.mark.parametrize("text", fixed_texts("llava_v1"))
def test_what_always_stands_around_a_question_is_one_token(tokenizer, text):
    assert len(tokenizer.encode(text, bos=False)) == 1


@pytest.mark.parametrize("text", ["Zebra, 42 quizzes & more!", "the reddest bluebird", "naïve 猫"])
def test_other_texts_come_back_from_their_pieces(tokenizer, text):
    assert tokenizer.decode(tokenizer.encode(text, bos=False)) == text


def test_targets_are_the_answer_alone(tokenizer):
    text = render([("<image>\nthe red ball", "Sure, the segmentation result is [SEG].")], "llava_v1", True)
    ids = tokenizer.encode(text)
    kept = [i for i in mask_targets(ids, text, "llava_v1", tokenizer, 1 << 30) if i >= 0]
    assert tokenizer.decode(kept).startswith("Sure, the segmentation result is")
    assert tokenizer.seg_id in kept


def test_a_vocabulary_too_small_for_the_letters_is_said():
    with pytest.raises(ConfigError, match="no tokenizer of 301 pieces"):
        make_tokenizer(["some words"], 301)


def test_no_two_places_have_the_same_position_code():
    codes = position_codes(10, 128).reshape(100, -1)
    distances = np.linalg.norm(codes[:, None] - codes[None], axis=-1) + 100 * np.eye(100)
    assert distances.min() > 1 and np.abs(codes).max() <= 1


def test_whitened_patches_have_no_mean_and_equal_variances():
    pictures = np.stack([make_lesson(SCENES, i, VISION).pixels for i in range(40)])
    clip = ClipVision(VISION, rngs=nnx.Rngs(0))
    clip.position_embed[...] = np.zeros_like(clip.position_embed[...])
    whiten_patches(clip, pictures, floor=1e-9)
    from read_jax.models.clip import normalize_clip
    from read_jax.models.layers import patchify

    patches = np.asarray(patchify(normalize_clip(pictures), 12)).reshape(-1, 3 * 12**2)
    out = patches @ np.asarray(clip.patch_embed.kernel[...]) + np.asarray(clip.position_embed[...])[1]
    np.testing.assert_allclose(out.mean(axis=0), 0, atol=1e-2)
    np.testing.assert_allclose(np.cov(out, rowvar=False), np.eye(16), atol=5e-2)


def test_mimetic_attention_looks_at_like_tokens():
    clip = ClipVision(VISION, rngs=nnx.Rngs(0))
    mimetic_attention(clip)
    q, k = (np.asarray(getattr(clip.layers.attn, name).kernel[...])[0] for name in ("q_proj", "k_proj"))
    x = np.random.default_rng(0).normal(size=(200, 16))
    scores = (x @ q) @ (x @ k).T
    assert np.mean(np.diag(scores)) > 3 * np.mean(np.abs(scores - np.diag(np.diag(scores))))


def test_words_look_for_the_tokens_that_resemble_their_rotation_and_not_for_themselves():
    model, rotation = pupil(), word_to_token(64, seed=1)
    np.testing.assert_allclose(rotation @ rotation.T, np.eye(64), atol=1e-5)
    seek_tokens(model.llama, rotation, seed=1, gain=4.0)
    q, k = (getattr(model.llama.layers.attn, name).kernel[...] for name in ("q_proj", "k_proj"))
    words = np.random.default_rng(0).normal(size=(200, 64)).astype(np.float32)
    for layer in range(len(q)):
        asked = words @ np.asarray(q[layer])
        to_tokens, to_words = (asked @ (x @ np.asarray(k[layer])).T for x in (words @ rotation, words))
        others = np.std(to_tokens - np.diag(np.diag(to_tokens)))
        assert np.mean(np.diag(to_tokens)) > 3 * others
        assert abs(np.mean(np.diag(to_words))) < others


def test_a_lesson_names_what_lies_in_each_cell():
    for index in range(20):
        lesson, drawing = make_lesson(SCENES, index, VISION), SCENES.drawing(index)
        labels, things = drawing.labels(), drawing.scene.things
        height, width = labels.shape
        side = min(height, width)
        top, left = (height - side) // 2, (width - side) // 2
        for cell, classes in enumerate(lesson.classes):
            row, column = divmod(cell, VISION.grid_size)
            y, x = ((np.array([row, column]) + 0.5) * side / VISION.grid_size).astype(int)
            thing = labels[top + y, left + x]
            if classes[-1] == 0:
                assert thing == 255 and (classes[:-1] == -1).all()
            named = {
                tuple(
                    CLASSES[kind].index(getattr(t, kind)) for kind in ("shape", "colour", "size", "pattern")
                )
                for t in things
            }
            assert classes[-1] != 1 or tuple(classes[:-1]) in named


def test_a_lesson_points_to_the_centre():
    lesson, thing = next(
        (make_lesson(SCENES, i, VISION), SCENES.drawing(i).scene.things[0])
        for i in range(100)
        if len(SCENES.drawing(i).scene.things) == 2
    )
    drawing = next(d for d in map(SCENES.drawing, range(100)) if len(d.scene.things) == 2)
    height, width = drawing.labels().shape
    side = min(height, width)
    there = [CLASSES["shape"].index(thing.shape), CLASSES["colour"].index(thing.colour)]
    cells = np.flatnonzero((lesson.classes[:, :2] == there).all(axis=1))
    assert len(cells)
    for x, y in 0.5 + lesson.centres[cells] / 4:
        assert x * side + (width - side) // 2 == pytest.approx(thing.x / 64, abs=0.1)
        assert y * side + (height - side) // 2 == pytest.approx(thing.y / 64, abs=0.1)


LESSONS = TeachingConfig(updates=12, batch=4, warmup_updates=2)


NUMBERS = itertools.count(3)
WORDS = {kind: [[next(NUMBERS)] for _ in names] for kind, names in CLASSES.items() if kind != "anything"}
WORD_COUNT = next(NUMBERS)


def pupil(vision: ClipVisionConfig = VISION) -> Read:
    scratch = load_config("nano_scenes:runlocal", []).start.scratch
    llama = dataclasses.replace(scratch.llama, vocab_size=WORD_COUNT)
    return Read(
        dataclasses.replace(scratch, clip=vision, llama=llama, sasp=SaspConfig(enabled=False)),
        rngs=nnx.Rngs(0),
    )


def leaves(model: Read) -> list[np.ndarray]:
    return [np.asarray(leaf[...]) for _, leaf in nnx.to_flat_state(nnx.state(model))]


def test_lessons_that_were_interrupted_end_with_the_same_eyes(tmp_path, monkeypatch):
    monkeypatch.setattr(teaching, "_EVERY", 5)
    whole, parts = pupil(), pupil()
    teach(whole, WORDS, LESSONS, tmp_path / "whole.npz")
    real, calls = teaching._save, []

    def killed(path, step, state, settings):
        real(path, step, state, settings)
        calls.append(step)
        raise KeyboardInterrupt

    monkeypatch.setattr(teaching, "_save", killed)
    for _ in range(2):
        with pytest.raises(KeyboardInterrupt):
            teach(parts, WORDS, LESSONS, tmp_path / "parts.npz")
    monkeypatch.setattr(teaching, "_save", real)
    teach(parts, WORDS, LESSONS, tmp_path / "parts.npz")
    assert calls == [5, 10]
    for ours, theirs in zip(leaves(parts), leaves(whole), strict=True):
        np.testing.assert_array_equal(ours, theirs)


@pytest.mark.parametrize(
    "damage",
    [
        pytest.param(lambda data: b"", id="empty", marks=pytest.mark.slow),
        pytest.param(lambda data: data[: len(data) // 2], id="half"),
        pytest.param(lambda data: b"no", id="another", marks=pytest.mark.slow),
    ],
)
def test_a_damaged_file_of_lessons_begins_them_anew(tmp_path, capsys, damage):
    file = tmp_path / "lessons.npz"
    teach(pupil(), WORDS, LESSONS, file)
    file.write_bytes(damage(file.read_bytes()))
    anew = pupil()
    teach(anew, WORDS, LESSONS, file)
    assert "begin anew" in capsys.readouterr().err
    assert not np.array_equal(leaves(anew)[0], leaves(pupil())[0])


@pytest.mark.slow
def test_lessons_of_another_model_are_not_taken(tmp_path, capsys):
    teach(pupil(), WORDS, LESSONS, tmp_path / "lessons.npz")
    larger = dataclasses.replace(VISION, hidden_size=32)
    teach(pupil(larger), WORDS, LESSONS, tmp_path / "lessons.npz")
    assert "of other lessons" in capsys.readouterr().err


def test_every_class_of_the_lessons_has_words(tokenizer):
    words = class_words(tokenizer)
    assert {kind: len(ids) for kind, ids in words.items()} == {
        kind: len(names) for kind, names in CLASSES.items() if kind != "anything"
    }
    of_cup = words["shape"][CLASSES["shape"].index("cup")]
    assert [tokenizer.decode([i]) for i in of_cup] == ["cup", "mug", "cups", "mugs"]


@pytest.mark.parametrize("name", ["nano_scenes", "nano_minutes"])
def test_the_data_of_a_recipe_with_lessons_have_their_words(name):
    config = load_config(name)
    lines = texts(make_mixture(config.data))
    words = class_words(make_tokenizer(lines, config.start.vocabulary, fixed_texts(config.data.template)))
    assert all(len(ids) == len(CLASSES[kind]) for kind, ids in words.items())


def test_lessons_without_words_are_said():
    poor = make_tokenizer(["nothing of the kind"], 400)
    with pytest.raises(ConfigError, match="needs a word for shape"):
        class_words(poor)


def test_the_embeddings_of_the_words_learn_and_no_others(tmp_path):
    model = pupil()
    teach(model, WORDS, LESSONS, tmp_path / "lessons.npz")
    before, after = (np.asarray(m.llama.embed_tokens.embedding[...]) for m in (pupil(), model))
    # all are scaled alike; those that learned have turned
    cosine = np.sum(before * after, axis=1) / np.linalg.norm(before, axis=1) / np.linalg.norm(after, axis=1)
    assert np.flatnonzero(cosine < 1 - 1e-5).tolist() == [i for ids in WORDS.values() for (i,) in ids]
    np.testing.assert_allclose(np.mean(np.square(after)), 1.0, rtol=1e-5)


def test_teaching_is_for_new_models():
    with pytest.raises(ConfigError, match="for new models"):
        StartConfig(model="somewhere", teaching=TeachingConfig())


def test_a_width_that_four_does_not_divide_has_codes_too():
    assert position_codes(5, 6).shape == (5, 5, 6)


@pytest.fixture
def begun(tmp_path):
    """(config, folder, parts) of a run that has made its new model."""
    config = load_config("nano_scenes:runlocal", ["start.vocabulary=600", "masks_from=3"])
    return config, tmp_path, prepare(config, tmp_path)[0]


def test_masks_are_trained_from_the_stated_update_on(begun):
    _, _, run = begun
    assert run.step(0) is run.step(2) and run.step(3) is run.step(100)
    assert run.step(2) is not run.step(3)


@pytest.mark.parametrize("change", ["start.seed=1", "start.vocabulary=700", "start.scratch.sam.depth=1"])
def test_a_new_model_of_other_settings_is_not_taken_for_this_one(begun, change):
    changes = ["start.vocabulary=600", change, "start.scratch.sam.global_attn_indexes=(0,)"]
    other = load_config("nano_scenes:runlocal", changes if "depth" in change else changes[:2])
    with pytest.raises(ConfigError, match="other settings"):
        prepare(other, begun[1])
    prepare(begun[0], begun[1])  # its own is
