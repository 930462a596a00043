"""What a training step costs by our own count: operations, bytes and memory, before anything is compiled.

The compiler's own figures take the body of a loop once, so they cannot say what a step costs; these count
every product of the network. Memory is an estimate that ranks candidates, within some tens of percent; only
the compiler's answer says whether a step fits.
"""

from __future__ import annotations

import dataclasses
import math
from typing import NamedTuple

import numpy as np
from jax.sharding import Mesh

from read_jax.config import ReadConfig
from read_jax.models.attention import KERNEL_FROM, WHOLE_FROM
from read_jax.planning.programs import Setup, abstract_state, bytes_per_device, placed, prefix_length
from read_jax.sharding import FSDP, TENSOR, batch_devices
from read_jax.training.config import TrainConfig
from read_jax.training.flops import (
    llama_pairs,
    llama_weights,
    mask_decoder_forward,
    prompt_tokens,
    sam_encoder_forward,
    train_step_flops,
)

_FLOAT32 = 4


class Cost(NamedTuple):
    """Of one update, per device.

    useful: operations that the result needs, every question having all its tokens; done: with what is
    recomputed; bytes: read from and written to the device's memory, at least; memory: bytes held at once.
    """

    useful: float
    done: float
    bytes: float
    memory: float


@dataclasses.dataclass(frozen=True)
class _Sizes:
    """Numbers that the counts are made of, per device and micro-batch."""

    pictures: float
    tokens: float
    pairs: float  # (query, key)
    answers: float  # tokens of questions and answers
    kernels: bool  # whether scores of long sequences stay on the chip


class Held(NamedTuple):
    """Bytes on a device that neither the batch nor what is recomputed changes. state: trained parameters,
    their moments and averages; frozen: the other parameters."""

    state: float
    frozen: float


def held(setup: Setup, mesh: Mesh) -> Held:
    """Of a run on a mesh."""
    return Held(*(bytes_per_device(x) for x in (abstract_state(setup, mesh), placed(setup.frozen, mesh))))


def train_cost(setup: Setup, mesh: Mesh, *, kernels: bool = True, on_device: Held | None = None) -> Cost:
    """One update of a run on a mesh.

    kernels: TPUs', which keep scores of long sequences on the chip. on_device: what `held` says of the two,
    where it is known already.
    """
    config, model = setup.config, setup.model
    data, llama = config.data, model.llama
    abreast, tensor = batch_devices(mesh), mesh.shape[TENSOR]
    lengths = np.full((data.global_batch, data.questions), data.tokens)
    useful = train_step_flops(
        model, config.trainable, prefix_length(model), lengths, data.global_batch * data.questions
    )
    pictures = data.global_batch / abreast / config.step.micro_batches
    sizes = _Sizes(
        pictures,
        pictures * (prefix_length(model) + data.questions * data.tokens),
        pictures * llama_pairs(prefix_length(model), lengths[0]),
        pictures * data.questions * data.tokens,
        kernels,
    )
    scores = 4.0 * llama.num_layers * llama.num_heads * llama.head_dim * sizes.pairs
    forward = (2.0 * llama_weights(llama) * sizes.tokens + scores) * config.step.micro_batches / tensor
    again = {True: forward, "dots": scores * config.step.micro_batches / tensor, False: 0.0}
    if kernels and sizes.tokens / sizes.pictures >= KERNEL_FROM:
        # a kernel's gradient finds the scores again, once for the queries and once for keys and values
        again = {
            remat: more + 1.5 * scores * config.step.micro_batches / tensor for remat, more in again.items()
        }
    done = useful / (abreast * tensor) + again[config.step.remat]
    done += (1 - 1 / tensor) * _unshared(config, model) / abreast
    state, frozen = on_device or held(setup, mesh)
    moved = config.step.micro_batches * _bytes_of_part(config, model, sizes, mesh)
    # of the update: parameters, gradients and moments, each read and written
    return Cost(
        useful / (abreast * tensor),
        done,
        moved + 3 * state,
        state + frozen + _memory(config, model, sizes, mesh, gradients=state / 3),
    )


