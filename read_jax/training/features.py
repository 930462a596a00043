"""The frozen vision encoders run once for all pictures, and what they say kept for training.

    cache(config, make_mixture(config.data), "features")    # the command `read-jax cache`
    config.data.features = "features"                       # training reads them, and runs no encoder

CLIP's features are kept before the projector, which is cheap and may learn, and SAM's image embedding, both
in bfloat16: 3.3 MB a picture at READ's sizes. With bfloat16 computation that is all that the encoders give,
so training goes the same way with a cache as without, up to how the compiler rounds in other programs.
"""

from __future__ import annotations

import dataclasses
import hashlib
import shutil
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, cast

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from jax.sharding import Mesh

from read_jax.config import ReadConfig
from read_jax.data.features import (
    BFLOAT16,
    CARD,
    SHARD_BYTES,
    Card,
    FeatureStore,
    ShardWriter,
    import_array_record,
    read_index,
    shard_complete,
)
from read_jax.data.item import Source
from read_jax.data.mixture import Mixture
from read_jax.data.packing import PictureFeatures
from read_jax.data.pictures import PictureLoader, Pictures
from read_jax.errors import CheckpointError, ConfigError, DataError
from read_jax.files import only_writer
from read_jax.models.clip import ClipVision, normalize_clip
from read_jax.models.sam.image_encoder import ImageEncoder, normalize_sam
from read_jax.sharding import batch_devices, batch_sharding, make_mesh, on_mesh, parameter_shardings
from read_jax.training.config import ENCODERS, TrainConfig
from read_jax.weights import store
from read_jax.weights.checkpoint import PARAMS, load_record, model_folder, model_leaves

Array = jax.Array

Encode = Callable[[Pictures], PictureFeatures]


@dataclasses.dataclass(frozen=True)
class Cached:
    """A complete cache. items: of its sources; pictures: distinct ones stored; unusable: reasons by item;
    bytes: on the disk."""

    folder: Path
    items: int
    pictures: int
    unusable: dict[str, str]
    bytes: int

    def __str__(self) -> str:
        lines = [
            f"{self.folder}: {self.items:,} items, {self.pictures:,} pictures, {self.bytes / 1e9:.2f} GB; "
            f"train with --config.data.features={self.folder}"
        ]
        if self.unusable:
            key, reason = next(iter(self.unusable.items()))
            lines.append(f"{len(self.unusable)} cannot be used, as {key}: {reason}")
        return "\n".join(lines)


def cache(
    config: TrainConfig,
    mixture: Mixture,
    output: str | Path,
    *,
    say: Callable[[str], None] = print,
    progress: Callable[[int, int], None] = lambda done, total: None,
    shard_bytes: int = SHARD_BYTES,
) -> Cached:
    """Run the encoders of the run's model over every picture of its training data, once.

    Killed, it goes on with the shard it was at when called again. Pictures that cannot be used are noted
    with their reasons; training skips them as it would without a cache.

    Args:
        config: of the run. A micro-batch's pictures are encoded at a time.
        mixture: of its data, as `make_mixture` gives it.
        output: folder of the cache.
        say: told the size before it begins.
        progress: told the items done, and how many there are.
        shard_bytes: about what a file may hold.

    Raises:
        ConfigError: encoders that are trained, no model to start from, or a folder with another cache.
        DataError: too many pictures cannot be used, or the disk is full.
        CheckpointError: the model folder is damaged.
    """
    if config.trained_encoders:
        raise ConfigError(
            f"{', '.join(config.trained_encoders)} of the model are trained (trainable: "
            f"{', '.join(config.trainable)}): what they say changes with every update and cannot be kept."
        )
    if not config.start.model:
        raise ConfigError(
            "start names no model folder, whose encoders would run: set start.model (for a new model, the "
            "start/ in the folder of a run that has begun)."
        )
    import_array_record()
    output = Path(output).expanduser()
    folder = model_folder(config.start.model)
    model_config = load_record(folder).config
    sources = _sources(mixture)
    card = make_card(config, folder, model_config, sources, shard_bytes)
    busy = DataError(f"another run is filling {output} right now; wait for it.")
    with only_writer(output, busy):
        if (output / CARD).exists():
            card = _same(Card.load(output), card, output)
        else:
            card.save(output)
        shards = card.shards
        done = [n for n in range(len(shards)) if shard_complete(output, n)]
        left = [n for n in range(len(shards)) if n not in done]
        pictures = sum(len(shards[n]) for n in left)
        say(
            f"{pictures:,} of {card.items:,} pictures of {', '.join(card.sources)} to encode, "
            f"{card.record_bytes / 1e6:.3g} MB each: at most {pictures * card.record_bytes / 1e9:.3g} GB in "
            f"{output} ({shutil.disk_usage(output).free / 1e9:.3g} GB free); equal ones are stored once"
        )
        if left:
            _fill(config, output, card, sources, model_config, folder, done, left, progress)
        index = read_index(output, range(len(shards)))
        size = sum(file.stat().st_size for file in output.iterdir())
        return Cached(output, card.items, len(index.places), index.unusable, size)


