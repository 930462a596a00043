"""The kernels of attention against the plain implementation.

Splash attention runs interpreted here, at sequences of SAM's and LLaMA's layouts scaled down; their full
shapes: `pytest -m slow tests/models/test_kernels.py`.
"""

from __future__ import annotations

import os
import subprocess
import sys
import types

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from read_jax.errors import ConfigError
from read_jax.models import attention as door
from read_jax.models.attention import attention, packed_attention
from read_jax.models.kernels import LANES, Packed, cudnn_attention, padded_size, splash_attention
from tests.models.parameters import assert_close

pytestmark = pytest.mark.usefixtures("compiled_quickly")


def draw(tokens: int, heads: int, groups: int, size: int, values: int, batch: int = 2, dtype="float32"):
    """Queries, keys and values of self-attention, and weights for a sum of the results."""
    rng = np.random.default_rng(0)
    shapes = (heads, size), (groups, size), (groups, values), (heads, values)
    return [jnp.asarray(rng.standard_normal((batch, tokens, *shape)), dtype) for shape in shapes]


def compare(function, reference, q, k, v, weights, tolerance=1e-5):
    """Values and gradients of both are equal."""
    assert_close(function(q, k, v), reference(q, k, v), tolerance)
    gradients = [
        jax.jit(jax.grad(lambda *a, f=f: jnp.sum(f(*a).astype(jnp.float32) * weights), (0, 1, 2)))(q, k, v)
        for f in (function, reference)
    ]
    for one, other in zip(*gradients, strict=True):
        assert_close(one, other, tolerance)


@given(st.integers(1, 9), st.integers(0, 4), st.integers(1, 5), st.integers(0, 7))
def test_a_token_sees_the_prefix_and_its_own_question_up_to_itself(prefix, questions, length, filling):
    layout = Packed(prefix, questions, length)
    visible = layout.visible(layout.tokens + filling)
    for query in range(layout.tokens + filling):
        if query >= layout.tokens:
            wanted = {query}
        elif query < prefix:
            wanted = set(range(query + 1))
        else:
            begin = prefix + (query - prefix) // length * length
            wanted = set(range(prefix)) | set(range(begin, query + 1))
        assert set(np.flatnonzero(visible[query])) == wanted


@given(st.integers(1, 5000))
def test_sequences_are_filled_up_to_whole_blocks(tokens):
    size, block = padded_size(tokens)
    assert size % block == block % LANES == 0
    assert 0 <= size - tokens < block


@pytest.mark.parametrize(
    "layout,heads,groups",
    [(Packed(150, 3, 40), 4, 2), (Packed(300), 2, 2), (Packed(512, 2, 128), 2, 1)],
    ids=["filled-grouped", "prefix-alone", "whole-blocks"],
)
def test_splash_attention_of_packed_questions_equals_the_plain_one(monkeypatch, layout, heads, groups):
    monkeypatch.setenv("READ_JAX_ATTENTION", "plain")
    operands = draw(layout.tokens, heads, groups, 32, 32)
    compare(
        lambda *a: splash_attention(*a, layout=layout, interpret=True),
        lambda *a: packed_attention(*a, layout),
        *operands,
    )


@pytest.mark.parametrize("tokens", [256, 300])
def test_splash_attention_with_folded_relative_positions_equals_the_plain_one(tokens):
    """Queries and keys have the channels of the bias behind their own; values have none."""
    q, k, v, weights = draw(tokens, 2, 2, 80 + 2 * 16, 80)
    compare(
        lambda *a: splash_attention(*a, scale=1.0, interpret=True),
        lambda *a: attention(*a, scale=1.0),
        0.1 * q,
        k,
        v,
        weights,
    )


def test_splash_attention_of_half_precision_keeps_its_sums_in_float32():
    layout = Packed(200, 2, 50)
    q, k, v, _ = draw(layout.tokens, 2, 2, 32, 32, dtype="bfloat16")
    ours = splash_attention(q, k, v, layout=layout, interpret=True)
    assert ours.dtype == jnp.bfloat16
    exact = packed_attention(*(x.astype(jnp.float32) for x in (q, k, v)), layout)
    assert_close(ours.astype(jnp.float32), exact, 1e-2)


def test_the_door_takes_the_kernel_for_long_sequences_alone(monkeypatch):
    monkeypatch.setenv("READ_JAX_ATTENTION", "splash-interpreted")
    taken = []
    monkeypatch.setattr(door, "splash_attention", lambda q, k, v, **others: taken.append(q.shape[1]) or v)
    for tokens in (door.KERNEL_FROM - 1, door.KERNEL_FROM, door.WHOLE_FROM - 1, door.WHOLE_FROM):
        q, k, v, _ = draw(tokens, 2, 2, 8, 8, batch=1)
        attention(q, k, v)
    assert taken == [door.WHOLE_FROM]
    for tokens in (door.KERNEL_FROM - 1, door.KERNEL_FROM):
        packed_attention(*draw(tokens, 2, 2, 8, 8, batch=1)[:3], Packed(tokens))
    assert taken == [door.WHOLE_FROM, door.KERNEL_FROM]
    attention(q, k, v, mask=jnp.ones((q.shape[1],) * 2, bool))  # whatever it says: not known while tracing
    attention(q[:, :1], k, v)
    assert len(taken) == 2


