"""The real segment-anything as the reference of our SAM, and its weights in our parameter tree.

`import segment_anything` runs the package's `__init__`, which imports the automatic mask generator and
with it torchvision. The networks need neither, so the package is entered as a bare module object with
only a search path, and `segment_anything.modeling` is imported from there.
"""

from __future__ import annotations

import functools
import importlib
import importlib.util
import sys
import types
from collections.abc import Callable, Mapping
from typing import Any

import numpy as np
import torch
from flax import nnx

from read_jax.config import SamConfig
from tests.models import parameters

Arrays = dict[str, np.ndarray]


def modeling() -> Any:
    """The module `segment_anything.modeling`, without running the package's own `__init__`."""
    if "segment_anything" not in sys.modules:
        spec = importlib.util.find_spec("segment_anything")
        if spec is None or spec.submodule_search_locations is None:
            raise ImportError("these tests compare with the package segment-anything: install it.")
        package = types.ModuleType("segment_anything")
        package.__path__ = list(spec.submodule_search_locations)
        sys.modules["segment_anything"] = package
    return importlib.import_module("segment_anything.modeling")


def reference_sam(config: SamConfig, seed: int) -> Any:
    """A torch `Sam` of this configuration, every parameter random (norms, biases and tables too)."""
    sa = modeling()
    grid = (config.grid_size, config.grid_size)
    sam = sa.Sam(
        image_encoder=sa.ImageEncoderViT(
            img_size=config.image_size,
            patch_size=config.patch_size,
            embed_dim=config.embed_dim,
            depth=config.depth,
            num_heads=config.num_heads,
            mlp_ratio=config.mlp_dim / config.embed_dim,
            out_chans=config.out_chans,
            norm_layer=functools.partial(torch.nn.LayerNorm, eps=1e-6),
            use_rel_pos=True,
            window_size=config.window_size,
            global_attn_indexes=config.global_attn_indexes,
        ),
        prompt_encoder=sa.PromptEncoder(
            embed_dim=config.out_chans,
            image_embedding_size=grid,
            input_image_size=(config.image_size, config.image_size),
            mask_in_chans=config.mask_in_chans,
        ),
        mask_decoder=sa.MaskDecoder(
            transformer_dim=config.out_chans,
            transformer=sa.TwoWayTransformer(
                depth=config.decoder_depth,
                embedding_dim=config.out_chans,
                num_heads=config.decoder_num_heads,
                mlp_dim=config.decoder_mlp_dim,
            ),
            num_multimask_outputs=config.num_mask_tokens - 1,
            iou_head_depth=config.iou_head_depth,
            iou_head_hidden_dim=config.iou_head_hidden_dim,
        ),
    ).eval()
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for name, value in sam.named_parameters():
            noise = torch.randn(value.shape, generator=generator)
            if "norm" in name and name.endswith("weight"):
                value.copy_(1.0 + 0.2 * noise)
            elif value.ndim > 1 and "embed" not in name and "token" not in name and "rel_pos" not in name:
                value.copy_(noise * (value.numel() / value.shape[0]) ** -0.5)
            else:
                value.copy_(0.3 * noise)
    return sam.requires_grad_(False)


def read_state_dict(state: Mapping[str, torch.Tensor]) -> Arrays:
    """A torch state dict as numpy float32."""
    return {name: value.detach().to(torch.float32).numpy() for name, value in state.items()}


def infer_config(weights: Arrays) -> SamConfig:
    """The geometry of a SAM state dict, from the shapes of its tensors."""
    _, grid, _, width = weights["image_encoder.pos_embed"].shape
    patch = weights["image_encoder.patch_embed.proj.weight"].shape[-1]
    tables = []
    while f"image_encoder.blocks.{len(tables)}.attn.rel_pos_h" in weights:
        tables.append(weights[f"image_encoder.blocks.{len(tables)}.attn.rel_pos_h"])
    windows = {len(t) for t in tables} - {2 * grid - 1}
    return SamConfig(
        embed_dim=width,
        depth=len(tables),
        num_heads=width // tables[0].shape[1],
        global_attn_indexes=tuple(i for i, t in enumerate(tables) if len(t) == 2 * grid - 1),
        mlp_dim=len(weights["image_encoder.blocks.0.mlp.lin1.weight"]),
        image_size=grid * patch,
        patch_size=patch,
        window_size=(windows.pop() + 1) // 2,
    )


