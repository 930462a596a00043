"""What must not change an update: packing, micro-batches, devices' share, recomputation; and what must."""

from __future__ import annotations

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from read_jax.errors import ConfigError
from read_jax.training.lora import LoraConfig, add_adapters
from read_jax.training.objective import LossWeights
from read_jax.training.optimizer import OptimizerConfig, make_optimizer
from read_jax.training.step import StepConfig, init_state, make_gradients, make_train_step, split_model
from read_jax.weights.model import load_model
from tests.training.tiny import packer_of, scenes_batch, separate, write_model

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


def gradients(tiny, batch, config=None, abreast=1, key=0):
    packer, graphdef, params, frozen = tiny
    config = config or StepConfig(remat=False)
    of = make_gradients(graphdef, packer.prefix_ids, packer.image_start, WEIGHTS, config, abreast)
    return jax.jit(of)(params, frozen, batch, jax.random.key(key))


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


@pytest.mark.parametrize("parts", [2, 4])
def test_micro_batches_add_up_to_the_batch(parts, tiny, four, plain):
    assert_equal_to_rounding(gradients(tiny, four, StepConfig(micro_batches=parts, remat=False)), plain)


def test_pictures_side_by_side_give_the_same(tiny, four, plain):
    assert_equal_to_rounding(gradients(tiny, four, abreast=4), plain)


@pytest.mark.parametrize("remat", [True, "dots"])
def test_recomputation_changes_nothing(remat, tiny, four, plain):
    assert_equal_to_rounding(gradients(tiny, four, StepConfig(remat=remat)), plain)


def test_a_picture_that_is_padding_counts_for_nothing(tiny, four, plain):
    packer = tiny[0]
    padded = jax.tree.map(lambda a, b: np.concatenate([a, b]), four, packer.batch([None, None]))
    assert_equal_to_rounding(gradients(tiny, padded), plain)


def test_every_trainable_leaf_but_the_iou_head_and_unused_mask_tokens_learns(plain):
    still = {
        jax.tree_util.keystr(path)
        for path, leaf in jax.tree_util.tree_leaves_with_path(plain[0])
        if not np.any(leaf)
    }
    assert still
    assert all("iou_" in path or "hypernetworks" in path for path in still), still


@pytest.fixture(scope="module")
def stepper(tiny):
    """(step, initial state, frozen) under a configuration."""
    packer, graphdef, params, frozen = tiny

    def make(config, optimizer=None):
        optimizer = make_optimizer(optimizer or OptimizerConfig(warmup_updates=0, total_updates=10))
        step = make_train_step(graphdef, optimizer, packer.prefix_ids, packer.image_start, WEIGHTS, config)
        return jax.jit(step), init_state(params, optimizer, config), frozen

    return make


def same(left, right):
    return all(
        np.array_equal(a, b) for a, b in zip(jax.tree.leaves(left), jax.tree.leaves(right), strict=True)
    )


@pytest.mark.parametrize("bad", ["not finite", "exploding"])
def test_a_bad_update_changes_nothing_and_is_counted(bad, stepper, four):
    limit = 1e-9 if bad == "exploding" else float("inf")
    step, state, frozen = stepper(StepConfig(remat=False, ema_decay=0.9, max_gradient_norm=limit))
    if bad == "not finite":
        first, *rest = jax.tree.leaves(frozen)
        frozen = jax.tree.unflatten(jax.tree.structure(frozen), [jnp.full_like(first, jnp.nan), *rest])
    after, metrics = step(state, frozen, four)
    assert (after.step, after.skipped, metrics["applied"], metrics["skipped"]) == (1, 1, 0, 1)
    assert same((after.params, after.opt_state, after.ema), (state.params, state.opt_state, state.ema))


def test_the_average_follows_the_parameters(stepper, four):
    step, state, frozen = stepper(StepConfig(remat=False, ema_decay=0.75))
    after, _ = step(state, frozen, four)
    assert not same(after.params, state.params)
    for old, new, average in zip(*map(jax.tree.leaves, (state.params, after.params, after.ema)), strict=True):
        np.testing.assert_allclose(average, 0.75 * old + 0.25 * new, rtol=1e-6, atol=1e-8)


def test_dropout_of_the_adapters_depends_on_the_step_alone(tiny, four):
    packer, graphdef, params, frozen = tiny
    model = nnx.merge(graphdef, params, frozen)
    for target in ("q_proj", "v_proj"):
        getattr(model.llama.layers.attn, target).lora_dropout = 0.5
    parts = packer, *split_model(model)
    first, again, other = (gradients(parts, four, key=key)[1].total for key in (0, 0, 1))
    assert first == again
    assert first != other


def test_a_name_that_is_nowhere_in_the_model_is_refused(tiny):
    model = nnx.merge(*tiny[1:])
    with pytest.raises(ConfigError, match="sam.mask_decodr"):
        split_model(model, ("lora", "sam.mask_decodr"))
