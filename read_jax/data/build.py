"""`read-jax data build`: a dataset's original files turned into ArrayRecord once, as a TFDS dataset.

A machine then reads a few large files, from a disk or a bucket, instead of a hundred thousand small ones, and
parses no annotations at start. TensorFlow is not needed. `read_jax.data.records` describes the result.

Pictures are stored as their files are, byte for byte, once in every split they occur in: refcoco, refcoco+
and refcocog built whole take about three times their pictures, the annotations some percent of that.
"""

from __future__ import annotations

import dataclasses
import functools
import io
import itertools
import json
import shutil
import tempfile
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

from PIL import Image

from read_jax.data.item import Compat, Item, Source
from read_jax.data.records import (
    FOLDER,
    ITEM_FIELDS,
    QUERY_FIELDS,
    VERSION,
    config_name,
    features,
    find,
    import_tfds,
    read_metadata,
    tfds_name,
    to_example,
)
from read_jax.data.sources import FAMILIES, REFER_SETS, SYNTHETIC, UnknownSplitError, load_source
from read_jax.errors import DataError, ReadJaxError
from read_jax.files import write_file

SHARD_BYTES = 128 << 20
"""About what a file holds; as much is held in memory while it is written."""

Progress = Callable[[int, int, str], None]
"""Called with the items done, their number, and the source's name."""

_SPLITS = {
    **dict.fromkeys(REFER_SETS, ("train", "val", "testA", "testB", "testC")),
    "ReasonSeg": ("train", "val", "test"),
    "scenes": ("train", "val", "test"),
}
_PARTIAL = ".incomplete-"


@dataclasses.dataclass(frozen=True)
class Built:
    """A split that is built.

    Attributes:
        name: of the source, "refcoco|val".
        folder: of the TFDS dataset, for `tfds.builder_from_directory`.
        items: number of them.
        fresh: written by this call; False: it was there already.
        record_bytes: size of the records; 0 when it was there already.
        image_bytes: size of the image files in it, each counted once; 0 when it was there already.
    """

    name: str
    folder: Path
    items: int
    fresh: bool
    record_bytes: int = 0
    image_bytes: int = 0

    def __str__(self) -> str:
        if not self.fresh:
            return (
                f"{self.name}: {self.items} items, there already in {self.folder} (--overwrite replaces them)"
            )
        factor = self.record_bytes / max(self.image_bytes, 1)
        return (
            f"{self.name}: {self.items} items in {self.folder}, {self.record_bytes / 1e6:.1f} MB, "
            f"{factor:.2f} times the pictures"
        )


@dataclasses.dataclass(frozen=True)
class Report:
    """What a call of `build` did.

    Attributes:
        built: every split that is there now, of those asked for.
        skipped: splits that the families asked for can have, and why these cannot be read here.
        leftovers: folders of interrupted builds; to be deleted when no other build is running.
    """

    built: list[Built]
    skipped: dict[str, str]
    leftovers: list[Path]

    def __str__(self) -> str:
        lines = [str(one) for one in self.built]
        lines += [f"{name} not built: {reason}" for name, reason in self.skipped.items()]
        lines += [
            f"{folder} is left of an interrupted build; delete it if no other is running."
            for folder in self.leftovers
        ]
        return "\n".join(lines)


def build(
    name: str,
    data_dir: str | Path | None = None,
    output: str | Path | None = None,
    compat: Compat = None,
    overwrite: bool = False,
    progress: Progress | None = None,
) -> Report:
    """Build a split ("refcoco|val"), all splits of a family ("refcoco"), a user's JSON lines, or "all".

    A split appears whole or not at all. One that is built already is left alone unless `overwrite`, also
    when its original files have changed since. A picture that is missing ends the build; one that does
    not decode is stored as it is and raises its `ImageError` when looked at, as from the original.

    Args:
        data_dir: the folder of the original files; not needed for scenes, for JSON lines as in
            `load_source`.
        output: a folder on a disk, default `data_dir`/tfds; copy it to a bucket afterwards.
        compat: which items; both modes can lie side by side.

    Raises:
        DataError: nothing of that name can be read, a file is missing or broken, the disk is full, or
            packages are missing.
    """
    import_tfds()
    output = _output(data_dir, output)
    leftovers = sorted(output.glob(f"{_PARTIAL}*"))
    results, skipped, first = [], {}, None
    names, certain = _names(name)
    for one in names:
        if one.endswith("|test") and _family(one) in REFER_SETS and not certain:
            letters = {f"{_family(one)}|test{letter}" for letter in "ABC"}
            if letters & {result.name for result in results}:
                continue  # their union
        try:
            source = load_source(one, data_dir, compat, built=False)
        except DataError as error:
            if certain:
                raise
            first = first or error
            if not isinstance(error, UnknownSplitError):
                skipped[one] = str(error)
            continue
        results.append(_build_split(source, _split_of(one), data_dir, output, overwrite, progress))
    if not results:
        what = f"{name}: none of its splits" if name != "all" else "none of the datasets"
        raise DataError(f"{what} can be read under {data_dir}. The first error: {first}") from first
    return Report(results, skipped, leftovers)


