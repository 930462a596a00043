"""export(convert(x)) is x, key for key and bit for bit, for every kind of source and format."""

from __future__ import annotations

import json

import numpy as np
import pytest
import torch

from read_jax.text.tokenizer import Tokenizer
from read_jax.weights import convert, export, inspect, load_config
from tests.weights import synthetic
from tests.weights.synthetic import differences, read_state, write_clip, write_read_checkpoint, write_sam

PRIVATE = (
    "config.json",
    "generation_config.json",
    "tokenizer.model",
    "added_tokens.json",
    "tokenizer_config.json",
)


@pytest.fixture(scope="module")
def clip(tmp_path_factory):
    return write_clip(tmp_path_factory.mktemp("towers") / "clip")


@pytest.mark.parametrize(
    "kind, format",
    [
        ("read", "bin"),
        ("read", "bin-single"),
        ("read", "safetensors"),
        ("sesame", "safetensors-single"),
        ("lisa", "bin"),
    ],
)
def test_export_of_a_conversion_is_the_source(tmp_path, kind, format):
    source = write_read_checkpoint(tmp_path / "x", kind=kind, format=format)
    tower = write_clip(tmp_path / "clip", image_size=224 if kind == "lisa" else 336)
    summary = convert(source, tower, tmp_path / "model", sasp=None if kind == "lisa" else "off")
    export(tmp_path / "model", tmp_path / "y", format="bin" if "bin" in format else "safetensors")
    original = read_state(source)
    assert differences(original, read_state(tmp_path / "y")) == []
    assert summary.tensors_used + sum(summary.allowed.values()) == summary.tensors_read
    for name in PRIVATE:
        ours, theirs = (tmp_path / "y" / name).read_bytes(), (source / name).read_bytes()
        assert json.loads(ours) == json.loads(theirs) if name.endswith("json") else ours == theirs


@pytest.mark.parametrize("format", ["bin", "safetensors"])
def test_a_bfloat16_source_keeps_its_type_and_bits(tmp_path, clip, format):
    source = write_read_checkpoint(tmp_path / "x", dtype=torch.bfloat16, format=format)
    assert convert(source, clip, tmp_path / "model", sasp="off").dtype == "bfloat16"
    export(tmp_path / "model", tmp_path / "y", format=format, max_shard_bytes=20_000)
    assert differences(read_state(source), read_state(tmp_path / "y")) == []


def test_a_float16_source_becomes_float32_without_loss(tmp_path, clip):
    source = write_read_checkpoint(tmp_path / "x", dtype=torch.float16)
    assert convert(source, clip, tmp_path / "model", sasp="off").dtype == "float32"
    export(tmp_path / "model", tmp_path / "y")
    assert (
        differences({k: v.float() for k, v in read_state(source).items()}, read_state(tmp_path / "y")) == []
    )


def test_asking_for_bfloat16_rounds_to_nearest(tmp_path, clip):
    source = write_read_checkpoint(tmp_path / "x", buffers=False)
    convert(source, clip, tmp_path / "model", sasp="off", dtype="bfloat16")
    export(tmp_path / "model", tmp_path / "y")
    assert (
        differences({k: v.bfloat16() for k, v in read_state(source).items()}, read_state(tmp_path / "y"))
        == []
    )


def test_a_whole_clip_gives_the_same_model_as_its_vision_part(tmp_path, clip):
    source = write_read_checkpoint(tmp_path / "x")
    whole = write_clip(tmp_path / "whole", whole=True, format="safetensors-single")
    one = convert(source, clip, tmp_path / "a", sasp="off")
    two = convert(source, whole, tmp_path / "b", sasp="off")
    assert one.fingerprint == two.fingerprint
    assert two.allowed["CLIP's text tower and contrastive head"] == 5
    assert two.allowed["CLIP position numbers 0, 1, 2, ..."] == 2


def test_converting_twice_gives_the_same_fingerprint(tmp_path, clip):
    source = write_read_checkpoint(tmp_path / "x")
    prints = {convert(source, clip, tmp_path / name, sasp="off").fingerprint for name in ("a", "b")}
    assert len(prints) == 1


def test_a_sharded_export_holds_the_same_tensors_under_its_limit(tmp_path, clip):
    source = write_read_checkpoint(tmp_path / "x")
    convert(source, clip, tmp_path / "model", sasp="off")
    summary = export(tmp_path / "model", tmp_path / "y", max_shard_bytes=50_000)
    index = json.loads((tmp_path / "y" / "model.safetensors.index.json").read_text())
    assert len(summary.files) > 1 and set(index["weight_map"].values()) == set(summary.files)
    assert index["metadata"]["total_size"] == summary.bytes
    assert differences(read_state(source), read_state(tmp_path / "y")) == []


def test_an_export_converts_back_to_the_same_model(tmp_path, clip):
    source = write_read_checkpoint(tmp_path / "x")
    first = convert(source, clip, tmp_path / "model", sasp="off")
    export(tmp_path / "model", tmp_path / "y")
    assert convert(tmp_path / "y", clip, tmp_path / "again", sasp="off").fingerprint == first.fingerprint


def test_a_sam_file_replaces_the_checkpoints_own_and_says_so(tmp_path, clip):
    source = write_read_checkpoint(tmp_path / "x")
    sam = write_sam(tmp_path / "sam.pth", seed=9)
    summary = convert(source, clip, tmp_path / "model", sam=sam, sasp="off")
    export(tmp_path / "model", tmp_path / "y")
    own = torch.load(sam, weights_only=True)
    exported = read_state(tmp_path / "y")
    assert (
        differences(
            own, {k.removeprefix("model.visual_model."): exported[f"model.visual_model.{k}"] for k in own}
        )
        == []
    )
    assert "replaced" in summary.warnings[0]