def test_an_unknown_implementation_is_refused(monkeypatch):
    monkeypatch.setenv("READ_JAX_ATTENTION", "flash")
    q, k, v, _ = draw(4, 2, 2, 8, 8)
    with pytest.raises(ConfigError, match="READ_JAX_ATTENTION is 'flash'; it can be one of: auto, plain"):
        attention(q, k, v)


SHARED = """
import jax, numpy as np
from read_jax.models.kernels import Packed, splash_attention
from read_jax.sharding import MeshConfig, batch_sharding, make_mesh, on_mesh
from tests.models.test_kernels import draw

layout = Packed(150, 3, 40)
q, k, v, weights = draw(layout.tokens, 4, 2, 32, 32, batch=4)

def loss(q, k, v):
    out = splash_attention(q, k, v, layout=layout, shared_heads=True, interpret=True)
    return (out * weights).sum(), out

graded = jax.value_and_grad(loss, (0, 1, 2), has_aux=True)
mesh = make_mesh(MeshConfig(data=2, fsdp=2, tensor=2))
alone = jax.jit(graded)(q, k, v)
shared = jax.jit(on_mesh(graded, mesh))(*jax.device_put((q, k, v), batch_sharding(mesh)))
(_, out), _ = shared
assert out.sharding.shard_shape(out.shape) == (1, layout.tokens, 2, 32), out.sharding
for one, other in zip(jax.tree.leaves(alone), jax.tree.leaves(shared), strict=True):
    np.testing.assert_allclose(one, other, rtol=1e-4, atol=1e-4)
"""


def test_devices_that_share_pictures_and_heads_get_what_one_gets():
    eight = {"XLA_FLAGS": "--xla_force_host_platform_device_count=8", "JAX_PLATFORMS": "cpu"}
    done = subprocess.run(
        [sys.executable, "-c", SHARED], env=os.environ | eight, capture_output=True, text=True
    )
    assert done.returncode == 0, done.stderr


@pytest.mark.slow
@pytest.mark.parametrize(
    "layout,heads,size,values",
    [(Packed(613, 10, 128), 2, 128, 128), (None, 1, 80 + 2 * 64, 80)],
    ids=["llama", "sam-global"],
)
def test_splash_attention_equals_the_plain_one_at_full_length(monkeypatch, layout, heads, size, values):
    """All tokens and channels of READ-7B with SAM ViT-H; fewer heads, which do not touch each other."""
    monkeypatch.setenv("READ_JAX_ATTENTION", "plain")
    q, k, v, weights = draw(layout.tokens if layout else 4096, heads, heads, size, values, batch=1)
    scale = {} if layout else {"scale": 1.0}
    compare(
        lambda *a: splash_attention(*a, layout=layout, interpret=True, **scale),
        lambda *a: packed_attention(*a, layout) if layout else attention(*a, **scale),
        q if layout else 0.1 * q,
        k,
        v,
        weights,
    )


@pytest.fixture
def asked(monkeypatch):
    """(implementation, shape of the queries) of every call; XLA's attention stands in for cuDNN's, which
    needs a GPU."""
    seen, attend = [], jax.nn.dot_product_attention

    def instead(*operands, implementation, **others):
        seen.append((implementation, operands[0].shape))
        return attend(*operands, implementation="xla", **others)

    monkeypatch.setattr(jax.nn, "dot_product_attention", instead)
    return seen


@pytest.mark.parametrize("layout", [Packed(150, 3, 40), Packed(256)], ids=["filled", "prefix-alone"])
def test_cudnn_is_asked_for_what_the_plain_one_computes(layout, asked):
    """Its mask, scale and filling."""
    compare(
        lambda *a: cudnn_attention(*a, layout),
        lambda *a: packed_attention(*a, layout),
        *draw(layout.tokens, 4, 2, 32, 32),
    )
    assert {name for name, _ in asked} == {"cudnn"}
    assert all(shape[1] % LANES == 0 for _, shape in asked)  # it trains on even lengths alone


@pytest.mark.parametrize(("capability", "kernel"), [("9.0", True), ("8.0", False)], ids=["Hopper", "Ampere"])
def test_heads_with_sams_bias_in_them_go_to_cudnn_where_it_takes_so_wide_ones(
    monkeypatch, capability, kernel, asked
):
    gpu = types.SimpleNamespace(compute_capability=capability, platform="gpu")
    monkeypatch.setattr(jax, "local_devices", lambda *_: [gpu])
    q, k, v, _ = draw(1024, 2, 2, 80 + 2 * 63, 80, batch=1)  # 206 channels, no multiple of eight
    monkeypatch.setenv("READ_JAX_ATTENTION", "plain")
    plain = attention(q, k, v, scale=0.1)
    monkeypatch.setenv("READ_JAX_ATTENTION", "cudnn")
    np.testing.assert_allclose(attention(q, k, v, scale=0.1), plain, rtol=1e-5, atol=1e-5)
    assert asked == ([("cudnn", (1, 1024, 2, 208))] if kernel else [])
