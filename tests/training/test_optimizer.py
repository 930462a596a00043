"""Updates against torch's AdamW and clipping, schedules against the original's list."""

from __future__ import annotations

import json

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
import torch

from read_jax.errors import ConfigError
from read_jax.training.optimizer import OptimizerConfig, learning_rate, make_optimizer

SIX = {"learning_rate": 3e-4, "warmup_updates": 3, "total_updates": 10}


@pytest.mark.parametrize(("run", "schedule"), [("deepspeed_0_10_3", "deepspeed"), ("plain_warmup", "linear")])
def test_the_rates_are_those_the_original_really_used(run, schedule, goldens):
    entries = json.loads((goldens / "tiny-a" / "training" / "training.json").read_text())[run]
    rate = learning_rate(OptimizerConfig(schedule=schedule, **SIX))
    wanted = [entry["lr"] for entry in entries if "lr" in entry]
    np.testing.assert_allclose([rate(k) for k in range(len(wanted))], wanted, rtol=1e-6, atol=1e-12)


def test_the_linear_schedule_rises_falls_and_ends_at_zero():
    rate = learning_rate(OptimizerConfig(learning_rate=1.0, warmup_updates=2, total_updates=6))
    np.testing.assert_allclose([rate(k) for k in range(8)], [0, 0.5, 1, 0.75, 0.5, 0.25, 0, 0])


@pytest.mark.parametrize("warmup", [0, 1, 2])
def test_deepspeed_warms_up_in_two_updates_at_least(warmup):
    config = OptimizerConfig(learning_rate=1.0, schedule="deepspeed", warmup_updates=warmup, total_updates=6)
    np.testing.assert_allclose(
        [learning_rate(config)(k) for k in range(8)], [1, 0, 0.5, 1, 0.75, 0.5, 0.25, 0]
    )


@pytest.mark.parametrize(
    "wrong", [{"learning_rate": float("inf")}, {"b2": 1.0}, {"b1": -0.1}, {"weight_decay": -1.0}], ids=str
)
def test_settings_that_make_no_sense_are_refused_by_name(wrong):
    with pytest.raises(ConfigError, match=next(iter(wrong))):
        OptimizerConfig(**wrong)


def test_without_warmup_the_first_update_has_the_full_rate():
    rate = learning_rate(OptimizerConfig(learning_rate=1.0, warmup_updates=0, total_updates=4))
    assert rate(0) == 1


@pytest.mark.parametrize("limit", [0.05, 1e3])
def test_updates_are_torchs(limit):
    rng = np.random.default_rng(0)
    start = rng.normal(size=(3, 4)).astype(np.float32)
    gradients = rng.normal(size=(5, 3, 4)).astype(np.float32)
    config = OptimizerConfig(clip_norm=limit, schedule="deepspeed", **SIX)

    weight = torch.nn.Parameter(torch.tensor(start))
    reference = torch.optim.AdamW([weight], lr=1.0, betas=(0.9, 0.95), eps=1e-8, weight_decay=0.0)
    optimizer = make_optimizer(config)
    params = {"w": jnp.asarray(start)}
    state = optimizer.init(params)
    for k, gradient in enumerate(gradients):
        reference.param_groups[0]["lr"] = float(learning_rate(config)(k))
        weight.grad = torch.tensor(gradient)
        torch.nn.utils.clip_grad_norm_([weight], limit)
        reference.step()
        updates, state = optimizer.update({"w": jnp.asarray(gradient)}, state, params)
        params = optax.apply_updates(params, updates)
        np.testing.assert_allclose(params["w"], weight.detach().numpy(), rtol=1e-6, atol=1e-8)


def test_muon_moves_matrices_in_every_direction_alike_and_the_rest_by_adamw():
    rng = np.random.default_rng(0)
    names = ("mlp.up_proj.kernel", "stack.kernel", "lm_head.kernel", "embed.embedding", "norm.scale")
    shapes = ((6, 12), (2, 4, 12), (6, 8), (6, 8), (8,))
    gradients = {n: jnp.asarray(rng.normal(size=s), jnp.float32) for n, s in zip(names, shapes, strict=True)}
    params = jax.tree.map(jnp.zeros_like, gradients)
    config = OptimizerConfig(name="muon", learning_rate=1e-2, warmup_updates=0, clip_norm=1e9)
    adamw = optax.adamw(1e-2, b2=config.b2, weight_decay=0.0, nesterov=True)
    moves, others = (
        optimizer.update(gradients, optimizer.init(params), params)[0]
        for optimizer in (make_optimizer(config), adamw)
    )
    for name in names[2:]:
        np.testing.assert_allclose(moves[name], others[name], rtol=1e-5)
    for name in names[:2]:
        stretch = np.linalg.svd(moves[name], compute_uv=False)
        assert stretch.min() > 0.5 * stretch.max()  # the gradient's differ far more
        assert np.sqrt(np.mean(np.square(moves[name]))) == pytest.approx(0.2 * 1e-2, rel=0.2)


@pytest.mark.parametrize(
    ("wrong", "words"),
    [
        ({"name": "sgd"}, "adamw, muon"),
        ({"schedule": "cosine"}, "linear, deepspeed, constant"),
        ({"warmup_updates": 9, "total_updates": 9}, "between 0 and total_updates"),
        ({"learning_rate": 0.0}, "learning_rate must be positive"),
    ],
)
def test_wrong_settings_are_refused(wrong, words):
    with pytest.raises(ConfigError, match=words):
        OptimizerConfig(**wrong)