def image_encoder_arrays(weights: Arrays, config: SamConfig) -> Arrays:
    """Our image encoder's parameters by dotted path."""
    w = {k.removeprefix("image_encoder."): v for k, v in weights.items() if k.startswith("image_encoder.")}
    kernel = w["patch_embed.proj.weight"]  # [D, 3, p, p]
    out = {
        "patch_embed.kernel": kernel.transpose(2, 3, 1, 0).reshape(-1, len(kernel)),
        "patch_embed.bias": w["patch_embed.proj.bias"],
        "position_embed": w["pos_embed"][0],
        "neck.conv1.kernel": w["neck.0.weight"][:, :, 0, 0].T,
        "neck.conv2.kernel": w["neck.2.weight"].transpose(2, 3, 1, 0),
        **_norm(w, "neck.1", "neck.norm1"),
        **_norm(w, "neck.3", "neck.norm2"),
    }
    for stack, is_global in (("window_blocks", False), ("global_blocks", True)):
        blocks = [i for i in range(config.depth) if (i in config.global_attn_indexes) == is_global]
        layers = []
        for i in blocks:
            layer: Arrays = {f"attn.{t}": w[f"blocks.{i}.attn.{t}"] for t in ("rel_pos_h", "rel_pos_w")}
            for name in ("attn.qkv", "attn.proj", "mlp.lin1", "mlp.lin2"):
                layer |= _linear(w, f"blocks.{i}.{name}", name)
            for name in ("norm1", "norm2"):
                layer |= _norm(w, f"blocks.{i}.{name}", name)
            layers.append(layer)
        if layers:
            out |= {f"{stack}.{k}": np.stack([layer[k] for layer in layers]) for k in layers[0]}
    return out


def prompt_encoder_arrays(weights: Arrays) -> Arrays:
    """Our prompt encoder's parameters by dotted path."""
    w = {k.removeprefix("prompt_encoder."): v for k, v in weights.items() if k.startswith("prompt_encoder.")}
    out = {
        "gaussian_matrix": w["pe_layer.positional_encoding_gaussian_matrix"],
        "point_embeddings": np.concatenate([w[f"point_embeddings.{i}.weight"] for i in range(4)]),
        "not_a_point_embed": w["not_a_point_embed.weight"][0],
        "no_mask_embed": w["no_mask_embed.weight"][0],
    }
    for theirs, ours in ((0, "conv1"), (3, "conv2"), (6, "conv3")):
        kernel = w[f"mask_downscaling.{theirs}.weight"]  # [out, in, r, c]
        out[f"mask_downscaling.{ours}.kernel"] = kernel.transpose(2, 3, 1, 0).reshape(-1, len(kernel))
        out[f"mask_downscaling.{ours}.bias"] = w[f"mask_downscaling.{theirs}.bias"]
    for theirs, ours in ((1, "norm1"), (4, "norm2")):
        out |= _norm(w, f"mask_downscaling.{theirs}", f"mask_downscaling.{ours}")
    return out


def mask_decoder_arrays(weights: Arrays, config: SamConfig) -> Arrays:
    """Our mask decoder's parameters by dotted path."""
    w = {k.removeprefix("mask_decoder."): v for k, v in weights.items() if k.startswith("mask_decoder.")}
    out = {"iou_token": w["iou_token.weight"], "mask_tokens": w["mask_tokens.weight"]}
    for name in (
        k.removesuffix(".weight") for k in w if k.startswith("transformer.") and k.endswith("weight")
    ):
        out |= (_norm if "norm" in name else _linear)(w, name, name)
    for theirs, ours in ((0, "conv1"), (3, "conv2")):  # transposed convolutions, [in, out, r, c]
        out[f"upscaling.{ours}.kernel"] = w[f"output_upscaling.{theirs}.weight"].transpose(0, 2, 3, 1)
        out[f"upscaling.{ours}.bias"] = w[f"output_upscaling.{theirs}.bias"]
    out |= _norm(w, "output_upscaling.1", "upscaling.norm")
    for i in range(3):
        heads = [f"output_hypernetworks_mlps.{t}.layers.{i}" for t in range(config.num_mask_tokens)]
        out[f"hypernetworks.layers.{i}.kernel"] = np.stack([w[f"{h}.weight"].T for h in heads])
        out[f"hypernetworks.layers.{i}.bias"] = np.stack([w[f"{h}.bias"] for h in heads])
    for i in range(config.iou_head_depth):
        out |= _linear(w, f"iou_prediction_head.layers.{i}", f"iou_head.layers.{i}")
    return out


def fill(module_type: Callable[..., nnx.Module], config: SamConfig, arrays: Arrays) -> Any:
    """A module of ours around given float32 parameters; every path must match, with its shape."""
    return parameters.fill(lambda: module_type(config, rngs=nnx.Rngs(0)), arrays)


def _linear(w: Arrays, theirs: str, ours: str) -> Arrays:
    return {f"{ours}.kernel": w[f"{theirs}.weight"].T, f"{ours}.bias": w[f"{theirs}.bias"]}


def _norm(w: Arrays, theirs: str, ours: str) -> Arrays:
    return {f"{ours}.scale": w[f"{theirs}.weight"], f"{ours}.bias": w[f"{theirs}.bias"]}
