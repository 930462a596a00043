"""Resizing matrices against torch's interpolate."""

from __future__ import annotations

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from read_jax.models.resize import bilinear_taps, one_hot_rows, output_taps, through_padding, through_resize

SOURCE = 40  # the static size of the source axis; what is used of it is traced


def torch_resize(x: np.ndarray, size: int) -> np.ndarray:
    """Resize the last axis of [N, size] with torch."""
    out = torch.nn.functional.interpolate(
        torch.from_numpy(x)[None, :, None], (1, size), mode="bilinear", align_corners=False
    )
    return out[0, :, 0].numpy()


@jax.jit
def resize_rows(dst, in_size, out_size):
    return one_hot_rows(through_resize(output_taps(dst), in_size, out_size), SOURCE)


@settings(max_examples=60, deadline=None)
@given(st.integers(1, SOURCE), st.integers(1, 3000), st.integers(0, 2**31))
def test_rows_equal_torch_interpolate(in_size, out_size, seed):
    x = np.random.default_rng(seed).standard_normal((3, SOURCE)).astype(np.float32)
    dst = np.random.default_rng(seed).integers(0, out_size, 64)  # one shape: one compilation
    ours = x @ np.asarray(resize_rows(dst, in_size, out_size)).T
    np.testing.assert_allclose(ours, torch_resize(x[:, :in_size], out_size)[:, dst], atol=1e-4)


@settings(max_examples=60, deadline=None)
@given(st.integers(1, 30000), st.integers(1, 30000), st.integers(-5, 40000))
def test_taps_are_neighbours_inside_the_source(in_size, out_size, dst):
    i0, i1, w1 = bilinear_taps(dst, in_size, out_size)
    assert 0 <= i0 <= i1 <= min(i0 + 1, in_size - 1)
    assert 0.0 <= w1 <= 1.0


def test_equal_sizes_leave_the_axis_alone():
    rows = resize_rows(np.arange(SOURCE), SOURCE, SOURCE)
    np.testing.assert_array_equal(rows, np.eye(SOURCE))


@pytest.mark.parametrize("pad", [0, 7, -1, -3])
def test_padding_reads_zeros_outside_and_crops_when_negative(pad):
    size = 10
    x = np.arange(1.0, size + 1, dtype=np.float32)
    padded = np.pad(x, pad) if pad >= 0 else x[-pad:pad]
    wanted = torch_resize(padded[None], 33)[0]
    taps = through_resize(output_taps(np.arange(33)), len(padded), 33)
    rows = one_hot_rows(through_padding(taps, pad, size), size)
    np.testing.assert_allclose(rows @ x, wanted, atol=1e-5)


def test_rows_work_under_vmap_over_traced_sizes():
    sizes = np.array([[3, 17], [40, 5], [1, 1]])
    dst = np.arange(8)
    batched = jax.vmap(lambda s: resize_rows(dst, s[0], s[1]))(sizes)
    for rows, (in_size, out_size) in zip(batched, sizes, strict=True):
        np.testing.assert_array_equal(rows, resize_rows(dst, in_size, out_size))


def test_gradient_reaches_the_map_with_torchs_values():
    x = np.random.default_rng(0).standard_normal((1, SOURCE)).astype(np.float32)
    ours = jax.grad(lambda m: jnp.sum((m @ resize_rows(np.arange(64), 30, 64).T) ** 2))(jnp.asarray(x))
    theirs = torch.from_numpy(x).requires_grad_()
    resized = torch.nn.functional.interpolate(
        theirs[:, None, None, :30], (1, 64), mode="bilinear", align_corners=False
    )
    (resized**2).sum().backward()
    np.testing.assert_allclose(ours, theirs.grad.numpy(), atol=1e-4)
