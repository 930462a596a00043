"""Every wrong source is refused before anything is written, with a message that says what is wrong."""

from __future__ import annotations

import json
import pickle
import shutil

import pytest
import torch
from safetensors.torch import save_file

from read_jax.errors import CheckpointError, ConfigError, ReadJaxError
from read_jax.weights import convert
from tests.weights import synthetic
from tests.weights.synthetic import read_state, write_clip, write_read_checkpoint, write_sam, write_state

FC1 = "model.text_hidden_fcs.0.0.weight"


@pytest.fixture(scope="module")
def originals(tmp_path_factory):
    root = tmp_path_factory.mktemp("originals")
    write_clip(root / "clip")
    for format in ("bin", "bin-single", "safetensors", "safetensors-single"):
        write_read_checkpoint(root / format, format=format)
    write_read_checkpoint(root / "llava", kind="llava")
    write_sam(root / "sam.pth")
    return root


@pytest.fixture
def copy(originals, tmp_path):
    """copy(name) is a private copy of an original, to be damaged."""

    def make(name):
        target = tmp_path / name
        if not target.exists():
            (shutil.copytree if (originals / name).is_dir() else shutil.copyfile)(originals / name, target)
        return target

    return make


def refused(source, clip, message, error=CheckpointError, **options):
    output = source.parent / "out"
    with pytest.raises(error, match=message) as caught:
        convert(source, clip, output, **{"sasp": "off", **options})
    assert not output.exists()
    assert not list(source.parent.glob(".out*"))
    return str(caught.value)


def edit(source, change):
    """Rewrite a single-file checkpoint with changed tensors."""
    state = read_state(source)
    change(state)
    write_state(source, state, "bin-single")


def edit_config(folder, **changes):
    path = folder / "config.json"
    config = {**json.loads(path.read_text()), **changes}
    path.write_text(json.dumps({k: v for k, v in config.items() if v is not None}))


@pytest.mark.parametrize("format, suffix", [("bin", "bin"), ("safetensors", "safetensors")])
class TestShards:
    def test_a_missing_shard(self, copy, format, suffix):
        source = copy(format)
        lost = sorted(source.glob(f"*00002-of-*.{suffix}"))[0]
        lost.unlink()
        refused(source, copy("clip"), f"1 of 3 shards are missing.*{lost.name}")

    def test_shards_without_their_index(self, copy, format, suffix):
        source = copy(format)
        next(source.glob("*.index.json")).unlink()
        refused(source, copy("clip"), "not their index")

    def test_a_shard_of_another_download(self, copy, format, suffix):
        source = copy(format)
        one, two = sorted(source.glob(f"*-of-*.{suffix}"))[:2]
        shutil.copyfile(two, one)
        refused(source, copy("clip"), "does not match .*index")

    @pytest.mark.parametrize("part", [0.0, 0.001, 0.5, 0.99])
    def test_a_truncated_shard(self, copy, format, suffix, part):
        source = copy(format)
        shard = sorted(source.glob(f"*00003-of-*.{suffix}"))[0]
        data = shard.read_bytes()
        shard.write_bytes(data[: int(len(data) * part)])
        message = refused(source, copy("clip"), "cut short|not a complete|damaged")
        assert shard.name in message


def test_an_empty_folder(copy, tmp_path):
    source = copy("bin")
    for file in source.glob("pytorch_model*"):
        file.unlink()
    refused(source, copy("clip"), "no weights in")


def test_no_such_folder(copy, tmp_path):
    refused(tmp_path / "absent", copy("clip"), "no such file or folder")


def test_an_absent_clip_folder(copy, tmp_path):
    refused(copy("bin"), tmp_path / "absent", "vision tower: no such file or folder")


def test_a_download_that_fails_says_what_to_do(copy, monkeypatch):
    import huggingface_hub

    def offline(*args, **kwargs):
        raise OSError("no route to host")

    monkeypatch.setattr(huggingface_hub, "snapshot_download", offline)
    with pytest.raises(CheckpointError, match=r"could not be downloaded.*no route to host.*pass the folder"):
        convert("owner/name", copy("clip"), copy("bin").parent / "out")


