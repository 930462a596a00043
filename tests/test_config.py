"""Configurations: what they accept, what they refuse, and the published ones."""

from __future__ import annotations

import dataclasses
import json
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from read_jax.config import (
    READ_PRESETS,
    SASP_PRESETS,
    ClipVisionConfig,
    LlamaConfig,
    ReadConfig,
    SamConfig,
    SaspConfig,
)
from read_jax.errors import ConfigError
from tests.weights.manifests import load_manifest

LLAMA: dict[str, Any] = {
    "vocab_size": 803,
    "hidden_size": 64,
    "intermediate_size": 172,
    "num_hidden_layers": 3,
    "num_attention_heads": 4,
}
CLIP: dict[str, Any] = {
    "hidden_size": 32,
    "intermediate_size": 64,
    "num_hidden_layers": 3,
    "num_attention_heads": 4,
}
TINY = ReadConfig(
    llama=LlamaConfig(803, 64, 172, 3, 4, 4, 16),
    clip=ClipVisionConfig(32, 64, 3, 4),
    sam=SamConfig(64, 4, 4, (1, 3), mlp_dim=256),
)


# JSON


@pytest.mark.parametrize("name", READ_PRESETS)
def test_presets_survive_json(name):
    config = ReadConfig.preset(name)
    assert ReadConfig.from_dict(json.loads(json.dumps(config.to_dict()))) == config


@given(
    st.builds(
        SaspConfig,
        enabled=st.booleans(),
        continuous=st.booleans(),
        num_points=st.integers(1, 1000),
        down_sample=st.integers(1, 24),
        threshold=st.sampled_from(["fixed", "mean_std"]),
        t_pos=st.floats(0.5, 1.0),
        t_neg=st.floats(0.0, 0.49),
        epsilon=st.floats(0.01, 3.0),
    ),
    st.integers(1, 64),
    st.floats(1e-8, 1e-3),
    st.booleans(),
)
def test_any_configuration_survives_json(sasp, heads, eps, tied):
    llama = LlamaConfig(803, 64, 172, 3, 4 * heads, heads, 16, rms_norm_eps=eps, tie_word_embeddings=tied)
    for config in (sasp, llama):
        assert type(config).from_dict(json.loads(json.dumps(config.to_dict()))) == config


def test_tuples_are_restored_from_json_lists():
    restored = SamConfig.from_dict(json.loads(json.dumps(SamConfig.preset("vit_b").to_dict())))
    assert restored.global_attn_indexes == (2, 5, 8, 11)
    assert hash(restored) == hash(SamConfig.preset("vit_b"))


def test_missing_optional_keys_take_their_defaults():
    data = TINY.to_dict()
    del data["sasp"], data["projector"]
    assert ReadConfig.from_dict(data) == TINY


@pytest.mark.parametrize(
    ("wrong", "nearest"),
    [
        ("num_point", "num_points"),
        ("downsample", "down_sample"),
        ("tpos", "t_pos"),
        ("treshold", "threshold"),
    ],
)
def test_an_unknown_key_names_the_nearest_one(wrong, nearest):
    with pytest.raises(ConfigError, match=f"no key '{wrong}'.*'{nearest}'"):
        SaspConfig.from_dict({wrong: 1})


def test_an_unknown_nested_key_says_where():
    data = TINY.to_dict()
    data["llama"]["hidden"] = 64
    with pytest.raises(ConfigError, match=r"ReadConfig\.llama has no key 'hidden'.*'hidden_size'"):
        ReadConfig.from_dict(data)


@pytest.mark.parametrize(
    ("key", "value"),
    [
        ("num_points", "30"),
        ("num_points", 30.0),
        ("num_points", True),
        ("num_points", None),
        ("t_pos", "0.8"),
        ("t_pos", True),
        ("continuous", 1),
        ("threshold", "otsu"),
        ("threshold", ["fixed"]),
    ],
)
def test_a_value_of_the_wrong_type_is_refused(key, value):
    with pytest.raises(ConfigError, match=rf"SaspConfig\.{key} must be "):
        SaspConfig.from_dict({key: value})


