"""LoRA adapters: PEFT folders, and the whole-model file that DeepSpeed's zero_to_fp32 writes.

An adapter is laid over a base checkpoint: its full weights replace the base's, its low-rank pairs are
added to the weight they belong to, W + scale * B @ A, computed in float32.
"""

from __future__ import annotations

import dataclasses
import math
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np

from read_jax.errors import CheckpointError
from read_jax.weights import sources
from read_jax.weights.engine import is_floating, nearest
from read_jax.weights.sources import Tensor

PREFIX = "base_model.model."
_BESIDE = "non_lora_trainables.bin"  # LLaVA saves there what it trained fully, beside the adapter
_WHAT = "LoRA adapter"
# options of PEFT that change what the stored tensors mean
_UNSUPPORTED = (
    "use_dora",
    "fan_in_fan_out",
    "rank_pattern",
    "alpha_pattern",
    "layer_replication",
    "megatron_config",
    "lora_bias",
    "use_qalora",
    "alora_invocation_tokens",
)
_REBASING_INITS = ("pissa", "olora", "corda", "loftq")


@dataclasses.dataclass(frozen=True)
class Adapter:
    """An opened adapter. rank, scale: as merged; weights: full tensors by the base's key; pairs: (A, B)."""

    path: Path
    rank: int
    scale: float
    weights: dict[str, Tensor]
    pairs: dict[str, tuple[Tensor, Tensor]]

    def overlay(self, base: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """The base with this adapter merged into it, lazily; raises `CheckpointError` where they disagree."""
        merged = {**base, **self.weights}
        for key, (a, b) in self.pairs.items():
            if key not in merged:
                raise CheckpointError(
                    f"{_WHAT}: {self.path} adapts {key}, which the base checkpoint does not have"
                    f"{nearest(key, merged)}."
                )
            weight = merged[key]
            if len(weight.shape) != 2 or (b.shape[0], a.shape[1]) != weight.shape:
                raise CheckpointError(
                    f"{_WHAT}: {a.key} {list(a.shape)} and {b.key} {list(b.shape)} do not fit {key} "
                    f"{list(weight.shape)}: the adapter was trained on another base."
                )
            merged[key] = self._merged(weight, a, b)
        return merged

    def _merged(self, weight: Tensor, a: Tensor, b: Tensor) -> Tensor:
        def read() -> np.ndarray:
            update = b.read().astype(np.float32) @ a.read().astype(np.float32)
            return weight.read().astype(np.float32) + np.float32(self.scale) * update

        return dataclasses.replace(weight, dtype=np.dtype(np.float32), read=read)


def open_adapter(name: str | Path, alpha: float | None = None) -> Adapter:
    """Open a PEFT folder (or Hugging Face id), a zero_to_fp32 file, or a folder that holds one.

    alpha: LoRA's alpha where no adapter_config.json states it; twice the rank (the original's choice)
    when neither does. Raises `CheckpointError`.
    """
    patterns = ("adapter_config.json", "adapter_model.*", _BESIDE, "pytorch_model*.bin", "*.index.json")
    path = sources.resolve(name, _WHAT, patterns)
    config: dict[str, Any] = {}
    if path.is_file():
        tensors = sources.open_file(path, _WHAT)
    elif (path / "adapter_config.json").is_file():
        config = sources.read_json(path / "adapter_config.json", _WHAT)
        _check_config(config, path)
        files = [path / f"adapter_model.{suffix}" for suffix in ("safetensors", "bin")]
        file = next((f for f in files if f.is_file()), None)
        if file is None:
            raise CheckpointError(
                f"{_WHAT}: {path} has neither adapter_model.safetensors nor adapter_model.bin."
            )
        tensors = sources.open_file(file, _WHAT)
        if (path / _BESIDE).is_file():
            tensors = {**sources.open_file(path / _BESIDE, _WHAT), **tensors}
    else:
        tensors = sources.open_folder(path, _WHAT)
    weights, halves = _split(tensors, path)
    pairs, rank = _pair(halves, path)
    scale = _scale(config, rank, alpha, path) if pairs else 1.0
    return Adapter(path, rank, scale, weights, pairs)


def _check_config(config: Mapping[str, Any], path: Path) -> None:
    if config.get("peft_type", "LORA") != "LORA":
        raise CheckpointError(f"{_WHAT}: {path} is of type {config['peft_type']!r}; only LORA can be merged.")
    used = [option for option in _UNSUPPORTED if config.get(option)]
    init = str(config.get("init_lora_weights", "")).lower()
    if init.startswith(_REBASING_INITS):
        used.append(f"init_lora_weights={init}")
    if config.get("bias", "none") not in ("none", None):
        used.append(f"bias={config['bias']}")
    if used:
        raise CheckpointError(
            f"{_WHAT}: {path} uses {', '.join(used)}, which cannot be merged here. Merge it with PEFT first "
            "(merge_and_unload) and convert the result."
        )


def _split(
    tensors: Mapping[str, Tensor], path: Path
) -> tuple[dict[str, Tensor], dict[str, dict[str, Tensor]]]:
    """Full weights by the base's key, and low-rank halves by the key of the weight they adapt."""
    weights: dict[str, Tensor] = {}
    halves: dict[str, dict[str, Tensor]] = {}
    for key, tensor in tensors.items():
        if not key.startswith(PREFIX):
            raise CheckpointError(
                f"{_WHAT}: {path} holds {key}, which does not start with {PREFIX!r}: it is not an "
                "adapter. Pass a merged checkpoint as the source instead."
            )
        name = key.removeprefix(PREFIX)
        half = re.fullmatch(r"(.+)\.lora_([AB])(?:\.(?!weight$)[^.]+)?\.weight", name)
        if half:
            halves.setdefault(f"{half[1]}.weight", {})[half[2]] = tensor
            continue
        if "lora_" in name:
            raise CheckpointError(
                f"{_WHAT}: {key} in {path} is of a kind that cannot be merged here (DoRA, embedding or bias "
                "adapters). Merge it with PEFT first (merge_and_unload)."
            )
        if ".original_module." in name:
            continue  # PEFT keeps the weight that modules_to_save replaced
        name = re.sub(r"\.modules_to_save(\.[^.]+)?(?=\.[^.]+$)", "", name).replace(".base_layer.", ".")
        weights[name] = tensor
    return weights, halves


def _pair(
    halves: Mapping[str, dict[str, Tensor]], path: Path
) -> tuple[dict[str, tuple[Tensor, Tensor]], int]:
    pairs: dict[str, tuple[Tensor, Tensor]] = {}
    ranks: dict[int, str] = {}
    for key, half in halves.items():
        if set(half) != {"A", "B"}:
            raise CheckpointError(
                f"{_WHAT}: {path} has only lora_{''.join(half)} for {key}; the other half is missing."
            )
        a, b = half["A"], half["B"]
        if len(a.shape) != 2 or len(b.shape) != 2 or a.shape[0] != b.shape[1]:
            raise CheckpointError(
                f"{_WHAT}: the ranks of {a.key} {list(a.shape)} and {b.key} {list(b.shape)} in {path} differ."
            )
        if not is_floating(a.dtype) or not is_floating(b.dtype):
            raise CheckpointError(f"{_WHAT}: {a.key} in {path} is {a.dtype}, not floating point.")
        ranks.setdefault(a.shape[0], key)
        pairs[key] = (a, b)
    if len(ranks) > 1:
        raise CheckpointError(
            f"{_WHAT}: {path} mixes the ranks {sorted(ranks)} ({', '.join(ranks.values())})."
        )
    return pairs, next(iter(ranks), 0)


def _scale(config: Mapping[str, Any], rank: int, alpha: float | None, path: Path) -> float:
    stated = config.get("lora_alpha")
    if config.get("r") not in (None, rank):
        raise CheckpointError(f"{_WHAT}: {path} says rank {config['r']}, its tensors have rank {rank}.")
    if stated is not None and alpha is not None and alpha != stated:
        raise CheckpointError(
            f"{_WHAT}: alpha {alpha:g} was asked for, but {path}/adapter_config.json says {stated:g}. "
            "Leave the "
            "option out."
        )
    value = stated if stated is not None else alpha if alpha is not None else 2 * rank
    if not isinstance(value, int | float) or not math.isfinite(value):
        raise CheckpointError(f"{_WHAT}: lora_alpha {value!r} is not a number.")
    return float(value) / (math.sqrt(rank) if config.get("use_rslora") else rank)
