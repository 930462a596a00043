"""SasP against the original's numbers, and against the full-image formulation in PyTorch."""

from __future__ import annotations

import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import torch
from hypothesis import assume, given, settings
from hypothesis import strategies as st

from read_jax.config import SaspConfig
from read_jax.geometry import SaspGeometry, sasp_geometry
from read_jax.models.sasp import SaspPoints, min_max, points_from_similarity, similarity_points
from tests.models.sasp_reference import make_continuous, margin, reference_points

CONFIGS = {
    "7b": SaspConfig.preset("7b"),
    "13b": SaspConfig.preset("13b"),
    "paper": SaspConfig.preset("paper"),
    "discrete": SaspConfig.preset("7b", continuous=False),
}
CROPPED = [(321, 321), (346, 400), (500, 376), (79, 158), (158, 79), (79, 79), (330, 250)]
"""Sizes (h, w) at which the original's rounding crops the grid, the full-size map, or both."""
EXTREME = [(1, 1), (1, 500), (500, 1), (2, 3), (5, 5), (11, 4), (30, 3000), (3000, 30)]
"""Sizes at which windows are cut by the borders, or nearly all of the grid is padding."""
ORDINARY = [(512, 512), (336, 336), (427, 640), (640, 480)]

SAFE = 1e-6
"""Margin below which the choice of points depends on float32 rounding."""


def random_map(seed: int, config: SaspConfig, scale: float = 3.0) -> np.ndarray:
    """A smooth map with noise [576], its choice of points clear of rounding."""
    for attempt in range(100):
        rng = np.random.default_rng([seed, attempt])
        coarse = torch.from_numpy(rng.standard_normal((1, 1, 5, 5)).astype(np.float32))
        smooth = torch.nn.functional.interpolate(coarse, (24, 24), mode="bicubic").numpy().reshape(-1)
        similarity = scale * (smooth + 0.1 * rng.standard_normal(576)).astype(np.float32)
        if config.down_sample == 1 or margin(similarity, config) > SAFE:
            return similarity
    raise AssertionError("no map with a clear choice")


def assert_equals_reference(similarity: np.ndarray, height: int, width: int, config: SaspConfig) -> None:
    ours = points_from_similarity(similarity, height, width, config)
    discrete, labels, points = reference_points(torch.from_numpy(similarity), height, width, config)
    np.testing.assert_array_equal(ours.discrete, discrete)
    np.testing.assert_array_equal(ours.labels, labels)
    np.testing.assert_allclose(ours.points, points.numpy(), rtol=0, atol=2e-3)


@pytest.mark.parametrize("name", ["7b", "13b"])
def test_equals_the_originals_points(goldens, name):
    data = np.load(goldens / "unit" / f"sasp_{name}.npz")
    config = SaspConfig.preset(name)
    assert (config.num_points, config.down_sample) == (data["num_points"], data["down_sample"])
    assert (config.t_pos, config.t_neg) == (data["t_pos"], data["t_neg"])
    for i in range(int(data["n_cases"])):
        case = {
            key: data[f"c{i:02}_{key}"] for key in ("similarity", "image_hw", "points_discrete", "labels")
        }
        height, width = map(int, case["image_hw"])
        geometry = sasp_geometry(height, width, config)
        assert (geometry.grid_height, geometry.grid_width) == tuple(data[f"c{i:02}_grid_hw"])
        ours = points_from_similarity(case["similarity"], height, width, config)
        np.testing.assert_array_equal(ours.discrete, case["points_discrete"])
        np.testing.assert_array_equal(ours.labels, case["labels"])
        np.testing.assert_allclose(ours.points, data[f"c{i:02}_points_continuous"], rtol=0, atol=2e-3)


@pytest.mark.parametrize("name", CONFIGS)
@pytest.mark.parametrize("size", CROPPED + EXTREME + ORDINARY, ids=lambda s: f"{s[0]}x{s[1]}")
def test_equals_the_full_image_formulation(size, name):
    assert_equals_reference(random_map(hash(size) % 1000, CONFIGS[name]), *size, CONFIGS[name])


