"""Adapters merged on the way: PEFT folders and zero_to_fp32 files."""

from __future__ import annotations

import json

import numpy as np
import pytest
import torch

from read_jax.errors import CheckpointError
from read_jax.weights import convert, export, load_record
from tests.weights.synthetic import (
    differences,
    lora_update,
    read_state,
    write_clip,
    write_peft_adapter,
    write_read_checkpoint,
    write_zero_to_fp32,
)

KEY = "model.layers.1.self_attn.v_proj"


@pytest.fixture(scope="module")
def base(tmp_path_factory):
    root = tmp_path_factory.mktemp("base")
    return write_read_checkpoint(root / "x"), write_clip(root / "clip")


def merged(base, adapter, folder, **options):
    convert(*base, folder / "model", lora=adapter, sasp="off", **options)
    export(folder / "model", folder / "y")
    return read_state(folder / "y")


@pytest.mark.parametrize("rslora, scale", [(False, 2.0), (True, 6.0 / np.sqrt(3))])
def test_a_peft_adapter_is_added_with_its_scale(base, tmp_path, rslora, scale):
    adapter = write_peft_adapter(tmp_path / "a", options={"use_rslora": rslora})
    before, after = read_state(base[0]), merged(base, adapter, tmp_path)
    for name in ("q_proj", "v_proj"):
        for i in range(2):
            key = f"model.layers.{i}.self_attn.{name}"
            wanted = before[f"{key}.weight"].numpy() + lora_update(adapter, key, scale)
            np.testing.assert_allclose(after[f"{key}.weight"].numpy(), wanted, rtol=1e-6, atol=1e-6)
    untouched = {
        k for k in before if not k.endswith(("q_proj.weight", "v_proj.weight")) or "visual_model" in k
    }
    assert differences({k: before[k] for k in untouched}, {k: after[k] for k in untouched}) == []


@pytest.mark.parametrize("format", ["bin", "safetensors"])
@pytest.mark.parametrize("name", ["", "default"])
def test_every_layout_of_a_peft_file_gives_the_same_merge(base, tmp_path, format, name):
    reference = merged(base, write_peft_adapter(tmp_path / "a"), tmp_path)
    other = tmp_path / "other"
    other.mkdir()
    adapter = write_peft_adapter(tmp_path / "b", format=format, adapter_name=name)
    assert differences(reference, merged(base, adapter, other)) == []


@pytest.mark.parametrize("middle", ["", ".modules_to_save", ".modules_to_save.default"])
def test_modules_to_save_replace_the_base(base, tmp_path, middle):
    head = torch.full_like(read_state(base[0])["lm_head.weight"], 0.5)
    adapter = write_peft_adapter(tmp_path / "a", extra={f"base_model.model.lm_head{middle}.weight": head})
    assert torch.equal(merged(base, adapter, tmp_path)["lm_head.weight"], head)


def test_what_llava_trained_fully_beside_the_adapter_replaces_the_base(base, tmp_path):
    adapter = write_peft_adapter(tmp_path / "a")
    weight = torch.full_like(read_state(base[0])["model.mm_projector.0.weight"], 0.25)
    torch.save({"base_model.model.model.mm_projector.0.weight": weight}, adapter / "non_lora_trainables.bin")
    assert torch.equal(merged(base, adapter, tmp_path)["model.mm_projector.0.weight"], weight)


def test_a_zero_to_fp32_file_replaces_everything_and_is_merged(base, tmp_path):
    trained = {k: v + 1 if "inv_freq" not in k else v for k, v in read_state(base[0]).items()}
    file = write_zero_to_fp32(tmp_path / "pytorch_model.bin", trained, clip=read_state(base[1]))
    after = merged(base, file, tmp_path)
    state = torch.load(file, weights_only=True)
    update = 2.0 * (
        state[f"base_model.model.{KEY}.lora_B.default.weight"]
        @ state[f"base_model.model.{KEY}.lora_A.default.weight"]
    )
    torch.testing.assert_close(
        after[f"{KEY}.weight"], trained[f"{KEY}.weight"] + update, rtol=1e-6, atol=1e-6
    )
    full = {k for k in trained if not k.endswith(("q_proj.weight", "v_proj.weight")) or "visual_model" in k}
    assert differences({k: trained[k] for k in full}, {k: after[k] for k in full}) == []
    assert set(after) == set(trained)


def test_alpha_can_be_given_where_the_file_is_silent(base, tmp_path):
    file = write_zero_to_fp32(tmp_path / "pytorch_model.bin", read_state(base[0]))
    convert(*base, tmp_path / "m", lora=file, lora_alpha=12, sasp="off")
    assert load_record(tmp_path / "m").source["lora_scale"] == 4.0


