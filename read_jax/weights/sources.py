"""Reading PyTorch checkpoints without loading them: every tensor is a view of a memory-mapped file.

`open_folder` and `open_file` give the tensors by name with their shapes and types, after checking that
every shard is there, complete and agrees with the index. Nothing is read until `Tensor.read`.
"""

from __future__ import annotations

import dataclasses
import json
import pickle
import re
import zipfile
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any

import ml_dtypes
import numpy as np

from read_jax.errors import CheckpointError

_SAFETENSORS_DTYPES: dict[str, np.dtype] = {
    "F64": np.dtype(np.float64),
    "F32": np.dtype(np.float32),
    "F16": np.dtype(np.float16),
    "BF16": np.dtype(ml_dtypes.bfloat16),
    "I64": np.dtype(np.int64),
    "I32": np.dtype(np.int32),
    "I16": np.dtype(np.int16),
    "I8": np.dtype(np.int8),
    "U8": np.dtype(np.uint8),
    "BOOL": np.dtype(np.bool_),
}
_MAX_HEADER = 100 << 20  # safetensors' own limit
_DOWNLOAD_PATTERNS = ("*.json", "tokenizer.model", "*.safetensors", "pytorch_model*.bin")


@dataclasses.dataclass(frozen=True)
class Tensor:
    """One tensor of a checkpoint: its name there, shape, numpy dtype, and how to read it.

    origin: the file it lies in; `read` returns a read-only view where the file can be mapped.
    """

    key: str
    shape: tuple[int, ...]
    dtype: np.dtype
    origin: Path | str
    read: Callable[[], np.ndarray]

    @property
    def nbytes(self) -> int:
        """Size in the checkpoint's own type."""
        return int(np.prod(self.shape, dtype=np.int64)) * self.dtype.itemsize


def resolve(name: str | Path, what: str, patterns: Iterable[str] = _DOWNLOAD_PATTERNS) -> Path:
    """A local folder for `name`: the folder itself, or a Hugging Face id "owner/name", downloaded.

    Raises `CheckpointError` when there is no such folder and no such download.
    """
    path = Path(name).expanduser()
    if path.exists():
        return path
    if not re.fullmatch(r"[A-Za-z0-9][\w.-]*/[\w.-]+", str(name)):
        raise CheckpointError(f"{what}: no such file or folder: {path}.")
    from huggingface_hub import snapshot_download

    try:
        return Path(snapshot_download(str(name), allow_patterns=list(patterns)))
    except Exception as error:  # the client raises many kinds: offline, gated, unknown id, disk
        reason = str(error).strip().splitlines()[0] if str(error).strip() else type(error).__name__
        raise CheckpointError(
            f"{what}: {name!r} is not a local folder and could not be downloaded from Hugging Face "
            f"({reason}). Check the name and the network, or download it elsewhere and pass the folder."
        ) from error


def read_json(path: Path, what: str) -> dict[str, Any]:
    """A JSON object from a file; raises `CheckpointError` when it is absent or not an object."""
    try:
        data = json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise CheckpointError(f"{what}: {path.name} is missing from {path.parent}.") from None
    except (OSError, ValueError) as error:
        raise CheckpointError(f"{what}: {path} cannot be read as JSON: {error}.") from None
    if not isinstance(data, dict):
        raise CheckpointError(f"{what}: {path} must hold a JSON object, not {type(data).__name__}.")
    return data


def open_folder(
    folder: Path, what: str, stems: tuple[str, ...] = ("model", "pytorch_model")
) -> dict[str, Tensor]:
    """The tensors of a Hugging Face folder: one file or an index with shards, safetensors before .bin."""
    if not folder.is_dir():
        raise CheckpointError(f"{what}: {folder} is not a folder.")
    for stem, suffix in ((stems[0], ".safetensors"), (stems[-1], ".bin")):
        index = folder / f"{stem}{suffix}.index.json"
        single = folder / f"{stem}{suffix}"
        if index.is_file():
            return _open_sharded(index, what)
        if single.is_file():
            return open_file(single, what)
        shards = sorted(folder.glob(f"{stem}-*-of-*{suffix}"))
        if shards:
            raise CheckpointError(
                f"{what}: {folder} holds shards such as {shards[0].name} but not their index {index.name}. "
                "Download the index too."
            )
    raise CheckpointError(
        f"{what}: no weights in {folder}. Expected model.safetensors, pytorch_model.bin, or shards "
        "with their "
        "index.json."
    )


def _open_sharded(index: Path, what: str) -> dict[str, Tensor]:
    weight_map = read_json(index, what).get("weight_map")
    if not isinstance(weight_map, dict) or not weight_map:
        raise CheckpointError(f"{what}: {index} has no weight_map.")
    names = sorted(set(weight_map.values()))
    outside = [name for name in names if Path(name).name != name]
    if outside:
        raise CheckpointError(f"{what}: {index} names a shard outside its folder: {outside[0]!r}.")
    absent = [name for name in names if not (index.parent / name).is_file()]
    if absent:
        raise CheckpointError(
            f"{what}: {len(absent)} of {len(names)} shards are missing from {index.parent}: "
            f"{', '.join(absent[:3])}. Download them again."
        )
    tensors: dict[str, Tensor] = {}
    for name in names:
        shard = open_file(index.parent / name, what)
        expected = {key for key, file in weight_map.items() if file == name}
        lost, extra = sorted(expected - shard.keys()), sorted(shard.keys() - expected)
        if lost or extra:
            problem = (
                f"lacks {lost[0]}" if lost else f"holds {extra[0]}, which the index does not place there"
            )
            raise CheckpointError(
                f"{what}: shard {name} does not match {index.name}: it {problem}. Files of different "
                "downloads are mixed; download the folder again."
            )
        tensors.update(shard)
    return tensors