def _names(name: str) -> tuple[list[str], bool]:
    """Names of sources, and whether each has to be there."""
    if "|" in name or name.endswith((".jsonl", ".json")):
        return [name], True
    families = [f for f in FAMILIES if f not in SYNTHETIC] if name == "all" else [name]
    names = []
    for family in families:
        if family not in FAMILIES:
            load_source(family, ".")  # raises, and says which are known
        splits = _SPLITS.get(family, ("train", "val"))
        names += [f"{family}|{s}" for s in splits + (("test",) if family in REFER_SETS else ())]
    return names, False


def _family(name: str) -> str:
    """What `find` knows a source by: its family, or the name of the user's file."""
    return name.partition("|")[0] if "|" in name else Path(name).name


def _split_of(name: str) -> tuple[str, str]:
    return _family(name), name.partition("|")[2] or "data"


def _output(data_dir: str | Path | None, output: str | Path | None) -> Path:
    if output is None:
        if data_dir is None:
            raise DataError("give the folder to build into (output, --output).")
        output = Path(data_dir) / FOLDER
    if "://" in str(output):
        raise DataError(f"{output}: build into a folder on a disk, then copy it to the bucket.")
    return Path(output).expanduser()


def _build_split(
    source: Source,
    family_split: tuple[str, str],
    data_dir: str | Path | None,
    output: Path,
    overwrite: bool,
    progress: Progress | None,
) -> Built:
    family, split = family_split
    final = output / tfds_name(family) / config_name(source.compat) / VERSION
    there = find(family, split, output, source.compat)
    if there is not None and not overwrite:
        return Built(source.name, final, len(there), fresh=False)
    if len(source) == 0:
        raise DataError(f"{source.name} has no items; there is nothing to build.")
    root = Path(data_dir).expanduser() if data_dir is not None else None
    if root is None and source.name.endswith((".jsonl", ".json")):
        root = Path(source.name).expanduser().parent
    vocabulary: list[Any] = []
    if final.exists():
        before = read_metadata(final)
        if before["source"] != family:
            raise DataError(f"{final} holds {before['source']} already; build {family} into another folder.")
        vocabulary = before["vocabulary"]  # its positions stay: other splits count in it
    try:
        output.mkdir(parents=True, exist_ok=True)
        work = Path(tempfile.mkdtemp(prefix=f"{_PARTIAL}{tfds_name(family)}-", dir=output))
    except OSError as error:
        raise DataError(f"{output} cannot be made, or not written to: {error.strerror or error}.") from None
    try:
        job = _Job(source, family, split, root, vocabulary, progress)
        job.check_space(work)
        fresh = _write(job, work)
        record_bytes = sum(file.stat().st_size for file in _shards(fresh, split))
        _install(fresh, final, split, work)
    except OSError as error:
        raise DataError(f"{source.name} cannot be built in {output}: {error.strerror or error}.") from error
    finally:
        shutil.rmtree(work, ignore_errors=True)
    return Built(source.name, final, len(source), True, record_bytes, sum(job.image_sizes.values()))


