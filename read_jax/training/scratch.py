"""A new model to train from nothing: random parameters and a tokenizer of the data's words."""

from __future__ import annotations

import collections
import dataclasses
import io
import json
import re
import string
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import sentencepiece
from flax import nnx

from read_jax.config import ReadConfig
from read_jax.data.mixture import Mixture
from read_jax.data.prompts import PHRASE_QUESTION, SEGMENTATION_ANSWER, SENTENCE_QUESTION
from read_jax.data.scenes import Scenes
from read_jax.errors import ConfigError
from read_jax.models.read import Read
from read_jax.text.conversation import get_template
from read_jax.text.tokenizer import READ_TOKENS, SEG_TOKEN, Tokenizer
from read_jax.training.config import StartConfig
from read_jax.training.initial import code_positions, mimetic_attention, whiten_patches
from read_jax.training.teaching import class_words, make_lesson, teach
from read_jax.weights.checkpoint import ModelRecord
from read_jax.weights.model import save_model

EXAMPLES = 500
"""The first so many pictures of every source give the tokenizer its words."""
_PICTURES = 100  # that the patch embedding begins from
_SPACE = "\u2581"  # as sentencepiece writes it
_ALWAYS = 256 + 4  # bytes, <unk>, <s>, </s> and the space
_PLACEHOLDER = re.compile(r"\{\w*\}")


def write_scratch(
    folder: Path, start: StartConfig, mixture: Mixture, template: str, *, workers: int = 0
) -> None:
    """Make the model folder that `start.scratch` describes.

    With `start.teaching`, what the vision tower has learned lies beside the folder meanwhile, and an
    interrupted run goes on from there. workers: processes that draw its lessons.
    """
    assert start.scratch is not None
    if start.tokenizer:
        tokenizer = Tokenizer.load(Path(start.tokenizer).expanduser())
        missing = [text for text in READ_TOKENS if text not in tokenizer.added_tokens]
        tokenizer.add_tokens(missing)
    else:
        tokenizer = make_tokenizer(texts(mixture), start.vocabulary, fixed_texts(template))
    llama = start.scratch.llama
    config = start.scratch.replace(
        llama=type(llama).from_dict({**llama.to_dict(), "vocab_size": tokenizer.vocab_size})
    )
    model = Read(config, rngs=nnx.Rngs(start.seed))
    code_positions(model)
    origin = _origin(start)
    lessons = folder.with_name(f"{folder.name}_teaching.npz")
    if start.teaching:
        scenes = Scenes(seed=start.teaching.seed + 1, length=None)
        pictures = [make_lesson(scenes, i, config.clip).pixels for i in range(_PICTURES)]
        whiten_patches(model.clip, np.stack(pictures), start.seed)
        mimetic_attention(model.clip, start.seed)
        right = teach(model, class_words(tokenizer), start.teaching, lessons, workers=workers)
        origin["cells_named_rightly"] = right
    params = nnx.state(model)
    leaves = {".".join(map(str, path)): leaf[...] for path, leaf in nnx.to_flat_state(params)}

    def write_upstream(upstream: Path) -> None:
        tokenizer.save(upstream)
        (upstream / "config.json").write_text(json.dumps(hugging_face_config(config), indent=2) + "\n")

    save_model(
        folder,
        config,
        "float32",
        origin,
        lambda row: np.asarray(leaves[row.path] if row.index is None else leaves[row.path][row.index]),
        write_upstream,
    )
    lessons.unlink(missing_ok=True)


def check_scratch(folder: Path, record: ModelRecord, start: StartConfig) -> None:
    """Raise `ConfigError` unless a folder holds the new model that `start` describes."""
    assert start.scratch is not None
    sizes = [
        {**config.to_dict(), "llama": {**config.llama.to_dict(), "vocab_size": None}}
        for config in (record.config, start.scratch)
    ]
    origin = _origin(start)
    if sizes[0] != sizes[1] or any(record.source.get(key) != value for key, value in origin.items()):
        raise ConfigError(
            f"{folder} holds a new model of other settings (start.scratch, seed, vocabulary or teaching). "
            "Use another workdir, or delete that folder to begin anew."
        )


def _origin(start: StartConfig) -> dict[str, Any]:
    """What a model folder says of where it comes from."""
    teaching = start.teaching.to_dict() if start.teaching else None
    return {"kind": "scratch", "seed": start.seed, "vocabulary": start.vocabulary, "teaching": teaching}


def texts(mixture: Mixture) -> Iterable[str]:
    """What is said in the first pictures of every source, and the templates around it."""
    for templates in dataclasses.astuple(mixture.templates):
        yield from templates
    for subset in mixture.subsets:
        for i in range(min(len(subset.source), EXAMPLES)):
            item = subset.source[i]
            for query in item.queries:
                yield from (query.phrase, query.correction, query.question or "", query.answer or "")
                yield from query.alternatives
            yield from item.absent


def fixed_texts(template: str) -> list[str]:
    """What stands around every question: the conversation's own words, and the evaluation templates'."""
    form = get_template(template)
    around = (PHRASE_QUESTION.format(text=SEG_TOKEN), SENTENCE_QUESTION.format(text=SEG_TOKEN))
    parts = [form.first_start, form.next_start, form.cue, SEGMENTATION_ANSWER]
    parts += [part for text in around for part in text.split(SEG_TOKEN)]
    sentences = (re.split(r"(?<=[.?]) ", part.replace(SEG_TOKEN, " ").strip()) for part in parts)
    # a mark at the end stays a piece of its own: it follows words too
    return sorted({s.rstrip(".?").strip() for group in sentences for s in group} - {""})


def make_tokenizer(lines: Iterable[str], vocabulary: int, fixed: Sequence[str] = ()) -> Tokenizer:
    """A LLaMA tokenizer in which words of the texts are pieces, the most frequent ones first.

    Any other text becomes pieces of words, and at last bytes.

    Args:
        lines: the texts.
        vocabulary: at most so many pieces.
        fixed: texts that become one piece each, wherever they occur.

    Raises `ConfigError` when the vocabulary is too small for the characters of the texts.
    """
    words = collections.Counter(
        word
        for line in lines
        for word in re.findall(
            r"[^\W\d_]+(?:'[^\W\d_]+)?", _PLACEHOLDER.sub(" ", line.replace(SEG_TOKEN, " "))
        )
    )
    characters = sorted({c for word in words for c in word} | set(string.printable) - set(string.whitespace))
    marked = [f"{_SPACE}{text.replace(' ', _SPACE)}" for text in fixed]
    room = vocabulary - len(READ_TOKENS) - len(marked) - len(characters) - _ALWAYS
    model = io.BytesIO()
    try:
        if room < 0:
            raise RuntimeError(f"{vocabulary - room} are needed for characters, bytes and fixed texts alone")
        # a piece that is given outright is taken wherever it fits, the longest one first
        pieces = dict.fromkeys((*marked, *(f"{_SPACE}{word}" for word, _ in words.most_common(room))))
        sentencepiece.SentencePieceTrainer.train(
            sentence_iterator=iter([*words, *(" ".join(characters),) * 20]),
            model_writer=model,
            model_type="unigram",
            vocab_size=vocabulary - len(READ_TOKENS),
            byte_fallback=True,
            hard_vocab_limit=False,
            character_coverage=1.0,
            user_defined_symbols=list(pieces),
            normalization_rule_name="identity",
            remove_extra_whitespaces=False,
            max_sentencepiece_length=200,
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
