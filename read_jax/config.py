"""Typed, immutable configuration of every part of READ.

One dataclass per network, each able to read the configuration file of its upstream twin
(`from_hf`). A configuration is plain data: it round-trips through JSON, and reading one refuses
unknown keys and wrong types with an error that names the nearest known key.
"""

from __future__ import annotations

import dataclasses
import difflib
import types
import typing
from collections.abc import Mapping
from typing import Any, Literal, Self

from read_jax.errors import ConfigError

CLIP_MEAN = (0.48145466, 0.4578275, 0.40821073)
"""Mean of CLIP's training pictures, RGB in 0..1 (OpenAI)."""
CLIP_STD = (0.26862954, 0.26130258, 0.27577711)
SAM_MEAN = (123.675, 116.28, 103.53)
"""Mean of ImageNet, RGB in 0..255 (segment-anything's pixel_mean)."""
SAM_STD = (58.395, 57.12, 57.375)


def _matches(value: Any, hint: Any) -> bool:
    """Whether a JSON value fits a field's annotation (the few kinds of annotation used here)."""
    origin = typing.get_origin(hint)
    if origin is Literal:
        return value in typing.get_args(hint)
    if origin in (types.UnionType, typing.Union):
        return any(_matches(value, option) for option in typing.get_args(hint))
    if origin is tuple:
        items = typing.get_args(hint)
        if not isinstance(value, list | tuple) or (items[-1] is not ... and len(value) != len(items)):
            return False
        return all(_matches(v, items[0]) for v in value)
    if origin is dict:
        key, item = typing.get_args(hint)
        return isinstance(value, Mapping) and all(
            _matches(k, key) and _matches(v, item) for k, v in value.items()
        )
    if hint is float:
        return isinstance(value, int | float) and not isinstance(value, bool)
    if hint is int:
        return isinstance(value, int) and not isinstance(value, bool)
    if hint is types.NoneType:
        return value is None
    return isinstance(value, hint)


def _wording(hint: Any) -> str:
    """An annotation in words, for an error."""
    if typing.get_origin(hint) is Literal:
        return "one of " + ", ".join(repr(choice) for choice in typing.get_args(hint))
    if typing.get_origin(hint) in (types.UnionType, typing.Union):
        return " or ".join(_wording(option) for option in typing.get_args(hint))
    if hint is types.NoneType:
        return "None"
    return hint.__name__ if isinstance(hint, type) else str(hint)


def _section(hint: Any) -> type[Config] | None:
    """The configuration class that a field holds, alone or with None beside it."""
    options = typing.get_args(hint) if typing.get_origin(hint) in (types.UnionType, typing.Union) else (hint,)
    return next(
        (option for option in options if isinstance(option, type) and issubclass(option, Config)), None
    )


def _left_out(value: Any, hint: Any) -> bool:
    return value is None and _matches(None, hint)


class Config:
    """JSON round trip and checking, shared by all the configurations."""

    @classmethod
    def from_dict(cls, data: Mapping[str, Any], where: str = "") -> Self:
        """Build from a JSON-like mapping; raises `ConfigError` on an unknown key or a wrong type."""
        where = where or cls.__name__
        if not isinstance(data, Mapping):
            raise ConfigError(f"{where} must be a mapping, not {type(data).__name__}.")
        hints = typing.get_type_hints(cls)
        names = [f.name for f in dataclasses.fields(cls)]  # type: ignore[arg-type]
        values: dict[str, Any] = {}
        for key, value in data.items():
            if key not in names:
                near = difflib.get_close_matches(key, names, n=1, cutoff=0.0)
                raise ConfigError(f"{where} has no key {key!r}; the nearest known key is {near[0]!r}.")
            hint = hints[key]
            nested = _section(hint)
            if nested and not _left_out(value, hint):
                values[key] = (
                    value if isinstance(value, nested) else nested.from_dict(value, f"{where}.{key}")
                )
                continue
            if not _matches(value, hint):
                raise ConfigError(f"{where}.{key} must be {_wording(hint)}, not {value!r}.")
            values[key] = tuple(value) if isinstance(value, list) else value
        try:
            return cls(**values)
        except TypeError as error:  # a required key is missing
            raise ConfigError(f"{where}: {error}") from None

    def to_dict(self) -> dict[str, Any]:
        """The same configuration as JSON-compatible plain data."""
        return dataclasses.asdict(self)  # type: ignore[call-overload]

    def _require(self, condition: bool, message: str) -> None:
        if not condition:
            raise ConfigError(f"{type(self).__name__}: {message}")

    def _require_positive(self, *names: str) -> None:
        for name in names:
            value = getattr(self, name)
            self._require(value > 0, f"{name} must be positive, not {value}.")


