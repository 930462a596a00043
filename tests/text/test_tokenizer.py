"""The tokenizer: its rules on a small model, its files, its errors."""

from __future__ import annotations

import json
import pickle
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from read_jax.errors import CheckpointError, PromptError
from read_jax.text.tokenizer import IMAGE_TOKEN_ID, READ_TOKENS, Tokenizer


def test_read_tokens_follow_the_vocabulary_in_order(model_bytes):
    tokenizer = Tokenizer(model_bytes)
    size = tokenizer.vocab_size
    assert tokenizer.add_tokens(READ_TOKENS) == list(READ_TOKENS)
    assert (tokenizer.seg_id, tokenizer.im_start_id, tokenizer.im_end_id) == (size, size + 1, size + 2)
    assert tokenizer.vocab_size == size + 3


def test_adding_known_tokens_changes_nothing(tokenizer):
    size = tokenizer.vocab_size
    assert tokenizer.add_tokens([*READ_TOKENS, "<s>", "<unk>", "t"]) == []
    assert tokenizer.vocab_size == size


def test_control_ids_are_llamas_and_padding_is_unknown(tokenizer):
    assert (tokenizer.unk_id, tokenizer.bos_id, tokenizer.eos_id, tokenizer.pad_id) == (0, 1, 2, 0)


@pytest.mark.parametrize("space", [" ", "\n", "\t \n", "\u00a0", ""])
def test_added_tokens_swallow_white_space_on_both_sides(tokenizer, space):
    spaced = tokenizer.encode(f"result is{space}[SEG]{space}shown")
    assert spaced == [*tokenizer.encode("result is"), tokenizer.seg_id, *tokenizer.encode("shown", bos=False)]


def test_control_tokens_keep_white_space(tokenizer):
    ids = tokenizer.encode("the </s> star", bos=False)
    before, after = tokenizer.encode("the ", bos=False), tokenizer.encode(" star", bos=False)
    assert ids == [*before, tokenizer.eos_id, *after]
    assert before != tokenizer.encode("the", bos=False)


def test_white_space_between_added_tokens_vanishes(tokenizer):
    assert tokenizer.encode("[SEG] \n [SEG]", bos=False) == [tokenizer.seg_id] * 2


def test_image_placeholder_splits_the_text_without_stripping(tokenizer):
    ids = tokenizer.encode("Look at <image> now")
    left, right = tokenizer.encode("Look at "), tokenizer.encode(" now", bos=False)
    assert ids == [*left, IMAGE_TOKEN_ID, *right]


def test_empty_text_is_the_begin_token_alone(tokenizer):
    assert tokenizer.encode("") == [tokenizer.bos_id]
    assert tokenizer.encode("<image>") == [tokenizer.bos_id, IMAGE_TOKEN_ID]
    assert tokenizer.encode("", bos=False) == []


def test_lone_surrogates_are_refused(tokenizer):
    with pytest.raises(PromptError, match="not valid Unicode"):
        tokenizer.encode("a \ud800 b")


def test_very_long_text_is_tokenised(tokenizer):
    ids = tokenizer.encode("star " * 20_000 + "[SEG]")
    assert ids[-1] == tokenizer.seg_id and len(ids) > 20_000


@given(
    st.text(st.characters(exclude_categories=["Cs"], exclude_characters="▁"), max_size=60)
)  # "▁" means " "
def test_plain_text_survives_encoding_and_decoding(tokenizer, text):
    if any(t in text for t in tokenizer.reserved_texts):
        return
    assert tokenizer.decode(tokenizer.encode(text)) == text


@given(
    st.lists(
        st.sampled_from(["the star", ".", " ", "\n", "象🐘", *READ_TOKENS, "<image>", "</s>"]), max_size=12
    )
)
def test_reserved_tokens_are_found_wherever_they_stand(tokenizer, parts):
    ids = tokenizer.encode("".join(parts))
    assert ids.count(tokenizer.seg_id) == parts.count("[SEG]")
    assert ids.count(IMAGE_TOKEN_ID) == parts.count("<image>")
    assert ids.count(tokenizer.eos_id) == parts.count("</s>")
    assert ids.count(tokenizer.bos_id) == 1


def test_decoding_joins_runs_and_added_tokens_with_one_space(tokenizer):
    ids = tokenizer.encode("It is [SEG].</s>")
    assert tokenizer.decode(ids) == "It is [SEG] ."
    assert tokenizer.decode(ids, skip_special_tokens=False) == "<s>It is [SEG]  .</s>"


def test_decoding_drops_image_placeholders(tokenizer):
    assert tokenizer.decode(tokenizer.encode("<im_start><image><im_end>\nA")) == "<im_start> <im_end> A"


def test_decoding_an_unknown_id_is_an_error(tokenizer):
    with pytest.raises(CheckpointError, match="do not belong together"):
        tokenizer.decode([5, tokenizer.vocab_size])


def test_pickled_copy_gives_the_same_ids(tokenizer):
    text = "Sure, [SEG] <image> é"
    assert pickle.loads(pickle.dumps(tokenizer)).encode(text) == tokenizer.encode(text)


