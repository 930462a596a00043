"""A new model to train from nothing: random parameters and a tokenizer of the data's words."""

from __future__ import annotations

import io
import json
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import numpy as np
import sentencepiece
from flax import nnx

from read_jax.config import ReadConfig
from read_jax.data.mixture import Mixture
from read_jax.errors import ConfigError
from read_jax.models.read import Read
from read_jax.text.conversation import get_template
from read_jax.text.tokenizer import READ_TOKENS, SEG_TOKEN, Tokenizer
from read_jax.training.config import StartConfig
from read_jax.weights.model import save_model

EXAMPLES = 300
"""So many examples of the training data give the tokenizer its words."""


def write_scratch(folder: Path, start: StartConfig, mixture: Mixture, template: str) -> None:
    """Make the model folder that `start.scratch` describes."""
    assert start.scratch is not None
    if start.tokenizer:
        tokenizer = Tokenizer.load(Path(start.tokenizer).expanduser())
        missing = [text for text in READ_TOKENS if text not in tokenizer.added_tokens]
        tokenizer.add_tokens(missing)
    else:
        tokenizer = make_tokenizer(texts(mixture, template), start.vocabulary)
    llama = start.scratch.llama
    config = start.scratch.replace(
        llama=type(llama).from_dict({**llama.to_dict(), "vocab_size": tokenizer.vocab_size})
    )
    params = nnx.state(Read(config, rngs=nnx.Rngs(start.seed)))
    leaves = {".".join(map(str, path)): leaf[...] for path, leaf in nnx.to_flat_state(params)}

    def write_upstream(upstream: Path) -> None:
        tokenizer.save(upstream)
        (upstream / "config.json").write_text(json.dumps(hugging_face_config(config), indent=2) + "\n")

    save_model(
        folder,
        config,
        "float32",
        {"kind": "scratch", "seed": start.seed},
        lambda row: np.asarray(leaves[row.path] if row.index is None else leaves[row.path][row.index]),
        write_upstream,
    )


def texts(mixture: Mixture, template: str) -> Iterable[str]:
    """What is said in the first examples of a mixture, and around it."""
    form = get_template(template)
    yield f"{form.first_start} {form.next_start} {form.cue}"
    for k in range(EXAMPLES):
        for row in mixture[k].rows:
            for turn in row.turns:
                yield from (text.replace(SEG_TOKEN, " ") for text in turn)


def make_tokenizer(lines: Iterable[str], vocabulary: int) -> Tokenizer:
    """A LLaMA tokenizer of the words in some texts; any other text becomes bytes.

    Raises `ConfigError` when the vocabulary is too small for the characters of the texts.
    """
    model = io.BytesIO()
    try:
        sentencepiece.SentencePieceTrainer.train(
            sentence_iterator=(line for line in lines if line.strip()),
            model_writer=model,
            model_type="bpe",
            vocab_size=vocabulary - len(READ_TOKENS),
            byte_fallback=True,
            hard_vocab_limit=False,
            character_coverage=1.0,
            num_threads=1,  # the same texts give the same tokenizer
            minloglevel=2,
        )
    except RuntimeError as error:
        line = str(error).strip().splitlines()[-1]
        raise ConfigError(
            f"no tokenizer of {vocabulary} pieces can be made of these texts: {line}"
        ) from error
    tokenizer = Tokenizer(model.getvalue(), where="the new tokenizer")
    tokenizer.add_tokens(READ_TOKENS)
    return tokenizer


def hugging_face_config(config: ReadConfig) -> dict[str, Any]:
    """What the original's config.json says of such a model."""
    llama, clip = config.llama, config.clip
    return {
        "architectures": ["READForCausalLM"],
        "bos_token_id": 1,
        "eos_token_id": 2,
        "hidden_act": "silu",
        "hidden_size": llama.hidden_size,
        "intermediate_size": llama.intermediate_size,
        "max_position_embeddings": llama.max_position_embeddings,
        "mm_hidden_size": clip.hidden_size,
        "mm_projector_type": config.projector,
        "mm_use_im_start_end": config.use_im_start_end,
        "mm_vision_select_feature": clip.select_feature,
        "mm_vision_select_layer": clip.select_layer,
        "model_type": "llava",
        "num_attention_heads": llama.num_heads,
        "num_hidden_layers": llama.num_layers,
        "num_key_value_heads": llama.num_kv_heads,
        "out_dim": config.prompt_dim,
        "pad_token_id": 0,
        "rms_norm_eps": llama.rms_norm_eps,
        "rope_theta": llama.rope_theta,
        "tie_word_embeddings": llama.tie_word_embeddings,
        "train_mask_decoder": True,
        "use_cache": False,
        "vocab_size": llama.vocab_size,
    }