@dataclasses.dataclass(frozen=True)
class LlamaConfig(Config):
    """LLaMA decoder (RMSNorm, rotary positions, SwiGLU), grouped-query heads allowed."""

    vocab_size: int
    hidden_size: int
    intermediate_size: int
    num_layers: int
    num_heads: int
    num_kv_heads: int
    head_dim: int
    rms_norm_eps: float = 1e-6
    rope_theta: float = 10000.0
    max_position_embeddings: int = 2048
    tie_word_embeddings: bool = False

    def __post_init__(self) -> None:
        self._require_positive(
            *("vocab_size", "hidden_size", "intermediate_size", "num_layers"),
            *("num_heads", "num_kv_heads", "head_dim"),
        )
        self._require(
            self.num_heads % self.num_kv_heads == 0,
            f"num_heads {self.num_heads} is not a multiple of num_kv_heads {self.num_kv_heads}.",
        )
        self._require(self.head_dim % 2 == 0, f"head_dim {self.head_dim} is odd; rotary needs pairs.")

    @classmethod
    def from_hf(cls, hf: Mapping[str, Any]) -> Self:
        """Read the LLaMA part of a Hugging Face `config.json` (missing keys: transformers' defaults)."""
        for key in (
            "vocab_size",
            "hidden_size",
            "intermediate_size",
            "num_hidden_layers",
            "num_attention_heads",
        ):
            if key not in hf:
                raise ConfigError(f"config.json has no {key!r}: is this a LLaMA-based checkpoint?")
        # transformers 5 writes rope_parameters, earlier releases rope_theta and rope_scaling
        rope = hf.get("rope_parameters") or {}
        scaling = hf.get("rope_scaling") or {k: v for k, v in rope.items() if k != "rope_theta"}
        if scaling.get("rope_type", scaling.get("type", "default" if not scaling else None)) != "default":
            raise ConfigError(f"rope_scaling {scaling!r} is not supported; only plain rotary positions are.")
        if hf.get("hidden_act", "silu") != "silu":
            raise ConfigError(f"hidden_act {hf['hidden_act']!r} is not supported; LLaMA uses 'silu'.")
        if hf.get("attention_bias") or hf.get("mlp_bias"):
            raise ConfigError("attention_bias and mlp_bias are not supported; LLaMA has neither.")
        heads = hf["num_attention_heads"]
        return cls(
            vocab_size=hf["vocab_size"],
            hidden_size=hf["hidden_size"],
            intermediate_size=hf["intermediate_size"],
            num_layers=hf["num_hidden_layers"],
            num_heads=heads,
            num_kv_heads=hf.get("num_key_value_heads") or heads,
            head_dim=hf.get("head_dim") or hf["hidden_size"] // heads,
            rms_norm_eps=float(hf.get("rms_norm_eps", 1e-6)),
            rope_theta=float(hf.get("rope_theta") or rope.get("rope_theta") or 10000.0),
            max_position_embeddings=hf.get("max_position_embeddings", 2048),
            tie_word_embeddings=bool(hf.get("tie_word_embeddings", False)),
        )


