"""Everything a conversion decides before it writes: what the source is, and where each tensor goes.

Only headers and shapes are read here, so every refusal comes before any work.
"""

from __future__ import annotations

import dataclasses
import re
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, TypeVar

from read_jax.config import SASP_PRESETS, ClipVisionConfig, LlamaConfig, ReadConfig, SamConfig, SaspConfig
from read_jax.errors import CheckpointError, ReadJaxError
from read_jax.text.tokenizer import READ_TOKENS, Tokenizer
from read_jax.weights import engine, lora, sources, starting
from read_jax.weights.checkpoint import SASP_KEY
from read_jax.weights.sources import Tensor
from read_jax.weights.tables import model_table, sam

_T = TypeVar("_T")
_SOURCE, _TOWER, _SAM = "checkpoint", "vision tower", "SAM file"
_TOWER_PATTERNS = ("*.json", "model.safetensors", "pytorch_model.bin")


@dataclasses.dataclass
class Plan:
    """A checked conversion. tensors: by upstream key; ledger: where each goes; warnings: for the summary."""

    config: ReadConfig
    dtype: str
    tensors: dict[str, Tensor]
    ledger: engine.Ledger
    tokenizer: Tokenizer
    new_tokens: list[str]
    source: dict[str, Any]
    folder: Path
    tower: Path
    inputs: list[Path]
    sasp_choice: str
    warnings: list[str]
    tensors_read: int


def make_plan(
    source: str | Path,
    vision_tower: str | Path,
    *,
    sam_file: str | Path | None = None,
    adapter: str | Path | None = None,
    lora_alpha: float | None = None,
    dtype: str | None = None,
    sasp: str | None = None,
) -> Plan:
    """Open everything, work out the configuration, and settle the ledger. Raises `CheckpointError`."""
    folder = sources.resolve(source, _SOURCE)
    tower = sources.resolve(vision_tower, _TOWER, _TOWER_PATTERNS)
    stated = sources.read_json(folder / "config.json", _SOURCE)
    hf = {key: value for key, value in stated.items() if value is not None}  # null: not said
    base = sources.open_folder(folder, _SOURCE)
    warnings: list[str] = []
    read = dict(base)
    tensors = base
    opened = None
    if adapter is not None:
        opened = lora.open_adapter(adapter, lora_alpha)
        tensors = opened.overlay(base)
    elif lora_alpha is not None:
        raise CheckpointError("lora_alpha was given without a LoRA adapter.")
    if sam_file is not None:
        tensors = _with_sam(tensors, Path(sam_file).expanduser(), warnings)

    plain = not any(key.startswith(starting.PROJECTION) for key in base)
    tokenizer = Tokenizer.load(folder)
    new_tokens = tokenizer.add_tokens(READ_TOKENS) if plain else []
    _check_tokens(tokenizer, hf)
    tensors, vocab = _vocabulary(tensors, hf, tokenizer, plain=plain, replaced=tensors is not base)

    sam_config = _sam_config(tensors, plain)
    clip_hf = sources.read_json(tower / "config.json", _TOWER)
    vision = sources.open_folder(tower, _TOWER)
    clip = _read_config(
        ClipVisionConfig.from_hf,
        _TOWER,
        clip_hf,
        hf.get("mm_vision_select_layer", -2),
        hf.get("mm_vision_select_feature", "patch"),
    )
    _check_tower(tensors, vision, hf, clip)
    parsed = _read_config(LlamaConfig.from_hf, _SOURCE, hf).to_dict()
    llama = LlamaConfig.from_dict({**parsed, "vocab_size": vocab}, f"{_SOURCE}: config.json")  # checks types
    projector = str(hf.get("mm_projector_type") or "linear")
    if plain and starting.PROJECTION + "2.weight" not in tensors:
        tensors = {**tensors, **starting.new_projection(llama.hidden_size, sam_config.out_chans)}
    points, choice = _choose_sasp(sasp, hf, llama, projector, clip)
    config = ReadConfig(
        llama=llama,
        clip=clip,
        sam=sam_config,
        sasp=points,
        projector=projector,
        prompt_dim=sam_config.out_chans,
        use_im_start_end=True if plain else bool(hf.get("mm_use_im_start_end", True)),
    )
    everything = {**vision, **tensors}
    ledger = engine.settle(model_table(config), everything, f"{folder} with {tower}")
    if dtype is None:
        dtype = "bfloat16" if str(sources.dominant_dtype(base.values())) == "bfloat16" else "float32"
    if dtype not in ("float32", "bfloat16"):
        raise CheckpointError(f"dtype must be 'float32' or 'bfloat16', not {dtype!r}.")
    kind = "llava" if plain else "lisa" if projector == "linear" else _architecture(hf)
    record = {
        "checkpoint": str(source),
        "kind": kind,
        "vision_tower": str(vision_tower),
        "sam": None if sam_file is None else str(sam_file),
        "lora": None if adapter is None else str(adapter),
        "lora_scale": None if opened is None or not opened.pairs else opened.scale,
    }
    inputs = [
        folder,
        tower,
        *([Path(sam_file).expanduser()] if sam_file else []),
        *([opened.path] if opened else []),
    ]
    extra = 0 if opened is None else len(opened.weights) + 2 * len(opened.pairs)
    return Plan(
        config=config,
        dtype=dtype,
        tensors=everything,
        ledger=ledger,
        tokenizer=tokenizer,
        new_tokens=new_tokens,
        source=record,
        folder=folder,
        tower=tower,
        inputs=inputs,
        sasp_choice=choice,
        warnings=warnings,
        tensors_read=len(read) + len(vision) + extra,
    )


