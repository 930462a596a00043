"""The LLaMA tokenizer as READ's checkpoints were trained with it, on sentencepiece itself.

The rules are those of transformers' slow tokenizer of 2023 ("legacy"), which newer releases no longer
reproduce: the text is split at the special tokens, every piece between them is encoded on its own (and so
gets its own "▁" prefix), and the tokens READ adds swallow the white space around them.
"""

from __future__ import annotations

import json
import re
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any, Self

import sentencepiece

from read_jax.errors import CheckpointError, PromptError

IMAGE_TOKEN = "<image>"
"""Stands for the picture in a prompt; it has no id in the vocabulary."""
IMAGE_TOKEN_ID = -200
"""What `<image>` becomes in a list of ids (LLaVA's IMAGE_TOKEN_INDEX)."""
SEG_TOKEN, IM_START_TOKEN, IM_END_TOKEN = "[SEG]", "<im_start>", "<im_end>"
READ_TOKENS = (SEG_TOKEN, IM_START_TOKEN, IM_END_TOKEN)
"""The tokens READ adds to LLaVA's vocabulary, in the order of their ids."""

_MODEL, _ADDED = "tokenizer.model", "added_tokens.json"
_SPECIAL, _CONFIG = "special_tokens_map.json", "tokenizer_config.json"
_UNLIMITED = 10**30  # what transformers writes when a tokenizer has no maximum length
_DEFAULT_MAX_LENGTH = 2048