@dataclasses.dataclass(frozen=True)
class ClipVisionConfig(Config):
    """CLIP vision transformer and which of its hidden states LLaVA reads.

    `select_layer` indexes the list of hidden states as transformers returns it: 0 is the embedding
    output, k the output of layer k, negative values count from the end (-2: all layers but the last).
    `select_feature` "patch" drops the class token, "cls_patch" keeps it.
    """

    hidden_size: int
    intermediate_size: int
    num_layers: int
    num_heads: int
    image_size: int = 336
    patch_size: int = 14
    layer_norm_eps: float = 1e-5
    hidden_act: Literal["quick_gelu", "gelu"] = "quick_gelu"
    select_layer: int = -2
    select_feature: Literal["patch", "cls_patch"] = "patch"

    def __post_init__(self) -> None:
        self._require_positive(
            *("hidden_size", "intermediate_size", "num_layers", "num_heads", "image_size", "patch_size")
        )
        self._require(
            self.image_size % self.patch_size == 0,
            f"image_size {self.image_size} is not a multiple of patch_size {self.patch_size}.",
        )
        self._require(
            self.hidden_size % self.num_heads == 0,
            f"hidden_size {self.hidden_size} is not a multiple of num_heads {self.num_heads}.",
        )
        self._require(
            -self.num_layers - 1 <= self.select_layer <= self.num_layers,
            f"select_layer {self.select_layer} does not exist in {self.num_layers} layers.",
        )

    @property
    def grid_size(self) -> int:
        """Patches along one side."""
        return self.image_size // self.patch_size

    @property
    def num_image_tokens(self) -> int:
        """Tokens an image becomes in the language model."""
        return self.grid_size**2 + (self.select_feature == "cls_patch")

    @property
    def used_layers(self) -> int:
        """How many layers run before the selected hidden state; the others are never computed."""
        return self.select_layer if self.select_layer >= 0 else self.num_layers + 1 + self.select_layer

    @classmethod
    def from_hf(cls, hf: Mapping[str, Any], select_layer: int = -2, select_feature: str = "patch") -> Self:
        """Read a CLIP `config.json`: of the vision model alone, or of the whole CLIP (`vision_config`)."""
        kind = str(hf.get("model_type") or "clip")
        if "clip" not in kind and "vision_config" not in hf:
            raise ConfigError(f"config.json is of a {kind!r} model, not of a CLIP: pass CLIP's own folder.")
        vision = hf.get("vision_config", hf)
        if "vision_config" in hf or str(hf.get("model_type", "")).startswith("clip"):
            vision = _CLIP_DEFAULTS | dict(vision)  # a nested configuration may hold only what differs
        for key in ("hidden_size", "intermediate_size", "num_hidden_layers", "num_attention_heads"):
            if key not in vision:
                raise ConfigError(f"the CLIP config.json has no {key!r}: is this a CLIP vision model?")
        return cls.from_dict(
            {
                "hidden_size": vision["hidden_size"],
                "intermediate_size": vision["intermediate_size"],
                "num_layers": vision["num_hidden_layers"],
                "num_heads": vision["num_attention_heads"],
                "image_size": vision.get("image_size", 224),
                "patch_size": vision.get("patch_size", 32),
                "layer_norm_eps": float(vision.get("layer_norm_eps", 1e-5)),
                "hidden_act": vision.get("hidden_act", "quick_gelu"),
                "select_layer": select_layer,
                "select_feature": select_feature,
            }
        )


_CLIP_DEFAULTS = {
    "hidden_size": 768,
    "intermediate_size": 3072,
    "num_hidden_layers": 12,
    "num_attention_heads": 12,
}