def open_file(path: Path, what: str) -> dict[str, Tensor]:
    """The tensors of one .safetensors, .bin or .pth file."""
    if not path.is_file():
        raise CheckpointError(f"{what}: no such file: {path}.")
    with path.open("rb") as file:
        head = file.read(64)
    if head.startswith(b"version https://git-lfs"):
        raise CheckpointError(f"{what}: {path} is a Git LFS pointer, not the file: run `git lfs pull`.")
    if path.suffix == ".safetensors":
        return _open_safetensors(path, what)
    return _open_torch(path, what, zipped=head.startswith(b"PK\x03\x04"))


def _open_safetensors(path: Path, what: str) -> dict[str, Tensor]:
    size = path.stat().st_size
    broken = f"{what}: {path} is not a complete safetensors file"
    again = "Download it again."
    with path.open("rb") as file:
        length = int.from_bytes(file.read(8), "little")
        if size < 8 or length > min(size - 8, _MAX_HEADER):
            raise CheckpointError(f"{broken}: {size} bytes cannot hold a header of {length}. {again}")
        try:
            header = json.loads(file.read(length))
        except ValueError as error:
            raise CheckpointError(f"{broken}: {error}. {again}") from None
    data = np.memmap(path, np.uint8, "r") if size else np.empty(0, np.uint8)
    start = 8 + length
    tensors: dict[str, Tensor] = {}
    for key, entry in header.items():
        if key == "__metadata__":
            continue
        try:
            dtype = _SAFETENSORS_DTYPES.get(entry["dtype"])
            shape = tuple(int(n) for n in entry["shape"])
            begin, end = (start + int(n) for n in entry["data_offsets"])
        except (KeyError, TypeError, ValueError) as error:
            raise CheckpointError(f"{broken}: the entry of {key} is malformed ({error!r}). {again}") from None
        if dtype is None:
            raise CheckpointError(f"{what}: {key} in {path.name} has the unsupported type {entry['dtype']}.")
        if end > size:
            raise CheckpointError(f"{broken}: {key} ends at byte {end} of {size}. {again}")
        if begin < start or end - begin != int(np.prod(shape, dtype=np.int64)) * dtype.itemsize:
            raise CheckpointError(f"{broken}: {key} has {end - begin} bytes for shape {list(shape)}. {again}")

        def read(
            begin: int = begin, end: int = end, dtype: np.dtype = dtype, shape: Any = shape
        ) -> np.ndarray:
            return np.asarray(data[begin:end]).view(dtype).reshape(shape)

        tensors[key] = Tensor(key, shape, dtype, path, read)
    # file order, so that copying the tensors one after the other reads the disk in sequence
    order = {key: header[key]["data_offsets"][0] for key in tensors}
    return dict(sorted(tensors.items(), key=lambda item: order[item[0]]))


def import_torch(what: str) -> Any:
    """PyTorch, or a `CheckpointError` that says how to get it or how to do without."""
    try:
        import torch
    except ImportError:
        raise CheckpointError(
            f"{what}: .bin and .pth files need PyTorch to be read or written (pip install torch, the "
            "CPU build is "
            "enough); safetensors files do not."
        ) from None
    return torch


def _open_torch(path: Path, what: str, zipped: bool) -> dict[str, Tensor]:
    if zipped and not zipfile.is_zipfile(path):
        raise CheckpointError(f"{what}: {path} is cut short (its end is missing). Download it again.")
    torch = import_torch(what)
    try:
        # files of PyTorch before 1.6 cannot be mapped: those are small enough to be read
        content = torch.load(path, map_location="cpu", weights_only=True, mmap=zipped)
    except pickle.UnpicklingError as error:
        line = str(error).strip().splitlines()[0]
        raise CheckpointError(
            f"{what}: {path} is not a plain file of tensors and was not opened, because it could run "
            f"code: {line}"
        ) from None
    except Exception as error:  # torch raises RuntimeError, EOFError, KeyError, ... on damaged files
        line = (str(error).strip() or type(error).__name__).splitlines()[0]
        raise CheckpointError(f"{what}: {path} is damaged or not a PyTorch file: {line}") from None
    if not isinstance(content, dict) or not content:
        raise CheckpointError(f"{what}: {path} does not hold tensors by name, but {type(content).__name__}.")
    tensors: dict[str, Tensor] = {}
    for key, value in content.items():
        if not isinstance(key, str) or not isinstance(value, torch.Tensor):
            raise CheckpointError(
                f"{what}: {path} holds {type(value).__name__} under {key!r}; expected a plain state "
                "dict of tensors."
            )
        try:
            view = _numpy_view(torch, value)
        except TypeError:
            raise CheckpointError(
                f"{what}: {key} in {path.name} has the unsupported type {value.dtype}."
            ) from None
        tensors[key] = Tensor(key, tuple(value.shape), view.dtype, path, lambda view=view: view)
    return tensors


def _numpy_view(torch: Any, value: Any) -> np.ndarray:
    """A torch tensor as numpy without a copy; numpy has no bfloat16 of its own, so by way of its bits."""
    if value.dtype == torch.bfloat16:
        return value.detach().view(torch.int16).numpy().view(ml_dtypes.bfloat16)
    return value.detach().numpy()


def dominant_dtype(tensors: Iterable[Tensor]) -> np.dtype:
    """The type that most of the bytes have."""
    sizes: dict[np.dtype, int] = {}
    for tensor in tensors:
        sizes[tensor.dtype] = sizes.get(tensor.dtype, 0) + tensor.nbytes
    return max(sizes, key=lambda dtype: sizes[dtype])