@settings(max_examples=25, deadline=None)
@given(
    st.integers(1, 300),
    st.integers(1, 300),
    st.sampled_from(sorted(CONFIGS)),
    st.integers(0, 2**31),
    st.sampled_from([1e-3, 1.0, 300.0]),
)
def test_equals_the_full_image_formulation_at_any_size(height, width, name, seed, scale):
    config = CONFIGS[name]
    noise = (scale * np.random.default_rng(seed).standard_normal(576)).astype(np.float32)
    assume(config.down_sample == 1 or margin(noise, config) > SAFE)
    assert_equals_reference(noise, height, width, config)
    if config.continuous:
        ours = points_from_similarity(noise, height, width, config)
        exact = make_continuous(
            torch.from_numpy(noise).double().reshape(24, 24), np.asarray(ours.discrete), height, width
        )
        np.testing.assert_allclose(ours.points, exact.numpy(), rtol=0, atol=1e-4)


def relative_gradient_error(size: tuple[int, int], config: SaspConfig, dtype: torch.dtype) -> float:
    """Norm of the difference to the reference's gradient, computed in `dtype`, over its norm."""
    similarity = random_map(7, config)
    direction = np.random.default_rng(8).standard_normal((config.num_points, 2)).astype(np.float32)
    ours = jax.grad(lambda s: jnp.sum(points_from_similarity(s, *size, config).points * direction))(
        jnp.asarray(similarity)
    )
    leaf = torch.from_numpy(similarity).to(dtype).requires_grad_()
    (reference_points(leaf, *size, config)[2] * torch.from_numpy(direction)).sum().backward()
    wanted = leaf.grad.numpy()
    return float(np.linalg.norm(ours - wanted) / np.linalg.norm(wanted))


@pytest.mark.parametrize("name", ["7b", "13b", "paper"])
@pytest.mark.parametrize("size", [(90, 120), (79, 158), (4, 11), (5, 5)])
def test_gradient_equals_the_float32_full_image_formulation(size, name):
    assert relative_gradient_error(size, CONFIGS[name], torch.float32) <= 1e-4


@pytest.mark.parametrize("name", ["7b", "13b"])
@pytest.mark.parametrize("size", [(90, 120), (321, 321), (346, 400), (427, 640)])
def test_gradient_equals_the_exact_full_image_formulation(size, name):
    # in doubles: at 640x427 the sum over all pixels itself loses a thousandth of its gradient in float32
    assert relative_gradient_error(size, CONFIGS[name], torch.float64) <= 3e-5


def test_discrete_points_carry_no_gradient():
    config = CONFIGS["discrete"]
    gradient = jax.grad(lambda s: jnp.sum(points_from_similarity(s, 90, 120, config).points))(
        jnp.asarray(random_map(0, config))
    )
    np.testing.assert_array_equal(gradient, np.zeros(576))


@pytest.mark.parametrize("name", CONFIGS)
def test_labels_come_in_groups_foreground_then_background_then_neutral(name):
    rank = {1: 0, 0: 1, -1: 2}
    for seed in range(20):
        labels = points_from_similarity(random_map(seed, CONFIGS[name]), 480, 640, CONFIGS[name]).labels
        ranks = [rank[int(label)] for label in labels]
        assert ranks == sorted(ranks)
        assert len(ranks) == CONFIGS[name].num_points


@settings(max_examples=60, deadline=None)
@given(st.integers(1, 5000), st.integers(1, 5000), st.sampled_from(sorted(CONFIGS)), st.integers(0, 2**31))
def test_points_lie_inside_the_image(height, width, name, seed):
    noise = np.random.default_rng(seed).standard_normal(576)
    result = points_from_similarity(noise, height, width, CONFIGS[name])
    for points in (np.asarray(result.discrete), np.asarray(result.points)):
        assert np.all(points >= 0)
        assert np.all(points <= [width - 1, height - 1])


@pytest.mark.parametrize("value", [0.0, 1.7, -3e5])
@pytest.mark.parametrize("name", CONFIGS)
def test_a_constant_map_gives_finite_neutral_points(name, value):
    constant = np.full(576, value)
    result = points_from_similarity(constant, 90, 120, CONFIGS[name])
    np.testing.assert_array_equal(result.labels, np.full(CONFIGS[name].num_points, -1))
    assert np.all(np.isfinite(result.points))


@pytest.mark.parametrize("name", CONFIGS)
def test_a_constant_map_gives_a_finite_gradient(name):
    gradient = jax.grad(lambda s: jnp.sum(points_from_similarity(s, 90, 120, CONFIGS[name]).points))(
        jnp.full(576, 1.7, jnp.float32)
    )
    assert np.all(np.isfinite(gradient))


