"""A model folder -> a Hugging Face folder that the original PyTorch code loads, as a stream."""

from __future__ import annotations

import dataclasses
import functools
import json
import math
import shutil
import time
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import numpy as np

from read_jax.errors import CheckpointError
from read_jax.weights import checkpoint, engine, sources, store
from read_jax.weights.checkpoint import BUFFERS, PARAMS, SASP_KEY, UPSTREAM
from read_jax.weights.folders import atomic_folder, check_output, check_space, fsync
from read_jax.weights.tables import checkpoint_table

Entry = tuple[tuple[int, ...], np.dtype, Callable[[], np.ndarray]]
"""Shape, type and reader of a tensor to write."""

_STEMS = {"safetensors": "model", "bin": "pytorch_model"}
_NAMES = {
    "float64": "F64",
    "float32": "F32",
    "float16": "F16",
    "bfloat16": "BF16",
    "int64": "I64",
    "int32": "I32",
    "int16": "I16",
    "int8": "I8",
    "uint8": "U8",
    "bool": "BOOL",
}
_PRIVATE = {"config.json", "preprocessor_config.json", BUFFERS}  # of upstream/: not copied as they are
_SPARE = 64 << 20


@dataclasses.dataclass(frozen=True)
class ExportSummary:
    """What an export wrote: number of tensors, files with weights, bytes of weights, seconds."""

    output: Path
    tensors: int
    files: list[str]
    bytes: int
    seconds: float

    def __str__(self) -> str:
        return (
            f"{self.output}: {self.tensors} tensors, {self.bytes / 1e9:.2f} GB in {len(self.files)} file(s), "
            f"{self.seconds:.1f} s"
        )


def export(
    model_dir: str | Path,
    output: str | Path,
    *,
    format: str = "safetensors",
    max_shard_bytes: int = 10_000_000_000,
    overwrite: bool = False,
    progress: Callable[[int, int, str], None] | None = None,
) -> ExportSummary:
    """Write a model back in the layout of the READ code (`READForCausalLM.from_pretrained`).

    CLIP is not part of it: the original loads CLIP from its own folder.

    Args:
        model_dir: a folder written by `convert`.
        output: the Hugging Face folder to make.
        format: "safetensors", or "bin" for torch.save files.
        max_shard_bytes: start a new file rather than exceed this; one file when everything fits.
        overwrite: replace an existing export, once the new one is complete.
        progress: called as (bytes done, bytes in all, file) after every file.

    Raises:
        CheckpointError: the model folder is damaged, or the output cannot be written.
    """
    start = time.monotonic()
    if format not in _STEMS:
        raise CheckpointError(f"unknown format {format!r}; known: {', '.join(_STEMS)}.")
    if max_shard_bytes < 1:
        raise CheckpointError(f"max_shard_bytes must be positive, not {max_shard_bytes}.")
    model_dir, output = checkpoint.model_folder(model_dir), Path(output).expanduser()
    record = checkpoint.load_record(model_dir)
    check_output(
        output,
        [model_dir],
        overwrite=overwrite,
        replaceable=_is_hugging_face,
        kind="a Hugging Face checkpoint",
    )
    stored = np.dtype(store.DTYPES[record.dtype])
    store.check_params(model_dir / PARAMS, checkpoint.model_leaves(record.config), stored)
    if format == "bin":
        sources.import_torch("export")
    entries = _entries(model_dir, record, stored)
    shards = _split(entries, max_shard_bytes)
    sizes = [sum(_nbytes(entries[key]) for key in shard) for shard in shards]
    check_space(output, sum(sizes) + (max(sizes) if format == "bin" else 0) + _SPARE)
    upstream = model_dir / UPSTREAM
    config = _config_json(sources.read_json(upstream / "config.json", "model folder"), record)
    names = _file_names(_STEMS[format], "." + format, len(shards))
    write = write_safetensors if format == "safetensors" else write_torch
    with atomic_folder(output) as folder:
        for done, (name, shard) in enumerate(zip(names, shards, strict=True), start=1):
            write(folder / name, {key: entries[key] for key in shard})
            if progress is not None:
                progress(sum(sizes[:done]), sum(sizes), name)
        if len(names) > 1:
            weight_map = {key: name for name, shard in zip(names, shards, strict=True) for key in shard}
            index = {"metadata": {"total_size": sum(sizes)}, "weight_map": dict(sorted(weight_map.items()))}
            _write_json(folder / f"{_STEMS[format]}.{format}.index.json", index)
        for file in sorted(upstream.iterdir()):
            if file.is_file() and file.name not in _PRIVATE:
                shutil.copyfile(file, folder / file.name)
        _write_json(folder / "config.json", config)
        fsync(folder / "config.json")
    return ExportSummary(output, len(entries), names, sum(sizes), time.monotonic() - start)


def _is_hugging_face(folder: Path) -> bool:
    weights = [file for stem in _STEMS.values() for file in folder.glob(f"{stem}*")]
    return (folder / "config.json").is_file() and bool(weights) and not (folder / PARAMS).exists()