def _fill(
    config: TrainConfig,
    output: Path,
    card: Card,
    sources: list[Source],
    model_config: ReadConfig,
    folder: Path,
    done: list[int],
    left: list[int],
    progress: Callable[[int, int], None],
) -> None:
    """Write the shards that are left."""
    mesh = make_mesh(config.mesh)
    size = config.data.global_batch // config.step.micro_batches
    size = -(-size // batch_devices(mesh)) * batch_devices(mesh)
    encode = make_encode(model_config, folder, config.dtype, mesh)
    index = read_index(output, done)
    spans = {n: [_cut(card.shards[n], at, size) for at in range(0, len(card.shards[n]), size)] for n in left}
    count = sum(len(card.shards[n]) for n in done)
    progress(count, card.items)
    data = config.data
    with PictureLoader(
        sources,
        model_config,
        [span for n in left for span in spans[n]],
        data.workers,
        data.buffer,
        data.max_bad_share,
    ) as loader:
        for number in left:
            items: list[tuple[str, str | None, str | None]] = []
            waiting: list[Pictures] = []  # one each, until there are enough for the encoders
            with ShardWriter(output, number, card.record_bytes, len(card.shards[number])) as shard:
                written: set[str] = set()
                for span in spans[number]:
                    batch = next(loader)
                    arrays = cast(Pictures, batch.arrays)
                    reasons = {skipped.key: skipped.reason for skipped in batch.skipped}
                    for row, key in enumerate(batch.keys):
                        digest = arrays.digest[row].tobytes().hex()
                        if key in reasons:
                            items.append((key, None, reasons[key]))
                            continue
                        items.append((key, digest, None))
                        if digest not in index.places and digest not in written:
                            written.add(digest)
                            waiting.append(Pictures(*(x[row] for x in arrays)))
                    while len(waiting) >= size:
                        _encode_into(shard, encode, waiting[:size], size)
                        del waiting[:size]
                    count += len(span)
                    progress(count, card.items)
                if waiting:
                    _encode_into(shard, encode, waiting, size)
                index.add(number, items, [])
                index.add(number, [], shard.finish(items))


def _encode_into(shard: ShardWriter, encode: Encode, pictures: list[Pictures], size: int) -> None:
    """Up to `size` pictures through the encoders; always as many, so that there is one program."""
    filled = pictures + [pictures[-1]] * (size - len(pictures))
    features = encode(Pictures(*map(np.stack, zip(*filled, strict=True))))
    clip, sam = (np.asarray(x) for x in features)
    for row, one in enumerate(pictures):
        shard.add(PictureFeatures(clip[row], sam[row]), one.digest.tobytes().hex())


def open_features(
    config: TrainConfig, folder: Path, model_config: ReadConfig, mixture: Mixture
) -> FeatureStore | None:
    """The cache that the run names, None if it names none.

    folder: of the model that the run starts from. Raises `ConfigError` when it is of other encoders or other
    data, `DataError` when it is not whole.
    """
    if not config.data.features:
        return None
    import_array_record()
    features = FeatureStore(config.data.features)
    _check_fits(features, make_card(config, folder, model_config, _sources(mixture)))
    return features


def _check_fits(features: FeatureStore, wanted: Card) -> None:
    card, where = features.card, features.folder
    for name in ("dtype", "clip_size", "sam_size", "clip_features", "image_embedding", "encoders"):
        theirs, ours = getattr(card, name), getattr(wanted, name)
        if theirs != ours:
            raise ConfigError(
                f"{where} holds features of other encoders: {name} is {theirs} there, {ours} in this run. "
                "Make a cache for this run's model with `read-jax cache`, in another folder."
            )
    for name, length in wanted.sources.items():
        if card.sources.get(name) != length:
            there = f"{card.sources[name]} items" if name in card.sources else "nothing"
            raise ConfigError(
                f"{where} holds {there} of {name}, which has {length} items: it lacks pictures of this run. "
                "Make a cache for this run's data with `read-jax cache`, in another folder."
            )


def make_card(
    config: TrainConfig,
    folder: Path,
    model_config: ReadConfig,
    sources: list[Source],
    shard_bytes: int = SHARD_BYTES,
) -> Card:
    """What a cache for that model and those sources is of."""
    clip, sam = model_config.clip, model_config.sam
    tokens, grid = clip.num_image_tokens, sam.grid_size
    card = Card(
        encoders=encoder_fingerprint(folder, config.dtype),
        dtype=config.dtype,
        clip_size=clip.image_size,
        sam_size=sam.image_size,
        clip_features=(tokens, clip.hidden_size),
        image_embedding=(grid, grid, sam.out_chans),
        sources={source.name: len(source) for source in sources},
        shard_items=1,
    )
    return dataclasses.replace(card, shard_items=max(1, shard_bytes // card.record_bytes))


def encoder_fingerprint(folder: Path, dtype: str) -> str:
    """Hash of the encoders' parameters, as they are computed with: names, shapes and values."""
    hashed = hashlib.sha256()
    for part in ENCODERS:
        for path, values in _parameters(folder, part, dtype):
            hashed.update(f"{path} {list(values.shape)} {dtype}\n".encode())
            hashed.update(store.raw_bytes(np.ascontiguousarray(values)))
    return f"sha256:{hashed.hexdigest()}"


def make_encode(config: ReadConfig, folder: Path, dtype: str, mesh: Mesh) -> Encode:
    """The compiled encoders of a model folder, in `dtype` on a mesh: `Pictures` -> `PictureFeatures`."""
    kinds: dict[str, Any] = {"dtype": jnp.dtype(dtype), "param_dtype": jnp.dtype(dtype)}
    modules = (
        lambda: ClipVision(config.clip, **kinds, rngs=nnx.Rngs(0)),
        lambda: ImageEncoder(config.sam, **kinds, rngs=nnx.Rngs(0)),
    )
    graphs, params = [], []
    for part, module in zip(ENCODERS, modules, strict=True):
        graphdef, abstract = nnx.split(nnx.eval_shape(module))
        leaves = {f"{part}.{'.'.join(map(str, path))}": path for path, _ in nnx.to_flat_state(abstract)}
        variables = dict(nnx.to_flat_state(abstract))
        places = parameter_shardings(config, {n: variables[p].shape for n, p in leaves.items()}, mesh)
        flat = {}
        for name, values in _parameters(folder, part, dtype):
            variable = variables[leaves[name]]
            flat[leaves[name]] = variable.replace(jax.device_put(values, places[name]))
        graphs.append(graphdef)
        params.append(nnx.from_flat_state(flat))

    def encode(params: list[Any], pictures: Pictures) -> PictureFeatures:
        clip, encoder = (nnx.merge(graph, part) for graph, part in zip(graphs, params, strict=True))
        sam_input = normalize_sam(pictures.sam_pixels, pictures.sam_size[:, 0], pictures.sam_size[:, 1])
        features = clip(normalize_clip(pictures.clip_pixels)), encoder(sam_input)
        return PictureFeatures(*(x.astype(BFLOAT16) for x in features))

    compiled, sharding = jax.jit(on_mesh(encode, mesh)), batch_sharding(mesh)
    return lambda pictures: compiled(params, jax.device_put(pictures, sharding))


def _parameters(folder: Path, part: str, dtype: str) -> Iterator[tuple[str, np.ndarray]]:
    """An encoder's parameters, one after the other, by dotted path in `dtype`."""
    record = load_record(folder)
    leaves = {n: leaf for n, leaf in model_leaves(record.config).items() if n.startswith(f"{part}.")}
    store.check_params(folder / PARAMS, leaves, store.DTYPES[record.dtype])
    for name in sorted(leaves):
        try:
            values = store.read_slice(folder / PARAMS, name, None)
        except (OSError, ValueError) as error:
            raise CheckpointError(f"{folder}: parameter {name} cannot be read: {error}") from error
        yield name, np.asarray(values).astype(store.DTYPES[dtype], copy=False)


def _sources(mixture: Mixture) -> list[Source]:
    """Each once, by name."""
    return list({subset.source.name: subset.source for subset in mixture.subsets}.values())


def _same(there: Card, wanted: Card, folder: Path) -> Card:
    """The card of a cache to go on with."""
    ours, theirs = dataclasses.asdict(wanted), dataclasses.asdict(there)
    differing = [name for name in ours if name != "shard_items" and ours[name] != theirs[name]]
    if differing:
        words = "; ".join(f"{name} is {theirs[name]} there, {ours[name]} here" for name in differing)
        raise ConfigError(f"{folder} holds a cache of something else: {words}. Choose another folder.")
    return there


def _cut(items: range, start: int, size: int) -> range:
    return items[start : start + size]