def test_a_hugging_face_id_is_downloaded(originals, tmp_path, monkeypatch):
    import huggingface_hub

    asked = []

    def download(name, allow_patterns):
        asked.append(name)
        return str(originals / ("clip" if "clip" in name else "bin"))

    monkeypatch.setattr(huggingface_hub, "snapshot_download", download)
    convert("owner/read", "owner/clip", tmp_path / "out", sasp="off")
    assert asked == ["owner/read", "owner/clip"]


def test_a_renamed_tensor_is_named_with_its_likely_meaning(copy):
    source = copy("bin-single")
    edit(source, lambda state: state.update({"model.text_hidden_fc.0.0.weight": state.pop(FC1)}))
    message = refused(source, copy("clip"), f"missing: {FC1}")
    assert "did you mean 'model.text_hidden_fc.0.0.weight'" in message


def test_an_unknown_tensor_is_named(copy):
    source = copy("bin-single")
    edit(source, lambda state: state.update({"model.layers.0.self_attn.q_proj.bias": torch.zeros(16)}))
    message = refused(source, copy("clip"), r"of no known use: model\.layers\.0\.self_attn\.q_proj\.bias")
    assert "did you mean" in message


def test_missing_tensors_are_counted_and_the_first_named(copy):
    source = copy("bin-single")

    def drop(state):
        for key in [k for k in state if "layers.1." in k and k.startswith("model.layers")]:
            del state[key]

    edit(source, drop)
    message = refused(source, copy("clip"), "9 tensor")
    assert "model.layers.1." in message and "and 6 more" in message


def test_a_missing_sam_tensor_is_named(copy):
    source = copy("bin-single")
    edit(source, lambda state: state.pop("model.visual_model.image_encoder.pos_embed"))
    refused(source, copy("clip"), r"image_encoder\.pos_embed is missing")


def test_a_wrong_shape_says_key_expected_and_found(copy):
    source = copy("bin-single")
    edit(source, lambda state: state.update({FC1: torch.zeros(16, 17)}))
    refused(source, copy("clip"), rf"{FC1} has shape \[16, 17\], expected \[16, 16\]")


@pytest.mark.parametrize("dtype", [torch.int8, torch.int64])
def test_weights_that_are_not_floating_point(copy, dtype):
    source = copy("bin-single")
    edit(source, lambda state: state.update({FC1: state[FC1].to(dtype)}))
    refused(source, copy("clip"), f"{FC1} is int.*not floating point")


def test_a_float8_file_is_refused(copy):
    source = copy("safetensors-single")
    state = read_state(source)
    state[FC1] = state[FC1].to(torch.float8_e4m3fn)
    save_file(state, source / "model.safetensors")
    refused(source, copy("clip"), "unsupported type F8_E4M3")


class Harmful:
    """Unpickles by calling a function: what weights_only is there to stop."""

    def __reduce__(self):
        return (exec, ("raise SystemError('this ran')",))


@pytest.mark.parametrize("zipped", [True, False])
def test_a_pickle_that_is_not_tensors_is_not_run(copy, zipped):
    source = copy("bin-single")
    torch.save({"model": Harmful()}, source / "pytorch_model.bin", _use_new_zipfile_serialization=zipped)
    refused(source, copy("clip"), "not a plain file of tensors|could run code")


def test_a_bare_pickle_is_refused(copy):
    source = copy("bin-single")
    (source / "pytorch_model.bin").write_bytes(pickle.dumps({"a": Harmful()}))
    refused(source, copy("clip"), "not a plain file|damaged")


@pytest.mark.parametrize("content", [[1, 2], {"a": 3}, {"state_dict": {"a": torch.zeros(2)}}])
def test_a_file_without_named_tensors_is_refused(copy, content):
    source = copy("bin-single")
    torch.save(content, source / "pytorch_model.bin")
    refused(source, copy("clip"), "expected a plain state dict|does not hold tensors")