class Tokenizer:
    """Text to ids and back. Immutable but for `add_tokens`; safe to share between threads, picklable.

    bos_id, eos_id, unk_id: the control tokens `<s>`, `</s>`, `<unk>`; pad_id is unk_id, as in the original.
    added_tokens: text -> id of every token beyond the sentencepiece model (or declared along with it).
    model_max_length: what tokenizer_config.json says (2048 when it says nothing or "unlimited").
    """

    def __init__(
        self,
        model: bytes,
        added_tokens: dict[str, int] | None = None,
        *,
        special_tokens_map: bytes | None = None,
        tokenizer_config: bytes | None = None,
        where: str = "the tokenizer",
    ) -> None:
        """Build from the contents of the files; `load` reads them from a folder.

        model: the sentencepiece model. special_tokens_map, tokenizer_config: the JSON files, kept so that
        `save` writes them back unchanged. where: named in error messages.
        Raises `CheckpointError` when something is corrupt or the files disagree.
        """
        self._where = where
        self._model = model
        self._special_map = special_tokens_map
        self._config = tokenizer_config
        self._sp = _sentencepiece(model, where)
        self.bos_id: int = self._sp.bos_id()
        self.eos_id: int = self._sp.eos_id()
        self.unk_id: int = self._sp.unk_id()
        if min(self.bos_id, self.eos_id, self.unk_id) < 0:
            raise CheckpointError(
                f"{where}: {_MODEL} has no <s>, </s> or <unk>; it is not a LLaMA tokenizer."
            )
        self.pad_id: int = self.unk_id
        self._controls = {self._sp.id_to_piece(i): i for i in (self.unk_id, self.bos_id, self.eos_id)}

        config = _json_object(tokenizer_config, f"{where}: {_CONFIG}")
        self.model_max_length = _max_length(config, where)
        declared = {**_added_in_config(config, where), **(added_tokens or {})}
        for text in READ_TOKENS:  # a vocabulary trained with them holds them itself
            if text not in declared and (own := self._sp.piece_to_id(text)) != self.unk_id:
                declared[text] = own
        self.added_tokens: dict[str, int] = {}
        for text, index in sorted(declared.items(), key=lambda item: item[1]):
            self._declare(text, index)
        self._compile()

    @classmethod
    def load(cls, folder: str | Path) -> Self:
        """Read a checkpoint folder: tokenizer.model, and the JSON files beside it where present.

        The added tokens may stand in added_tokens.json, in tokenizer_config.json's `added_tokens_decoder`
        (newer transformers) or nowhere (plain LLaVA). Raises `CheckpointError`.
        """
        folder = Path(folder)
        model = _read(folder / _MODEL)
        if model is None:
            hint = "it holds no tokenizer.model (a sentencepiece file of about 500 kB)"
            if (folder / "tokenizer.json").is_file():
                hint += "; its tokenizer.json alone does not give the ids the checkpoint was trained with"
            raise CheckpointError(
                f"no tokenizer in {folder}: {hint}. "
                f"Copy tokenizer.model from the base LLaVA or READ checkpoint."
            )
        added = _json_object(_read(folder / _ADDED), str(folder / _ADDED))
        return cls(
            model,
            added,
            special_tokens_map=_read(folder / _SPECIAL),
            tokenizer_config=_read(folder / _CONFIG),
            where=str(folder),
        )

    def save(self, folder: str | Path) -> None:
        """Write the files in the layout the original code reads; what did not change is written verbatim."""
        folder = Path(folder)
        folder.mkdir(parents=True, exist_ok=True)
        (folder / _MODEL).write_bytes(self._model)
        beyond = {t: i for t, i in self.added_tokens.items() if i >= self._sp.vocab_size()}
        if beyond:
            (folder / _ADDED).write_text(_dump(dict(sorted(beyond.items()))), encoding="utf-8")
        special = self._special_map
        if special is None:
            names = {"bos_token": self.bos_id, "eos_token": self.eos_id, "pad_token": self.pad_id}
            names["unk_token"] = self.unk_id
            special = _dump({k: self._sp.id_to_piece(i) for k, i in names.items()}).encode()
        (folder / _SPECIAL).write_bytes(special)
        (folder / _CONFIG).write_bytes(self._config_bytes(beyond))

    def _config_bytes(self, beyond: dict[str, int]) -> bytes:
        """tokenizer_config.json: as it was, plus newly added tokens where that file itself lists tokens."""
        if self._config is None:
            settings = {
                "add_bos_token": True,
                "add_eos_token": False,
                "bos_token": self._sp.id_to_piece(self.bos_id),
                "clean_up_tokenization_spaces": False,
                "eos_token": self._sp.id_to_piece(self.eos_id),
                "legacy": True,
                "model_max_length": self.model_max_length,
                "padding_side": "right",
                "tokenizer_class": "LlamaTokenizer",
                "unk_token": self._sp.id_to_piece(self.unk_id),
            }
            return _dump(settings).encode()
        config = json.loads(self._config)
        listed = config.get("added_tokens_decoder")
        missing = {t: i for t, i in beyond.items() if listed and str(i) not in listed}
        if not missing:
            return self._config
        flags = {"lstrip": True, "normalized": False, "rstrip": True, "single_word": False, "special": False}
        for text, index in missing.items():
            listed[str(index)] = {"content": text, **flags}
        return _dump(config).encode()

    def add_tokens(self, texts: Iterable[str]) -> list[str]:
        """Append tokens after the present ones, skipping those already known; returns the new ones."""
        new = []
        for text in texts:
            if not text or text != text.strip() or text == IMAGE_TOKEN:
                raise ValueError(f"{text!r} cannot be a token: it is empty, padded with spaces or reserved.")
            if text not in self.added_tokens and self._sp.piece_to_id(text) == self.unk_id:
                if text in self._controls:  # "<unk>" itself maps to unk_id
                    continue
                self._declare(text, self.vocab_size)
                new.append(text)
        self._compile()
        return new

    def _declare(self, text: str, index: int) -> None:
        if self._controls.get(text) == index:
            return  # newer layouts list the control tokens too
        if not isinstance(index, int) or index < 0 or index in self.added_tokens.values():
            raise CheckpointError(
                f"{self._where}: added token {text!r} has the id {index!r}, invalid or taken."
            )
        if index < self._sp.vocab_size() and self._sp.id_to_piece(index) != text:
            raise CheckpointError(
                f"{self._where}: added token {text!r} has the id {index}, which {_MODEL} gives to "
                f"{self._sp.id_to_piece(index)!r}; the files belong to different checkpoints."
            )
        self.added_tokens[text] = index

    def _compile(self) -> None:
        self._texts = {index: text for text, index in self.added_tokens.items()}
        self._split_ids = {**self._controls, **self.added_tokens}
        longest_first = sorted(self._split_ids, key=len, reverse=True)
        self._splitter = re.compile("(" + "|".join(map(re.escape, longest_first)) + ")")

    @property
    def vocab_size(self) -> int:
        """Number of ids, added tokens included: the embedding needs at least so many rows."""
        return max(self._sp.vocab_size(), 1 + max(self.added_tokens.values(), default=-1))

    @property
    def seg_id(self) -> int:
        """Id of `[SEG]`; raises `CheckpointError` when the tokenizer has none."""
        return self._added_id(SEG_TOKEN)

    @property
    def im_start_id(self) -> int:
        """Id of `<im_start>`; raises `CheckpointError` when the tokenizer has none."""
        return self._added_id(IM_START_TOKEN)

    @property
    def im_end_id(self) -> int:
        """Id of `<im_end>`; raises `CheckpointError` when the tokenizer has none."""
        return self._added_id(IM_END_TOKEN)

    def _added_id(self, text: str) -> int:
        if text not in self.added_tokens:
            raise CheckpointError(
                f"{self._where}: the tokenizer has no {text} token; this looks like plain LLaVA. "
                f"To train from it, extend the vocabulary first: tokenizer.add_tokens(READ_TOKENS)."
            )
        return self.added_tokens[text]

    @property
    def reserved_texts(self) -> tuple[str, ...]:
        """Every text that `encode` does not read as plain text, `<image>` included."""
        return (IMAGE_TOKEN, *self._split_ids)

    def encode(self, text: str, bos: bool = True) -> list[int]:
        """Ids of a prompt; `<image>` becomes `IMAGE_TOKEN_ID`, `<s>` is put in front when `bos`.

        Special tokens written in the text become their ids (check what users type with
        `conversation.check_question`). Raises `PromptError` on text that is not valid Unicode.
        """
        try:
            text.encode("utf-8")
        except UnicodeEncodeError as error:
            raise PromptError(
                f"the text is not valid Unicode: character {error.start} is half of a surrogate pair."
            ) from None
        ids = [self.bos_id] if bos else []
        for number, chunk in enumerate(text.split(IMAGE_TOKEN)):
            if number:
                ids.append(IMAGE_TOKEN_ID)
            ids += self._encode_chunk(chunk)
        return ids

    def _encode_chunk(self, chunk: str) -> list[int]:
        pieces = self._splitter.split(chunk)  # text at even places, tokens at odd ones
        for at in range(1, len(pieces), 2):
            if pieces[at] in self.added_tokens:  # these swallow the white space around them
                pieces[at - 1] = pieces[at - 1].rstrip()
                pieces[at + 1] = pieces[at + 1].lstrip()
        ids: list[int] = []
        for at, piece in enumerate(pieces):
            if at % 2:
                ids.append(self._split_ids[piece])
            elif piece:
                ids += self._sp.encode(piece)
        return ids

    def decode(self, ids: Sequence[int], skip_special_tokens: bool = True) -> str:
        """Text of ids. Image placeholders give nothing; `[SEG]`, `<im_start>`, `<im_end>` always stay.

        skip_special_tokens drops `<s>`, `</s>` and `<unk>`. Runs of plain tokens and added tokens are joined
        by one space each, as the original's answers are. Raises `CheckpointError` for an id that the
        tokenizer does not know: then weights and tokenizer do not belong together.
        """
        parts: list[str] = []
        run: list[int] = []
        for index in map(int, ids):
            if index == IMAGE_TOKEN_ID or (skip_special_tokens and index in self._controls.values()):
                continue
            if index in self._texts:
                if run:
                    parts.append(self._decode_run(run))
                    run = []
                parts.append(self._texts[index])
            elif 0 <= index < self._sp.vocab_size():
                run.append(index)
            else:
                raise CheckpointError(
                    f"{self._where}: id {index} is outside the tokenizer's {self.vocab_size} tokens; "
                    f"weights and tokenizer do not belong together."
                )
        if run:
            parts.append(self._decode_run(run))
        return " ".join(parts)

    def _decode_run(self, ids: list[int]) -> str:
        """Text of ids without added tokens; a control token puts a space before the words that it ends."""
        text = ""
        words: list[int] = []
        for index in ids:
            if index not in self._controls.values():
                words.append(index)
                continue
            if words:
                text += " " + self._sp.decode(words)
                words = []
            text += self._sp.id_to_piece(index)
        return text + (self._sp.decode(words) if words else "")


