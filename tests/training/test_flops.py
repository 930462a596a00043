"""The count of operations against known figures, and against the compiler's count of unrolled programs."""

from __future__ import annotations

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from read_jax.config import ReadConfig
from read_jax.models.llama import LlamaLayer, rotary_angles
from read_jax.models.sam.mask_decoder import MaskDecoder
from read_jax.training import flops
from read_jax.training.step import TRAINABLE


def test_the_published_encoders_take_what_is_known_of_them():
    config = ReadConfig.preset("read-7b")
    assert flops.sam_encoder_forward(config.sam) == pytest.approx(5.96e12, rel=0.02)
    assert flops.clip_forward(config.clip) == pytest.approx(0.37e12, rel=0.06)


@pytest.mark.parametrize(("size", "tflops"), [("7b", 31.1), ("13b", 54.3)])
def test_a_picture_with_three_questions_takes_what_the_arithmetic_floor_says(size, tflops):
    config = ReadConfig.preset(f"read-{size}")
    names = tuple(name for name in TRAINABLE if name != "llama.lm_head")
    lengths = np.full((1, 3), 100)
    assert flops.train_step_flops(config, names, 620, lengths, 3) / 1e12 == pytest.approx(tflops, rel=0.03)


def test_a_layer_of_the_language_model_takes_what_the_compiler_counts():
    config = dataclasses.replace(
        ReadConfig.preset("read-7b").llama,
        hidden_size=64,
        intermediate_size=160,
        num_layers=1,
        num_heads=4,
        num_kv_heads=2,
        head_dim=16,
    )
    layer = LlamaLayer(config, dtype=jnp.float32, param_dtype=jnp.float32, rngs=nnx.Rngs(0))
    tokens = 128

    def weights_only(x):
        cos, sin = rotary_angles(jnp.zeros(x.shape[:-1], jnp.int32), config.head_dim, 1e4)
        q, k, v = layer.attn.project(x, cos, sin)
        return layer.attn.output(q).sum() + k.sum() + v.sum() + layer.mlp(x).sum()

    lowered = jax.jit(weights_only).lower(jnp.zeros((1, 1, tokens, 64)))
    counted = lowered.compile().cost_analysis()["flops"]
    ours = 2 * flops.llama_weights(config) * tokens
    assert ours == pytest.approx(counted, rel=0.05)


def test_the_mask_decoder_takes_what_the_compiler_counts():
    config, tokens = ReadConfig.preset("read-7b").sam, 36
    decoder, state = nnx.split(
        nnx.eval_shape(
            lambda: MaskDecoder(config, dtype=jnp.float32, param_dtype=jnp.float32, rngs=nnx.Rngs(0))
        )
    )
    side, width = config.grid_size, config.out_chans
    image = jax.ShapeDtypeStruct((1, side, side, width), jnp.float32)
    prompt = jax.ShapeDtypeStruct((1, tokens - 1 - config.num_mask_tokens, width), jnp.float32)
    position = jax.ShapeDtypeStruct((side, side, width), jnp.float32)

    def low_res(state, image, position, prompt):
        return nnx.merge(decoder, state)(image, position, prompt, image)[0]

    counted = jax.jit(low_res).lower(state, image, position, prompt).cost_analysis()["flops"]
    assert flops.mask_decoder_forward(config, tokens) == pytest.approx(counted, rel=0.08)  # it adds norms


def test_packing_saves_what_the_repeated_prefix_costs():
    packed = flops.llama_pairs(600, [100, 100, 100])
    apart = 3 * flops.llama_pairs(600, [100])
    assert apart - packed == 2 * 600 * 601 / 2


@pytest.mark.parametrize(("kind", "rate"), [("NVIDIA H200", 989e12), ("TPU v5 lite", 197e12), ("cpu", None)])
def test_what_a_device_can_do_is_known_by_its_name(kind, rate):
    assert flops.peak(kind) == rate