def test_training_from_plain_llava_can_be_merged_over_it(tmp_path):
    llava = write_read_checkpoint(tmp_path / "llava", kind="llava")
    clip = write_clip(tmp_path / "clip")
    trained = read_state(write_read_checkpoint(tmp_path / "trained", seed=7))
    file = write_zero_to_fp32(tmp_path / "pytorch_model.bin", trained, clip=read_state(clip))
    after = merged((llava, clip), file, tmp_path)
    assert set(after) == set(trained)
    assert torch.equal(after["model.embed_tokens.weight"], trained["model.embed_tokens.weight"])
    assert torch.equal(after["model.text_hidden_fcs.0.2.bias"], trained["model.text_hidden_fcs.0.2.bias"])


def test_the_reference_merge_is_reproduced(goldens, tmp_path):
    tiny = goldens / "tiny-a"
    base = (tiny / "checkpoint", tiny / "clip")
    convert(*base, tmp_path / "model", lora=tiny / "lora" / "pytorch_model.bin", sasp="7b")
    export(tmp_path / "model", tmp_path / "y")
    after = read_state(tmp_path / "y")
    manifest = json.loads((tiny / "lora" / "merged_manifest.json").read_text())["keys"]
    assert {k: list(v.shape) for k, v in after.items()} == {k: v["shape"] for k, v in manifest.items()}
    with np.load(tiny / "lora" / "merged_tensors.npz") as reference:
        for key in reference.files:
            np.testing.assert_allclose(after[key].numpy(), reference[key], rtol=0, atol=1e-6)
        rest = {k: v for k, v in after.items() if k not in reference.files}
    state = torch.load(tiny / "lora" / "pytorch_model.bin", weights_only=True)
    assert differences(rest, {k: state[f"base_model.model.{k}"] for k in rest}) == []


@pytest.mark.parametrize(
    "options, message",
    [
        ({"use_dora": True}, "use_dora"),
        ({"peft_type": "IA3"}, "IA3"),
        ({"rank_pattern": {"q_proj": 4}}, "rank_pattern"),
        ({"init_lora_weights": "pissa"}, "pissa"),
        ({"bias": "all"}, "bias=all"),
        ({"r": 5}, "says rank 5, its tensors have rank 3"),
        ({"lora_alpha": "six"}, "not a number"),
    ],
)
def test_unsupported_adapters_are_refused(base, tmp_path, options, message):
    adapter = write_peft_adapter(tmp_path / "a", options=options)
    with pytest.raises(CheckpointError, match=message):
        convert(*base, tmp_path / "m", lora=adapter, sasp="off")
    assert not (tmp_path / "m").exists()


PREFIX = f"base_model.model.{KEY}"


@pytest.mark.parametrize(
    "extra, message",
    [
        ({"base_model.model.model.layers.9.self_attn.q_proj.lora_A.weight": (3, 16)}, "other half"),
        ({f"{PREFIX}.lora_A.weight": (4, 16)}, "ranks"),
        ({f"{PREFIX}.lora_A.weight": (3, 17)}, "another base"),
        ({f"{PREFIX}.lora_magnitude_vector": (16,)}, "cannot be merged"),
        ({"something.else": (2,)}, "not an adapter"),
        ({"base_model.model.model.unheard_of.weight": (2,)}, "unheard_of"),
    ],
)
def test_adapters_that_do_not_fit_are_refused(base, tmp_path, extra, message):
    tensors = {key: torch.zeros(shape) for key, shape in extra.items()}
    adapter = write_peft_adapter(tmp_path / "a", extra=tensors)
    with pytest.raises(CheckpointError, match=message):
        convert(*base, tmp_path / "m", lora=adapter, sasp="off")


def test_an_adapter_for_a_module_that_does_not_exist_is_refused(base, tmp_path):
    key = "base_model.model.model.layers.9.self_attn.q_proj"
    extra = {f"{key}.lora_A.weight": torch.zeros(3, 16), f"{key}.lora_B.weight": torch.zeros(16, 3)}
    adapter = write_peft_adapter(tmp_path / "a", extra=extra)
    with pytest.raises(CheckpointError, match=r"layers\.9\.self_attn\.q_proj\.weight, which the base"):
        convert(*base, tmp_path / "m", lora=adapter, sasp="off")


def test_a_contradicting_alpha_is_refused(base, tmp_path):
    adapter = write_peft_adapter(tmp_path / "a", alpha=6)
    with pytest.raises(CheckpointError, match="says 6"):
        convert(*base, tmp_path / "m", lora=adapter, lora_alpha=16, sasp="off")


def test_alpha_without_an_adapter_is_refused(base, tmp_path):
    with pytest.raises(CheckpointError, match="without a LoRA adapter"):
        convert(*base, tmp_path / "m", lora_alpha=16, sasp="off")


def test_an_absent_adapter_is_refused(base, tmp_path):
    with pytest.raises(CheckpointError, match="no such file or folder"):
        convert(*base, tmp_path / "m", lora=tmp_path / "none", sasp="off")