def batch(config: SaspConfig, sizes: list[tuple[int, int]]) -> tuple[np.ndarray, ...]:
    """Maps [B, 576] and traced geometry [B] of images of these sizes."""
    geometries = [sasp_geometry(h, w, config) for h, w in sizes]
    geometry = SaspGeometry(*(np.stack(column) for column in zip(*geometries, strict=True)))
    maps = np.stack([random_map(i, config) for i in range(len(sizes))])
    return maps, np.array([h for h, _ in sizes]), np.array([w for _, w in sizes]), geometry


@pytest.mark.parametrize("name", ["7b", "13b"])
def test_a_batch_of_different_sizes_equals_one_by_one(name):
    config = CONFIGS[name]
    sizes = [(480, 640), (321, 321), (79, 300), (1, 1), (5, 400)]
    arguments = batch(config, sizes)
    together = jax.jit(jax.vmap(functools.partial(similarity_points, config=config)))(*arguments)
    for i, size in enumerate(sizes):
        alone = points_from_similarity(arguments[0][i], *size, config)
        np.testing.assert_array_equal(together.discrete[i], alone.discrete)
        np.testing.assert_array_equal(together.labels[i], alone.labels)
        np.testing.assert_allclose(together.points[i], alone.points, rtol=1e-6, atol=1e-5)


def test_one_compilation_serves_every_size():
    config = CONFIGS["7b"]
    compiled = jax.jit(jax.vmap(functools.partial(similarity_points, config=config)))
    for size in CROPPED + EXTREME + ORDINARY:
        compiled(*batch(config, [size, (480, 640)]))
    assert compiled._cache_size() == 1


def test_switched_off_it_gives_no_points():
    result = points_from_similarity(np.zeros(576), 90, 120, SaspConfig.preset("off"))
    assert jax.tree.map(lambda x: x.shape, result) == SaspPoints((0, 2), (0,), (0, 2))
    assert (result.discrete.dtype, result.labels.dtype, result.points.dtype) == (
        jnp.int32,
        jnp.int32,
        jnp.float32,
    )


@pytest.mark.parametrize("side", [8, 16])
def test_other_grid_sizes_equal_the_full_image_formulation(side):
    config = dataclasses.replace(CONFIGS["7b"], num_points=4, t_pos=0.7)
    similarity = np.random.default_rng(side).standard_normal(side * side).astype(np.float32)
    assert margin(similarity, config) > SAFE
    assert_equals_reference(similarity, 90, 120, config)


def test_scaling_and_shifting_a_map_changes_nothing():
    config = CONFIGS["13b"]
    similarity = np.round(random_map(3, config) * 64) / 64  # exact in float32 after both operations
    first = points_from_similarity(similarity, 90, 120, config)
    second = points_from_similarity(similarity * 4 + 16, 90, 120, config)
    jax.tree.map(np.testing.assert_array_equal, first, second)


def test_half_precision_maps_are_computed_in_float32():
    similarity = jnp.asarray(random_map(1, CONFIGS["13b"])).astype(jnp.bfloat16)
    result = points_from_similarity(similarity, 90, 120, CONFIGS["13b"])
    wanted = points_from_similarity(similarity.astype(jnp.float32), 90, 120, CONFIGS["13b"])
    jax.tree.map(np.testing.assert_array_equal, result, wanted)
    assert result.points.dtype == jnp.float32


def test_a_map_that_is_not_square_is_refused():
    with pytest.raises(ValueError, match="square number of values, not 575"):
        points_from_similarity(np.zeros(575), 90, 120, CONFIGS["7b"])


def test_more_points_than_cells_are_refused():
    with pytest.raises(ValueError, match="30 points from a 2x2 grid"):
        points_from_similarity(np.zeros(100), 90, 120, dataclasses.replace(CONFIGS["7b"], down_sample=5))


@pytest.mark.parametrize("size", [(0, 5), (5, 0), (-1, 5)])
def test_an_image_without_pixels_is_refused(size):
    with pytest.raises(ValueError, match="has no geometry"):
        points_from_similarity(np.zeros(576), *size, CONFIGS["7b"])


jitted_min_max = jax.jit(jax.vmap(min_max))


@settings(max_examples=30, deadline=None)
@given(st.integers(0, 2**31), st.floats(1e-3, 1e6))
def test_min_max_equals_numpy_to_the_last_bit(seed, scale):
    x = (scale * np.random.default_rng(seed).standard_normal(144)).astype(np.float32)
    wanted = (x - x.min()) / (x.max() - x.min())
    np.testing.assert_array_equal(jitted_min_max(x[None])[0], wanted)