@pytest.mark.parametrize("value", [3, [1.5], ["1"], "1"])
def test_a_list_of_the_wrong_items_is_refused(value):
    data = SamConfig.preset("vit_b").to_dict() | {"global_attn_indexes": value}
    with pytest.raises(ConfigError, match=r"SamConfig\.global_attn_indexes must be "):
        SamConfig.from_dict(data)


@pytest.mark.parametrize("value", [[1], "x", 3, None])
def test_a_section_that_is_not_a_mapping_is_refused(value):
    with pytest.raises(ConfigError, match=r"ReadConfig\.llama must be a mapping"):
        ReadConfig.from_dict({**TINY.to_dict(), "llama": value})


def test_whole_numbers_are_accepted_for_fractions():
    assert SaspConfig.from_dict({"t_pos": 1, "t_neg": 0}) == SaspConfig(t_pos=1.0, t_neg=0.0)


def test_a_missing_required_key_is_named():
    data = TINY.llama.to_dict()
    del data["vocab_size"]
    with pytest.raises(ConfigError, match=r"LlamaConfig.*vocab_size"):
        LlamaConfig.from_dict(data)


# Hugging Face


def test_llama_reads_a_hugging_face_config():
    hf = LLAMA | {
        "num_key_value_heads": 2,
        "rms_norm_eps": 1e-5,
        "rope_theta": 5e5,
        "max_position_embeddings": 4096,
        "tie_word_embeddings": True,
        "hidden_act": "silu",
        "rope_scaling": None,
        "mm_hidden_size": 1024,  # keys of LLaVA's are none of LLaMA's business
    }
    assert LlamaConfig.from_hf(hf) == LlamaConfig(803, 64, 172, 3, 4, 2, 16, 1e-5, 5e5, 4096, True)


def test_llama_takes_transformers_defaults_for_missing_keys():
    assert LlamaConfig.from_hf(LLAMA) == LlamaConfig(
        vocab_size=803,
        hidden_size=64,
        intermediate_size=172,
        num_layers=3,
        num_heads=4,
        num_kv_heads=4,
        head_dim=16,
        rms_norm_eps=1e-6,
        rope_theta=10000.0,
        max_position_embeddings=2048,
        tie_word_embeddings=False,
    )


def test_llama_takes_a_given_head_size():
    assert LlamaConfig.from_hf(LLAMA | {"head_dim": 32}).head_dim == 32


@pytest.mark.parametrize(
    ("key", "value"),
    [
        ("rope_scaling", {"type": "linear", "factor": 2.0}),
        ("rope_scaling", {"factor": 2.0}),
        ("hidden_act", "gelu"),
        ("attention_bias", True),
        ("mlp_bias", True),
    ],
)
def test_llama_refuses_what_it_does_not_compute(key, value):
    with pytest.raises(ConfigError, match=f"{key}.*not supported"):
        LlamaConfig.from_hf(LLAMA | {key: value})


@pytest.mark.parametrize("key", LLAMA)
def test_llama_names_a_missing_key(key):
    with pytest.raises(ConfigError, match=f"'{key}'"):
        LlamaConfig.from_hf({k: v for k, v in LLAMA.items() if k != key})


def test_llama_refuses_heads_that_do_not_group():
    with pytest.raises(ConfigError, match="num_heads 4 is not a multiple of num_kv_heads 3"):
        LlamaConfig.from_hf(LLAMA | {"num_key_value_heads": 3})


def test_clip_takes_transformers_defaults_for_missing_keys():
    config = ClipVisionConfig.from_hf(CLIP)
    assert config == ClipVisionConfig(32, 64, 3, 4, image_size=224, patch_size=32)
    assert (config.layer_norm_eps, config.hidden_act) == (1e-5, "quick_gelu")


@pytest.mark.parametrize("wrap", [lambda v: v, lambda v: {"vision_config": v, "text_config": {}}])
def test_clip_reads_the_vision_model_alone_or_inside_the_whole(wrap):
    hf = CLIP | {"image_size": 336, "patch_size": 14, "hidden_act": "gelu", "layer_norm_eps": 1e-6}
    config = ClipVisionConfig.from_hf(wrap(hf), select_layer=-1, select_feature="cls_patch")
    assert config == ClipVisionConfig(32, 64, 3, 4, 336, 14, 1e-6, "gelu", -1, "cls_patch")


