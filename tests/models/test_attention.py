"""The one door of attention against torch, and its forms against each other."""

from __future__ import annotations

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import torch

from read_jax.models import attention as module
from read_jax.models.attention import attention, prefix_attention
from tests.models.parameters import assert_close


def draw(seed: int, *shape: int) -> np.ndarray:
    return np.random.default_rng(seed).standard_normal(shape).astype(np.float32)


def inputs(b: int = 2, t: int = 5, s: int = 7, h: int = 4, g: int = 4, k: int = 8, v: int = 8):
    """Queries [B, T, H, K], keys [B, S, G, K], values [B, S, G, V]."""
    return draw(0, b, t, h, k), draw(1, b, s, g, k), draw(2, b, s, g, v)


def torch_attention(
    q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, mask: np.ndarray | None = None, scale=None
) -> torch.Tensor:
    """[B, T, H, K] in, [B, T, H, V] out."""
    out = torch.nn.functional.scaled_dot_product_attention(
        q.transpose(1, 2),
        k.transpose(1, 2),
        v.transpose(1, 2),
        attn_mask=None if mask is None else torch.from_numpy(mask),
        scale=scale,
        enable_gqa=True,
    )
    return out.transpose(1, 2)


def tensors(*arrays: np.ndarray) -> list[torch.Tensor]:
    return [torch.from_numpy(a).requires_grad_() for a in arrays]


CASES = {
    "plain": {},
    "one_query": {"t": 1},
    "grouped": {"h": 6, "g": 2},
    "single_group": {"h": 4, "g": 1},
    "wider_values": {"v": 12},
    "narrower_values": {"v": 3, "h": 4, "g": 2},
    "fewer_keys": {"s": 2},
}


@pytest.mark.parametrize("case", CASES)
def test_equals_torch(case):
    arrays = inputs(**CASES[case])
    assert_close(attention(*arrays), torch_attention(*tensors(*arrays)).detach())


def assert_gradients_equal_torch(*arrays: np.ndarray) -> None:
    weights = draw(3, *arrays[0].shape[:3], arrays[2].shape[-1])
    ours = jax.jit(jax.grad(lambda *a: jnp.sum(attention(*a) * weights), argnums=(0, 1, 2)))(*arrays)
    theirs = tensors(*arrays)
    (torch_attention(*theirs) * torch.from_numpy(weights)).sum().backward()
    for one, other in zip(ours, theirs, strict=True):
        assert_close(one, other.grad)


@pytest.mark.parametrize("case", ["plain", "grouped", "narrower_values"])
def test_gradients_equal_torch(case):
    assert_gradients_equal_torch(*inputs(**CASES[case]))


@pytest.mark.parametrize("shape", [(5, 7), (2, 1, 5, 7), (1, 6, 5, 7), (2, 6, 5, 7), (2, 1, 1, 7)])
def test_a_mask_of_any_broadcastable_shape_equals_torch(shape):
    arrays = inputs(h=6, g=2)
    mask = np.random.default_rng(4).random(shape) < 0.6
    mask[..., 0] = True  # every query sees something
    ours = attention(*arrays, mask=jnp.asarray(mask))
    assert_close(ours, torch_attention(*tensors(*arrays), mask=mask).detach())


def test_a_given_scale_replaces_the_default():
    arrays = inputs()
    assert_close(attention(*arrays, scale=0.7), torch_attention(*tensors(*arrays), scale=0.7).detach())


def test_masked_keys_and_values_have_no_influence():
    q, k, v = inputs()
    mask = jnp.arange(7) < 4
    changed = attention(q, k.copy(), v.copy(), mask=mask)
    k[:, 4:], v[:, 4:] = 1e4, -1e4
    np.testing.assert_array_equal(attention(q, k, v, mask=mask), changed)


def test_large_scores_do_not_overflow():
    q, k, v = inputs()
    ours = attention(100 * q, 100 * k, v)
    assert_close(ours, torch_attention(*tensors(100 * q, 100 * k, v)).detach())


def test_half_precision_inputs_keep_the_softmax_in_float32():
    arrays = [jnp.asarray(a).astype(jnp.bfloat16) for a in inputs(s=300)]
    ours = attention(*arrays)
    assert ours.dtype == jnp.bfloat16
    # what remains is the rounding of queries, weights and sum to 8 bits, once each
    assert_close(ours.astype(jnp.float32), attention(*(a.astype(jnp.float32) for a in arrays)), 1e-2)