@pytest.fixture(scope="module")
def folders(tmp_path_factory, clip):
    root = tmp_path_factory.mktemp("llava")
    source = write_read_checkpoint(root / "llava", kind="llava", format="safetensors")
    sam = write_sam(root / "sam.pth")
    summary = convert(source, clip, root / "model", sam=sam, sasp="off")
    export(root / "model", root / "y")
    return root, summary


class TestPlainLlava:
    def test_the_export_has_the_layout_of_read(self, folders, tmp_path):
        root, _ = folders
        reference = read_state(write_read_checkpoint(tmp_path / "read"))
        exported = read_state(root / "y")
        assert {k: v.shape for k, v in exported.items()} == {k: v.shape for k, v in reference.items()}

    def test_what_the_sources_hold_is_unchanged(self, folders):
        root, _ = folders
        exported, llava = read_state(root / "y"), read_state(root / "llava")
        sam = {
            f"model.visual_model.{k}": v for k, v in torch.load(root / "sam.pth", weights_only=True).items()
        }
        rows = len(llava["lm_head.weight"])
        for key in ("lm_head.weight", "model.embed_tokens.weight"):
            exported[key] = exported[key][:rows]
        kept = {**llava, **sam}
        assert differences(kept, {k: v for k, v in exported.items() if k in kept}) == []

    def test_new_rows_lie_near_the_mean_of_the_old(self, folders):
        root, _ = folders
        exported, llava = read_state(root / "y"), read_state(root / "llava")
        for key in ("lm_head.weight", "model.embed_tokens.weight"):
            old, new = llava[key], exported[key][len(llava[key]) :]
            assert len(new) == 3
            assert (new - old.mean(0)).abs().max() < 0.02 * 5  # five standard deviations
            assert len({row.numpy().tobytes() for row in new}) == 3

    def test_the_projection_starts_as_torch_starts_a_linear_layer(self, folders):
        exported = read_state(folders[0] / "y")
        bound = 1 / np.sqrt(synthetic.SMALL.hidden)
        for name in ("0.weight", "0.bias", "2.weight", "2.bias"):
            values = exported[f"model.text_hidden_fcs.0.{name}"]
            assert values.abs().max() <= bound and values.std() > 0.4 * bound

    def test_the_tokens_are_added_in_order(self, folders):
        root, summary = folders
        tokenizer = Tokenizer.load(root / "y")
        base = Tokenizer.load(root / "llava").vocab_size
        assert summary.new_tokens == ["[SEG]", "<im_start>", "<im_end>"]
        assert [tokenizer.seg_id, tokenizer.im_start_id, tokenizer.im_end_id] == [base, base + 1, base + 2]

    def test_config_json_describes_the_new_model(self, folders):
        root, _ = folders
        config = json.loads((root / "y" / "config.json").read_text())
        before = json.loads((root / "llava" / "config.json").read_text())
        assert config["architectures"] == ["READForCausalLM"]
        assert config["vocab_size"] == before["vocab_size"] + 3
        assert (config["out_dim"], config["train_mask_decoder"]) == (synthetic.SMALL.sam_out, True)
        assert config["mm_use_im_start_end"] is True
        assert load_config(root / "model").use_im_start_end

    def test_the_same_source_gives_the_same_start(self, folders, clip, tmp_path):
        root, summary = folders
        again = convert(root / "llava", clip, tmp_path / "m", sam=root / "sam.pth", sasp="off")
        assert again.fingerprint == summary.fingerprint


def test_sasp_follows_the_width_when_not_told(tmp_path):
    sizes = synthetic.Sizes(hidden=4096, heads=32, layers=1, inter=8)
    source = write_read_checkpoint(tmp_path / "x", sizes=sizes, dtype=torch.bfloat16)
    clip = write_clip(tmp_path / "clip", sizes=sizes)
    convert(source, clip, tmp_path / "model")
    sasp = load_config(tmp_path / "model").sasp
    assert (sasp.enabled, sasp.num_points, sasp.down_sample) == (True, 30, 2)


def test_inspect_describes_the_model(tmp_path, clip):
    source = write_read_checkpoint(tmp_path / "x")
    summary = convert(source, clip, tmp_path / "model", sasp="off")
    info = inspect(tmp_path / "model")
    assert sum(info.groups.values()) == info.record.parameters == summary.parameters
    assert list(info.tokens) == ["[SEG]", "<im_start>", "<im_end>"]
    assert "SasP         off" in str(info) and summary.fingerprint in str(info)


class TestReference:
    """The original's own tiny checkpoint."""

    def test_it_round_trips_with_its_rotary_buffers(self, goldens, tmp_path):
        tiny = goldens / "tiny-a"
        summary = convert(tiny / "checkpoint", tiny / "clip", tmp_path / "model", sasp="7b")
        assert (summary.tensors_used, summary.kind) == (240 + 37, "read")
        for format in ("safetensors", "bin"):
            export(tmp_path / "model", tmp_path / "y", format=format, overwrite=True)
            assert differences(read_state(tiny / "checkpoint"), read_state(tmp_path / "y")) == []

    def test_config_json_survives(self, goldens, tmp_path):
        tiny = goldens / "tiny-a"
        convert(tiny / "checkpoint", tiny / "clip", tmp_path / "model", sasp="7b")
        export(tmp_path / "model", tmp_path / "y")
        written, original = (
            json.loads((f / "config.json").read_text()) for f in (tmp_path / "y", tiny / "checkpoint")
        )
        assert written == original