def _read_config(read: Callable[..., _T], what: str, *arguments: Any) -> _T:
    """`read(*arguments)`; values that make no sense at all become an error that names the file."""
    try:
        return read(*arguments)
    except ReadJaxError:
        raise
    except (ArithmeticError, AttributeError, TypeError, ValueError) as error:
        raise CheckpointError(f"{what}: config.json has values that make no sense: {error}.") from error


def _architecture(hf: Mapping[str, Any]) -> str:
    names = hf.get("architectures") or ["READForCausalLM"]
    return str(names[0]).removesuffix("ForCausalLM").lower()


def _with_sam(tensors: Mapping[str, Tensor], path: Path, warnings: list[str]) -> dict[str, Tensor]:
    """The checkpoint with all of SAM's tensors taken from a SAM file."""
    own = {key: tensor for key, tensor in tensors.items() if key.startswith(sam.PREFIX)}
    rest = {key: tensor for key, tensor in tensors.items() if key not in own}
    loaded = sources.open_file(path, _SAM)
    if not any(key.startswith("image_encoder.") for key in loaded):
        raise CheckpointError(
            f"{_SAM}: {path} is not a SAM checkpoint: it holds {next(iter(loaded), 'nothing')!r} and the "
            "like, not image_encoder.*."
        )
    if own:
        warnings.append(
            f"the checkpoint's own {len(own)} SAM tensors, its trained mask decoder among them, were "
            f"replaced by {path}"
        )
    return {**rest, **{sam.PREFIX + key: tensor for key, tensor in loaded.items()}}


def _sam_config(tensors: Mapping[str, Tensor], plain: bool) -> SamConfig:
    if plain and not any(key.startswith(sam.PREFIX) for key in tensors):
        raise CheckpointError(
            "this is a plain LLaVA checkpoint without SAM: pass SAM's own file too (for instance "
            "sam_vit_h_4b8939.pth)."
        )
    return sam.infer_config(tensors, _SOURCE)


def _check_tokens(tokenizer: Tokenizer, hf: Mapping[str, Any]) -> None:
    """The tokenizer must know [SEG], and the image's brackets where the prompts have them."""
    needed = {"[SEG]": tokenizer.added_tokens.get("[SEG]")}
    if hf.get("mm_use_im_start_end", True):
        needed |= {text: tokenizer.added_tokens.get(text) for text in READ_TOKENS}
    absent = [text for text, index in needed.items() if index is None]
    if absent:
        raise CheckpointError(
            f"{_SOURCE}: the tokenizer has no {', '.join(absent)}, which this checkpoint was trained "
            "with. Is "
            "added_tokens.json missing?"
        )


