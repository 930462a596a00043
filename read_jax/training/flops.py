"""Floating-point operations of a training step, counted from the architecture, and what devices can do.

Only work that the result needs is counted: no padding of questions, no recomputation. A product of [m, k]
and [k, n] is 2 m k n. (The compiler's own count takes the body of a scan once.)
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from read_jax.config import ClipVisionConfig, LlamaConfig, ReadConfig, SamConfig
from read_jax.training.step import is_chosen

PEAK = {
    "H200": 989e12,
    "H100": 989e12,
    "A100": 312e12,
    "L40S": 362e12,
    "TPU v4": 275e12,
    "TPU v5p": 459e12,
    "TPU v5 lite": 197e12,
    "TPU v5e": 197e12,
    "TPU v5": 459e12,  # v5p, by what JAX calls it
    "TPU v6 lite": 918e12,
    "TPU v6e": 918e12,
}
"""bfloat16 operations per second without sparsity, from the data sheets, by part of the device's name."""


def peak(device_kind: str) -> float | None:
    """Operations per second of a device, None if it is not in the table (a CPU)."""
    return next((rate for name, rate in PEAK.items() if name.lower() in device_kind.lower()), None)


def clip_forward(config: ClipVisionConfig) -> float:
    """CLIP's used layers over one picture."""
    n, d = config.grid_size**2 + 1, config.hidden_size
    layer = 2 * n * (4 * d * d + 2 * d * config.intermediate_size) + 4 * n * n * d
    return config.used_layers * layer + 2 * (n - 1) * 3 * config.patch_size**2 * d


def sam_encoder_forward(config: SamConfig) -> float:
    """SAM's image encoder over one picture; windows are padded to whole ones, as the network has it."""
    side, d, w = config.grid_size, config.embed_dim, config.window_size
    windows = (-(-side // w)) ** 2
    total = 2.0 * side**2 * 3 * config.patch_size**2 * d
    for block in range(config.depth):
        everywhere = block in config.global_attn_indexes
        extent, parts = (side, 1) if everywhere else (w, windows)
        n = extent**2
        total += parts * (2 * n * 4 * d * d + 4 * n * n * d + 2 * 2 * n * extent * d)
        total += 2 * side**2 * 2 * d * config.mlp_dim
    return total + 2 * side**2 * (d * config.out_chans + 9 * config.out_chans**2)


def mask_decoder_forward(config: SamConfig, tokens: int) -> float:
    """SAM's mask decoder for one prompt of so many tokens (the output tokens among them)."""
    n, c = config.grid_size**2, config.out_chans
    half = c // 2
    cross = 2 * (2 * tokens * c * half + 2 * n * c * half) + 4 * tokens * n * half
    layer = 2 * cross + 2 * tokens * (4 * c * c + 2 * c * config.decoder_mlp_dim) + 4 * tokens**2 * c
    upscaling = 2 * n * 4 * (c * (c // 4) + 4 * (c // 4) * (c // 8))
    return config.decoder_depth * layer + cross + upscaling + 2 * 16 * n * (c // 8)


def llama_pairs(prefix: int, lengths: Sequence[int] | np.ndarray) -> float:
    """(query, key) pairs of a prefix and the questions behind it."""
    t = np.asarray(lengths, np.float64)
    return prefix * (prefix + 1) / 2 + float(np.sum(t * prefix + t * (t + 1) / 2))


def llama_weights(config: LlamaConfig) -> int:
    """Weights of all layers that every token is multiplied with."""
    own, shared = config.num_heads * config.head_dim, config.num_kv_heads * config.head_dim
    width = config.hidden_size
    return config.num_layers * (2 * width * own + 2 * width * shared + 3 * width * config.intermediate_size)


def prompt_tokens(config: ReadConfig) -> int:
    """Tokens of the mask decoder: its own, the points' and the [SEG]'s."""
    points = config.sasp.num_points + 1 if config.sasp.enabled else 0
    return 1 + config.sam.num_mask_tokens + points + 1


def train_step_flops(
    config: ReadConfig,
    trainable: Sequence[str],
    prefix: int,
    lengths: np.ndarray,
    masks: int,
    encoders: bool = True,
) -> float:
    """One update.

    Args:
        config: the model.
        trainable: names of what is trained: gradients of frozen weights are not needed, those of activations
            are, everywhere behind the first trained parameter.
        prefix: tokens before every question.
        lengths: int [B, Q] tokens of the questions, 0 where there is none.
        masks: how many have a mask.
        encoders: whether the vision encoders run.
    """
    llama, pictures = config.llama, len(lengths)
    tokens = pictures * prefix + float(np.sum(lengths))
    pairs = sum(llama_pairs(prefix, row[row > 0]) for row in np.asarray(lengths))

    def cost(forward: float, path: str) -> float:  # of weights: forward, activations' and own gradient
        return forward * (3 if is_chosen(trainable, path) else 2)

    total = cost(2.0 * llama_weights(llama) * tokens, "llama.layers")
    total += 3 * 4.0 * llama.num_layers * llama.num_heads * llama.head_dim * pairs
    total += cost(2.0 * llama.hidden_size * llama.vocab_size * float(np.sum(lengths)), "llama.lm_head")
    for forward, path in (
        (clip_forward(config.clip), "clip"),
        (sam_encoder_forward(config.sam), "sam.image_encoder"),
    ):
        total += encoders * pictures * forward * (3 if is_chosen(trainable, path) else 1)
    decoder = mask_decoder_forward(config.sam, prompt_tokens(config))
    return total + masks * cost(decoder, "sam.mask_decoder")
