"""CLIP's vision tower against transformers."""

from __future__ import annotations

import jax
import numpy as np
import pytest
import torch
import transformers
from flax import nnx

from read_jax.config import ClipVisionConfig
from read_jax.models.clip import ClipVision
from tests.models.parameters import assert_close, fill, stacked


def copied(model: transformers.CLIPVisionModel, config: ClipVisionConfig) -> ClipVision:
    state = {key.removeprefix("vision_model."): value for key, value in model.state_dict().items()}
    values = {
        "class_embed": state["embeddings.class_embedding"].numpy(),
        "position_embed": state["embeddings.position_embedding.weight"].numpy(),
        "patch_embed.kernel": state["embeddings.patch_embedding.weight"]
        .permute(2, 3, 1, 0)
        .reshape(-1, config.hidden_size)
        .numpy(),
        "pre_norm.scale": state["pre_layrnorm.weight"].numpy(),
        "pre_norm.bias": state["pre_layrnorm.bias"].numpy(),
    }
    linears = {f"attn.{n}": f"self_attn.{n}" for n in ("q_proj", "k_proj", "v_proj", "out_proj")}
    linears |= {"mlp.fc1": "mlp.fc1", "mlp.fc2": "mlp.fc2"}
    count = config.used_layers
    for ours, theirs in linears.items() if count else ():
        for leaf, name in (("kernel", "weight"), ("bias", "bias")):
            values[f"layers.{ours}.{leaf}"] = stacked(
                state, f"encoder.layers.{{i}}.{theirs}.{name}", count, transpose=leaf == "kernel"
            )
    for i in (1, 2) if count else ():
        values[f"layers.norm{i}.scale"] = stacked(state, f"encoder.layers.{{i}}.layer_norm{i}.weight", count)
        values[f"layers.norm{i}.bias"] = stacked(state, f"encoder.layers.{{i}}.layer_norm{i}.bias", count)
    return fill(lambda: ClipVision(config, rngs=nnx.Rngs(0)), values)


@pytest.mark.parametrize(
    ("image_size", "patch", "layers", "heads", "act", "select"),
    [
        (336, 14, 3, 4, "quick_gelu", -2),
        (224, 14, 4, 2, "quick_gelu", -1),
        (64, 16, 2, 4, "gelu", 1),
        (64, 32, 2, 1, "quick_gelu", 0),
    ],
)
@pytest.mark.parametrize("feature", ["patch", "cls_patch"])
def test_features_equal_transformers(image_size, patch, layers, heads, act, select, feature):
    hf = transformers.CLIPVisionConfig(
        hidden_size=32, intermediate_size=40, num_hidden_layers=layers, num_attention_heads=heads,
        image_size=image_size, patch_size=patch, hidden_act=act, attn_implementation="eager",
    )  # fmt: skip
    torch.manual_seed(layers)
    theirs = transformers.CLIPVisionModel(hf).eval()
    with torch.no_grad():
        for parameter in theirs.parameters():
            parameter.normal_(0.0, 0.2).add_(1.0 if parameter.ndim == 1 else 0.0)
    config = ClipVisionConfig.from_hf(hf.to_dict(), select, feature)
    pixels = np.random.default_rng(0).normal(size=(2, image_size, image_size, 3)).astype(np.float32)
    with torch.no_grad():
        expected = theirs(
            torch.from_numpy(pixels.transpose(0, 3, 1, 2)), output_hidden_states=True
        ).hidden_states
    expected = expected[select].numpy()
    model = copied(theirs, config)
    features = jax.jit(lambda x: model(x))(pixels)
    assert features.shape[1] == config.num_image_tokens
    assert_close(features, expected[:, 1:] if feature == "patch" else expected)
