"""Token generation: greedy, or sampled with temperature and top-p, with a key/value cache.

Everything runs on the device in one program: prefill of the questions, then a loop that ends when every
row has ended. Beside the tokens it keeps, for each of them, the state that predicted it: the state of a
generated [SEG] is then at hand whether it came from prefill or from decoding.
"""

from __future__ import annotations

from typing import NamedTuple

import jax
import jax.numpy as jnp

from read_jax.models.llama import KeyValues, Llama

Array = jax.Array


class Generated(NamedTuple):
    """Answers of B images x Q questions, at most N tokens each.

    tokens: int32 [B, Q, N], filled up with the end token; counts: int32 [B, Q] tokens up to and
    including the end token, or to the limit; states: [B, Q, N, D], the final hidden state that
    predicted each token.
    """

    tokens: Array
    counts: Array
    states: Array


class _Loop(NamedTuple):
    step: Array
    token: Array  # [B, Q] the last token chosen
    done: Array  # [B, Q]
    counts: Array
    tokens: Array
    states: Array
    cache: KeyValues


def choose_token(logits: Array, temperature: Array, top_p: Array, seeds: Array, step: Array) -> Array:
    """Sample from logits [R, V] restricted to the smallest set of tokens with probability >= top_p.

    The noise depends on the row's seed and the step alone, so a question gets the same answer whatever
    else is in its batch.
    """
    # shifted first: a tiny temperature then gives minus infinity, never NaN
    shifted = logits - jnp.max(logits, axis=-1, keepdims=True)
    scaled = shifted / jnp.maximum(temperature, jnp.finfo(jnp.float32).tiny)
    order = jnp.argsort(-scaled, axis=-1)
    ranked = jnp.take_along_axis(scaled, order, axis=-1)
    probabilities = jax.nn.softmax(ranked, axis=-1)
    before = jnp.cumsum(probabilities, axis=-1) - probabilities
    # the likeliest token always stays; at 1 they all do, whatever the rounding of the sum
    inside = (before < top_p) | (top_p >= 1) | (jnp.arange(ranked.shape[-1]) == 0)
    ranked = jnp.where(inside, ranked, -jnp.inf)
    keys = jax.vmap(lambda seed: jax.random.fold_in(jax.random.key(seed), step))(seeds)
    rank = jax.vmap(jax.random.categorical)(keys, ranked)
    return jnp.take_along_axis(order, rank[:, None], axis=-1)[:, 0]


def generate(
    llama: Llama,
    prefix: KeyValues,
    ids: Array,
    lengths: Array,
    *,
    max_new: Array,
    capacity: int,
    end_id: int,
    sampling: tuple[Array, Array, Array] | None = None,
) -> Generated:
    """Answer Q questions about each of B images.

    Args:
        llama: the language model.
        prefix: [L, B, S, G, K] keys and values shared by an image's questions.
        ids: int32 [B, Q, T] question tokens, padded on the right.
        lengths: int32 [B, Q] valid tokens; 0 marks a row that is only there to fill the batch.
        max_new: int32 [B, Q], tokens to generate at most for each question; traced, 1 to `capacity`.
        capacity: room for new tokens (static).
        end_id: the token that ends an answer.
        sampling: (temperature [], top_p [], seeds [B, Q]), or None for greedy decoding.
    """
    b, q, t = ids.shape
    start = prefix.keys.shape[2]
    x = llama.embed(ids)
    cache = llama.empty_cache(b, q, t + capacity, x.dtype)
    positions = jnp.broadcast_to(start + jnp.arange(t), ids.shape)
    states, cache = llama.extend(x, positions, cache, jnp.zeros((b, q), jnp.int32), prefix=prefix)
    last = jnp.maximum(lengths - 1, 0)[..., None, None]
    state = jnp.take_along_axis(states, last, axis=2)[:, :, 0]  # [B, Q, D]

    def record(loop: _Loop, state: Array, cache: KeyValues) -> _Loop:
        """Choose the token that `state` predicts."""
        logits = llama.logits(state)
        if sampling is None:
            token = jnp.argmax(logits, axis=-1)
        else:
            temperature, top_p, seeds = sampling
            flat = logits.reshape(b * q, -1)
            token = choose_token(flat, temperature, top_p, seeds.reshape(-1), loop.step).reshape(b, q)
        token = jnp.where(loop.done, end_id, token).astype(jnp.int32)
        counts = loop.counts + ~loop.done
        return _Loop(
            loop.step + 1,
            token,
            loop.done | (token == end_id) | (counts >= max_new),
            counts,
            loop.tokens.at[:, :, loop.step].set(token),
            loop.states.at[:, :, loop.step].set(state),
            cache,
        )

    def advance(loop: _Loop) -> _Loop:
        """Feed the last token, then choose the next."""
        slots = lengths + loop.step - 1
        x = llama.embed(loop.token)[:, :, None]
        state, cache = llama.extend(x, (start + slots)[..., None], loop.cache, slots, prefix=prefix)
        return record(loop, state[:, :, 0], cache)

    first = _Loop(
        step=jnp.int32(0),
        token=jnp.zeros((b, q), jnp.int32),
        done=lengths == 0,
        counts=jnp.zeros((b, q), jnp.int32),
        tokens=jnp.full((b, q, capacity), end_id, jnp.int32),
        states=jnp.zeros((b, q, capacity, state.shape[-1]), state.dtype),
        cache=cache,
    )
    loop = jax.lax.while_loop(lambda loop: ~jnp.all(loop.done), advance, record(first, state, cache))
    return Generated(loop.tokens, loop.counts, loop.states)