@pytest.mark.parametrize("key", CLIP)
def test_clip_names_a_missing_key(key):
    with pytest.raises(ConfigError, match=f"'{key}'"):
        ClipVisionConfig.from_hf({k: v for k, v in CLIP.items() if k != key})


def test_clip_refuses_an_unknown_activation():
    with pytest.raises(ConfigError, match="hidden_act"):
        ClipVisionConfig.from_hf(CLIP | {"hidden_act": "relu"})


@pytest.mark.parametrize(("layer", "used"), [(-2, 23), (-1, 24), (0, 0), (24, 24), (-25, 0), (22, 22)])
def test_select_layer_counts_hidden_states_from_either_end(layer, used):
    assert ClipVisionConfig(1024, 4096, 24, 16, select_layer=layer).used_layers == used


@pytest.mark.parametrize(("feature", "tokens"), [("patch", 576), ("cls_patch", 577)])
def test_clip_tokens(feature, tokens):
    assert ClipVisionConfig(1024, 4096, 24, 16, select_feature=feature).num_image_tokens == tokens


# Published models


@pytest.mark.parametrize("name", READ_PRESETS)
def test_presets_agree_with_the_published_tensors(name):
    config = ReadConfig.preset(name)
    family, size = name.split("-")
    shapes = {k: t.shape for k, t in load_manifest(manifest_of(family, size)).items()}

    llama = config.llama
    assert shapes["model.embed_tokens.weight"] == (llama.vocab_size, llama.hidden_size)
    assert shapes["model.layers.0.self_attn.q_proj.weight"][0] == llama.num_heads * llama.head_dim
    assert shapes["model.layers.0.self_attn.k_proj.weight"][0] == llama.num_kv_heads * llama.head_dim
    assert shapes["model.layers.0.self_attn.rotary_emb.inv_freq"] == (llama.head_dim // 2,)
    assert shapes["model.layers.0.mlp.up_proj.weight"][0] == llama.intermediate_size
    assert depth_of(shapes, "model.layers.") == llama.num_layers
    assert_sam_agrees(config.sam, shapes, "model.visual_model.")
    assert shapes["model.text_hidden_fcs.0.2.weight"] == (config.prompt_dim, llama.hidden_size)

    projector = [s for k, s in shapes.items() if k.startswith("model.mm_projector.") and len(s) == 2]
    assert len(projector) == config.projector_depth
    assert projector[0] == (llama.hidden_size, config.clip.hidden_size)


def manifest_of(family: str, size: str) -> str:
    return f"lisa_v1_{size}" if family == "lisa" else f"read_sesame_{size}"


def depth_of(shapes: dict[str, tuple[int, ...]], prefix: str) -> int:
    return 1 + max(int(k.removeprefix(prefix).split(".")[0]) for k in shapes if k.startswith(prefix))


def assert_sam_agrees(sam: SamConfig, shapes: dict[str, tuple[int, ...]], prefix: str) -> None:
    encoder = f"{prefix}image_encoder."
    blocks = f"{encoder}blocks."
    assert shapes[f"{encoder}pos_embed"] == (1, sam.grid_size, sam.grid_size, sam.embed_dim)
    assert shapes[f"{encoder}neck.0.weight"][0] == sam.out_chans
    assert shapes[f"{blocks}0.mlp.lin1.weight"][0] == sam.mlp_dim
    assert depth_of(shapes, blocks) == sam.depth
    for i in range(sam.depth):
        side = sam.grid_size if i in sam.global_attn_indexes else sam.window_size
        table = shapes[f"{blocks}{i}.attn.rel_pos_h"]
        assert table == (2 * side - 1, sam.embed_dim // sam.num_heads)


@pytest.mark.parametrize("name", ["vit_b", "vit_l", "vit_h"])
def test_sam_presets_agree_with_the_published_tensors(name):
    shapes = {k: t.shape for k, t in load_manifest(f"sam_{name}").items()}
    assert_sam_agrees(SamConfig.preset(name), shapes, "")


@pytest.mark.parametrize(
    ("name", "manifest"),
    [("read-7b", "clip_vit_large_patch14_336_vision"), ("lisa-7b", "clip_vit_large_patch14_vision")],
)
def test_clip_of_the_presets_agrees_with_the_published_tensors(name, manifest):
    clip = ReadConfig.preset(name).clip
    shapes = {k: t.shape for k, t in load_manifest(manifest).items()}
    embeddings = "vision_model.embeddings."
    assert shapes[f"{embeddings}patch_embedding.weight"] == (
        clip.hidden_size,
        3,
        clip.patch_size,
        clip.patch_size,
    )
    assert shapes[f"{embeddings}position_embedding.weight"] == (clip.grid_size**2 + 1, clip.hidden_size)
    layers = "vision_model.encoder.layers."
    assert shapes[f"{layers}0.mlp.fc1.weight"][0] == clip.intermediate_size
    assert depth_of(shapes, layers) == clip.num_layers


def test_only_read_prompts_with_points():
    assert {name for name in READ_PRESETS if ReadConfig.preset(name).sasp.enabled} == {"read-7b", "read-13b"}


@pytest.mark.parametrize("name", ["read-70b", "READ-7b", "", "read"])
def test_an_unknown_preset_lists_the_known_ones(name):
    with pytest.raises(ConfigError, match=f"no preset '{name}'; known: read-7b, "):
        ReadConfig.preset(name)


def test_an_unknown_sam_preset_lists_the_known_ones():
    with pytest.raises(ConfigError, match="no SAM preset 'vit_g'; known: vit_b, vit_l, vit_h"):
        SamConfig.preset("vit_g")  # type: ignore[arg-type]


# SasP


def test_sasp_presets_hold_the_published_settings():
    assert SaspConfig.preset("7b") == SaspConfig(True, True, 30, 2, "fixed", 0.8, 0.2)
    assert SaspConfig.preset("13b") == SaspConfig(True, True, 60, 1, "fixed", 0.6, 0.2)
    paper = SaspConfig.preset("paper")
    assert (paper.enabled, paper.threshold, paper.epsilon) == (True, "mean_std", 0.5)
    assert not SaspConfig.preset("off").enabled


@pytest.mark.parametrize("name", SASP_PRESETS)
def test_every_sasp_preset_has_a_discrete_form(name):
    discrete = SaspConfig.preset(name, continuous=False)
    assert not discrete.continuous
    assert dataclasses.replace(discrete, continuous=True) == SaspConfig.preset(name)


def test_an_unknown_sasp_preset_lists_the_known_ones():
    with pytest.raises(ConfigError, match="no SasP preset '70b'; known: 7b, 13b, paper, off"):
        SaspConfig.preset("70b")


@pytest.mark.parametrize(("width", "name"), [(4096, "7b"), (5120, "13b")])
def test_sasp_settings_follow_from_the_width_of_the_language_model(width, name):
    assert SaspConfig.preset_for_width(width) == name


@pytest.mark.parametrize("width", [64, 4095, 8192])
def test_other_widths_have_no_published_sasp_settings(width):
    assert SaspConfig.preset_for_width(width) is None


# Values that disagree


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"num_points": 0}, "num_points must be positive, not 0"),
        ({"down_sample": -1}, "down_sample must be positive, not -1"),
        ({"t_pos": 0.2, "t_neg": 0.2}, "t_neg 0.2 must be below t_pos 0.2"),
        ({"epsilon": 0.0}, "epsilon must be positive, not 0.0"),
    ],
)
def test_sasp_refuses(changes, message):
    with pytest.raises(ConfigError, match=message):
        SaspConfig(**changes)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"window_size": 0}, "window_size must be positive, not 0"),
        ({"window_size": -14}, "window_size must be positive, not -14"),
        ({"patch_size": 0}, "patch_size must be positive, not 0"),
        ({"image_size": 1000}, "image_size 1000 is not a multiple of patch_size 16"),
        ({"num_heads": 5}, "embed_dim 64 is not a multiple of num_heads 5"),
        ({"global_attn_indexes": (1, 4)}, r"\(1, 4\) go beyond depth 4"),
        ({"global_attn_indexes": (-1,)}, "go beyond depth 4"),
    ],
)
def test_sam_refuses(changes, message):
    with pytest.raises(ConfigError, match=f"SamConfig: .*{message}"):
        dataclasses.replace(TINY.sam, **changes)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"num_heads": 0}, "num_heads must be positive, not 0"),
        ({"patch_size": 13}, "image_size 336 is not a multiple of patch_size 13"),
        ({"num_heads": 3}, "hidden_size 32 is not a multiple of num_heads 3"),
        ({"select_layer": 4}, "select_layer 4 does not exist in 3 layers"),
        ({"select_layer": -5}, "select_layer -5 does not exist in 3 layers"),
    ],
)
def test_clip_refuses(changes, message):
    with pytest.raises(ConfigError, match=f"ClipVisionConfig: {message}"):
        dataclasses.replace(TINY.clip, **changes)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"num_kv_heads": 0}, "num_kv_heads must be positive, not 0"),
        ({"head_dim": 15}, "head_dim 15 is odd"),
        ({"num_layers": -1}, "num_layers must be positive, not -1"),
    ],
)
def test_llama_refuses(changes, message):
    with pytest.raises(ConfigError, match=f"LlamaConfig: {message}"):
        dataclasses.replace(TINY.llama, **changes)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"sasp": SaspConfig(num_points=101)}, r"cannot choose 101 points from a 12x12 grid \(at most 100\)"),
        ({"sasp": SaspConfig(num_points=1, down_sample=12)}, r"from a 2x2 grid \(at most 0\)"),
        ({"clip": ClipVisionConfig(32, 64, 3, 4, select_feature="cls_patch")}, "select_feature 'patch'"),
        ({"projector": "mlp0x_gelu"}, "projector 'mlp0x_gelu' is neither"),
        ({"projector": "resampler"}, "projector 'resampler' is neither"),
        ({"prompt_dim": 128}, "prompt_dim 128 differs from SAM's prompt width 256"),
    ],
)
def test_the_whole_model_refuses_parts_that_disagree(changes, message):
    with pytest.raises(ConfigError, match=f"ReadConfig: .*{message}"):
        TINY.replace(**changes)