def test_a_git_lfs_pointer_is_recognised(copy):
    source = copy("bin-single")
    (source / "pytorch_model.bin").write_text("version https://git-lfs.github.com/spec/v1\noid sha256:00\n")
    refused(source, copy("clip"), "git lfs pull")


def test_a_file_of_the_old_torch_format_is_still_read(copy, originals, tmp_path):
    source = copy("bin-single")
    torch.save(read_state(source), source / "pytorch_model.bin", _use_new_zipfile_serialization=False)
    old = convert(source, copy("clip"), tmp_path / "old", sasp="off")
    new = convert(originals / "bin-single", copy("clip"), tmp_path / "new", sasp="off")
    assert old.fingerprint == new.fingerprint


@pytest.mark.parametrize("text", ["{", "[]", "\xff"])
def test_a_damaged_config(copy, text):
    source = copy("bin")
    (source / "config.json").write_text(text, encoding="latin-1")
    refused(source, copy("clip"), "config.json")


def test_a_config_without_a_llama(copy):
    source = copy("bin")
    edit_config(source, hidden_size=None)
    refused(source, copy("clip"), "hidden_size", error=ConfigError)


@pytest.mark.parametrize(
    "changes", [{"num_hidden_layers": "two"}, {"num_attention_heads": 0}, {"rms_norm_eps": "x"}]
)
def test_a_config_of_wrong_types(copy, changes):
    source = copy("bin")
    edit_config(source, **changes)
    refused(source, copy("clip"), "config", error=ReadJaxError)


def test_a_tokenizer_without_seg(copy):
    source = copy("bin")
    (source / "added_tokens.json").unlink()
    refused(source, copy("clip"), r"no \[SEG\]")


def test_a_tokenizer_larger_than_the_embedding(copy):
    source = copy("bin")
    path = source / "added_tokens.json"
    added = json.loads(path.read_text())
    path.write_text(json.dumps({**added, "<extra>": max(added.values()) + 1}))
    refused(source, copy("clip"), "tokens, the embedding only")


def test_a_clip_of_another_width(copy, tmp_path):
    wide = write_clip(tmp_path / "wide", sizes=synthetic.Sizes(clip_hidden=12))
    refused(copy("bin"), wide, "12 wide, the checkpoint's projector reads 8")


def test_a_clip_of_another_picture_size(copy, tmp_path):
    small = write_clip(tmp_path / "small", image_size=224)
    refused(copy("bin"), small, r"sees 224 px, but .*clip-vit-large-patch14-336 \(336 px\)")


def test_a_clip_whose_config_is_of_another(copy):
    clip = copy("clip")
    edit_config(clip, image_size=224)
    refused(copy("bin"), clip, "577 rows, but config.json's 224 px need 257")


def test_a_projector_other_than_the_config_says(copy):
    source = copy("bin")
    edit_config(source, mm_projector_type=None)
    refused(source, copy("clip"), r"missing: model\.mm_projector\.weight")


def test_an_unknown_projector(copy):
    source = copy("bin")
    edit_config(source, mm_projector_type="resampler")
    refused(source, copy("clip"), "resampler", error=ConfigError)


def test_plain_llava_needs_a_sam_file(copy):
    refused(copy("llava"), copy("clip"), "pass SAM's own file")


def test_a_file_that_is_not_sam(copy, originals):
    refused(copy("llava"), copy("clip"), "not a SAM checkpoint", sam=originals / "clip" / "pytorch_model.bin")


def test_an_absent_sam_file(copy, tmp_path):
    refused(copy("llava"), copy("clip"), "no such file", sam=tmp_path / "sam_vit_h.pth")


def test_unknown_sasp_settings_ask_for_a_preset(copy):
    refused(copy("bin"), copy("clip"), "choose with --sasp: 7b, 13b, paper, off", sasp=None)


def test_an_unknown_preset(copy):
    refused(copy("bin"), copy("clip"), "no SasP preset '70b'", sasp="70b", error=ConfigError)


def test_an_unknown_dtype(copy):
    refused(copy("bin"), copy("clip"), "float32.*bfloat16.*not 'int8'", dtype="int8")
