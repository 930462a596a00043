"""A tiny model, made on the spot, whose answers are known beforehand.

Its weights are random but for a few hand-made ones in the language model, so that a digit in the question
says how many [SEG] the answer holds (0 when there is none):

    "find 2 apples" -> " a [SEG] a [SEG]</s>",  "find apples" -> " a</s>"

Layer 0 attends uniformly to everything before and so counts: a digit's token carries its value in channel
FLAG, [SEG] carries -1, and the mean, put into channel LEFT, is the number of masks still to come. With it,
and with the last token's own marker channel, `lm_head` chooses the next token by wide margins. All other
channels, the second layer and the picture's tokens are random, and so is what becomes of a [SEG] state.
After llava_llama_2's prompt, which ends in "]", the very first token of the answer is [SEG].
"""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file

import read_jax
from read_jax.text.tokenizer import Tokenizer
from read_jax.weights import convert
from tests.weights.synthetic import Sizes, write_clip, write_read_checkpoint

SIZES = Sizes(hidden=32, inter=24)
FLAG, LEFT, COLON, WORD, SEG, BRACKET = range(6)
MARKERS = 6  # channels that only the hand-made weights write
COUNT_GAIN = 800.0  # about the number of tokens the mean is taken over
MARGIN, PER_MASK = 40.0, 30.0


def write_scripted_checkpoint(folder: Path, seed: int = 13) -> Path:
    """A READ checkpoint in the original layout that answers as the module says."""
    write_read_checkpoint(folder, format="safetensors-single", sizes=SIZES, seed=seed)
    tokenizer = Tokenizer.load(folder)
    state = load_file(folder / "model.safetensors")
    colon, bracket, word = (tokenizer.encode(text)[-1] for text in (":", "]", "a"))

    embed = state["model.embed_tokens.weight"]
    embed[:, :MARKERS] = 0
    embed[tokenizer.seg_id, FLAG] = -1
    for digit in "12":
        embed[tokenizer.encode(digit)[-1], FLAG] = float(digit)
    for token, marker in ((colon, COLON), (word, WORD), (tokenizer.seg_id, SEG), (bracket, BRACKET)):
        embed[token, marker] = 2
    # a root mean square of 1, so that the norm before attention leaves the flags as they are
    rest = embed[:, MARKERS:]
    wanted = (SIZES.hidden - embed[:, :MARKERS].square().sum(1)).sqrt()
    rest *= (wanted / rest.norm(dim=1))[:, None]

    for name in ("model.mm_projector.2.weight", "model.mm_projector.2.bias"):
        state[name][:MARKERS] = 0
    for layer in range(SIZES.layers):
        key = f"model.layers.{layer}."
        for name in ("self_attn.o_proj", "mlp.down_proj"):
            state[f"{key}{name}.weight"] *= 0.03
            state[f"{key}{name}.weight"][:MARKERS] = 0
        state[f"{key}input_layernorm.weight"][:] = 1
    counting = "model.layers.0.self_attn."
    state[f"{counting}q_proj.weight"][:] = 0
    state[f"{counting}v_proj.weight"][0] = 0
    state[f"{counting}v_proj.weight"][0, FLAG] = 1
    state[f"{counting}o_proj.weight"][:, 0] = 0
    state[f"{counting}o_proj.weight"][LEFT, 0] = COUNT_GAIN
    state["model.norm.weight"][:] = 1

    head = state["lm_head.weight"]
    head *= 0.1
    head[word, [COLON, SEG]] = MARGIN
    head[tokenizer.seg_id, [WORD, BRACKET]] = MARGIN
    head[[word, tokenizer.seg_id], LEFT] = PER_MASK
    head[tokenizer.eos_id, [WORD, SEG, BRACKET]] = MARGIN + 0.5 * PER_MASK / 2  # below half a mask: the end
    save_file(state, folder / "model.safetensors", metadata={"format": "pt"})
    return folder


@pytest.fixture(scope="session")
def scripted_sources(tmp_path_factory) -> tuple[Path, Path]:
    """(checkpoint, CLIP) of the scripted model in the original layouts."""
    folder = tmp_path_factory.mktemp("scripted")
    return write_scripted_checkpoint(folder / "checkpoint"), write_clip(folder / "clip")


@pytest.fixture(scope="session")
def model_folder(scripted_sources, tmp_path_factory) -> Path:
    """The scripted model, converted."""
    folder = tmp_path_factory.mktemp("model") / "scripted"
    convert(*scripted_sources, folder, sasp="7b")
    return folder


@pytest.fixture(scope="session")
def segmenter(model_folder) -> read_jax.Segmenter:
    """The scripted model, loaded; shared, so that its programs are compiled once."""
    return read_jax.load(model_folder)


def picture(height: int, width: int, seed: int = 0) -> np.ndarray:
    """Smooth random colours, uint8 [height, width, 3]."""
    y, x = np.linspace(0, 3, height)[:, None, None], np.linspace(0, 3, width)[None, :, None]
    phase = np.random.default_rng(seed).uniform(0, 6, (2, 3))
    return (127 + 120 * np.sin(3 * y + phase[0]) * np.cos(2 * x + phase[1])).astype(np.uint8)


def torch_greedy(model: torch.nn.Module, ids: list[int], count: int, end_id: int) -> list[int]:
    """Greedy continuation by transformers, up to and including the end token."""
    with torch.no_grad():
        out = model.generate(
            torch.tensor([ids]),
            attention_mask=torch.ones(1, len(ids), dtype=torch.long),
            max_new_tokens=count,
            do_sample=False,
            eos_token_id=end_id,
            pad_token_id=end_id,
        )
    return out[0, len(ids) :].tolist()
