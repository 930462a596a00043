"""Pickles are read without running anything."""

from __future__ import annotations

import collections
import pickle
import struct

import numpy as np
import pytest
from hypothesis import assume, given
from hypothesis import strategies as st

from read_jax.data.plain_pickle import load_plain_pickle
from read_jax.errors import DataError

SCALARS = st.none() | st.booleans() | st.integers() | st.floats(allow_nan=False) | st.text()
PLAIN = st.recursive(
    SCALARS, lambda inner: st.lists(inner) | st.dictionaries(st.text(), inner) | st.tuples(inner, inner)
)


def written(folder, data):
    path = folder / "refs(x).p"
    path.write_bytes(data)
    return path


@given(value=PLAIN, protocol=st.integers(0, pickle.HIGHEST_PROTOCOL))
def test_plain_values_come_back(tmp_path_factory, value, protocol):
    path = written(tmp_path_factory.mktemp("pickle"), pickle.dumps(value, protocol))
    assert load_plain_pickle(path) == value


class Caller:
    """Unpickling this the ordinary way creates a file."""

    def __init__(self, path):
        self.path = path

    def __reduce__(self):
        return open, (str(self.path), "w")


@pytest.mark.parametrize("protocol", range(pickle.HIGHEST_PROTOCOL + 1))
def test_nothing_in_the_file_runs(tmp_path, protocol):
    trap = tmp_path / "created"
    data = pickle.dumps([{"ref_id": Caller(trap)}], protocol)
    pickle.loads(data)[0]["ref_id"].close()
    assert trap.exists()  # it would have worked
    trap.unlink()
    with pytest.raises(DataError, match=r"asks for (_?io|builtins|__builtin__)\.open"):
        load_plain_pickle(written(tmp_path, data))
    assert not trap.exists()


@pytest.mark.parametrize(
    "value",
    [np.float64(1), np.arange(3), collections.OrderedDict(a=1), collections.Counter("a"), Exception, len],
    ids=["numpy number", "array", "ordered dict", "counter", "class", "function"],
)
def test_even_harmless_objects_are_refused_by_name(tmp_path, value):
    path = written(tmp_path, pickle.dumps([value]))
    with pytest.raises(DataError, match=r"refs\(x\)\.p asks for [\w.]+; only pickles of plain") as error:
        load_plain_pickle(path)
    assert str(path) in str(error.value)


def test_reference_outside_the_file_is_refused(tmp_path):
    with pytest.raises(DataError, match="outside the file"):
        load_plain_pickle(written(tmp_path, b"Pthing\n."))


def test_text_of_python_2_is_utf_8(tmp_path):
    assert load_plain_pickle(written(tmp_path, b"U\x05caf\xc3\xa9.")) == "café"


def test_text_of_python_2_that_is_not_utf_8_is_latin_1(tmp_path):
    assert load_plain_pickle(written(tmp_path, b"U\x04caf\xe9.")) == "café"


@pytest.mark.parametrize("protocol", range(pickle.HIGHEST_PROTOCOL + 1))
def test_file_cut_anywhere_is_an_error(tmp_path, protocol):
    data = pickle.dumps([{"sent": "the café", "ref_id": 70000, "ok": True}], protocol)
    for length in range(len(data)):
        with pytest.raises(DataError, match="damaged or was not copied completely"):
            load_plain_pickle(written(tmp_path, data[:length]))


@given(st.binary(max_size=60))
def test_any_bytes_are_a_plain_value_or_an_error(tmp_path_factory, data):
    assume(b"r" not in data and b"\x96" not in data)  # opcodes that reserve gigabytes if told to
    path = written(tmp_path_factory.mktemp("pickle"), data)
    try:
        load_plain_pickle(path)
    except DataError as error:
        assert str(path) in str(error)


@pytest.mark.parametrize("opcode", [b"\x8d", b"\x8e"], ids=["text", "bytes"])
def test_claim_of_more_than_the_file_holds_is_an_error(tmp_path, opcode):
    data = b"\x80\x04" + opcode + struct.pack("<Q", 2**62) + b"abc."
    with pytest.raises(DataError, match="damaged"):
        load_plain_pickle(written(tmp_path, data))


def test_missing_file_is_named(tmp_path):
    with pytest.raises(DataError, match=r"none\.p: there is no such file"):
        load_plain_pickle(tmp_path / "none.p")


def test_folder_is_an_error(tmp_path):
    with pytest.raises(DataError, match="cannot be read"):
        load_plain_pickle(tmp_path)
