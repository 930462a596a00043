"""What must not change an update: packing, micro-batches, devices' share, recomputation; and what must."""

from __future__ import annotations

import functools

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from flax import nnx

from read_jax.errors import ConfigError
from read_jax.training.lora import LoraConfig, add_adapters
from read_jax.training.objective import LossWeights
from read_jax.training.optimizer import OptimizerConfig, make_optimizer
from read_jax.training.step import StepConfig, init_state, make_gradients, make_train_step, split_model
from read_jax.weights.model import load_model
from tests.training.tiny import packer_of, scenes_batch, separate, write_model

pytestmark = pytest.mark.usefixtures("compiled_quickly")
WEIGHTS = LossWeights(focal=0.3)


@pytest.fixture(scope="module")
def tiny(tmp_path_factory):
    """(packer, graphdef, trainable, frozen) with adapters that are not zero."""
    folder = write_model(tmp_path_factory.mktemp("tiny"))
    model = load_model(folder)
    add_adapters(model.llama, LoraConfig(rank=2, alpha=4, dropout=0.0), nnx.Rngs(0))
    for target in ("q_proj", "v_proj"):
        layer = getattr(model.llama.layers.attn, target)
        layer.lora_b[...] = 0.1 * jax.random.normal(jax.random.key(1), layer.lora_b.shape)
    return packer_of(folder), *split_model(model)


@pytest.fixture(scope="module")
def four(tiny):
    return scenes_batch(tiny[0], 4)


@functools.cache
def compiled(graphdef, prefix_ids, image_start, config, abreast):
    of = make_gradients(graphdef, np.asarray(prefix_ids), image_start, WEIGHTS, config, abreast)
    return jax.jit(of)


def gradients(tiny, batch, config=StepConfig(remat=False), abreast=1):  # noqa: B008
    packer, graphdef, params, frozen = tiny
    of = compiled(graphdef, tuple(packer.prefix_ids), packer.image_start, config, abreast)
    return of(params, frozen, batch, jax.random.key(0))


@pytest.fixture(scope="module")
def plain(tiny, four):
    return gradients(tiny, four)


def assert_equal_to_rounding(ours, theirs):
    """Losses to 1e-6 relative; each gradient to 1e-4 of its norm and 1e-6 of the global one."""
    (ours, our_losses, our_counts), (theirs, losses, counts) = ours, theirs
    np.testing.assert_array_equal(our_counts, counts)
    np.testing.assert_allclose(our_losses, losses, rtol=2e-6)
    total = np.sqrt(sum(np.sum(np.square(leaf)) for leaf in jax.tree.leaves(theirs)))
    for (path, mine), other in zip(
        jax.tree_util.tree_leaves_with_path(ours), jax.tree.leaves(theirs), strict=True
    ):
        difference = np.linalg.norm(mine - other)
        assert difference <= 1e-4 * np.linalg.norm(other) + 1e-6 * total, path


def test_questions_behind_one_prefix_give_the_losses_and_gradients_of_separate_sequences(tiny, four, plain):
    apart = separate(four)
    assert len(apart.valid) == 12
    assert plain[1].ce > 0 and plain[1].bce > 0 and plain[1].dice > 0 and plain[1].focal > 0
    assert_equal_to_rounding(gradients(tiny, apart), plain)


def test_parts_recomputed_and_side_by_side_add_up_to_the_batch(tiny, four, plain):
    config = StepConfig(micro_batches=2, remat=True)
    assert_equal_to_rounding(gradients(tiny, four, config, abreast=2), plain)


@pytest.mark.slow
@pytest.mark.parametrize(
    ("config", "abreast"),
    [
        (StepConfig(micro_batches=4, remat=False), 1),
        (StepConfig(remat="dots"), 1),
        (StepConfig(remat=False), 4),
    ],
)
def test_each_way_to_cut_the_work_gives_the_same(config, abreast, tiny, four, plain):
    assert_equal_to_rounding(gradients(tiny, four, config, abreast=abreast), plain)


def test_a_place_without_a_picture_counts_for_nothing(tiny):
    packer = tiny[0]
    two = scenes_batch(packer, 2)
    padded, twice = (
        jax.tree.map(lambda a, b: np.concatenate([a, b]), two, more)
        for more in (packer.batch([None, None]), two)
    )
    ours, theirs = gradients(tiny, padded), gradients(tiny, twice)
    # averages over what counts: the same pictures twice have the same
    assert_equal_to_rounding(ours, (*theirs[:2], jax.tree.map(lambda n: n / 2, theirs[2])))


def test_every_trainable_leaf_but_the_iou_head_and_unused_mask_tokens_learns(plain):
    still = {
        jax.tree_util.keystr(path)
        for path, leaf in jax.tree_util.tree_leaves_with_path(plain[0])
        if not np.any(leaf)
    }
    assert still
    assert all("iou_" in path or "hypernetworks" in path for path in still), still


