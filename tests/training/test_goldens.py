"""Losses, gradients and updates of the original's own training run."""

from __future__ import annotations

import functools
import json
import re

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from flax import nnx
from PIL import Image

from read_jax.data.mixture import Row, Sample
from read_jax.data.packing import Limits, Packer
from read_jax.images.masks import CompactMask
from read_jax.models import attention
from read_jax.text.tokenizer import Tokenizer
from read_jax.training.lora import LoraConfig, add_adapters
from read_jax.training.losses import token_cross_entropy
from read_jax.training.objective import LossWeights
from read_jax.training.optimizer import OptimizerConfig, make_optimizer
from read_jax.training.step import StepConfig, make_gradients, split_model
from read_jax.weights.checkpoint import UPSTREAM, load_config
from read_jax.weights.convert import convert
from read_jax.weights.model import load_model
from read_jax.weights.tables import model_table

RUNS = {
    "deepspeed_0_10_3": {"schedule": "deepspeed"},
    "plain_warmup": {"schedule": "linear"},
    "deepspeed_0_10_3_clip_0.05": {"schedule": "deepspeed", "clip_norm": 0.05},
}
TURN = re.compile(r"USER: <image>\n(.*?) ASSISTANT: (.*?)</s>", re.DOTALL)


@pytest.fixture(scope="module")
def recorded(goldens):
    folder = goldens / "tiny-a" / "training"
    return json.loads((folder / "training.json").read_text()), dict(np.load(folder / "training.npz"))


@pytest.fixture(scope="module")
def folder(goldens, tmp_path_factory):
    """tiny-a as a model folder."""
    out = tmp_path_factory.mktemp("tiny") / "model"
    convert(goldens / "tiny-a" / "checkpoint", goldens / "tiny-a" / "clip", out, sasp="7b", dtype="float32")
    return out


@pytest.fixture(scope="module")
def packed(goldens, recorded, folder):
    """The recorded batch, and its packer."""
    info, arrays = recorded
    limits = Limits(questions=3, tokens=96, mask_canvas=(400, 1000))
    packer = Packer(load_config(folder), Tokenizer.load(folder / UPSTREAM), limits=limits)
    examples = []
    for i, picture in enumerate(info["batch"]):
        shape = arrays[f"gt_masks{i}_shape"]
        masks = iter(np.unpackbits(arrays[f"gt_masks{i}_packed"])[: np.prod(shape)].reshape(shape))
        rows = [
            Row(tuple(TURN.findall(text)), exists, CompactMask.encode(next(masks)) if exists else None)
            for text, exists in zip(picture["conversations"], picture["exists"], strict=True)
        ]
        image = np.asarray(Image.open(goldens / "tiny-a" / picture["image"]).convert("RGB"))
        examples.append(packer.pack(Sample(picture["image"], "golden", image, tuple(rows))))
    return packer.batch(examples), packer


def adapted(folder, arrays):
    """The start: the checkpoint with the recorded adapters."""
    model = load_model(folder)
    add_adapters(model.llama, LoraConfig(rank=8, alpha=16, dropout=0.0), nnx.Rngs(0))
    for target in ("q_proj", "v_proj"):
        layer = getattr(model.llama.layers.attn, target)
        for ours, theirs in (("lora_a", "lora_A"), ("lora_b", "lora_B")):
            names = [
                f"lora_init/base_model.model.model.layers.{n}.self_attn.{target}.{theirs}.default.weight"
                for n in range(layer.kernel.shape[0])
            ]
            getattr(layer, ours)[...] = jnp.stack([arrays[name].T for name in names])
    return model


@pytest.fixture(scope="module")
def trained(folder, recorded, packed):
    """The adapted model's parameters, and the gradients of a step by parameters."""
    return make_trained(folder, recorded, packed)


