"""Choosing tokens, and greedy generation against transformers."""

from __future__ import annotations

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx
from hypothesis import given, settings
from hypothesis import strategies as st

from read_jax.config import LlamaConfig
from read_jax.inference.generation import choose_token, generate
from read_jax.models.llama import KeyValues, Llama
from tests.inference.conftest import torch_greedy
from tests.models.test_llama import copied, random_transformers_llama

VOCAB = 11
choose = jax.jit(choose_token)


def draw(logits, temperature, top_p, count):
    """`count` tokens from one row of logits, one per seed."""
    rows = jnp.broadcast_to(jnp.asarray(logits, jnp.float32), (count, len(logits)))
    seeds = jnp.arange(count, dtype=jnp.uint32)
    return np.asarray(choose(rows, jnp.float32(temperature), jnp.float32(top_p), seeds, jnp.int32(3)))


def nucleus(logits, temperature, top_p):
    """The distribution that sampling should follow, in double precision."""
    scaled = np.asarray(logits, np.float64) / temperature
    p = np.exp(scaled - scaled.max())
    p /= p.sum()
    kept = np.zeros(len(p), bool)
    for token in np.argsort(-p):
        kept[token] = True
        if p[kept].sum() >= top_p:
            break
    return np.where(kept, p, 0) / p[kept].sum()


@pytest.mark.parametrize(("temperature", "top_p"), [(1.0, 1.0), (0.7, 0.8), (2.5, 0.95), (0.3, 0.5)])
def test_sampled_tokens_follow_the_nucleus_distribution(temperature, top_p):
    logits = np.random.default_rng(1).normal(0, 1.5, VOCAB)
    wanted = nucleus(logits, temperature, top_p)
    count = 20_000
    found = np.bincount(draw(logits, temperature, top_p, count), minlength=VOCAB) / count
    assert (found[wanted == 0] == 0).all()
    deviation = np.sqrt(wanted * (1 - wanted) / count)
    assert (np.abs(found - wanted) <= 5 * deviation + 1e-9).all()


@settings(deadline=None, max_examples=30)
@given(
    st.permutations(list(range(VOCAB))),
    st.sampled_from([1e-45, 1e-38, 1e-20, 1e-6]),
    st.sampled_from([1.0, 0.5]),
)
def test_a_tiny_temperature_is_greedy(order, temperature, top_p):
    logits = np.asarray(order, np.float32) * 0.1
    assert (draw(logits, temperature, top_p, 8) == logits.argmax()).all()


@settings(deadline=None, max_examples=30)
@given(st.permutations(list(range(VOCAB))), st.sampled_from([1e-45, 1e-12, 1e-3]))
def test_a_tiny_top_p_is_greedy(order, top_p):
    logits = np.asarray(order, np.float32) * 0.01
    assert (draw(logits, 1.0, top_p, 8) == logits.argmax()).all()


def test_the_choice_depends_on_seed_and_step_only():
    rng = np.random.default_rng(2)
    logits, other = rng.normal(size=(2, VOCAB)).astype(np.float32)
    one, half = jnp.float32(1), jnp.float32(0.9)
    alone = choose(logits[None], one, half, jnp.asarray([7], jnp.uint32), jnp.int32(5))
    rows = jnp.stack([other, logits, other])
    among = choose(rows, one, half, jnp.asarray([1, 7, 2], jnp.uint32), jnp.int32(5))
    assert alone[0] == among[1]


@pytest.fixture(scope="module")
def pair():
    """The same random model in transformers and here."""
    theirs, config = random_transformers_llama(
        4,
        vocab_size=40,
        hidden_size=32,
        intermediate_size=48,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
    )
    return theirs, copied(theirs, config)


def answers(model, prefix, questions, limits, end_id):
    """(tokens, states) of every question behind one shared prefix, generated in one batch."""
    graphdef, params = nnx.split(model)

    @jax.jit
    def run(params, ids, lengths, limits):
        llama = nnx.merge(graphdef, params)
        head = jnp.asarray(prefix)[None, None]
        _, own = llama(llama.embed(head), jnp.arange(len(prefix))[None, None])
        shared = KeyValues(own.keys[:, :, 0], own.values[:, :, 0])
        return generate(llama, shared, ids, lengths, max_new=limits, capacity=16, end_id=end_id)

    ids = np.zeros((1, len(questions), 8), np.int32)
    for row, question in enumerate(questions):
        ids[0, row, : len(question)] = question
    out = run(
        params, ids, np.asarray([[len(q) for q in questions]], np.int32), np.asarray([limits], np.int32)
    )
    counts = np.asarray(out.counts[0])
    return [
        (np.asarray(out.tokens[0, row, :n]).tolist(), out.states[0, row, :n]) for row, n in enumerate(counts)
    ]


PREFIX = [1, 17, 30, 8, 22]
QUESTIONS = [[5, 6, 7], [9, 10, 11, 12, 13, 14, 15, 16], [33]]


def test_greedy_generation_equals_transformers(pair):
    theirs, ours = pair
    free = [torch_greedy(theirs, PREFIX + question, 16, 39) for question in QUESTIONS]
    end_id = free[0][6]  # a token that does come, so that one row ends before the others
    wanted = [torch_greedy(theirs, PREFIX + question, 16, end_id) for question in QUESTIONS]
    assert len(wanted[0]) < 16
    found = answers(ours, PREFIX, QUESTIONS, [16, 16, 16], end_id)
    assert [tokens for tokens, _ in found] == wanted


def test_each_row_stops_at_its_own_limit(pair):
    theirs, ours = pair
    found = answers(ours, PREFIX, QUESTIONS, [1, 16, 5], 39)
    wanted = [
        torch_greedy(theirs, PREFIX + question, count, 39)
        for question, count in zip(QUESTIONS, (1, 16, 5), strict=True)
    ]
    assert [tokens for tokens, _ in found] == wanted


def test_states_are_those_that_predict_the_tokens(pair):
    _, ours = pair
    for tokens, states in answers(ours, PREFIX, QUESTIONS, [6, 6, 6], 39):
        assert np.asarray(ours.logits(states)).argmax(-1).tolist() == tokens


def test_rows_that_only_fill_the_batch_stay_empty():
    llama = Llama(LlamaConfig(20, 16, 24, 1, 2, 2, 8), rngs=nnx.Rngs(0))
    (filler, _), (real, _) = answers(llama, [1, 2], [[], [3, 4]], [4, 4], 19)
    assert filler == []
    assert real == answers(llama, [1, 2], [[3, 4]], [4], 19)[0][0]
