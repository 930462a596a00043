"""Small checkpoints with random weights in the original layouts, made on the spot.

    folder = write_read_checkpoint(tmp / "ckpt", kind="read", format="bin")
    clip = write_clip(tmp / "clip")

Names and shapes are written out here from the original's modules, independently of the tables that the
tests hold against them.
"""

from __future__ import annotations

import dataclasses
import functools
import io
import json
from collections.abc import Callable, Mapping
from pathlib import Path

import numpy as np
import sentencepiece
import torch
from safetensors.torch import save_file

State = dict[str, torch.Tensor]
TOKENS = ("[SEG]", "<im_start>", "<im_end>")


@dataclasses.dataclass(frozen=True)
class Sizes:
    """Widths and depths; the defaults are as small as the layouts allow.

    kv_heads, head_dim: None for as many as `heads`, and for hidden / heads.
    """

    hidden: int = 16
    layers: int = 2
    heads: int = 2
    kv_heads: int | None = None
    head_dim: int | None = None
    inter: int = 24
    clip_hidden: int = 8
    clip_heads: int = 2
    clip_layers: int = 3
    clip_inter: int = 12
    sam_dim: int = 16
    sam_depth: int = 3
    sam_heads: int = 2
    sam_global: tuple[int, ...] = (1,)
    sam_grid: int = 4
    sam_window: int = 2
    sam_out: int = 32
    sam_mlp: int = 20
    decoder_mlp: int = 24

    def attention_widths(self) -> dict[str, int]:
        """Outputs of the language model's q_proj, k_proj and v_proj."""
        head = self.head_dim or self.hidden // self.heads
        shared = head * (self.kv_heads or self.heads)
        return {"q_proj": head * self.heads, "k_proj": shared, "v_proj": shared}


SMALL = Sizes()


class Random:
    """Tensors of one seed, in one type."""

    def __init__(self, seed: int, dtype: torch.dtype = torch.float32) -> None:
        self._generator = torch.Generator().manual_seed(seed)
        self._dtype = dtype

    def __call__(self, *shape: int) -> torch.Tensor:
        return torch.randn(shape, generator=self._generator).to(self._dtype)


def _linear(state: State, key: str, inputs: int, outputs: int, draw: Random, bias: bool = True) -> None:
    state[f"{key}.weight"] = draw(outputs, inputs)
    if bias:
        state[f"{key}.bias"] = draw(outputs)


def _norm(state: State, key: str, width: int, draw: Random) -> None:
    state[f"{key}.weight"] = draw(width)
    state[f"{key}.bias"] = draw(width)


def llama_state(sizes: Sizes, vocab: int, draw: Random, buffers: bool = True) -> State:
    """`model.*` and `lm_head` of a LLaMA."""
    width, state = sizes.hidden, {"model.embed_tokens.weight": draw(vocab, sizes.hidden)}
    for i in range(sizes.layers):
        key = f"model.layers.{i}."
        outputs = sizes.attention_widths()
        for name, size in outputs.items():
            _linear(state, f"{key}self_attn.{name}", width, size, draw, bias=False)
        _linear(state, f"{key}self_attn.o_proj", outputs["q_proj"], width, draw, bias=False)
        if buffers:
            half = outputs["q_proj"] // sizes.heads // 2
            state[f"{key}self_attn.rotary_emb.inv_freq"] = 10000.0 ** -(torch.arange(half) / half)
        _linear(state, f"{key}mlp.gate_proj", width, sizes.inter, draw, bias=False)
        _linear(state, f"{key}mlp.up_proj", width, sizes.inter, draw, bias=False)
        _linear(state, f"{key}mlp.down_proj", sizes.inter, width, draw, bias=False)
        state[f"{key}input_layernorm.weight"] = draw(width)
        state[f"{key}post_attention_layernorm.weight"] = draw(width)
    state["model.norm.weight"] = draw(width)
    state["lm_head.weight"] = draw(vocab, width)
    return state


