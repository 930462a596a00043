"""The LLaMA decoder against transformers, and its prefix and cache against the plain forward pass."""

from __future__ import annotations

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import torch
import transformers
from flax import nnx

from read_jax.config import LlamaConfig
from read_jax.models.llama import KeyValues, Llama
from tests.models.parameters import assert_close, fill, stacked


def random_transformers_llama(seed: int, **config) -> tuple[transformers.LlamaForCausalLM, LlamaConfig]:
    hf = transformers.LlamaConfig(attn_implementation="eager", attention_bias=False, **config)
    torch.manual_seed(seed)
    model = transformers.LlamaForCausalLM(hf).eval()
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.normal_(0.0, 0.1).add_(1.0 if parameter.ndim == 1 else 0.0)
    return model, LlamaConfig.from_hf(hf.to_dict())


def copied(model: transformers.LlamaForCausalLM, config: LlamaConfig) -> Llama:
    state, n = model.state_dict(), config.num_layers
    values = {
        "embed_tokens.embedding": state["model.embed_tokens.weight"].numpy(),
        "norm.scale": state["model.norm.weight"].numpy(),
        "layers.input_norm.scale": stacked(state, "model.layers.{i}.input_layernorm.weight", n),
        "layers.post_norm.scale": stacked(state, "model.layers.{i}.post_attention_layernorm.weight", n),
    }
    for part, names in {
        "attn": ("q_proj", "k_proj", "v_proj", "o_proj"),
        "mlp": ("gate_proj", "up_proj", "down_proj"),
    }.items():
        theirs = {"attn": "self_attn", "mlp": "mlp"}[part]
        for name in names:
            values[f"layers.{part}.{name}.kernel"] = stacked(
                state, f"model.layers.{{i}}.{theirs}.{name}.weight", n, transpose=True
            )
    if not config.tie_word_embeddings:
        values["lm_head.kernel"] = state["lm_head.weight"].numpy().T
    return fill(lambda: Llama(config, rngs=nnx.Rngs(0)), values)


@pytest.mark.parametrize(
    "config",
    [
        {"hidden_size": 48, "num_attention_heads": 6, "num_key_value_heads": 2, "num_hidden_layers": 3},
        {"hidden_size": 32, "num_attention_heads": 4, "num_key_value_heads": 4, "num_hidden_layers": 2,
         "rms_norm_eps": 1e-5, "tie_word_embeddings": True},
        {"hidden_size": 40, "num_attention_heads": 5, "num_key_value_heads": 1, "num_hidden_layers": 4,
         "rope_theta": 500.0},
    ],
    ids=["grouped-query", "tied-embeddings", "multi-query-short-rope"],
)  # fmt: skip
def test_forward_equals_transformers(config):
    theirs, ours = random_transformers_llama(1, vocab_size=97, intermediate_size=56, **config)
    ids = np.random.default_rng(0).integers(0, 97, (2, 70))
    with torch.no_grad():
        out = theirs(torch.from_numpy(ids), output_hidden_states=True)
    model = copied(theirs, ours)
    positions = jnp.broadcast_to(jnp.arange(70), (2, 1, 70))
    states, _ = jax.jit(lambda ids: model(model.embed(ids), positions))(jnp.asarray(ids)[:, None])
    assert_close(states[:, 0], out.hidden_states[-1])
    assert_close(model.logits(states[:, 0]), out.logits)


@pytest.fixture(scope="module")
def rows():
    """A grouped-query model; ids of 2 prefixes of 9 tokens and of 3 questions of 7 tokens after each."""
    config = LlamaConfig(61, 32, 48, 3, 4, 2, 8)
    rng = np.random.default_rng(2)
    return Llama(config, rngs=nnx.Rngs(3)), rng.integers(0, 61, (2, 1, 9)), rng.integers(0, 61, (2, 3, 7))


@jax.jit
def whole(model, prefix, questions):
    """States of the questions' tokens when each row is one plain sequence."""
    ids = jnp.concatenate([jnp.broadcast_to(prefix, (2, 3, 9)), questions], axis=-1)
    states, _ = model(model.embed(ids), jnp.broadcast_to(jnp.arange(16), (2, 3, 16)))
    return states[:, :, 9:]


@jax.jit
def prefix_key_values(model, prefix):
    _, own = model(model.embed(prefix), jnp.broadcast_to(jnp.arange(9), (2, 1, 9)))
    return KeyValues(own.keys[:, :, 0], own.values[:, :, 0])


def test_questions_behind_a_shared_prefix_equal_whole_sequences(rows):
    model, prefix, questions = rows

    @jax.jit
    def behind(model, shared, ids):
        return model(model.embed(ids), jnp.broadcast_to(9 + jnp.arange(7), (2, 3, 7)), prefix=shared)[0]

    states = behind(model, prefix_key_values(model, prefix), questions)
    assert_close(states, whole(model, prefix, questions), 1e-5)


def test_prefix_and_questions_in_one_pass_equal_whole_sequences(rows):
    model, prefix, questions = rows

    @jax.jit
    def together(model, prefix, ids):
        return model.with_prefix(model.embed(prefix[:, 0]), model.embed(ids))

    first, states = together(model, prefix, questions)
    assert_close(states, whole(model, prefix, questions), 1e-5)
    alone, _ = model(model.embed(prefix), jnp.broadcast_to(jnp.arange(9), (2, 1, 9)))
    assert_close(first, alone[:, 0], 1e-5)


def test_cached_decoding_of_rows_of_different_length_equals_whole_sequences(rows):
    model, prefix, questions = rows
    shared = prefix_key_values(model, prefix)
    expected = np.asarray(whole(model, prefix, questions))
    lengths = np.array([[4, 2, 5], [1, 5, 3]])

    @jax.jit
    def extend(model, ids, slots, cache):
        positions = 9 + slots[..., None] + jnp.arange(ids.shape[-1])
        return model.extend(model.embed(ids), positions, cache, slots, prefix=shared)

    cache = model.empty_cache(2, 3, 5 + 6, jnp.float32)
    _, cache = extend(model, questions[..., :5], np.zeros((2, 3), int), cache)
    for slots in (lengths, lengths + 1):
        ids = np.take_along_axis(questions, slots[..., None], axis=-1)
        state, cache = extend(model, ids, slots, cache)
        assert_close(state, np.take_along_axis(expected, slots[..., None, None], axis=2), 1e-5)


def test_abstract_7b_has_the_published_number_of_parameters():
    config = LlamaConfig(32000, 4096, 11008, 32, 32, 32, 128)
    model = nnx.eval_shape(lambda: Llama(config, rngs=nnx.Rngs(0)))
    assert sum(x.size for x in jax.tree.leaves(nnx.state(model))) == 6_738_415_616