def make_trained(folder, recorded, packed):
    """As `trained`, compiled anew."""
    batch, packer = packed
    model = adapted(folder, recorded[1])
    geometry = batch.geometry
    encode = jax.jit(
        lambda m: m.encode_images(
            batch.clip_pixels, batch.sam_pixels, geometry.sam_height, geometry.sam_width
        )
    )
    features = encode(model)
    graphdef, params, frozen = split_model(model)
    params = jax.device_put(params, jax.devices()[0])  # as updates leave them: nothing is compiled again
    config = StepConfig(remat=False)
    gradients = jax.jit(
        make_gradients(graphdef, packer.prefix_ids, packer.image_start, LossWeights(), config)
    )

    def gradients_of(p):
        return gradients(p, frozen, batch, jax.random.key(0), features)

    first = gradients_of(params)  # the same whatever the schedule
    return params, lambda p: first if p is params else gradients_of(p)


def upstream_arrays(state, config):
    """{the original's parameter name: array in its layout} of trainable leaves."""
    rows = {}
    for row in model_table(config).rows:
        rows.setdefault(row.path, []).append(row)
    named = {}
    for path, leaf in nnx.to_flat_state(state):
        value, dotted = np.asarray(leaf[...]), ".".join(map(str, path))
        target, kind = path[-2:]
        if kind in ("lora_a", "lora_b"):
            half = {"lora_a": "lora_A", "lora_b": "lora_B"}[kind]
            named |= {
                f"base_model.model.model.layers.{n}.self_attn.{target}.{half}.default.weight": part.T
                for n, part in enumerate(value)
            }
            continue
        for row in rows[dotted]:
            part = value if row.index is None else value[row.index]
            named[f"base_model.model.{row.key}"] = row.inverse(part)
    return named


@pytest.fixture(scope="module")
def first_gradients(trained, packed):
    """{the original's parameter name: our gradient in its layout} of the first update."""
    return upstream_arrays(trained[1](trained[0])[0], packed[1].config)


def tolerance(name, info):
    """1e-4 of the gradient's own norm and 1e-6 of the global one."""
    total = info["plain_warmup"][0]["global_grad_norm_before_clip"]
    return 1e-4 * info["grad0_norm_per_param"][name] + 1e-6 * total


def test_every_first_gradient_has_the_originals_norm(first_gradients, recorded):
    assert_norms_are_the_originals(first_gradients, recorded)


def assert_norms_are_the_originals(first_gradients, recorded):
    info, _ = recorded
    norms, without = info["grad0_norm_per_param"], set(info["params_without_grad"])
    assert set(first_gradients) == set(norms) | without
    for name, value in first_gradients.items():
        if name in without:
            assert not value.any(), name
        else:
            assert abs(np.linalg.norm(value) - norms[name]) <= tolerance(name, info), name


def test_every_recorded_first_gradient_is_the_originals(first_gradients, recorded):
    assert_gradients_are_the_originals(first_gradients, recorded)


def assert_gradients_are_the_originals(first_gradients, recorded):
    info, arrays = recorded
    names = {key.removeprefix("grad0/") for key in arrays if key.startswith("grad0/")}
    assert names <= set(first_gradients)
    for name in names:
        difference = np.linalg.norm(first_gradients[name] - arrays[f"grad0/{name}"])
        assert difference <= tolerance(name, info), (name, difference / tolerance(name, info))


@pytest.mark.slow
def test_with_a_tpus_kernel_every_first_gradient_is_the_originals(folder, recorded, packed, monkeypatch):
    """Splash attention, interpreted, over the packed sequence."""
    monkeypatch.setenv("READ_JAX_ATTENTION", "splash-interpreted")
    monkeypatch.setattr(attention, "KERNEL_FROM", 1)
    params, gradients_of = make_trained(folder, recorded, packed)
    found = upstream_arrays(gradients_of(params)[0], packed[1].config)
    assert_norms_are_the_originals(found, recorded)
    assert_gradients_are_the_originals(found, recorded)


