"""The losses that teach to point, and to begin an answer rightly."""

from __future__ import annotations

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from read_jax.text.targets import IGNORE_INDEX
from read_jax.training.losses import share_of_cells, similarity_loss
from read_jax.training.objective import LossWeights, first_tokens


def shares(mask: np.ndarray, canvas: tuple[int, int], grid: int) -> np.ndarray:
    """share_of_cells of one mask at the top left of a canvas full of other ones."""
    masks = np.ones((1, 1, *canvas), np.uint8)
    masks[0, 0, : mask.shape[0], : mask.shape[1]] = mask
    return np.asarray(share_of_cells(jnp.asarray(masks), jnp.asarray([mask.shape]), grid))[0, 0]


@settings(max_examples=30, deadline=None)
@given(st.integers(0, 2**32 - 1), st.integers(1, 4), st.integers(0, 5), st.booleans())
def test_a_cells_share_is_the_mean_of_its_pixels_in_the_central_square(seed, scale, margin, upright):
    random, grid = np.random.default_rng(seed), 3
    square = random.integers(0, 2, (scale * grid, scale * grid)).astype(np.uint8)
    wide = np.pad(square, ((0, 0), (margin, margin)), constant_values=1)
    mask = wide.T if upright else wide
    expected = (square.T if upright else square).reshape(grid, scale, grid, scale).mean(axis=(1, 3))
    np.testing.assert_allclose(shares(mask, (30, 30), grid), expected.reshape(-1), atol=1e-6)


def test_cells_that_cut_through_pixels_take_their_part_of_them():
    # two cells over three columns: the middle one belongs to both by halves
    mask = np.zeros((3, 3), np.uint8)
    mask[:, 1] = 1
    np.testing.assert_allclose(shares(mask, (4, 4), 2), np.full(4, 1 / 3), atol=1e-6)


def test_ignored_pixels_are_no_target():
    np.testing.assert_array_equal(shares(np.full((4, 4), 255, np.uint8), (4, 4), 2), 0)


@settings(max_examples=30, deadline=None)
@given(st.integers(0, 2**32 - 1))
def test_the_similarity_loss_is_zero_for_the_targets_distribution_and_positive_otherwise(seed):
    random, width = np.random.default_rng(seed), 16
    share = random.random(9).astype(np.float32)
    perfect = np.log(share / share.sum()) * width**0.5 + 3.0
    assert abs(float(similarity_loss(jnp.asarray(perfect), jnp.asarray(share), width))) < 1e-5
    other = random.normal(size=9).astype(np.float32) * 10
    assert float(similarity_loss(jnp.asarray(other), jnp.asarray(share), width)) > 0


def test_its_gradient_draws_the_map_to_the_target():
    share = jnp.asarray([0.0, 1.0, 0.0, 0.0])
    gradient = jax.grad(lambda s: similarity_loss(s, share, 4))(jnp.zeros(4))
    np.testing.assert_allclose(gradient, np.array([0.25, -0.75, 0.25, 0.25]) / 2, atol=1e-6)


def test_a_target_outside_the_square_costs_nothing_and_gives_no_gradient():
    value, gradient = jax.value_and_grad(similarity_loss)(jnp.arange(4.0), jnp.zeros(4), 4)
    assert float(value) == 0 and not np.any(gradient)


def test_first_tokens_are_those_where_answers_begin():
    skip = IGNORE_INDEX
    targets = [[skip, 5, 6, skip, skip, 7], [1, 2, skip, 3, 4, skip]]
    expected = [[skip, 5, skip, skip, skip, 7], [1, skip, skip, 3, skip, skip]]
    np.testing.assert_array_equal(first_tokens(targets), expected)


def test_weights_without_masks_keep_the_others():
    weights = LossWeights(focal=1.0, similarity=0.3, first_token=0.2)
    assert weights.of_masks
    assert weights.without_masks() == LossWeights(1.0, 0.0, 0.0, 0.0, 0.3, 0.2)
    assert not weights.without_masks().of_masks


def test_a_negative_weight_is_refused():
    with pytest.raises(Exception, match="must not be negative"):
        LossWeights(similarity=-1.0)