def test_as_many_points_as_the_smallest_grid_holds_are_accepted():
    assert TINY.replace(sasp=SaspConfig(num_points=100)).sasp.num_points == 100


def test_without_points_the_grid_does_not_matter():
    off = SaspConfig(enabled=False, num_points=1000)
    clip = dataclasses.replace(TINY.clip, select_feature="cls_patch")
    assert not TINY.replace(sasp=off, clip=clip).sasp.enabled


@pytest.mark.parametrize(
    ("projector", "depth"), [("linear", 1), ("mlp1x_gelu", 1), ("mlp2x_gelu", 2), ("mlp12x_gelu", 12)]
)
def test_projector_depth(projector, depth):
    assert TINY.replace(projector=projector).projector_depth == depth


def test_configurations_cannot_be_changed_in_place():
    with pytest.raises(dataclasses.FrozenInstanceError):
        TINY.prompt_dim = 128  # type: ignore[misc]


def test_llama_reads_rotary_settings_as_transformers_5_writes_them():
    written = LLAMA | {"rope_parameters": {"rope_type": "default", "rope_theta": 5e5}}
    assert LlamaConfig.from_hf(written).rope_theta == 5e5
    with pytest.raises(ConfigError, match=r"linear.*not supported"):
        LlamaConfig.from_hf(LLAMA | {"rope_parameters": {"rope_type": "linear", "factor": 4.0}})


def test_clip_fills_in_what_a_nested_vision_config_leaves_out():
    config = ClipVisionConfig.from_hf(
        {"model_type": "clip", "vision_config": {"image_size": 336, "patch_size": 14}}
    )
    assert (config.hidden_size, config.num_layers, config.num_heads) == (768, 12, 12)


def test_another_model_in_the_place_of_clip_is_named():
    with pytest.raises(ConfigError, match="'llava' model, not of a CLIP"):
        ClipVisionConfig.from_hf(LLAMA | {"model_type": "llava"})


def test_a_value_outside_its_choices_is_told_the_choices():
    with pytest.raises(ConfigError, match="one of 'fixed', 'mean_std', not 'median'"):
        SaspConfig.from_dict({"threshold": "median"})