def test_a_certain_tokens_gradient_is_rounded_as_the_originals():
    if jax.default_backend() != "cpu":
        pytest.skip("only a CPU adds in PyTorch's order")
    # eight running sums: 1 swallows the 100 terms of 3e-8 that follow it in its lane, the others' add up
    logits = jnp.full((8 * 101,), np.log(3e-8)).at[0].set(0.0)
    gradient = jax.jit(jax.grad(lambda x: token_cross_entropy(x[None], jnp.zeros(1, int))[0]))(logits)
    assert gradient[0] == pytest.approx(-7 * 101 * 3e-8, abs=1.2e-7)  # exact: -807 * 3e-8, 25 roundings off


@pytest.mark.parametrize("vocabulary", [3, 8, 11, 803])
def test_the_gradient_of_the_cross_entropy_is_softmax_less_the_target(vocabulary):
    rng = np.random.default_rng(vocabulary)
    logits = rng.normal(0, 3, (6, vocabulary)).astype(np.float32)
    targets = rng.integers(0, vocabulary, 6)
    gradient = jax.grad(lambda x: token_cross_entropy(x, jnp.asarray(targets))[0])(jnp.asarray(logits))
    odds = np.exp(logits.astype(np.float64))
    wanted = odds / odds.sum(axis=-1, keepdims=True) - np.eye(vocabulary)[targets]
    np.testing.assert_allclose(gradient, wanted, atol=1e-6)


@pytest.fixture(scope="module")
def run(trained, packed):
    """Six updates under one schedule: (the metrics before each and after the last, the norm of every trained
    tensor by the original's name after each)."""

    @functools.cache
    def go(name):
        optimizer = make_optimizer(
            OptimizerConfig(warmup_updates=3, total_updates=10, learning_rate=3e-4, **RUNS[name])
        )
        params, gradients_of = trained
        opt_state = optimizer.init(params)

        @jax.jit
        def update(gradients, opt_state, params):
            updates, opt_state = optimizer.update(gradients, opt_state, params)
            return optax.apply_updates(params, updates), opt_state

        history, norms = [], []
        for _ in range(7):
            gradients, losses, _ = gradients_of(params)
            norm = float(optax.tree.norm(gradients))
            history.append({key: float(value) for key, value in losses._asdict().items()} | {"norm": norm})
            params, opt_state = update(gradients, opt_state, params)
            arrays = upstream_arrays(params, packed[1].config)
            norms.append({key: np.linalg.norm(value) for key, value in arrays.items()})
        return history, norms

    return go


@pytest.mark.parametrize("name", RUNS)
def test_losses_of_six_updates_are_the_originals(name, run, recorded):
    history, _ = run(name)
    entries = recorded[0][name]
    assert len(entries) == 7
    for ours, theirs in zip(history, entries, strict=True):
        tolerance = 1e-4 if theirs.get("update") == 0 else 1e-3
        for key, wanted in (
            ("total", "loss"),
            ("ce", "ce_loss"),
            ("bce", "mask_bce_loss"),
            ("dice", "mask_dice_loss"),
        ):
            assert ours[key] == pytest.approx(theirs[wanted], rel=tolerance), (theirs.get("update"), key)
    assert history[0]["norm"] == pytest.approx(entries[0]["global_grad_norm_before_clip"], rel=1e-4)


@pytest.mark.parametrize("name", RUNS)
def test_trained_tensors_have_the_originals_norms_after_updates(name, run, recorded):
    _, norms = run(name)
    found = recorded[0]["param_norm_after"][name]
    assert set(found) == {"update0", "update5"}
    for update, wanted in found.items():
        ours = norms[int(update.removeprefix("update"))]
        assert set(wanted) <= set(ours)
        for key, norm in wanted.items():
            # Adam's first step is the gradient's sign, which for the smallest gradients is rounding
            assert ours[key] == pytest.approx(norm, rel=1e-4, abs=1e-6), (update, key)
