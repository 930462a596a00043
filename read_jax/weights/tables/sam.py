"""Segment Anything as segment-anything names it, under the prefix it has inside a READ checkpoint."""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping
from typing import Any

from read_jax.config import SamConfig
from read_jax.errors import CheckpointError
from read_jax.weights.engine import Allowed, Row, Spec, Table, expand, layer_norm, linear, nearest, stack

PREFIX = "model.visual_model."


def _block(config: SamConfig, side: int) -> tuple[Spec, ...]:
    """One transformer block whose attention spans `side` x `side` patches."""
    width, head = config.embed_dim, config.embed_dim // config.num_heads
    return (
        *layer_norm("norm1", "norm1", width),
        ("attn.rel_pos_h", "attn.rel_pos_h", "same", (2 * side - 1, head)),
        ("attn.rel_pos_w", "attn.rel_pos_w", "same", (2 * side - 1, head)),
        *linear("attn.qkv", "attn.qkv", width, 3 * width),
        *linear("attn.proj", "attn.proj", width, width),
        *layer_norm("norm2", "norm2", width),
        *linear("mlp.lin1", "mlp.lin1", width, config.mlp_dim),
        *linear("mlp.lin2", "mlp.lin2", config.mlp_dim, width),
    )


def _image_encoder(config: SamConfig) -> Iterator[Row]:
    width, grid, patch, out = config.embed_dim, config.grid_size, config.patch_size, config.out_chans
    key, path = PREFIX + "image_encoder.", "sam.image_encoder."
    yield Row(key + "pos_embed", path + "position_embed", "grid", (1, grid, grid, width))
    yield Row(
        key + "patch_embed.proj.weight", path + "patch_embed.kernel", "patches", (width, 3, patch, patch)
    )
    yield Row(key + "patch_embed.proj.bias", path + "patch_embed.bias", "same", (width,))
    global_blocks = [i for i in range(config.depth) if i in config.global_attn_indexes]
    window_blocks = [i for i in range(config.depth) if i not in config.global_attn_indexes]
    block = key + "blocks.{i}."
    yield from stack(block, path + "window_blocks.", window_blocks, _block(config, config.window_size))
    yield from stack(block, path + "global_blocks.", global_blocks, _block(config, grid))
    yield Row(key + "neck.0.weight", path + "neck.conv1.kernel", "patches", (out, width, 1, 1))
    yield from expand(key, path, layer_norm("neck.1", "neck.norm1", out))
    yield Row(key + "neck.2.weight", path + "neck.conv2.kernel", "conv", (out, out, 3, 3))
    yield from expand(key, path, layer_norm("neck.3", "neck.norm2", out))


def _patches(name: str, ours: str, inputs: int, outputs: int, side: int) -> Iterator[Spec]:
    yield f"{name}.weight", f"{ours}.kernel", "patches", (outputs, inputs, side, side)
    yield f"{name}.bias", f"{ours}.bias", "same", (outputs,)


