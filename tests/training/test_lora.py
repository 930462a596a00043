"""Adapters: where they go, what they add, and what their dropout drops."""

from __future__ import annotations

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from read_jax.config import LlamaConfig
from read_jax.errors import ConfigError
from read_jax.models.llama import Llama
from read_jax.training.lora import TARGETS, LoraConfig, adapted_layer, add_adapters

CONFIG = LlamaConfig(32, 16, 24, 2, 4, 2, 4)


def adapted(target, dropout=0.0):
    """A model with an adapter on one projection that is not zero, and (prefix, rows) to ask it."""
    llama = Llama(CONFIG, rngs=nnx.Rngs(0))
    add_adapters(llama, LoraConfig(rank=3, alpha=6.0, dropout=dropout, targets=(target,)), nnx.Rngs(1))
    layer = adapted_layer(llama, target)
    layer.lora_b[...] = jax.random.normal(jax.random.key(2), layer.lora_b.shape)
    prefix, rows = (
        jax.random.normal(jax.random.key(k), shape) for k, shape in ((3, (1, 5, 16)), (4, (1, 2, 3, 16)))
    )
    return llama, prefix, rows


@pytest.mark.parametrize("target", TARGETS)
def test_an_adapter_adds_its_scaled_product_to_the_weight(target):
    llama, *tokens = adapted(target)
    found = llama.with_prefix(*tokens)
    layer = adapted_layer(llama, target)
    merged = Llama(CONFIG, rngs=nnx.Rngs(0))
    kernel = adapted_layer(merged, target).kernel
    plain = merged.with_prefix(*tokens)
    kernel[...] += 2.0 * layer.lora_a[...] @ layer.lora_b[...]
    for ours, wanted, without in zip(found, merged.with_prefix(*tokens), plain, strict=True):
        np.testing.assert_allclose(ours, wanted, rtol=1e-4, atol=1e-5)
        assert not np.allclose(ours, without, atol=1e-2)


@pytest.mark.parametrize("target", TARGETS)
def test_dropout_drops_of_the_adapter_only_and_only_with_a_key(target):
    llama, *tokens = adapted(target, dropout=0.5)
    kept, *others = (
        np.asarray(llama.with_prefix(*tokens, dropout_key=key)[1])
        for key in (None, jax.random.key(0), jax.random.key(1))
    )
    np.testing.assert_allclose(kept, adapted(target)[0].with_prefix(*tokens)[1], atol=1e-6)
    assert not np.allclose(kept, others[0], atol=1e-3) and not np.allclose(*others, atol=1e-3)
    layer = adapted_layer(llama, target)
    layer.lora_b[...] = jnp.zeros_like(layer.lora_b[...])
    np.testing.assert_allclose(
        llama.with_prefix(*tokens, dropout_key=jax.random.key(0))[1], llama.with_prefix(*tokens)[1], atol=1e-6
    )


def test_a_new_adapter_changes_nothing():
    llama, *tokens = adapted("q_proj")
    adapted_layer(llama, "q_proj").lora_b[...] *= 0
    plain = Llama(CONFIG, rngs=nnx.Rngs(0)).with_prefix(*tokens)[1]
    np.testing.assert_allclose(llama.with_prefix(*tokens)[1], plain, atol=1e-6)


@pytest.mark.parametrize("alpha", [0.0, -2.0, float("inf")])
def test_an_alpha_that_leaves_nothing_is_refused(alpha):
    with pytest.raises(ConfigError, match="alpha"):
        LoraConfig(alpha=alpha)


def test_what_cannot_be_adapted_is_refused_with_what_can():
    with pytest.raises(ConfigError, match=r"q_proj.*down_proj, not lm_head"):
        LoraConfig(targets=("q_proj", "lm_head"))
