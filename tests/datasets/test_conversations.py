"""LLaVA-Instruct, on files of a few records."""

from __future__ import annotations

import pickle

import pytest

from read_jax.data import load_source
from read_jax.data.conversations import load
from read_jax.errors import DataError, ImageError
from tests.datasets import label_trees


def turns(*texts, first="human"):
    speakers = ("human", "gpt") if first == "human" else ("gpt", "human")
    return [{"from": speakers[i % 2], "value": text} for i, text in enumerate(texts)]


def conversation(tmp_path, said, image="a.jpg"):
    label_trees.llava_instruct(tmp_path, [{"id": "1", "image": image, "conversations": said}])
    return load_source("llava_instruct|train", tmp_path)[0]


def test_the_turns_are_questions_and_answers_of_one_conversation(tmp_path):
    item = conversation(tmp_path, turns("<image>\nWhat is it?", "A cat.\n", " And then? ", "It left."))
    assert item.conversation
    assert item.questions == ["What is it?", " And then? "]
    assert item.answers == ["A cat.\n", "It left."]
    assert item.phrases == item.questions
    assert item.exists == [False, False] and item.masks.shape == (2, 6, 8) and not item.masks.any()
    assert item.sent_ids == [0, 1]


@pytest.mark.parametrize(
    ("value", "question", "shows"),
    [
        ("<image>\nWhat?", "What?", True),
        ("What?\n<image>", "What?", True),
        ("  Look at <image> and name it. ", "Look at  and name it.", True),
        ("<image>", "", True),
        ("  What? ", "  What? ", False),
    ],
)
def test_the_pictures_mark_leaves_the_text_and_is_remembered(tmp_path, value, question, shows):
    (query,) = conversation(tmp_path, turns(value, "Yes.")).queries
    assert (query.question, query.shows_image) == (question, shows)


def test_an_opening_by_the_assistant_is_left_out(tmp_path):
    item = conversation(tmp_path, turns("Hello.", "<image>\nWhat?", "A cat.", first="gpt"))
    assert (item.questions, item.answers) == (["What?"], ["A cat."])


def test_a_last_question_that_nobody_answers_is_left_out(tmp_path):
    item = conversation(tmp_path, turns("<image>\nWhat?", "A cat.", "Why?"))
    assert item.questions == ["What?"]


@pytest.mark.parametrize(
    ("said", "words"),
    [
        (turns("What?"), "no answered question"),
        ([], "no answered question"),
        (None, "no list 'conversations'"),
        ([*turns("What?"), *turns("What?")], "human speaks where it is gpt's turn"),
        ([*turns("Hi.", first="gpt"), *turns("Hi.", first="gpt")], "gpt speaks where it is human's turn"),
        ([{"from": "system", "value": "x"}], "turn 0 is from 'system'; known: human, gpt"),
        ([{"from": "human", "value": 3}], "turn 0 has no text 'value'"),
        (["x"], "turn 0 has no text 'value'"),
    ],
)
def test_a_broken_conversation_is_refused_by_its_number_and_leaves_the_others(tmp_path, said, words):
    good = {"id": "1", "image": "a.jpg", "conversations": turns("What?", "A cat.")}
    label_trees.llava_instruct(tmp_path, [good, {"id": "2", "image": "a.jpg", "conversations": said}])
    source = load_source("llava_instruct|train", tmp_path)
    assert source[0].questions == ["What?"]
    with pytest.raises(DataError, match=rf"llava_instruct_150k\.json: record 1.*{words}"):
        source[1]


def test_items_come_in_the_files_order_each_with_a_key_of_its_own(tmp_path):
    record = {"id": "same", "conversations": turns("What?", "A cat.")}
    label_trees.llava_instruct(tmp_path, [{**record, "image": "b.jpg"}, {**record, "image": "a.jpg"}])
    items = list(load_source("llava_instruct|train", tmp_path))
    assert [item.key for item in items] == ["train/0", "train/1"]
    assert items[0].image_path == str(tmp_path / "coco" / "train2017" / "b.jpg")


def test_counting_from_the_end_gives_the_same_item(tmp_path):
    record = {"image": "a.jpg", "conversations": turns("What?", "A cat.")}
    label_trees.llava_instruct(tmp_path, [record, record])
    source = load_source("llava_instruct|train", tmp_path)
    assert source[-1].key == "train/1" and source[-1].ref_ids == [1]
    with pytest.raises(IndexError):
        source[2]


def test_a_turned_picture_has_the_size_it_is_shown_in(tmp_path):
    conversation(tmp_path, turns("What?", "A cat."))
    label_trees.save_picture(tmp_path / "coco/train2017/a.jpg", 6, 8, orientation=8)
    item = load_source("llava_instruct|train", tmp_path)[0]
    assert (item.height, item.width) == item.image.shape[:2] == (6, 8)


def test_a_missing_picture_is_an_image_error(tmp_path):
    conversation(tmp_path, turns("What?", "A cat."))
    (tmp_path / "coco/train2017/a.jpg").unlink()
    with pytest.raises(ImageError, match=r"a\.jpg: there is no such file"):
        load_source("llava_instruct|train", tmp_path)[0]


def test_a_record_without_a_picture_is_named(tmp_path):
    label_trees.write_json(tmp_path / "llava_dataset/llava_instruct_150k.json", [{"conversations": []}])
    with pytest.raises(DataError, match="record 0 has no text 'image'"):
        load_source("llava_instruct|train", tmp_path)[0]


@pytest.mark.parametrize("content", [{"a": 1}, ["x"]])
def test_a_file_of_another_kind_is_refused(tmp_path, content):
    label_trees.write_json(tmp_path / "llava_dataset/llava_instruct_150k.json", content)
    with pytest.raises(DataError, match="must hold a list of records"):
        load_source("llava_instruct|train", tmp_path)


def test_an_unknown_split_is_told_the_known_one(tmp_path):
    with pytest.raises(DataError, match=r"no split 'val'; known: llava_instruct\|train"):
        load("llava_instruct", "val", tmp_path, None)


def test_sources_and_items_travel_between_processes(tmp_path):
    conversation(tmp_path, turns("What?", "A cat."))
    source = pickle.loads(pickle.dumps(load_source("llava_instruct|train", tmp_path)))
    assert pickle.loads(pickle.dumps(source[0])).image.shape == (6, 8, 3)