def _entries(model_dir: Path, record: checkpoint.ModelRecord, stored: np.dtype) -> dict[str, Entry]:
    """Every tensor of the Hugging Face layout, in upstream's order, with how to make it."""
    table = checkpoint_table(record.config)

    def make(row: engine.Row) -> np.ndarray:
        return row.inverse(store.read_slice(model_dir / PARAMS, row.path, row.index))

    entries: dict[str, Entry] = {
        row.key: (row.shape, stored, functools.partial(make, row)) for row in table.rows
    }
    path = model_dir / UPSTREAM / BUFFERS
    if path.is_file():
        for key, tensor in sources.open_file(path, "model folder").items():
            entries[key] = (tensor.shape, tensor.dtype, tensor.read)
    return entries


def _nbytes(entry: Entry) -> int:
    return math.prod(entry[0]) * entry[1].itemsize


def _split(entries: Mapping[str, Entry], limit: int) -> list[list[str]]:
    """Keys by file: as many as fit, in order."""
    shards: list[list[str]] = [[]]
    size = 0
    for key, entry in entries.items():
        if shards[-1] and size + _nbytes(entry) > limit:
            shards.append([])
            size = 0
        shards[-1].append(key)
        size += _nbytes(entry)
    return shards


def _file_names(stem: str, suffix: str, count: int) -> list[str]:
    if count == 1:
        return [stem + suffix]
    return [f"{stem}-{i:05d}-of-{count:05d}{suffix}" for i in range(1, count + 1)]


def write_safetensors(path: Path, entries: Mapping[str, Entry]) -> None:
    """Write a safetensors file tensor by tensor; only one is in memory at a time."""
    header: dict[str, Any] = {"__metadata__": {"format": "pt"}}
    offset = 0
    for key, (shape, dtype, _) in entries.items():
        end = offset + math.prod(shape) * dtype.itemsize
        header[key] = {"dtype": _NAMES[str(dtype)], "shape": list(shape), "data_offsets": [offset, end]}
        offset = end
    text = json.dumps(header, separators=(",", ":")).encode()
    text += b" " * (-len(text) % 8)  # data starts on a multiple of 8 bytes
    with path.open("wb") as file:
        file.write(len(text).to_bytes(8, "little") + text)
        for shape, dtype, read in entries.values():
            values = np.empty(shape, dtype)
            store.fill(values, read())
            file.write(store.raw_bytes(values))


def write_torch(path: Path, entries: Mapping[str, Entry]) -> None:
    """Write a torch.save file. It goes through a mapped temporary, so the shard is never all in memory."""
    torch = sources.import_torch("export")
    staged = path.with_suffix(".staged.safetensors")
    write_safetensors(staged, entries)
    # torch wants writable memory: a private mapping is, and is never written
    data = np.memmap(staged, np.uint8, "c")
    start = 8 + int.from_bytes(data[:8].tobytes(), "little")
    state = {}
    for key, (shape, dtype, _) in entries.items():
        end = start + math.prod(shape) * dtype.itemsize
        values = data[start:end].view(dtype).reshape(shape)
        state[key] = _torch_view(torch, np.asarray(values))
        start = end
    try:
        torch.save(state, path)
    except RuntimeError as error:  # torch's own writer does not say why it stopped
        line = str(error).strip().splitlines()[0]
        raise CheckpointError(f"{path.name} could not be written; is the disk full? ({line})") from error
    del state
    staged.unlink()


def _torch_view(torch: Any, values: np.ndarray) -> Any:
    if str(values.dtype) == "bfloat16":
        return torch.from_numpy(values.view(np.int16)).view(torch.bfloat16)
    return torch.from_numpy(values)


def _config_json(hf: dict[str, Any], record: checkpoint.ModelRecord) -> dict[str, Any]:
    """Upstream's config.json, brought up to date with what the model has become."""
    config = record.config
    hf = {**hf, "vocab_size": config.llama.vocab_size, "torch_dtype": record.dtype}
    if "trained_updates" in record.source:
        # the original does not read it; without it, who converts the folder again would have to know
        hf[SASP_KEY] = config.sasp.to_dict()
        if config.sasp.enabled:  # whatever it began from
            hf["architectures"] = ["READForCausalLM"]
    if record.source.get("kind") != "llava":
        return hf
    tower = str(record.source.get("vision_tower"))
    return {
        **hf,
        "architectures": ["READForCausalLM"],
        "mm_use_im_start_end": True,
        "mm_vision_tower": hf.get("mm_vision_tower", tower),
        "model_type": "llava",
        "out_dim": config.prompt_dim,
        "train_mask_decoder": True,
        "use_cache": False,
        "vision_tower": hf.get("vision_tower", hf.get("mm_vision_tower", tower)),
    }


def _write_json(path: Path, data: Mapping[str, Any]) -> None:
    store.write_bytes(path, (json.dumps(data, indent=2) + "\n").encode())
