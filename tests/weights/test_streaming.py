"""Converting takes a fixed amount of memory, whatever the size of the model."""

from __future__ import annotations

import mmap
import shutil

import pytest

from read_jax.weights import convert
from read_jax.weights.convert import anonymous_memory
from tests.weights import make_synthetic_7b as big
from tests.weights import synthetic
from tests.weights.synthetic import write_clip, write_read_checkpoint

NEEDED = 36e9


def _peak(source, clip, output):
    return big.measure(source, clip, output, sasp="off")["anonymous_peak"]


def test_progress_counts_every_byte_once(tmp_path):
    source, clip = write_read_checkpoint(tmp_path / "x"), write_clip(tmp_path / "clip")
    calls = []
    summary = convert(source, clip, tmp_path / "m", sasp="off", progress=lambda *call: calls.append(call))
    assert len(calls) == summary.tensors_used == len({what for _, _, what in calls})
    assert [done for done, _, _ in calls] == sorted(done for done, _, _ in calls)
    assert calls[-1][0] == calls[-1][1] == summary.bytes


def test_anonymous_memory_sees_an_array_come():
    size = 64 << 20
    before = anonymous_memory()
    # not malloc, which may hand out again what an earlier test freed
    with mmap.mmap(-1, size, flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS) as block:
        block.write(b"\x01" * size)
        assert anonymous_memory() - before > 0.9 * size


def test_memory_does_not_grow_with_the_number_of_layers(tmp_path):
    peaks = []
    for layers in (2, 24):
        sizes = synthetic.Sizes(hidden=512, heads=8, inter=2048, layers=layers)
        folder = tmp_path / str(layers)
        source = write_read_checkpoint(folder / "x", sizes=sizes, format="safetensors")
        peaks.append(_peak(source, write_clip(folder / "clip", sizes=sizes), folder / "m"))
    extra_weights = 22 * (4 * 512**2 + 3 * 512 * 2048) * 4  # bytes of the 22 further layers: 370 MB
    assert peaks[1] - peaks[0] < extra_weights / 5


@pytest.mark.slow
@pytest.mark.parametrize("format", ["bin"])
def test_a_7b_checkpoint_converts_in_under_3_gb(tmp_path, format):
    if shutil.disk_usage(tmp_path).free < NEEDED:
        pytest.skip(f"a 7B-shaped conversion needs {NEEDED / 1e9:.0f} GB of free disk")
    try:
        figures = big.measure(*big.make(tmp_path / "big", format), tmp_path / "big" / "model")
        print(figures)
        assert figures["anonymous_peak"] < 3e9
    finally:
        shutil.rmtree(tmp_path / "big")