def _unshared(config: TrainConfig, model: ReadConfig) -> float:
    """Operations of an update that devices which share a picture do all of them, see `read_jax.sharding`:
    SAM's encoder but for its MLPs, its decoder, and the logits."""
    sam, data = model.sam, config.data
    mlps = 4.0 * sam.depth * sam.grid_size**2 * sam.embed_dim * sam.mlp_dim
    head = 2.0 * model.llama.hidden_size * model.llama.vocab_size * data.tokens
    decoder = mask_decoder_forward(sam, prompt_tokens(model))
    return data.global_batch * (sam_encoder_forward(sam) - mlps + 3 * data.questions * (head + decoder))


def _bytes_of_part(config: TrainConfig, model: ReadConfig, sizes: _Sizes, mesh: Mesh) -> float:
    """Forward and backward of one micro-batch."""
    llama, item, tensor = model.llama, 4 if config.dtype == "float32" else 2, mesh.shape[TENSOR]
    passes = 3 if config.step.remat is True else 2
    weights = item * llama_weights(llama) / tensor
    # gathered weights are written before they are read
    total = passes * weights * (2 if mesh.shape[FSDP] > 1 else 1)
    wide = 10 * llama.hidden_size + 6 * llama.intermediate_size / tensor
    total += (passes + 1) * item * llama.num_layers * sizes.tokens * wide
    total += (passes + 1) * 2 * llama.num_layers * _scores(model, sizes, tensor)
    total += 6 * _FLOAT32 * sizes.answers * llama.vocab_size
    return total + sizes.pictures * _sam_bytes(model, item, sizes.kernels)


def _scores(model: ReadConfig, sizes: _Sizes, tensor: int) -> float:
    """Bytes of a LLaMA layer's scores in the device's memory: none where a kernel attends."""
    written = not sizes.kernels or sizes.tokens / sizes.pictures < KERNEL_FROM
    return written * _FLOAT32 * model.llama.num_heads / tensor * sizes.pairs


def _sam_bytes(model: ReadConfig, item: int, kernels: bool) -> float:
    """SAM's encoder over one picture: its scores above all."""
    sam = model.sam
    cells = sam.grid_size**2
    everywhere = len(sam.global_attn_indexes) * cells**2 * (cells < WHOLE_FROM or not kernels)
    windows = (sam.depth - len(sam.global_attn_indexes)) * cells * sam.window_size**2
    scores = 3 * _FLOAT32 * sam.num_heads * (everywhere + windows)
    return scores + item * sam.depth * cells * (12 * sam.embed_dim + 2 * sam.mlp_dim)


def _memory(config: TrainConfig, model: ReadConfig, sizes: _Sizes, mesh: Mesh, *, gradients: float) -> float:
    """Held at once beside the parameters and their moments: gradients, and the most that a part needs."""
    llama, item = model.llama, 4 if config.dtype == "float32" else 2
    fsdp, tensor = mesh.shape[FSDP], mesh.shape[TENSOR]
    layer = llama_weights(llama) / llama.num_layers
    kept = llama.hidden_size * item * sizes.tokens  # of every layer: its input
    if config.step.remat is not True:
        kept += item * sizes.tokens * (3 * llama.hidden_size + 2 * llama.intermediate_size) / tensor
    if config.step.remat is False:
        kept += item * sizes.tokens * llama.hidden_size / tensor + _scores(model, sizes, tensor)
    one = item * sizes.tokens * (8 * llama.hidden_size + 4 * llama.intermediate_size / tensor)
    one += 2 * _scores(model, sizes, tensor)
    gathered = 2 * item * layer / tensor * (fsdp > 1)
    logits = 3 * _FLOAT32 * sizes.answers * llama.vocab_size
    tables = 2 * item * llama.vocab_size * llama.hidden_size * (fsdp * tensor > 1)
    encoder = 4 * sizes.pictures * _sam_bytes(model, item, sizes.kernels) / model.sam.depth
    masks = 8 * _FLOAT32 * sizes.pictures * config.data.questions * math.prod(config.data.mask_canvas)
    return gradients + llama.num_layers * kept + max(one + gathered, logits + tables, encoder, masks)
