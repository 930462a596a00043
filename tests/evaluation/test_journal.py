"""The journal survives being killed, and never mixes two runs."""

from __future__ import annotations

import json

import pytest

from read_jax.errors import DataError
from read_jax.evaluation.journal import Journal, read_records

IDENTITY = {"dataset": "x|val", "mode": "forced", "notes": ("one",), "limit": None}


def record(index, **more):
    return {
        "index": index,
        "key": f"p{index}",
        "image": None,
        "height": 2,
        "width": 3,
        "questions": [],
    } | more


def error(index):
    return {"index": index, "key": None, "image": None, "error": "gone"}


def write(folder, *records, **options):
    with Journal(folder, IDENTITY, {"device": "here"}, **options) as journal:
        for entry in records:
            journal.append(entry)


def only_file(folder):
    (path,) = folder.glob("*.jsonl")
    return path


def test_records_come_back_in_order_with_the_header(tmp_path):
    write(tmp_path / "new" / "run", record(2), record(0), record(1))
    header, records = read_records(tmp_path / "new" / "run")
    assert records == [record(0), record(1), record(2)]
    assert header == IDENTITY | {"notes": ["one"], "environment": {"device": "here"}}


def test_a_later_journal_finds_the_earlier_records(tmp_path):
    write(tmp_path, record(3))
    with Journal(tmp_path, IDENTITY, {"device": "elsewhere"}) as journal:
        assert journal.records == {3: record(3)}
        journal.append(record(1))
        assert set(journal.records) == {1, 3}
    header, records = read_records(tmp_path)
    assert [entry["index"] for entry in records] == [1, 3]
    assert header["environment"] == {"device": "here"}


def test_a_record_is_in_the_file_before_the_journal_is_closed(tmp_path):
    with Journal(tmp_path, IDENTITY) as journal:
        journal.append(record(0))
        assert read_records(tmp_path)[1] == [record(0)]


def test_cut_anywhere_it_resumes_with_whole_records(tmp_path):
    write(tmp_path, record(0), record(1, key="grüße"), record(2))
    path = only_file(tmp_path)
    whole = path.read_bytes()
    for length in range(len(whole) + 1):
        path.write_bytes(whole[:length])
        with Journal(tmp_path, IDENTITY, {"device": "here"}) as journal:
            missing = [i for i in range(3) if i not in journal.records]
            for index in missing:
                journal.append(record(index, **({"key": "grüße"} if index == 1 else {})))
        assert path.read_bytes() == whole


def test_a_torn_line_is_not_read(tmp_path):
    write(tmp_path, record(0))
    with open(only_file(tmp_path), "ab") as file:
        file.write(b'{"index": 1, "key"')
    assert read_records(tmp_path)[1] == [record(0)]


@pytest.mark.parametrize(
    ("name", "value"), [("mode", "generate"), ("dataset", "y|val"), ("limit", 5), ("notes", ())]
)
def test_another_run_is_refused_and_what_differs_is_named(tmp_path, name, value):
    write(tmp_path, record(0))
    with pytest.raises(DataError, match=rf"{name} was .*, now .*--overwrite"):
        Journal(tmp_path, IDENTITY | {name: value})
    assert read_records(tmp_path)[1] == [record(0)]


def test_a_setting_that_one_run_lacks_is_a_difference(tmp_path):
    write(tmp_path, record(0))
    with pytest.raises(DataError, match="new was None, now 1"):
        Journal(tmp_path, IDENTITY | {"new": 1})


def test_overwriting_starts_anew(tmp_path):
    write(tmp_path, record(0), record(1))
    with Journal(tmp_path, IDENTITY | {"mode": "generate"}, overwrite=True) as journal:
        assert journal.records == {}
        journal.append(record(5))
    header, records = read_records(tmp_path)
    assert (header["mode"], records) == ("generate", [record(5)])


def test_overwriting_removes_damage(tmp_path):
    write(tmp_path, record(0))
    only_file(tmp_path).write_bytes(b"\x00nonsense\n")
    write(tmp_path, record(1), overwrite=True)
    assert read_records(tmp_path)[1] == [record(1)]


def test_hosts_write_parts_that_are_read_together(tmp_path):
    write(tmp_path, record(0), record(2), host=0, hosts=2)
    write(tmp_path, record(3), record(1), host=1, hosts=2)
    assert [entry["index"] for entry in read_records(tmp_path)[1]] == [0, 1, 2, 3]
    with Journal(tmp_path, IDENTITY) as journal:
        assert set(journal.records) == {0, 1, 2, 3}


def test_overwriting_removes_the_parts_of_hosts_that_are_no_more(tmp_path):
    write(tmp_path, record(0), host=0, hosts=12)
    write(tmp_path, record(1), host=11, hosts=12)
    write(tmp_path, record(7), overwrite=True)
    assert read_records(tmp_path)[1] == [record(7)]


def test_an_answer_replaces_an_error_and_never_the_other_way(tmp_path):
    write(tmp_path, error(0), record(1), host=1, hosts=2)
    write(tmp_path, record(0), error(1), error(2), host=0, hosts=2)
    assert read_records(tmp_path)[1] == [record(0), record(1), error(2)]


def test_two_processes_cannot_write_the_same_answers(tmp_path):
    with Journal(tmp_path, IDENTITY), pytest.raises(DataError, match="another process"):
        Journal(tmp_path, IDENTITY)
    Journal(tmp_path, IDENTITY).close()


@pytest.mark.parametrize(
    ("line", "message"),
    [
        (b"{broken\n", "line 3: damaged"),
        (b"[1]\n", "line 3: damaged"),
        (b'{"key": "a"}\n', "line 3: a picture"),
    ],
)
def test_damage_in_the_middle_is_reported_with_its_line(tmp_path, line, message):
    write(tmp_path, record(0))
    with open(only_file(tmp_path), "ab") as file:
        file.write(line + json.dumps(record(1)).encode() + b"\n")
    with pytest.raises(DataError, match=message):
        Journal(tmp_path, IDENTITY)
    with pytest.raises(DataError, match=message):
        read_records(tmp_path)


@pytest.mark.parametrize("text", ['{"what": "mine"}\n', '{"what": "mine"}\n{"more', "mine", '{"format":2}\n'])
def test_a_file_of_something_else_is_refused_and_left_alone(tmp_path, text):
    path = tmp_path / "answers-00000.jsonl"
    path.write_text(text)
    with pytest.raises(DataError, match="not written by"):
        Journal(tmp_path, IDENTITY)
    assert path.read_text() == text


def test_a_folder_without_an_evaluation_is_named(tmp_path):
    with pytest.raises(DataError, match="holds no evaluation"):
        read_records(tmp_path / "nowhere")


def test_an_output_that_is_a_file_is_named(tmp_path):
    (tmp_path / "out").write_text("")
    with pytest.raises(DataError, match="is a file"):
        Journal(tmp_path / "out", IDENTITY)
