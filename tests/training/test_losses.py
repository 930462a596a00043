"""Losses against the original's numbers, torch's own, and what padding must not change."""

from __future__ import annotations

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from read_jax.text.targets import IGNORE_INDEX
from read_jax.training.losses import COUNT_EPS, mask_losses, token_cross_entropy

KINDS = {"bce": "sigmoid_ce", "dice": "dice", "focal": "focal"}


@functools.partial(jax.jit, static_argnums=0)  # operation by operation, every one is compiled for every size
@functools.partial(jax.value_and_grad, argnums=1)
def batch_loss(kind, logits, targets, number):
    valid = jnp.ones(logits.shape, bool)
    values = getattr(mask_losses(logits, targets, valid), kind)
    return jnp.sum(values) / (number + COUNT_EPS)


compiled_losses = jax.jit(mask_losses)
gradient_of_all = jax.jit(jax.grad(lambda *args: sum(jnp.sum(value) for value in mask_losses(*args))))


@pytest.mark.parametrize("kind", KINDS)
def test_values_and_gradients_are_the_originals(kind, goldens):
    data = np.load(goldens / "unit" / "losses.npz")
    for case in range(int(data["n_cases"])):
        name = f"c{case:02d}_"
        logits, targets = data[name + "logits"], data[name + "targets"]
        number = data[name + "num_masks"]
        value, gradient = batch_loss(kind, logits, targets, number)
        np.testing.assert_allclose(value, data[name + KINDS[kind]], rtol=1e-5, atol=1e-7)
        wanted = data[f"{name}{KINDS[kind]}_grad"]
        np.testing.assert_allclose(
            gradient, wanted, rtol=1e-4, atol=1e-6 * max(np.abs(wanted).max(initial=0), 1e-12)
        )


def random_masks(seed, rows, height, width):
    rng = np.random.default_rng(seed)
    return rng.normal(0, 5, (rows, height, width)).astype(np.float32), rng.integers(
        0, 2, (rows, height, width)
    )


@settings(max_examples=20, deadline=None)
@given(st.integers(0, 1000), st.integers(0, 3), st.integers(0, 3))
def test_padding_changes_no_loss_and_gets_no_gradient(seed, above, left):
    logits, targets = random_masks(seed, 2, 4, 5)
    canvas, extra = random_masks(seed + 1, 2, 7, 8)  # one size for all examples: compiled once
    valid = np.zeros(canvas.shape, bool)
    place = (slice(None), slice(above, above + 4), slice(left, left + 5))
    canvas[place], extra[place], valid[place] = logits, targets, True
    plain = compiled_losses(logits, targets, np.ones(logits.shape, bool))
    for value, other in zip(plain, compiled_losses(canvas, extra, valid), strict=True):
        np.testing.assert_allclose(value, other, rtol=1e-5, atol=1e-7)
    gradient = np.asarray(gradient_of_all(canvas, extra, valid))
    assert np.all(gradient[~valid] == 0)
    wanted = np.asarray(gradient_of_all(logits, targets, np.ones(logits.shape, bool)))
    np.testing.assert_allclose(gradient[place], wanted, rtol=1e-5, atol=1e-7)
    assert np.any(wanted)


def test_extreme_logits_give_finite_losses_and_gradients():
    logits = jnp.array([[[1e4, -1e4], [60.0, -60.0]]])
    for targets in (jnp.zeros((1, 2, 2)), jnp.ones((1, 2, 2))):
        gradient = gradient_of_all(logits, targets, jnp.ones(logits.shape, bool))
        assert np.isfinite(np.asarray(gradient)).all()


def test_cross_entropy_is_torchs_over_the_counted_tokens():
    rng = np.random.default_rng(0)
    logits = rng.normal(0, 3, (2, 5, 11)).astype(np.float32)
    targets = rng.integers(0, 11, (2, 5))
    targets[0, :3] = IGNORE_INDEX
    total, count = jax.jit(token_cross_entropy)(logits, targets)
    wanted = torch.nn.functional.cross_entropy(
        torch.tensor(logits).flatten(0, 1), torch.tensor(targets).flatten(), ignore_index=IGNORE_INDEX
    )
    assert count == 7
    np.testing.assert_allclose(total / count, wanted.item(), rtol=1e-6)