@dataclasses.dataclass(frozen=True)
class SamConfig(Config):
    """Segment Anything: ViT image encoder, prompt encoder, mask decoder."""

    embed_dim: int
    depth: int
    num_heads: int
    global_attn_indexes: tuple[int, ...]
    mlp_dim: int
    image_size: int = 1024
    patch_size: int = 16
    window_size: int = 14
    out_chans: int = 256
    mask_in_chans: int = 16
    decoder_depth: int = 2
    decoder_num_heads: int = 8
    decoder_mlp_dim: int = 2048
    num_mask_tokens: int = 4
    iou_head_depth: int = 3
    iou_head_hidden_dim: int = 256

    def __post_init__(self) -> None:
        self._require_positive(
            *("embed_dim", "depth", "num_heads", "mlp_dim", "image_size", "patch_size", "window_size"),
            *("out_chans", "mask_in_chans", "decoder_depth", "decoder_num_heads", "decoder_mlp_dim"),
            *("num_mask_tokens", "iou_head_depth", "iou_head_hidden_dim"),
        )
        self._require(
            self.image_size % self.patch_size == 0,
            f"image_size {self.image_size} is not a multiple of patch_size {self.patch_size}.",
        )
        self._require(
            self.embed_dim % self.num_heads == 0,
            f"embed_dim {self.embed_dim} is not a multiple of num_heads {self.num_heads}.",
        )
        self._require(
            all(0 <= i < self.depth for i in self.global_attn_indexes),
            f"global_attn_indexes {self.global_attn_indexes} go beyond depth {self.depth}.",
        )

    @property
    def grid_size(self) -> int:
        """Side of the image embedding, in patches."""
        return self.image_size // self.patch_size

    @property
    def low_res_size(self) -> int:
        """Side of the low-resolution masks, in pixels."""
        return 4 * self.grid_size

    @classmethod
    def preset(cls, name: Literal["vit_b", "vit_l", "vit_h"]) -> Self:
        """The geometry of a published SAM (segment-anything's `build_sam`)."""
        if name not in _SAM_PRESETS:
            raise ConfigError(f"no SAM preset {name!r}; known: {', '.join(_SAM_PRESETS)}.")
        dim, depth, heads, global_layers = _SAM_PRESETS[name]
        return cls(dim, depth, heads, global_layers, mlp_dim=4 * dim)


_SAM_PRESETS: dict[str, tuple[int, int, int, tuple[int, ...]]] = {
    "vit_b": (768, 12, 12, (2, 5, 8, 11)),
    "vit_l": (1024, 24, 16, (5, 11, 17, 23)),
    "vit_h": (1280, 32, 16, (7, 15, 23, 31)),
}


@dataclasses.dataclass(frozen=True)
class SaspConfig(Config):
    """Similarity as Points: how a similarity map becomes SAM point prompts.

    enabled: off gives LISA's and SESAME's pipeline ([SEG] embedding only).
    continuous: shift each chosen pixel to the differentiable expectation around it (READ, eq. of
        the discrete-to-continuous step); off gives the "discrete points" ablation.
    down_sample: side of the similarity grid divided by this before choosing points.
    threshold: "fixed" compares the min-max normalised map with `t_pos` / `t_neg` (the released
        code); "mean_std" with its mean ± `epsilon` · standard deviation (the paper's text).
    """

    enabled: bool = True
    continuous: bool = True
    num_points: int = 30
    down_sample: int = 2
    threshold: Literal["fixed", "mean_std"] = "fixed"
    t_pos: float = 0.8
    t_neg: float = 0.2
    epsilon: float = 0.5

    def __post_init__(self) -> None:
        self._require(self.num_points > 0, f"num_points must be positive, not {self.num_points}.")
        self._require(self.down_sample > 0, f"down_sample must be positive, not {self.down_sample}.")
        self._require(
            self.t_neg < self.t_pos,
            f"t_neg {self.t_neg} must be below t_pos {self.t_pos}.",
        )
        self._require(self.epsilon > 0, f"epsilon must be positive, not {self.epsilon}.")

    @classmethod
    def preset(cls, name: str, *, continuous: bool = True) -> Self:
        """Settings by name: "7b" and "13b" as those checkpoints were trained, "paper", or "off"."""
        if name not in SASP_PRESETS:
            raise ConfigError(f"no SasP preset {name!r}; known: {', '.join(SASP_PRESETS)}.")
        return cls(**SASP_PRESETS[name], continuous=continuous)

    @classmethod
    def preset_for_width(cls, hidden_size: int) -> str | None:
        """Name of the preset of the published model of this language-model width, or None."""
        return {4096: "7b", 5120: "13b"}.get(hidden_size)


