"""The model folder: what it holds, and reading it.

    MODEL_DIR/config.json   format, type, architecture, where the weights came from, fingerprint
    MODEL_DIR/params/       an Orbax checkpoint of the parameter tree (keys: the parts of dotted paths)
    MODEL_DIR/upstream/     the source's own config.json, tokenizer and image-processor files, and
                            buffers.safetensors: tensors that only an export needs

Every function raises `CheckpointError` on a folder that is missing, incomplete or damaged.
"""

from __future__ import annotations

import contextlib
import ctypes
import dataclasses
import json
import math
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from read_jax.config import ReadConfig
from read_jax.errors import CheckpointError, ConfigError
from read_jax.weights import engine, store
from read_jax.weights.tables import model_table

FORMAT = 1
CONFIG, PARAMS, UPSTREAM = "config.json", "params", "upstream"
BUNDLED = ("nano",)
"""Models that come with the package, by name: nano is of `configs/nano_scenes.py`."""
BUNDLED_MODELS = Path(__file__).parent.parent / "bundled"
BUFFERS = "buffers.safetensors"
SASP_KEY = "read_jax_sasp"
"""Our key in an exported config.json: the point settings, for which the original has none."""


@dataclasses.dataclass(frozen=True)
class ModelRecord:
    """A model folder's config.json.

    config: the architecture; dtype: the type stored; source: names and kinds of what was converted;
    parameters: their number; fingerprint: hash of the content; version: of read_jax that wrote it.
    """

    config: ReadConfig
    dtype: str
    source: dict[str, Any]
    parameters: int
    fingerprint: str
    version: str

    def save(self, folder: Path) -> None:
        """Write it as the folder's config.json."""
        data = {
            "format": FORMAT,
            "read_jax_version": self.version,
            "dtype": self.dtype,
            "parameters": self.parameters,
            "fingerprint": self.fingerprint,
            "source": self.source,
            "config": self.config.to_dict(),
        }
        store.write_bytes(folder / CONFIG, (json.dumps(data, indent=2) + "\n").encode())