def test_first_tokens_of_denials_weigh_as_much_as_those_of_affirmations(tiny, four):
    packer, graphdef, params, frozen = tiny
    weights = LossWeights(ce=0.0, bce=0.0, dice=0.0, first_token=1.0)
    of = jax.jit(
        make_gradients(graphdef, packer.prefix_ids, packer.image_start, weights, StepConfig(remat=False), 1)
    )

    def loss(*denied):
        exists = np.ones_like(four.exists)
        exists[tuple(np.transpose(denied))] = False
        return float(of(params, frozen, four._replace(exists=exists), jax.random.key(0))[1].first_token)

    asked = np.argwhere(np.asarray(four.lengths) > 0)
    number = len(asked)
    first, second = map(tuple, asked[:2])
    mean = 2 * loss(*asked)  # nothing is affirmed
    # 2 loss = denial + (total - denial) / (number - 1), solved for the denial
    one, other = ((2 * loss(q) * (number - 1) - mean * number) / (number - 2) for q in (first, second))
    both = (one + other) / 2 + (mean * number - one - other) / (number - 2)
    assert 2 * loss(first, second) == pytest.approx(both, rel=1e-4)
    assert one != pytest.approx(other, rel=1e-3)


@pytest.fixture(scope="module")
def stepper(tiny, four):
    """(step, initial state, frozen), with dropout, an average and a limit of the gradient's norm."""
    packer, *parts = tiny
    model = nnx.merge(*parts)
    for target in ("q_proj", "v_proj"):
        getattr(model.llama.layers.attn, target).lora_dropout = 0.5
    graphdef, params, frozen = split_model(model)
    config = StepConfig(remat=False, ema_decay=0.75, max_gradient_norm=1e3)
    optimizer = optax.chain(
        make_optimizer(OptimizerConfig(warmup_updates=0, total_updates=10)),
        optax.inject_hyperparams(optax.scale)(step_size=1.0),  # that a test can set
    )
    step = make_train_step(graphdef, optimizer, packer.prefix_ids, packer.image_start, WEIGHTS, config)
    jitted = jax.jit(step)

    def of(state, frozen, batch=four):
        result = jitted(state, frozen, batch)
        assert jitted._cache_size() == 1  # whatever the pictures' sizes
        return result

    return of, jax.device_put(init_state(params, optimizer, config), jax.devices()[0]), frozen


def same(left, right):
    return all(
        np.array_equal(a, b) for a, b in zip(jax.tree.leaves(left), jax.tree.leaves(right), strict=True)
    )


@pytest.mark.parametrize(("bad", "value"), [("not finite", np.nan), ("exploding", 1e9)])
def test_a_bad_update_changes_nothing_and_is_counted(bad, value, stepper):
    step, state, frozen = stepper
    frozen = jax.tree.map(lambda x: x, frozen)  # the fixture's own stays as it is
    frozen["sam"]["prompt_encoder"] = jax.tree.map(
        lambda x: jnp.full_like(x, jnp.nan) if bad == "not finite" else value * x,
        frozen["sam"]["prompt_encoder"],
    )
    after, metrics = step(state, frozen)
    assert (after.step, after.skipped, metrics["applied"], metrics["skipped"]) == (1, 1, 0, 1)
    assert same((after.params, after.opt_state, after.ema), (state.params, state.opt_state, state.ema))


def test_an_update_that_overflows_changes_nothing_whatever_its_gradient(stepper):
    step, state, frozen = stepper
    usual, scale = state.opt_state
    scale = scale._replace(hyperparams={"step_size": jnp.full_like(scale.hyperparams["step_size"], jnp.inf)})
    before = state._replace(opt_state=(usual, jax.device_put(scale, jax.devices()[0])))
    after, metrics = step(before, frozen)
    assert np.isfinite(metrics["gradient_norm"]) and not np.isfinite(metrics["update_norm"])
    assert (metrics["applied"], metrics["skipped"]) == (0, 1)
    assert same((after.params, after.ema), (state.params, state.ema))


def test_pictures_of_other_sizes_need_no_other_program(tiny, four, stepper):
    step, state, frozen = stepper
    other = scenes_batch(tiny[0], 4, seed=5)
    assert not np.array_equal(other.geometry.height, four.geometry.height)
    assert step(step(state, frozen)[0], frozen, other)[1]["applied"] == 1


@pytest.mark.parametrize(("updates", "decay"), [(0, 0.1), (5, 0.4), (1000, 0.75)])
def test_the_average_follows_the_parameters(stepper, updates, decay):
    step, state, frozen = stepper
    after, metrics = step(state._replace(step=jax.device_put(jnp.int32(updates), jax.devices()[0])), frozen)
    assert metrics["applied"] == 1
    assert not same(after.params, state.params)
    for old, new, average in zip(*map(jax.tree.leaves, (state.params, after.params, after.ema)), strict=True):
        np.testing.assert_allclose(average, decay * old + (1 - decay) * new, rtol=1e-5, atol=1e-7)


def test_what_is_dropped_depends_on_the_step_alone(stepper):
    step, state, frozen = stepper
    first, again, later = (
        step(state._replace(step=jax.device_put(jnp.int32(number), jax.devices()[0])), frozen)[1]["total"]
        for number in (0, 0, 1)
    )
    assert first == again
    assert first != later


def test_a_name_that_is_nowhere_in_the_model_is_refused(tiny):
    model = nnx.merge(*tiny[1:])
    with pytest.raises(ConfigError, match=r"sam\.mask_decodr"):
        split_model(model, ("lora", "sam.mask_decodr"))