def sam_state(sizes: Sizes, draw: Random) -> State:
    """SAM's state dict as its .pth file has it."""
    width, head, out, grid = sizes.sam_dim, sizes.sam_dim // sizes.sam_heads, sizes.sam_out, sizes.sam_grid
    state: State = {"image_encoder.pos_embed": draw(1, grid, grid, width)}
    state["image_encoder.patch_embed.proj.weight"] = draw(width, 3, 16, 16)
    state["image_encoder.patch_embed.proj.bias"] = draw(width)
    for i in range(sizes.sam_depth):
        key, side = f"image_encoder.blocks.{i}.", grid if i in sizes.sam_global else sizes.sam_window
        _norm(state, f"{key}norm1", width, draw)
        state[f"{key}attn.rel_pos_h"] = draw(2 * side - 1, head)
        state[f"{key}attn.rel_pos_w"] = draw(2 * side - 1, head)
        _linear(state, f"{key}attn.qkv", width, 3 * width, draw)
        _linear(state, f"{key}attn.proj", width, width, draw)
        _norm(state, f"{key}norm2", width, draw)
        _linear(state, f"{key}mlp.lin1", width, sizes.sam_mlp, draw)
        _linear(state, f"{key}mlp.lin2", sizes.sam_mlp, width, draw)
    state["image_encoder.neck.0.weight"] = draw(out, width, 1, 1)
    _norm(state, "image_encoder.neck.1", out, draw)
    state["image_encoder.neck.2.weight"] = draw(out, out, 3, 3)
    _norm(state, "image_encoder.neck.3", out, draw)

    key = "prompt_encoder."
    state[f"{key}pe_layer.positional_encoding_gaussian_matrix"] = draw(2, out // 2)
    names = [f"point_embeddings.{i}" for i in range(4)] + ["not_a_point_embed", "no_mask_embed"]
    for name in names:
        state[f"{key}{name}.weight"] = draw(1, out)
    for number, (outputs, inputs, side) in {0: (4, 1, 2), 3: (16, 4, 2), 6: (out, 16, 1)}.items():
        state[f"{key}mask_downscaling.{number}.weight"] = draw(outputs, inputs, side, side)
        state[f"{key}mask_downscaling.{number}.bias"] = draw(outputs)
    _norm(state, f"{key}mask_downscaling.1", 4, draw)
    _norm(state, f"{key}mask_downscaling.4", 16, draw)

    def attention(name: str, inner: int) -> None:
        for part in ("q_proj", "k_proj", "v_proj"):
            _linear(state, f"{name}.{part}", out, inner, draw)
        _linear(state, f"{name}.out_proj", inner, out, draw)

    key = "mask_decoder."
    for i in range(2):
        layer = f"{key}transformer.layers.{i}."
        attention(f"{layer}self_attn", out)
        attention(f"{layer}cross_attn_token_to_image", out // 2)
        attention(f"{layer}cross_attn_image_to_token", out // 2)
        for j in range(1, 5):
            _norm(state, f"{layer}norm{j}", out, draw)
        _linear(state, f"{layer}mlp.lin1", out, sizes.decoder_mlp, draw)
        _linear(state, f"{layer}mlp.lin2", sizes.decoder_mlp, out, draw)
    attention(f"{key}transformer.final_attn_token_to_image", out // 2)
    _norm(state, f"{key}transformer.norm_final_attn", out, draw)
    state[f"{key}iou_token.weight"] = draw(1, out)
    state[f"{key}mask_tokens.weight"] = draw(4, out)
    for number, (inputs, outputs) in {0: (out, out // 4), 3: (out // 4, out // 8)}.items():
        state[f"{key}output_upscaling.{number}.weight"] = draw(inputs, outputs, 2, 2)
        state[f"{key}output_upscaling.{number}.bias"] = draw(outputs)
    _norm(state, f"{key}output_upscaling.1", out // 4, draw)
    for i in range(4):
        for j, outputs in enumerate((out, out, out // 8)):
            _linear(state, f"{key}output_hypernetworks_mlps.{i}.layers.{j}", out, outputs, draw)
    for j, outputs in enumerate((out, out, 4)):
        _linear(state, f"{key}iou_prediction_head.layers.{j}", out, outputs, draw)
    return state


def clip_state(sizes: Sizes, image_size: int, draw: Random) -> State:
    """`vision_model.*` of a CLIP with 14-pixel patches."""
    width, key = sizes.clip_hidden, "vision_model."
    state: State = {f"{key}embeddings.class_embedding": draw(width)}
    state[f"{key}embeddings.patch_embedding.weight"] = draw(width, 3, 14, 14)
    state[f"{key}embeddings.position_embedding.weight"] = draw((image_size // 14) ** 2 + 1, width)
    _norm(state, f"{key}pre_layrnorm", width, draw)
    for i in range(sizes.clip_layers):
        layer = f"{key}encoder.layers.{i}."
        for name in ("k_proj", "v_proj", "q_proj", "out_proj"):
            _linear(state, f"{layer}self_attn.{name}", width, width, draw)
        _norm(state, f"{layer}layer_norm1", width, draw)
        _linear(state, f"{layer}mlp.fc1", width, sizes.clip_inter, draw)
        _linear(state, f"{layer}mlp.fc2", sizes.clip_inter, width, draw)
        _norm(state, f"{layer}layer_norm2", width, draw)
    _norm(state, f"{key}post_layernorm", width, draw)
    return state


def moderate(state: State) -> State:
    """The same draw scaled so that activations stay near 1 and rounding is not amplified.

    Matrices by the square root of their inputs, norms to around 1, everything else (tables, biases) by 0.3.
    """
    scaled = {}
    for key, value in state.items():
        table = any(word in key for word in ("embed", "token", "rel_pos", "gaussian"))
        if value.ndim > 1 and (not table or "patch_embed" in key):
            inputs = value.shape[0] if "output_upscaling" in key else value[0].numel()
            scaled[key] = value * inputs**-0.5
        elif value.ndim == 1 and key.endswith("weight"):
            scaled[key] = 1 + 0.2 * value
        else:
            scaled[key] = 0.3 * value
    return scaled


@functools.cache
def _sentencepiece_model() -> bytes:
    text = ["where is the red fox in the picture", "sure it is beside the small green house", "a b c d e f g"]
    model = io.BytesIO()
    sentencepiece.SentencePieceTrainer.train(
        sentence_iterator=iter(text * 10),
        model_writer=model,
        model_type="bpe",
        vocab_size=320,
        byte_fallback=True,
        minloglevel=2,
        hard_vocab_limit=False,
    )
    return model.getvalue()


def write_tokenizer(folder: Path, tokens: tuple[str, ...] = TOKENS) -> int:
    """A LLaMA tokenizer folder with these added tokens; returns its number of tokens."""
    model = _sentencepiece_model()
    size = sentencepiece.SentencePieceProcessor(model_proto=model).vocab_size()
    (folder / "tokenizer.model").write_bytes(model)
    special = {"bos_token": "<s>", "eos_token": "</s>", "pad_token": "<unk>", "unk_token": "<unk>"}
    settings = {"legacy": True, "model_max_length": 2048, "tokenizer_class": "LlamaTokenizer"}
    files: dict[str, Mapping] = {"special_tokens_map.json": special, "tokenizer_config.json": settings}
    if tokens:
        files["added_tokens.json"] = {text: size + i for i, text in enumerate(tokens)}
    for name, data in files.items():
        (folder / name).write_text(json.dumps(data))
    return size + len(tokens)


def write_state(folder: Path, state: State, format: str, parts: int = 3) -> None:
    """Save tensors as "bin" or "safetensors" shards with an index, or with "-single" as one file."""
    suffix = format.removesuffix("-single")
    stem = {"bin": "pytorch_model", "safetensors": "model"}[suffix]

    def save(tensors: State, path: Path) -> None:
        if suffix == "bin":
            torch.save(tensors, path)
        else:
            save_file(tensors, path, metadata={"format": "pt"})

    if format.endswith("-single"):
        save(state, folder / f"{stem}.{suffix}")
        return
    keys, weight_map = list(state), {}
    for part in range(parts):
        name = f"{stem}-{part + 1:05d}-of-{parts:05d}.{suffix}"
        mine = keys[len(keys) * part // parts : len(keys) * (part + 1) // parts]
        save({key: state[key].clone() for key in mine}, folder / name)
        weight_map.update(dict.fromkeys(mine, name))
    index = {"metadata": {"total_size": sum(t.nbytes for t in state.values())}, "weight_map": weight_map}
    (folder / f"{stem}.{suffix}.index.json").write_text(json.dumps(index))


def write_read_checkpoint(
    folder: Path,
    *,
    kind: str = "read",
    format: str = "bin",
    dtype: torch.dtype = torch.float32,
    sizes: Sizes = SMALL,
    buffers: bool = True,
    seed: int = 0,
    options: Mapping | None = None,
    scale: Callable[[State], State] | None = None,
) -> Path:
    """A READ, SESAME, LISA or (kind "llava") plain LLaVA folder.

    buffers: with the rotary frequencies, those of rope_theta 10000. options: changes of its config; the
    projector and tying of the embedding are followed. scale: changes the weights, e.g. `moderate`.
    """
    folder.mkdir(parents=True)
    options = options or {}
    draw = Random(seed, dtype)
    vocab = write_tokenizer(folder, () if kind == "llava" else TOKENS)
    state = llama_state(sizes, vocab, draw, buffers)
    if kind == "lisa":
        _linear(state, "model.mm_projector", sizes.clip_hidden, sizes.hidden, draw)
    else:
        for i in range(int(options.get("mm_projector_type", "mlp2x_gelu")[3])):
            inputs = sizes.hidden if i else sizes.clip_hidden
            _linear(state, f"model.mm_projector.{2 * i}", inputs, sizes.hidden, draw)
    if kind != "llava":
        state.update({f"model.visual_model.{k}": v for k, v in sam_state(sizes, draw).items()})
        _linear(state, "model.text_hidden_fcs.0.0", sizes.hidden, sizes.hidden, draw)
        _linear(state, "model.text_hidden_fcs.0.2", sizes.hidden, sizes.sam_out, draw)
    if options.get("tie_word_embeddings"):
        del state["lm_head.weight"]
    write_state(folder, scale(state) if scale else state, format)
    names = {"read": "READ", "sesame": "SESAME", "lisa": "LISA", "llava": "LlavaLlama"}
    config = {
        "architectures": [f"{names[kind]}ForCausalLM"],
        "hidden_act": "silu",
        "hidden_size": sizes.hidden,
        "initializer_range": 0.02,
        "intermediate_size": sizes.inter,
        "max_position_embeddings": 2048,
        "mm_hidden_size": sizes.clip_hidden,
        "mm_use_im_start_end": kind != "llava",
        "mm_vision_select_feature": "patch",
        "mm_vision_select_layer": -2,
        "mm_vision_tower": "openai/clip-vit-large-patch14" + ("" if kind == "lisa" else "-336"),
        "model_type": "llava",
        "num_attention_heads": sizes.heads,
        "num_hidden_layers": sizes.layers,
        "num_key_value_heads": sizes.kv_heads or sizes.heads,
        "rms_norm_eps": 1e-5,
        "tie_word_embeddings": False,
        "torch_dtype": str(dtype).removeprefix("torch."),
        "vocab_size": vocab,
    }
    if kind != "lisa":  # LISA's config does not name its projector
        config["mm_projector_type"] = "mlp2x_gelu"
    if kind != "llava":
        config |= {"out_dim": sizes.sam_out, "train_mask_decoder": True, "use_cache": False}
    if sizes.head_dim:
        config["head_dim"] = sizes.head_dim
    (folder / "config.json").write_text(json.dumps(config | dict(options)))
    (folder / "generation_config.json").write_text(json.dumps({"bos_token_id": 1, "eos_token_id": 2}))
    return folder


def write_clip(
    folder: Path,
    *,
    image_size: int = 336,
    whole: bool = False,
    format: str = "bin-single",
    sizes: Sizes = SMALL,
    seed: int = 1,
    options: Mapping | None = None,
    scale: Callable[[State], State] | None = None,
) -> Path:
    """A CLIP folder: the vision model alone, or (`whole`) with text tower, projections and position ids.

    options: changes of the vision model's config. scale: changes the weights, e.g. `moderate`.
    """
    folder.mkdir(parents=True)
    draw = Random(seed)
    state = clip_state(sizes, image_size, draw)
    vision = {
        "hidden_size": sizes.clip_hidden,
        "image_size": image_size,
        "intermediate_size": sizes.clip_inter,
        "num_attention_heads": sizes.clip_heads,
        "num_hidden_layers": sizes.clip_layers,
        "patch_size": 14,
        **(options or {}),
    }
    config: dict = {"model_type": "clip_vision_model", **vision}
    if whole:
        config = {"model_type": "clip", "vision_config": vision, "text_config": {}}
        tokens = (image_size // 14) ** 2 + 1
        state["vision_model.embeddings.position_ids"] = torch.arange(tokens)[None]
        state["text_model.embeddings.position_ids"] = torch.arange(7)[None]
        state["text_model.embeddings.token_embedding.weight"] = draw(9, 6)
        state["text_model.final_layer_norm.weight"] = draw(6)
        state["visual_projection.weight"] = draw(5, sizes.clip_hidden)
        state["text_projection.weight"] = draw(5, 6)
        state["logit_scale"] = torch.tensor(4.6)
    write_state(folder, scale(state) if scale else state, format)
    (folder / "config.json").write_text(json.dumps(config))
    (folder / "preprocessor_config.json").write_text(
        json.dumps({"size": image_size, "crop_size": image_size})
    )
    return folder


def write_sam(file: Path, *, sizes: Sizes = SMALL, seed: int = 2) -> Path:
    """A SAM .pth file."""
    torch.save(sam_state(sizes, Random(seed)), file)
    return file


def _lora_pairs(sizes: Sizes, rank: int, draw: Random) -> dict[str, tuple[torch.Tensor, torch.Tensor]]:
    width, outputs = sizes.hidden, sizes.attention_widths()
    return {
        f"model.layers.{i}.self_attn.{name}": (draw(rank, width), draw(outputs[name], rank))
        for i in range(sizes.layers)
        for name in ("q_proj", "v_proj")
    }


def write_peft_adapter(
    folder: Path,
    *,
    rank: int = 3,
    alpha: float = 6.0,
    format: str = "safetensors",
    adapter_name: str = "",
    extra: State | None = None,
    options: Mapping | None = None,
    sizes: Sizes = SMALL,
    seed: int = 3,
) -> Path:
    """A PEFT folder adapting q_proj and v_proj. extra: more tensors (full keys); options: of its config."""
    folder.mkdir(parents=True)
    state: State = {}
    middle = f".{adapter_name}" if adapter_name else ""
    for key, (a, b) in _lora_pairs(sizes, rank, Random(seed)).items():
        state[f"base_model.model.{key}.lora_A{middle}.weight"] = a
        state[f"base_model.model.{key}.lora_B{middle}.weight"] = b
    state |= extra or {}
    if format == "safetensors":
        save_file(state, folder / "adapter_model.safetensors")
    else:
        torch.save(state, folder / "adapter_model.bin")
    config = {"peft_type": "LORA", "r": rank, "lora_alpha": alpha, "bias": "none", **(options or {})}
    (folder / "adapter_config.json").write_text(json.dumps(config))
    return folder


def write_zero_to_fp32(
    file: Path, base: State, *, clip: State | None = None, rank: int = 3, sizes: Sizes = SMALL, seed: int = 4
) -> Path:
    """A whole PEFT-wrapped model in float32, as DeepSpeed's script writes it, LoRA and CLIP included."""
    prefix = "base_model.model."
    state = {prefix + key: value.float() for key, value in base.items()}
    for key, value in (clip or {}).items():
        state[f"{prefix}model.vision_tower.vision_tower.{key}"] = value.float()
    for key, (a, b) in _lora_pairs(sizes, rank, Random(seed)).items():
        state[f"{prefix}{key}.lora_A.default.weight"] = a
        state[f"{prefix}{key}.lora_B.default.weight"] = b
    torch.save(state, file)
    return file


def read_state(folder: Path) -> State:
    """All tensors of a checkpoint folder, read with the original's own libraries."""
    from safetensors.torch import load_file

    state: State = {}
    for file in sorted(folder.glob("pytorch_model*.bin")):
        state.update(torch.load(file, weights_only=True))
    for file in sorted(folder.glob("model*.safetensors")):
        state.update(load_file(file))
    return state


def differences(left: State, right: State) -> list[str]:
    """Keys that are not in both with the same shape, type and bits."""

    def bits(tensor: torch.Tensor) -> bytes:
        return (
            tensor.contiguous().view(torch.uint8).numpy().tobytes()
            if tensor.ndim
            else tensor.numpy().tobytes()
        )

    wrong = set(left) ^ set(right)
    for key in set(left) & set(right):
        a, b = left[key], right[key]
        if a.shape != b.shape or a.dtype != b.dtype or bits(a) != bits(b):
            wrong.add(key)
    return sorted(wrong)


def lora_update(adapter: Path, key: str, scale: float) -> np.ndarray:
    """scale * B @ A for one adapted layer of a PEFT folder written with the defaults."""
    from safetensors.torch import load_file

    state = load_file(adapter / "adapter_model.safetensors")
    a, b = (state[f"base_model.model.{key}.lora_{half}.weight"].numpy() for half in "AB")
    return np.float32(scale) * (b @ a)