SASP_PRESETS: dict[str, dict[str, Any]] = {
    "7b": {"num_points": 30, "down_sample": 2, "t_pos": 0.8, "t_neg": 0.2},
    "13b": {"num_points": 60, "down_sample": 1, "t_pos": 0.6, "t_neg": 0.2},
    "paper": {"num_points": 30, "down_sample": 2, "threshold": "mean_std", "epsilon": 0.5},
    "off": {"enabled": False},
}


@dataclasses.dataclass(frozen=True)
class ReadConfig(Config):
    """The whole model: CLIP, projector, LLaMA, SAM and SasP.

    projector: LLaVA's `mm_projector_type`, "linear" or "mlpNx_gelu".
    prompt_dim: width of the projected [SEG] embedding (SAM's prompt width).
    use_im_start_end: whether `<im_start>` and `<im_end>` surround the image in the prompt.
    """

    llama: LlamaConfig
    clip: ClipVisionConfig
    sam: SamConfig
    sasp: SaspConfig = SaspConfig()
    projector: str = "mlp2x_gelu"
    prompt_dim: int = 256
    use_im_start_end: bool = True

    def __post_init__(self) -> None:
        self._require(
            self.projector_depth > 0,
            f"projector {self.projector!r} is neither 'linear' nor of the form 'mlp2x_gelu'.",
        )
        self._require(
            self.prompt_dim == self.sam.out_chans,
            f"prompt_dim {self.prompt_dim} differs from SAM's prompt width {self.sam.out_chans}.",
        )
        if self.sasp.enabled:
            side = self.clip.grid_size // self.sasp.down_sample
            fewest = (side - 2) ** 2  # the rounding of the padding may crop one cell on every side
            self._require(
                self.clip.select_feature == "patch",
                "SasP needs select_feature 'patch': the similarity map has one value per patch.",
            )
            self._require(
                side > 2 and self.sasp.num_points <= fewest,
                f"SasP cannot choose {self.sasp.num_points} points from a {side}x{side} grid "
                f"(at most {max(fewest, 0)}).",
            )

    @property
    def projector_depth(self) -> int:
        """Number of linear layers of the projector (0 when the type is unknown)."""
        if self.projector == "linear":
            return 1
        name = self.projector.removeprefix("mlp").removesuffix("x_gelu")
        return int(name) if name.isdecimal() and self.projector == f"mlp{name}x_gelu" else 0

    def replace(self, **changes: Any) -> Self:
        """A copy with some fields changed."""
        return dataclasses.replace(self, **changes)

    @classmethod
    def preset(cls, name: str) -> Self:
        """The configuration of a published checkpoint, e.g. "read-7b", "sesame-13b", "lisa-7b"."""
        if name not in READ_PRESETS:
            raise ConfigError(f"no preset {name!r}; known: {', '.join(READ_PRESETS)}.")
        family, size = name.split("-")
        hidden, inter, layers, heads = {"7b": (4096, 11008, 32, 32), "13b": (5120, 13824, 40, 40)}[size]
        positions, eps = (2048, 1e-6) if family == "lisa" else (4096, 1e-5)
        return cls(
            llama=LlamaConfig(
                vocab_size=32003,
                hidden_size=hidden,
                intermediate_size=inter,
                num_layers=layers,
                num_heads=heads,
                num_kv_heads=heads,
                head_dim=hidden // heads,
                rms_norm_eps=eps,
                max_position_embeddings=positions,
            ),
            clip=ClipVisionConfig(1024, 4096, 24, 16, image_size=224 if family == "lisa" else 336),
            sam=SamConfig.preset("vit_h"),
            sasp=SaspConfig.preset(size if family == "read" else "off"),
            projector="linear" if family == "lisa" else "mlp2x_gelu",
        )


READ_PRESETS = tuple(f"{family}-{size}" for family in ("read", "sesame", "lisa") for size in ("7b", "13b"))