def _prompt_encoder(config: SamConfig) -> Iterator[Row]:
    width, inner, outer = config.out_chans, config.mask_in_chans // 4, config.mask_in_chans
    key, path = PREFIX + "prompt_encoder.", "sam.prompt_encoder."
    matrix = "pe_layer.positional_encoding_gaussian_matrix"
    yield Row(key + matrix, path + "gaussian_matrix", "same", (2, width // 2))
    yield from stack(
        key + "point_embeddings.{i}.", path, range(4), [("weight", "point_embeddings", "row", (1, width))]
    )
    yield Row(key + "not_a_point_embed.weight", path + "not_a_point_embed", "row", (1, width))
    yield from expand(
        key + "mask_downscaling.",
        path + "mask_downscaling.",
        (
            *_patches("0", "conv1", 1, inner, 2),
            *layer_norm("1", "norm1", inner),
            *_patches("3", "conv2", inner, outer, 2),
            *layer_norm("4", "norm2", outer),
            *_patches("6", "conv3", outer, width, 1),
        ),
    )
    yield Row(key + "no_mask_embed.weight", path + "no_mask_embed", "row", (1, width))


def _attention(name: str, width: int, inner: int) -> Iterator[Spec]:
    for part in ("q_proj", "k_proj", "v_proj"):
        yield from linear(f"{name}.{part}", f"{name}.{part}", width, inner)
    yield from linear(f"{name}.out_proj", f"{name}.out_proj", inner, width)


def _decoder_layer(config: SamConfig) -> tuple[Spec, ...]:
    width, mlp = config.out_chans, config.decoder_mlp_dim
    return (
        *_attention("self_attn", width, width),
        *layer_norm("norm1", "norm1", width),
        *_attention("cross_attn_token_to_image", width, width // 2),
        *layer_norm("norm2", "norm2", width),
        *linear("mlp.lin1", "mlp.lin1", width, mlp),
        *linear("mlp.lin2", "mlp.lin2", mlp, width),
        *layer_norm("norm3", "norm3", width),
        *layer_norm("norm4", "norm4", width),
        *_attention("cross_attn_image_to_token", width, width // 2),
    )


def _upscale(name: str, ours: str, inputs: int, outputs: int) -> Iterator[Spec]:
    yield f"{name}.weight", f"{ours}.kernel", "transposed_conv", (inputs, outputs, 2, 2)
    yield f"{name}.bias", f"{ours}.bias", "same", (outputs,)


def _mask_decoder(config: SamConfig) -> Iterator[Row]:
    width, tokens = config.out_chans, config.num_mask_tokens
    key, path = PREFIX + "mask_decoder.", "sam.mask_decoder."
    for i in range(config.decoder_depth):
        layer = f"transformer.layers.{i}."
        yield from expand(key + layer, path + layer, _decoder_layer(config))
    final = (
        *_attention("final_attn_token_to_image", width, width // 2),
        *layer_norm("norm_final_attn", "norm_final_attn", width),
    )
    yield from expand(key + "transformer.", path + "transformer.", final)
    yield Row(key + "iou_token.weight", path + "iou_token", "same", (1, width))
    yield Row(key + "mask_tokens.weight", path + "mask_tokens", "same", (tokens, width))
    upscaling = (
        *_upscale("0", "conv1", width, width // 4),
        *layer_norm("1", "norm", width // 4),
        *_upscale("3", "conv2", width // 4, width // 8),
    )
    yield from expand(key + "output_upscaling.", path + "upscaling.", upscaling)
    mask_mlp = (
        spec
        for i, out in enumerate((width, width, width // 8))
        for spec in linear(f"layers.{i}", f"layers.{i}", width, out)
    )
    yield from stack(key + "output_hypernetworks_mlps.{i}.", path + "hypernetworks.", range(tokens), mask_mlp)
    widths = [width, *[config.iou_head_hidden_dim] * (config.iou_head_depth - 1), tokens]
    iou_mlp = (
        spec
        for i in range(config.iou_head_depth)
        for spec in linear(f"layers.{i}", f"layers.{i}", widths[i], widths[i + 1])
    )
    yield from expand(key + "iou_prediction_head.", path + "iou_head.", iou_mlp)


def table(config: SamConfig) -> Table:
    """Image encoder, prompt encoder and mask decoder."""
    rows = (*_image_encoder(config), *_prompt_encoder(config), *_mask_decoder(config))
    pixels = Allowed(
        re.escape(PREFIX) + r"pixel_(mean|std)", "SAM's pixel normalisation: a constant of the code"
    )
    return Table(rows, (pixels,))


def infer_config(tensors: Mapping[str, Any], where: str) -> SamConfig:
    """SAM's geometry from the shapes of its tensors (no file states it).

    A relative-position table as long as the whole grid needs marks a global-attention block; the others
    give the window. Decoder heads leave no trace in the shapes: 8, as in every published SAM.
    """

    def shape(key: str) -> tuple[int, ...]:
        if PREFIX + key not in tensors:
            near = nearest(PREFIX + key, (k for k in tensors if k.startswith(PREFIX)))
            raise CheckpointError(f"{where}: SAM's tensor {PREFIX + key} is missing{near}.")
        return tuple(tensors[PREFIX + key].shape)

    def count(pattern: str) -> int:
        found = {int(m[1]) for k in tensors if (m := re.match(re.escape(PREFIX) + pattern, k))}
        return len(found)

    try:
        _, grid, _, width = shape("image_encoder.pos_embed")
        patch = shape("image_encoder.patch_embed.proj.weight")[-1]
        depth = count(r"image_encoder\.blocks\.(\d+)\.")
        tables = [shape(f"image_encoder.blocks.{i}.attn.rel_pos_h") for i in range(depth)]
        global_blocks = tuple(i for i, (rows, _) in enumerate(tables) if rows == 2 * grid - 1)
        windows = {(rows + 1) // 2 for i, (rows, _) in enumerate(tables) if i not in global_blocks}
        if len(windows) > 1:
            raise CheckpointError(f"{where}: SAM's blocks use several window sizes {sorted(windows)}.")
        return SamConfig(
            embed_dim=width,
            depth=depth,
            num_heads=width // tables[0][1],
            global_attn_indexes=global_blocks,
            mlp_dim=shape("image_encoder.blocks.0.mlp.lin1.weight")[0],
            image_size=grid * patch,
            patch_size=patch,
            window_size=windows.pop() if windows else 14,
            out_chans=shape("image_encoder.neck.0.weight")[0],
            mask_in_chans=shape("prompt_encoder.mask_downscaling.3.weight")[0],
            decoder_depth=count(r"mask_decoder\.transformer\.layers\.(\d+)\."),
            decoder_mlp_dim=shape("mask_decoder.transformer.layers.0.mlp.lin1.weight")[0],
            num_mask_tokens=shape("mask_decoder.mask_tokens.weight")[0],
            iou_head_depth=count(r"mask_decoder\.iou_prediction_head\.layers\.(\d+)\."),
            iou_head_hidden_dim=shape("mask_decoder.iou_prediction_head.layers.0.weight")[0],
        )
    except (ValueError, IndexError) as error:
        if isinstance(error, CheckpointError):
            raise
        raise CheckpointError(f"{where}: SAM's tensors have shapes no SAM has ({error}).") from None