def is_model_folder(folder: Path) -> bool:
    """Whether a folder was written by `convert`, judging by its config.json."""
    try:
        data = json.loads((folder / CONFIG).read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return False
    return isinstance(data, dict) and "read_jax_version" in data


def model_folder(model_dir: str | Path) -> Path:
    """The folder of that path, or the package's own model of that name; a model folder at hand goes first.

    Raises `CheckpointError` when there is neither.
    """
    folder = Path(model_dir).expanduser()
    # another folder that happens to be called so does not stand in the way
    if str(model_dir) in BUNDLED and not is_model_folder(folder):
        return BUNDLED_MODELS / str(model_dir)
    if folder.is_dir():
        return folder
    raise CheckpointError(
        f"no model folder at {folder}. Make one with: read-jax convert; or use {BUNDLED[0]}, the small model "
        "that comes with the package."
    )


def load_record(model_dir: str | Path) -> ModelRecord:
    """Read and check a model folder's config.json."""
    folder = model_folder(model_dir)
    path = folder / CONFIG
    try:
        data = json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise CheckpointError(f"{folder} is not a model folder: it has no {CONFIG}.") from None
    except (OSError, ValueError) as error:
        raise CheckpointError(f"{path} cannot be read: {error}.") from None
    if not isinstance(data, dict) or "read_jax_version" not in data:
        hint = " It looks like a Hugging Face folder: convert it first." if "model_type" in data else ""
        if (folder / "checkpoints").is_dir():
            hint = " It is the folder of a training run: make a model folder of it with read-jax merge."
        raise CheckpointError(f"{folder} is not a model folder of this package.{hint}")
    if data.get("format") != FORMAT:
        raise CheckpointError(
            f"{path} has format {data.get('format')!r}; this version reads {FORMAT}. Convert the "
            "source again."
        )
    try:
        record = ModelRecord(
            config=ReadConfig.from_dict(data["config"]),
            dtype=data["dtype"],
            source=dict(data["source"]),
            parameters=int(data["parameters"]),
            fingerprint=str(data["fingerprint"]),
            version=str(data["read_jax_version"]),
        )
    except ConfigError as error:
        raise CheckpointError(f"{path}: {error}") from None
    except (KeyError, TypeError, ValueError) as error:
        raise CheckpointError(f"{path} is incomplete: {error!r}. Convert the source again.") from None
    if record.dtype not in store.DTYPES:
        raise CheckpointError(f"{path}: unknown dtype {record.dtype!r}; known: {', '.join(store.DTYPES)}.")
    return record


def load_config(model_dir: str | Path) -> ReadConfig:
    """The architecture of the model in this folder."""
    return load_record(model_dir).config


def model_leaves(config: ReadConfig) -> dict[str, engine.Leaf]:
    """Every parameter of a model by dotted path, with its shape."""
    return engine.leaves(model_table(config))


def abstract_params(
    config: ReadConfig, dtype: Any, shardings: Any = None, only: Sequence[str] = ()
) -> dict[str, Any]:
    """The parameter tree as `jax.ShapeDtypeStruct`s: nested dictionaries keyed by path components.

    dtype: of every leaf, or a mapping from dotted paths to types. shardings: None, one
    `jax.sharding.Sharding` for everything, or a tree of them of the same structure. only: as for
    `load_params`.
    """
    import jax

    flat = flatten(shardings) if isinstance(shardings, Mapping) else None
    tree: dict[str, Any] = {}
    leaves = model_leaves(config)
    for path in _chosen(leaves, only):
        leaf = leaves[path]
        if flat is not None and path not in flat:
            raise ValueError(f"shardings has no entry for {path}.")
        sharding = flat[path] if flat is not None else shardings
        node = tree
        *parents, name = path.split(".")
        for key in parents:
            node = node.setdefault(key, {})
        kind = dtype[path] if isinstance(dtype, Mapping) else dtype
        node[name] = jax.ShapeDtypeStruct(leaf.shape, kind, sharding=sharding)
    return tree


def _chosen(leaves: Mapping[str, Any], only: Sequence[str]) -> list[str]:
    """Paths that are among the named parts; raises `ConfigError` for a part that the model does not have."""
    if not only:
        return list(leaves)
    for name in only:
        if not any(f"{path}.".startswith(f"{name}.") for path in leaves):
            parts = sorted({".".join(path.split(".")[:2]) for path in leaves})
            raise ConfigError(
                f"the model has no part {name!r}; it has {', '.join(parts)}, and what is in them."
            )
    return [path for path in leaves if any(f"{path}.".startswith(f"{name}.") for name in only)]


def flatten(tree: Mapping[str, Any], prefix: str = "") -> dict[str, Any]:
    """A nested dictionary by dotted paths."""
    flat: dict[str, Any] = {}
    for key, value in tree.items():
        if isinstance(value, Mapping):
            flat.update(flatten(value, f"{prefix}{key}."))
        else:
            flat[f"{prefix}{key}"] = value
    return flat


def load_params(
    model_dir: str | Path, dtype: Any = None, shardings: Any = None, only: Sequence[str] = ()
) -> dict[str, Any]:
    """Restore the parameters with Orbax, straight into their shards.

    Args:
        model_dir: a folder written by `convert`.
        dtype: type to cast to while reading, or a mapping from dotted paths to types; None keeps the stored
            one.
        shardings: None (this process's first device), one sharding for all, or a dictionary of them, nested
            or by dotted path.
        only: parts of the model by dotted path, such as "sam.mask_decoder"; nothing else is read. Empty: all.

    Returns:
        Nested dictionaries of `jax.Array`, keyed by the components of the dotted paths.

    Raises:
        CheckpointError: the folder is missing, damaged, or not of this kind.
        ConfigError: the model has no part of a name in `only`.
    """
    import jax
    import orbax.checkpoint as ocp

    record = load_record(model_dir)
    folder = model_folder(model_dir).resolve() / PARAMS
    stored = store.DTYPES[record.dtype]
    chunks = store.check_params(folder, model_leaves(record.config), stored)
    if shardings is None:
        shardings = jax.sharding.SingleDeviceSharding(jax.local_devices()[0])
    target = abstract_params(record.config, stored if dtype is None else dtype, shardings, only)
    # shards are read a few at a time: Orbax's default has the whole model in host memory at once
    flat = flatten(target)
    largest = max(
        store.bytes_to_read(
            leaf.shape, leaf.sharding.shard_shape(leaf.shape), chunks[path], np.dtype(stored).itemsize
        )
        for path, leaf in flat.items()
    )
    budget = int(largest / 1e9) + 1  # GB; not above the largest, it would never start
    # of several processes each reads what it needs without waiting for the others
    this = jax.process_index()
    alone = ocp.options.MultiprocessingOptions(
        primary_host=this, active_processes={this}, barrier_sync_key_prefix=f"process_{this}"
    )
    handler = ocp.PyTreeCheckpointHandler(
        use_ocdbt=False, restore_concurrent_gb=budget, multiprocessing_options=alone
    )
    on_host = any(d.platform == "cpu" for d in next(iter(flat.values())).sharding.device_set)
    freed = large_blocks_freed_at_once() if on_host else contextlib.nullcontext()
    with freed, ocp.Checkpointer(handler, multiprocessing_options=alone) as checkpointer:
        try:
            restore_args = ocp.checkpoint_utils.construct_restore_args(target)
            return checkpointer.restore(
                folder,
                args=ocp.args.PyTreeRestore(
                    item=target, restore_args=restore_args, partial_restore=bool(only)
                ),
            )
        except (OSError, ValueError) as error:
            line = (str(error).strip() or type(error).__name__).splitlines()[0]
            raise CheckpointError(f"{folder} could not be restored: {line}") from error


@contextlib.contextmanager
def large_blocks_freed_at_once() -> Iterator[None]:
    """What is freed goes back to the system, where the C library would keep some gigabytes: they count where
    the weights themselves stay in this memory. Afterwards its limits are fixed, at the most that it would
    have come to by itself. Does nothing without glibc."""
    try:
        mallopt = ctypes.CDLL(None).mallopt
    except (AttributeError, OSError, TypeError):
        yield
        return
    from_mmap, trim = -3, -1  # of mallopt(3)
    mallopt(from_mmap, 256 << 10)
    try:
        yield
    finally:
        mallopt(from_mmap, 32 << 20)
        mallopt(trim, 64 << 20)


@dataclasses.dataclass(frozen=True)
class ModelInfo:
    """What `inspect` tells of a model folder. tokens: added tokens and their ids; groups: parameters each."""

    folder: Path
    record: ModelRecord
    bytes: int
    groups: dict[str, int]
    tokens: dict[str, int]

    def __str__(self) -> str:
        record, config = self.record, self.record.config
        sasp = config.sasp
        points = f"{sasp.num_points} points, grid / {sasp.down_sample}" if sasp.enabled else "off"
        source = ", ".join(f"{key} {value}" for key, value in record.source.items() if value is not None)
        lines = [
            f"{self.folder}: {record.parameters:,} parameters, {record.dtype}, {self.bytes / 1e9:.2f} GB",
            f"  source       {source}",
            f"  LLaMA        width {config.llama.hidden_size}, {config.llama.num_layers} layers, "
            f"vocabulary {config.llama.vocab_size}",
            f"  CLIP         width {config.clip.hidden_size}, {config.clip.image_size} px, "
            f"{config.clip.num_image_tokens} image tokens",
            f"  SAM          width {config.sam.embed_dim}, {config.sam.depth} blocks, "
            f"{config.sam.image_size} px",
            f"  SasP         {points}",
            f"  tokens       {', '.join(f'{text} {index}' for text, index in self.tokens.items())}",
            *(f"  {name:<12} {count:,}" for name, count in self.groups.items()),
            f"  fingerprint  {record.fingerprint}",
        ]
        return "\n".join(lines)


def check_content(model_dir: str | Path) -> None:
    """Raise `CheckpointError` unless every parameter is bit for bit what was written; reads all of them."""
    folder = model_folder(model_dir)
    record = load_record(folder)
    leaves = model_leaves(record.config)
    store.check_params(folder / PARAMS, leaves, np.dtype(store.DTYPES[record.dtype]))
    found = store.content_fingerprint(folder / PARAMS, leaves)
    if found != record.fingerprint:
        raise CheckpointError(
            f"{folder} is damaged: the parameters have the fingerprint {found[:19]}, its {CONFIG} states "
            f"{record.fingerprint[:19]}. Convert again, or copy it again."
        )


def inspect(model_dir: str | Path) -> ModelInfo:
    """Describe a model folder, after checking that its files are all there; reads no weights."""
    from read_jax.text.tokenizer import Tokenizer

    folder = model_folder(model_dir)
    record = load_record(folder)
    leaves = model_leaves(record.config)
    dtype = np.dtype(store.DTYPES[record.dtype])
    store.check_params(folder / PARAMS, leaves, dtype)
    groups: dict[str, int] = {}
    for path, leaf in leaves.items():
        name = path.split(".")[0]
        groups[name] = groups.get(name, 0) + math.prod(leaf.shape)
    tokens = Tokenizer.load(folder / UPSTREAM).added_tokens
    size = sum(groups.values()) * dtype.itemsize
    return ModelInfo(folder, record, size, groups, dict(tokens))