def test_plain_llava_folder_has_no_seg_and_says_so(plain_folder):
    tokenizer = Tokenizer.load(plain_folder)
    assert tokenizer.model_max_length == 512
    for name in ("seg_id", "im_start_id", "im_end_id"):
        with pytest.raises(CheckpointError, match=r"llava.*plain LLaVA"):
            getattr(tokenizer, name)


def test_saved_folder_loads_to_the_same_tokenizer(plain_folder, tmp_path):
    tokenizer = Tokenizer.load(plain_folder)
    tokenizer.add_tokens(READ_TOKENS)
    tokenizer.save(tmp_path / "out")
    again = Tokenizer.load(tmp_path / "out")
    assert again.added_tokens == tokenizer.added_tokens
    assert again.model_max_length == 512
    for name in ("tokenizer.model", "tokenizer_config.json", "special_tokens_map.json"):
        assert (tmp_path / "out" / name).read_bytes() == (plain_folder / name).read_bytes()


def test_saving_without_source_files_writes_the_layout_the_original_reads(tokenizer, tmp_path):
    tokenizer.save(tmp_path)
    config = json.loads((tmp_path / "tokenizer_config.json").read_text())
    special = json.loads((tmp_path / "special_tokens_map.json").read_text())
    assert config["tokenizer_class"] == "LlamaTokenizer" and config["legacy"] is True
    assert special["pad_token"] == special["unk_token"] == "<unk>"
    assert json.loads((tmp_path / "added_tokens.json").read_text()) == tokenizer.added_tokens


def test_plain_tokenizer_saves_no_added_tokens_file(plain_folder, tmp_path):
    Tokenizer.load(plain_folder).save(tmp_path / "out")
    assert not (tmp_path / "out" / "added_tokens.json").exists()


def test_tokens_listed_only_in_the_newer_config_are_found(plain_folder, tmp_path):
    size = Tokenizer.load(plain_folder).vocab_size
    listed = {str(i): {"content": t} for i, t in enumerate(["<unk>", "<s>", "</s>"])}
    listed[str(size)] = {"content": "[SEG]", "lstrip": False, "special": False}
    (plain_folder / "tokenizer_config.json").write_text(json.dumps({"added_tokens_decoder": listed}))
    tokenizer = Tokenizer.load(plain_folder)
    assert tokenizer.added_tokens == {"[SEG]": size}
    assert tokenizer.encode(" [SEG] ", bos=False) == [size]
    tokenizer.add_tokens(READ_TOKENS)
    tokenizer.save(tmp_path / "out")
    (tmp_path / "out" / "added_tokens.json").unlink()  # newer readers use the config alone
    assert Tokenizer.load(tmp_path / "out").added_tokens == tokenizer.added_tokens


def test_tokens_inside_the_sentencepiece_model_are_found(train_model):
    tokenizer = Tokenizer(train_model(user_defined_symbols=["[SEG]"]))
    size = tokenizer.vocab_size
    assert tokenizer.seg_id < size
    assert tokenizer.encode("a [SEG] b").count(tokenizer.seg_id) == 1
    assert tokenizer.add_tokens(READ_TOKENS) == ["<im_start>", "<im_end>"]
    assert tokenizer.vocab_size == size + 2


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (b"", "empty"),
        (b"not a model", "not a sentencepiece model"),
        (b"version https://git-lfs.github.com/spec/v1\n", "git lfs pull"),
    ],
)
def test_corrupt_model_file_is_named(plain_folder, content, message):
    (plain_folder / "tokenizer.model").write_bytes(content)
    with pytest.raises(CheckpointError, match=message) as error:
        Tokenizer.load(plain_folder)
    assert str(plain_folder) in str(error.value)


def test_truncated_model_file_is_an_error(plain_folder, model_bytes):
    (plain_folder / "tokenizer.model").write_bytes(model_bytes[: len(model_bytes) // 2 + 1])
    with pytest.raises(CheckpointError, match=r"tokenizer\.model"):
        Tokenizer.load(plain_folder)


def test_missing_model_file_says_what_to_copy(tmp_path):
    (tmp_path / "tokenizer.json").write_text("{}")
    with pytest.raises(CheckpointError, match=r"no tokenizer\.model.*tokenizer\.json alone.*Copy") as error:
        Tokenizer.load(tmp_path)
    assert str(tmp_path) in str(error.value)


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("added_tokens.json", "{", "not valid JSON"),
        ("added_tokens.json", "[1]", "must hold a JSON object"),
        ("added_tokens.json", '{"[SEG]": 7}', "different checkpoints"),
        ("added_tokens.json", '{"[SEG]": "x"}', "invalid or taken"),
        ("added_tokens.json", '{"[SEG]": 9000, "<im_start>": 9000}', "invalid or taken"),
        ("tokenizer_config.json", '{"model_max_length": "many"}', "positive integer"),
        ("tokenizer_config.json", '{"added_tokens_decoder": {"x": {}}}', "malformed added_tokens_decoder"),
    ],
)
def test_bad_json_files_are_explained(plain_folder: Path, name, content, message):
    (plain_folder / name).write_text(content)
    with pytest.raises(CheckpointError, match=message):
        Tokenizer.load(plain_folder)


def test_unlimited_length_means_the_default(plain_folder):
    (plain_folder / "tokenizer_config.json").write_text(
        '{"model_max_length": 1000000000000000019884624838656}'
    )
    assert Tokenizer.load(plain_folder).model_max_length == 2048
