"""A LLaMA-like sentencepiece model, trained in a moment, for tests that need no reference data."""

from __future__ import annotations

import io
import json
from collections.abc import Callable
from pathlib import Path

import pytest
import sentencepiece

from read_jax.text.conversation import TEMPLATES
from read_jax.text.tokenizer import READ_TOKENS, Tokenizer

SENTENCES = [
    *(t.first_start + "What is the red circle in this image?" + t.cue for t in TEMPLATES.values()),
    "Sure, the segmentation result is shown. Sorry, there is no zebra in this image.",
    "Please segment the yellow star on the left, and answer: which is larger? USER: ASSISTANT:",
]


def _train(**options: object) -> bytes:
    """Bytes of a byte-fallback BPE model with LLaMA's ids for <unk>, <s>, </s>."""
    model = io.BytesIO()
    settings = {
        "model_type": "bpe",
        "vocab_size": 420,
        "byte_fallback": True,
        "normalization_rule_name": "identity",
        "remove_extra_whitespaces": False,
        "hard_vocab_limit": False,
        "minloglevel": 2,
    }
    sentencepiece.SentencePieceTrainer.train(
        sentence_iterator=iter(SENTENCES * 4), model_writer=model, **(settings | options)
    )
    return model.getvalue()


@pytest.fixture(scope="session")
def train_model() -> Callable[..., bytes]:
    return _train


@pytest.fixture(scope="session")
def model_bytes() -> bytes:
    return _train()


@pytest.fixture
def plain_folder(model_bytes: bytes, tmp_path: Path) -> Path:
    """A tokenizer folder as plain LLaVA has it: no added tokens."""
    folder = tmp_path / "llava"
    folder.mkdir()
    (folder / "tokenizer.model").write_bytes(model_bytes)
    (folder / "tokenizer_config.json").write_text(json.dumps({"model_max_length": 512, "legacy": False}))
    (folder / "special_tokens_map.json").write_text('{"bos_token": "<s>",\n "unk_token": "<unk>"}')
    return folder


@pytest.fixture(scope="session")
def tokenizer(model_bytes: bytes) -> Tokenizer:
    """The small model with READ's three tokens."""
    tokenizer = Tokenizer(model_bytes)
    tokenizer.add_tokens(READ_TOKENS)
    return tokenizer