@dataclasses.dataclass
class _Job:
    """What is written: the items of a source as TFDS examples."""

    source: Source
    family: str
    split: str
    root: Path | None
    vocabulary: list[Any]
    progress: Progress | None
    image_sizes: dict[str, int] = dataclasses.field(default_factory=dict)

    def __post_init__(self) -> None:
        self._positions = {json.dumps(entry): i for i, entry in enumerate(self.vocabulary)}

    @functools.cached_property
    def bytes_per_item(self) -> int:
        """Estimated from sixteen items."""
        count = len(self.source)
        sample = [self.source[i] for i in range(0, count, -(-count // 16))]
        return sum(len(_image_file(item)) for item in sample) // len(sample) + 1024

    def check_space(self, folder: Path) -> None:
        """Raises `DataError` when the disk will not hold the records."""
        need, free = self.bytes_per_item * len(self.source), shutil.disk_usage(folder).free
        if need > free:
            raise DataError(
                f"{self.source.name} takes about {need / 2**30:.1f} GiB, {folder.parent} has "
                f"{free / 2**30:.1f} GiB free."
            )

    def examples(self, start: int, stop: int) -> Iterator[tuple[int, dict[str, Any]]]:
        """The examples of a shard."""
        for i in range(start, stop):
            item = self.source[i]
            image = _image_file(item)
            path = item.image_path or ""
            self.image_sizes[path or item.key] = len(image)
            if self.root is not None and Path(path).is_relative_to(self.root):
                path = Path(path).relative_to(self.root).as_posix()
            example = to_example(item, image, path, self._positions)
            if len(self._positions) > len(self.vocabulary):
                new = itertools.islice(self._positions, len(self.vocabulary), None)
                self.vocabulary += [json.loads(entry) for entry in new]
            yield i, example
            if self.progress:
                self.progress(i + 1, len(self.source), self.source.name)


def _image_file(item: Item) -> bytes:
    """The picture's file as it is; a drawn one as PNG."""
    if item.image_path is None:
        buffer = io.BytesIO()
        Image.fromarray(item.image).save(buffer, "PNG")
        return buffer.getvalue()
    try:
        return Path(item.image_path).read_bytes()
    except OSError as error:
        raise DataError(f"{item.image_path}, the picture of {item.key}: {error.strerror or error}.") from None


@functools.cache
def _builder_class() -> Any:
    tfds = import_tfds()

    class RecordBuilder(tfds.core.ShardBasedBuilder, skip_registration=True):  # pyright: ignore
        """Writes shard by shard in the source's order: TFDS's shuffling ones need TensorFlow from 1 GB on."""

        VERSION = tfds.core.Version(VERSION)
        BUILDER_CONFIGS = [  # noqa: RUF012 - TFDS's own convention
            tfds.core.BuilderConfig(name="default", description="Masks and texts as they should be."),
            tfds.core.BuilderConfig(
                name="read", description="With the original's defects that published numbers depend on."
            ),
        ]

        def __init__(self, job: _Job, **options: Any) -> None:
            self.name = tfds_name(job.family)
            self.job = job
            super().__init__(**options)

        def _info(self) -> Any:
            job = self.job
            return tfds.core.DatasetInfo(
                builder=self,
                description=f"{job.family}: pictures, questions and target masks; see read_jax.data.records.",
                features=features(),
                disable_shuffling=True,
                metadata=tfds.core.MetadataDict(
                    source=job.family,
                    compat=job.source.compat,
                    item_fields=list(ITEM_FIELDS),
                    query_fields=list(QUERY_FIELDS),
                    vocabulary=job.vocabulary,  # complete when it is saved, after the examples
                ),
            )

        def _shard_iterators_per_split(self, dl_manager: Any) -> dict[str, list[Callable[[], Any]]]:
            del dl_manager
            count, job = len(self.job.source), self.job
            step = max(1, SHARD_BYTES // job.bytes_per_item)
            starts = range(0, count, step)
            return {job.split: [functools.partial(job.examples, i, min(i + step, count)) for i in starts]}

        def _log_download_bytes(self) -> None:
            """Nothing is downloaded, and `progress` tells the rest."""

        def _log_download_done(self) -> None:
            """As above."""

    return RecordBuilder


def _write(job: _Job, work: Path) -> Path:
    """A TFDS dataset of that one split; its folder. Raises `DataError` when not all of it arrived on disk."""
    tfds = import_tfds()
    from array_record.python.array_record_module import ArrayRecordReader

    builder = _builder_class()(
        job, data_dir=work, config=config_name(job.source.compat), file_format="array_record"
    )
    try:
        builder.download_and_prepare(download_config=tfds.download.DownloadConfig(try_download_gcs=False))
        folder = Path(builder.data_dir)
        written = 0
        for shard in _shards(folder, job.split):
            reader = ArrayRecordReader(str(shard))
            written += reader.num_records()
            reader.close()
    except (RuntimeError, ValueError) as error:
        if isinstance(error, ReadJaxError):
            raise
        raise DataError(
            f"the records of {job.source.name} cannot be written to {work.parent}: {error}"
        ) from error
    if written != len(job.source):
        raise DataError(
            f"of {len(job.source)} records of {job.source.name} only {written} arrived in {work.parent}; "
            "is the disk full?"
        )
    return folder


def _shards(folder: Path, split: str) -> list[Path]:
    return sorted(folder.glob(f"*-{split}.array_record-*"))


def _install(fresh: Path, final: Path, split: str, work: Path) -> None:
    """Move a split into its place, beside the dataset's other splits. Whenever it is interrupted, what
    dataset_info.json names is there whole."""
    info_file = final / "dataset_info.json"
    default = fresh.parent.parent / ".config"  # which config TFDS opens when none is named
    if not (final.parent.parent / ".config").exists():
        final.parent.parent.mkdir(exist_ok=True)
        default.rename(final.parent.parent / ".config")
    info = json.loads(info_file.read_text(encoding="utf-8")) if info_file.exists() else {"splits": []}
    others = [one for one in info["splits"] if one["name"] != split]
    if not others:
        if final.exists():
            final.rename(work / "replaced")
        final.parent.mkdir(exist_ok=True)
        fresh.rename(final)
        return
    if (fresh / "features.json").read_bytes() != (final / "features.json").read_bytes():
        raise DataError(
            f"{final} was built by another version of read_jax; delete it and build "
            f"{', '.join(one['name'] for one in [*others, {'name': split}])} again."
        )
    if len(others) < len(info["splits"]):
        write_file(info_file, _json_bytes({**info, "splits": others}))
        for shard in _shards(final, split):
            shard.unlink()
    for shard in _shards(fresh, split):
        shard.rename(final / shard.name)
    write_file(final / "metadata.json", (fresh / "metadata.json").read_bytes())
    added = json.loads((fresh / "dataset_info.json").read_text(encoding="utf-8"))["splits"]
    write_file(info_file, _json_bytes({**info, "splits": others + added}))


def _json_bytes(content: Any) -> bytes:
    return json.dumps(content, indent=2).encode()