def prefix_inputs(h: int = 4, g: int = 4, v: int = 8):
    """B = 2 images, Q = 3 questions of T = 4 queries, prefix of 6 keys, C = 5 own keys."""
    prefix = draw(1, 2, 6, g, 8), draw(2, 2, 6, g, v)
    own = draw(3, 2, 3, 5, g, 8), draw(4, 2, 3, 5, g, v)
    mask = np.random.default_rng(5).random((2, 3, 4, 5)) < 0.5
    return draw(0, 2, 3, 4, h, 8), *prefix, *own, mask


def concatenated(q, prefix_k, prefix_v, k, v, mask):
    """The same attention, question by question, over keys copied behind the prefix."""
    seen = np.concatenate([np.ones((*mask.shape[:3], prefix_k.shape[1]), bool), mask], axis=-1)
    rows = []
    for i in range(q.shape[1]):
        keys = jnp.concatenate([prefix_k, k[:, i]], axis=1)
        values = jnp.concatenate([prefix_v, v[:, i]], axis=1)
        rows.append(attention(q[:, i], keys, values, mask=seen[:, i, None]))
    return jnp.stack(rows, axis=1)


@pytest.mark.parametrize("sizes", [{}, {"h": 6, "g": 2}, {"v": 3}], ids=["plain", "grouped", "narrow_values"])
def test_prefix_attention_equals_attention_over_the_concatenated_keys(sizes):
    *arrays, mask = prefix_inputs(**sizes)
    assert_close(prefix_attention(*arrays, mask=mask), concatenated(*arrays, mask))


def test_prefix_attention_has_the_gradients_of_the_concatenated_form():
    *arrays, mask = prefix_inputs(h=6, g=2)
    weights = draw(6, *arrays[0].shape)
    every = tuple(range(5))
    ours = jax.jit(jax.grad(lambda *a: jnp.sum(prefix_attention(*a, mask=mask) * weights), every))(*arrays)
    theirs = jax.jit(jax.grad(lambda *a: jnp.sum(concatenated(*a, mask) * weights), every))(*arrays)
    for one, other in zip(ours, theirs, strict=True):
        assert_close(one, other)


def test_queries_that_see_none_of_their_own_keys_see_the_prefix_alone():
    q, prefix_k, prefix_v, k, v, mask = prefix_inputs()
    ours = prefix_attention(q, prefix_k, prefix_v, k, v, mask=np.zeros_like(mask))
    wanted = attention(q.reshape(2, 12, 4, 8), prefix_k, prefix_v).reshape(q.shape)
    assert_close(ours, wanted)


@pytest.fixture
def small_blocks(monkeypatch):
    """From 32 scores on, in blocks of 4 queries."""
    monkeypatch.setattr(module, "BLOCKED_FROM", 32)
    monkeypatch.setattr(module, "QUERY_BLOCK", 4)


def loops(q, k, v, **keywords) -> bool:
    """Whether the attention of these operands is computed in a loop over blocks."""
    return "scan" in str(jax.make_jaxpr(lambda *a: attention(*a, **keywords))(q, k, v))


BLOCKED = {
    "plain": {"t": 12},
    "one_block": {"t": 4, "s": 8},
    "grouped": {"t": 8, "h": 6, "g": 2},
    "wider_values": {"t": 8, "v": 12},
}


@pytest.mark.parametrize("case", BLOCKED)
@pytest.mark.parametrize("scale", [None, 0.7])
def test_blocked_equals_torch(small_blocks, case, scale):
    arrays = inputs(**BLOCKED[case])
    assert loops(*arrays)
    ours = attention(*arrays, scale=scale)
    assert_close(ours, torch_attention(*tensors(*arrays), scale=scale).detach())


@pytest.mark.parametrize("case", ["plain", "grouped", "wider_values"])
def test_blocked_has_the_gradients_of_torch(small_blocks, case):
    arrays = inputs(**BLOCKED[case])
    assert loops(*arrays)
    assert_gradients_equal_torch(*arrays)


def test_blocked_works_under_jit_and_vmap(small_blocks):
    arrays = [np.stack([a, 2 * a]) for a in inputs(t=8)]
    ours = jax.jit(jax.vmap(attention))(*arrays)
    for i in range(2):
        assert_close(ours[i], torch_attention(*tensors(*(a[i] for a in arrays))).detach())


def test_blocked_does_not_overflow(small_blocks):
    q, k, v = inputs(t=8)
    assert_close(attention(100 * q, 100 * k, v), torch_attention(*tensors(100 * q, 100 * k, v)).detach())


def test_masked_small_or_uneven_attention_is_computed_at_once(small_blocks):
    assert not loops(*inputs(t=8), mask=jnp.ones((8, 7), bool))
    assert not loops(*inputs(t=4, s=7))
    assert not loops(*inputs(t=9))