def _vocabulary(
    tensors: Mapping[str, Tensor], hf: Mapping[str, Any], tokenizer: Tokenizer, *, plain: bool, replaced: bool
) -> tuple[dict[str, Tensor], int]:
    """The tensors with vocabulary rows for every token, and their number."""
    result = dict(tensors)
    embed = tensors.get(starting.EMBED)
    if embed is None or len(embed.shape) != 2:
        raise CheckpointError(
            f"{_SOURCE}: {starting.EMBED} is missing or not a "
            f"matrix{engine.nearest(starting.EMBED, tensors)}."
        )
    rows = embed.shape[0]
    vocab = rows if replaced else hf.get("vocab_size", rows)
    if tokenizer.vocab_size <= rows:
        return result, vocab
    if not plain:
        raise CheckpointError(
            f"{_SOURCE}: the tokenizer has {tokenizer.vocab_size} tokens, the embedding only {rows} "
            "rows: the "
            "tokenizer files belong to another checkpoint."
        )
    if tokenizer.vocab_size - rows > len(READ_TOKENS):
        raise CheckpointError(
            f"{_SOURCE}: the embedding has {rows} rows, but the tokenizer alone has "
            f"{tokenizer.vocab_size - len(READ_TOKENS)} tokens: they belong to different checkpoints."
        )
    deviation = float(hf.get("initializer_range", 0.02))
    for key in (starting.EMBED, starting.HEAD):
        if key in result and result[key].shape == embed.shape:
            result[key] = starting.extend_rows(result[key], tokenizer.vocab_size, deviation)
    return result, tokenizer.vocab_size


def _check_tower(
    tensors: Mapping[str, Tensor], vision: Mapping[str, Tensor], hf: Mapping[str, Any], clip: ClipVisionConfig
) -> None:
    """Refuse a CLIP other than the one the checkpoint was trained with, as far as can be told."""
    first = tensors.get("model.mm_projector.0.weight") or tensors.get("model.mm_projector.weight")
    if first is not None and len(first.shape) == 2 and first.shape[1] != clip.hidden_size:
        raise CheckpointError(
            f"{_TOWER}: this CLIP is {clip.hidden_size} wide, the checkpoint's projector reads "
            f"{first.shape[1]}: it "
            f"was trained with another CLIP ({hf.get('mm_vision_tower', 'unnamed')})."
        )
    key = "vision_model.embeddings.position_embedding.weight"
    if key in vision and vision[key].shape[0] != clip.grid_size**2 + 1:
        raise CheckpointError(
            f"{_TOWER}: {key} has {vision[key].shape[0]} rows, but config.json's {clip.image_size} px need "
            f"{clip.grid_size**2 + 1}: config and weights are of different CLIPs."
        )
    name = str(hf.get("mm_vision_tower") or "").rstrip("/").split("/")[-1]
    match = re.fullmatch(r"clip-vit-\w+-patch\d+(?:-(\d+))?", name)
    wanted = int(match[1] or 224) if match else clip.image_size
    if wanted != clip.image_size:
        raise CheckpointError(
            f"{_TOWER}: this CLIP sees {clip.image_size} px, but the checkpoint was trained with {name} "
            f"({wanted} px). Pass {hf['mm_vision_tower']}."
        )


def _choose_sasp(
    name: str | None, hf: Mapping[str, Any], llama: LlamaConfig, projector: str, clip: ClipVisionConfig
) -> tuple[SaspConfig, str]:
    """The point settings, and a word on why; only config.json of our own exports states them."""
    if name is not None:
        return SaspConfig.preset(name), f"{name} (as asked)"
    if hf.get(SASP_KEY) is not None:
        stated = SaspConfig.from_dict(hf[SASP_KEY], f"{_SOURCE}: config.json: {SASP_KEY}")
        return stated, f"{'on' if stated.enabled else 'off'} (config.json states them)"
    if projector == "linear" or clip.image_size != 336:
        return SaspConfig.preset("off"), "off (a linear projector or a CLIP of other than 336 px: LISA)"
    classes = [str(c) for c in hf.get("architectures") or ()]
    if any(c.upper().startswith(("SESAME", "LISA")) for c in classes):
        return SaspConfig.preset("off"), f"off (config.json names {classes[0]}, trained without points)"
    preset = SaspConfig.preset_for_width(llama.hidden_size)
    if preset is None:
        raise CheckpointError(
            f"the SasP settings of a language model {llama.hidden_size} wide are not known; choose with "
            f"--sasp: {', '.join(SASP_PRESETS)}."
        )
    why = f"by width {llama.hidden_size}; for a model trained without points choose 'off'"
    return SaspConfig.preset(preset), f"{preset} ({why})"