def _sentencepiece(model: bytes, where: str) -> Any:
    processor = sentencepiece.SentencePieceProcessor()
    problem = "it is empty" if not model else ""
    if model.startswith(b"version https://git-lfs"):
        problem = "it is a Git LFS pointer, not the file: run `git lfs pull`"
    if not problem:
        try:
            processor.LoadFromSerializedProto(model)
        except RuntimeError:
            problem = "it is not a sentencepiece model"
        else:
            if processor.vocab_size() > 0:
                return processor
            problem = "it holds no pieces"
    raise CheckpointError(
        f"{where}: {_MODEL} ({len(model)} bytes) cannot be read: {problem}. Download it again."
    )


def _read(path: Path) -> bytes | None:
    """Contents of a file, None when it does not exist."""
    try:
        return path.read_bytes()
    except (FileNotFoundError, NotADirectoryError):
        return None
    except OSError as error:
        raise CheckpointError(f"cannot read {path}: {error.strerror or error}.") from None


def _json_object(data: bytes | None, where: str) -> dict[str, Any]:
    if data is None:
        return {}
    try:
        value = json.loads(data)
    except ValueError as error:  # bad JSON or bad UTF-8
        raise CheckpointError(f"{where} is not valid JSON: {error}.") from None
    if not isinstance(value, dict):
        raise CheckpointError(f"{where} must hold a JSON object, not {type(value).__name__}.")
    return value


def _added_in_config(config: dict[str, Any], where: str) -> dict[str, int]:
    """Tokens listed by tokenizer_config.json: {"32000": {"content": "[SEG]", ...}, ...}."""
    try:
        listed = (config.get("added_tokens_decoder") or {}).items()
        return {token["content"]: int(index) for index, token in listed}
    except (AttributeError, KeyError, TypeError, ValueError):
        raise CheckpointError(f"{where}: {_CONFIG} has a malformed added_tokens_decoder.") from None


def _max_length(config: dict[str, Any], where: str) -> int:
    value = config.get("model_max_length")
    if value is None or (isinstance(value, int | float) and value >= _UNLIMITED):
        return _DEFAULT_MAX_LENGTH
    if isinstance(value, bool) or not isinstance(value, int) or value < 1:
        raise CheckpointError(
            f"{where}: {_CONFIG} has model_max_length {value!r}; it must be a positive integer."
        )
    return value


def _dump(value: Any) -> str:
    return json.dumps(value, indent=2, ensure_ascii=False) + "\n"
