"""Initial values for new models: what helps a small model to learn from nothing, on little data.

A converted model brings its own values; these are for `start.scratch` alone.
"""

from __future__ import annotations

import jax.numpy as jnp
import numpy as np

from read_jax.models.clip import ClipVision, normalize_clip
from read_jax.models.layers import patchify
from read_jax.models.llama import Llama
from read_jax.models.read import Read

_SHORTEST, _LONGEST = 2.0, 20.0
"""Periods of the position codes, in cells of the grid."""


def position_codes(grid: int, width: int) -> np.ndarray:
    """2D sine-cosine codes, float32 [grid, grid, width]: the first half tells the row, the second the column.

    Every value lies in [-1, 1]; what is over when width is no multiple of 4 is zero.
    """
    count = width // 4
    frequency = 2 * np.pi / (_SHORTEST * (_LONGEST / _SHORTEST) ** (np.arange(count) / count))
    angle = np.arange(grid)[:, None] * frequency
    line = np.concatenate([np.sin(angle), np.cos(angle)], axis=-1)
    rows, columns = np.broadcast_arrays(line[:, None], line[None])
    codes = np.zeros((grid, grid, width), np.float32)
    codes[..., : 4 * count] = np.concatenate([rows, columns], axis=-1)
    return codes


def code_positions(model: Read, amplitude: float = 1.0) -> None:
    """Begin both vision encoders with position codes as large as what the patches say.

    Drawn at random and small, as usual, they are learned last, and until then all places look alike.
    """
    clip, encoder = model.clip, model.sam.image_encoder
    codes = position_codes(clip.config.grid_size, clip.config.hidden_size)
    table = np.concatenate([np.zeros_like(codes[0, :1]), codes.reshape(-1, codes.shape[-1])])
    clip.position_embed[...] = jnp.asarray(amplitude * table)
    codes = position_codes(model.config.sam.grid_size, model.config.sam.embed_dim)
    encoder.position_embed[...] = jnp.asarray(0.5 * amplitude * codes).reshape(encoder.position_embed.shape)


def whiten_patches(clip: ClipVision, pictures: np.ndarray, seed: int = 0, floor: float = 3e-3) -> None:
    """Begin the patch embedding with the whitened principal components of patches, in a random rotation.

    Args:
        clip: its position codes take the mean patch away.
        pictures: uint8 [n, s, s, 3], of the kind it will see.
        seed: of the rotation.
        floor: added to the variances, as a share of their mean: components that say nothing stay small.
    """
    patches = np.asarray(patchify(normalize_clip(pictures), clip.config.patch_size), np.float64)
    patches = patches.reshape(-1, patches.shape[-1])
    mean, width = patches.mean(axis=0), clip.config.hidden_size
    variances, directions = np.linalg.eigh(np.cov(patches - mean, rowvar=False))
    variances, directions = variances[::-1][:width], directions[:, ::-1][:, :width]
    rotation, _ = np.linalg.qr(np.random.default_rng(seed).normal(size=(len(variances), width)))
    kernel = directions / np.sqrt(variances + floor * variances.mean()) @ rotation
    clip.patch_embed.kernel[...] = jnp.asarray(kernel, jnp.float32)
    clip.position_embed[...] = clip.position_embed[...].at[1:].add(jnp.asarray(-mean @ kernel, jnp.float32))


def mimetic_attention(clip: ClipVision, seed: int = 0) -> None:
    """Begin with attention that looks at like tokens, as that of trained models does.

    Source: Trockman and Kolter, "Mimetic Initialization of Self-Attention Layers" (2023): query times key
    near the identity, value times output near its negative.
    """
    if clip.layers is None:
        return
    random = np.random.default_rng(seed)
    attention = clip.layers.attn
    depth, width, _ = attention.q_proj.kernel.shape
    size = width // clip.config.num_heads
    q, k, v, o = (np.zeros((depth, width, width), np.float32) for _ in range(4))

    def noise() -> np.ndarray:
        return random.normal(size=(width, width)) / width**0.5

    for layer in range(depth):
        for start in range(0, width, size):
            left, scale, right = np.linalg.svd(0.7 * noise() + 0.7 * np.eye(width))
            root = scale[:size] ** 0.5
            q[layer, :, start : start + size] = left[:, :size] * root
            k[layer, :, start : start + size] = right[:size].T * root
        left, scale, right = np.linalg.svd(0.4 * noise() - 0.4 * np.eye(width))
        v[layer], o[layer] = left * scale**0.5, (right.T * scale**0.5).T
    for name, kernel in (("q_proj", q), ("k_proj", k), ("v_proj", v), ("out_proj", o)):
        getattr(attention, name).kernel[...] = jnp.asarray(kernel)


def word_to_token(width: int, seed: int = 0) -> np.ndarray:
    """The rotation that takes a word's embedding to what image tokens of such things resemble.

    float32 [width, width], orthogonal. Resembling the embedding itself they could not be told from the word:
    a word that looks for its like would find, above all, itself.
    """
    return np.linalg.qr(np.random.default_rng(seed).normal(size=(width, width)))[0].astype(np.float32)


def seek_tokens(llama: Llama, rotation: np.ndarray, seed: int = 0, gain: float = 2.0) -> None:
    """Begin with attention by which words look for image tokens that `rotation` takes them to.

    In every head, the slower half of the rotary frequencies does so, each in directions of its own: over
    the length of a prompt they hardly turn. The faster half stays as it is, to tell neighbours by.

    Args:
        llama: the language model.
        rotation: as `word_to_token` gives it.
        seed: of the directions.
        gain: how strongly.
    """
    config = llama.config
    random = np.random.default_rng(seed)
    half = config.head_dim // 2
    slow = np.arange(half // 2, half)
    slow = np.concatenate([slow, slow + half])  # rotary pairs are half a head apart
    attention = llama.layers.attn
    q, k = (np.array(layer.kernel[...]) for layer in (attention.q_proj, attention.k_proj))
    width, shared = config.hidden_size, config.num_heads // config.num_kv_heads
    for layer in range(config.num_layers):
        directions, _ = np.linalg.qr(random.normal(size=(width, width)))
        for head in range(config.num_kv_heads):
            chosen = gain * directions[:, (head * len(slow) + np.arange(len(slow))) % width]
            k[layer][:, head * config.head_dim + slow] = chosen
            for asking in range(head * shared, (head + 1) * shared):
                q[layer][:, asking * config.head_dim + slow] = rotation @ chosen
    attention.q_proj.kernel[...], attention.k_proj.kernel[...] = jnp.asarray(q), jnp.asarray(k)
