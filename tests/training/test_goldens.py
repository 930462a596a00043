"""Losses, gradients and updates of the original's own training run."""

from __future__ import annotations

import json
import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx
from PIL import Image

from read_jax.data.mixture import Row, Sample
from read_jax.data.packing import Limits, Packer
from read_jax.images.masks import CompactMask
from read_jax.text.tokenizer import Tokenizer
from read_jax.training.lora import LoraConfig, add_adapters
from read_jax.training.objective import LossWeights
from read_jax.training.optimizer import OptimizerConfig, make_optimizer
from read_jax.training.step import StepConfig, init_state, make_train_step, split_model
from read_jax.weights.checkpoint import UPSTREAM, load_config
from read_jax.weights.convert import convert
from read_jax.weights.model import load_model

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


def upstream_names(path, value):
    """(upstream name, array in its layout) of each part of one of our leaves."""
    name = ".".join(map(str, path))
    prefix = "base_model.model."
    if ".attn." in name and name.startswith("llama.layers"):
        _, _, _, target, kind = path
        for n, part in enumerate(value):
            kind_up = {"lora_a": "lora_A", "lora_b": "lora_B"}[kind]
            yield f"{prefix}model.layers.{n}.self_attn.{target}.{kind_up}.default.weight", part.T
    elif name == "llama.embed_tokens.embedding":
        yield f"{prefix}model.embed_tokens.weight", value
    elif name == "llama.lm_head.kernel":
        yield f"{prefix}lm_head.weight", value.T


@pytest.fixture(scope="module")
def run(folder, recorded, packed):
    """Six updates under one schedule: the metrics before each and after the last, and the first gradients."""
    batch, packer = packed

    def go(name):
        optimizer = make_optimizer(
            OptimizerConfig(warmup_updates=3, total_updates=10, learning_rate=3e-4, **RUNS[name])
        )
        graphdef, params, frozen = split_model(adapted(folder, recorded[1]))
        config = StepConfig(remat=False)
        step = jax.jit(
            make_train_step(graphdef, optimizer, packer.prefix_ids, packer.image_start, LossWeights(), config)
        )
        state = init_state(params, optimizer, config)
        history = []
        for _ in range(7):
            state, metrics = step(state, frozen, batch)
            history.append({key: float(value) for key, value in metrics.items()})
        return history

    return go


@pytest.mark.parametrize("name", RUNS)
def test_losses_of_six_updates_are_the_originals(name, run, recorded):
    history = run(name)
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
    assert history[0]["gradient_norm"] == pytest.approx(entries[0]["global_grad_norm_before_clip"], rel=1e-4)
