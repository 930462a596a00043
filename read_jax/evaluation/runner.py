"""`evaluate`: ask a model a dataset's questions and score its answers; a stopped run goes on where it was.

Pictures go through the model in windows that are the same however often the run is stopped and whatever the
number of hosts, so that a resumed run ends with the same numbers to the last bit on the same kind of device.
"""

from __future__ import annotations

import functools
import hashlib
import importlib.metadata
import json
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

import jax

import read_jax
from read_jax.data.item import Compat, Source
from read_jax.data.sources import load_source
from read_jax.errors import DataError, ReadJaxError
from read_jax.evaluation.answering import Mode, Progress, Settings, answer, missing
from read_jax.evaluation.journal import Journal, read_records
from read_jax.evaluation.report import MARKDOWN, PAGE, SUMMARY, write_report
from read_jax.evaluation.summary import summarize
from read_jax.inference.request import check_sampling
from read_jax.inference.segmenter import default_images_per_batch, device_groups, load_copies
from read_jax.processes import check_shared, rank, wait_for_all
from read_jax.text.conversation import get_template
from read_jax.weights.checkpoint import load_record

FORCED_FAMILIES = (
    "ReasonSeg",
    "refclef",
    "refcoco",
    "refcoco+",
    "refcocog",
    "ade20k",
    "cocostuff",
    "mapillary",
    "pascal_part",
    "paco_lvis",
)
"""Evaluated with the right answers given, as the paper validates them; all else generates."""

_WINDOW = 4  # batches of pictures that are sorted by number of questions before they go to the device
_SAMPLE = 32  # items that the content's fingerprint looks at


def evaluate(
    model_dir: str | Path,
    dataset: str,
    data_dir: str | Path | None,
    output: str | Path,
    *,
    mode: Mode | None = None,
    compat: Compat = None,
    conversation: str | None = None,
    max_new_tokens: int = 512,
    dtype: str | None = None,
    images_per_batch: int | None = None,
    devices: int = 1,
    copies: int | None = None,
    limit: int | None = None,
    overwrite: bool = False,
    max_bad: float = 0.01,
    progress: Progress | None = None,
) -> dict[str, Any]:
    """Score a model on a dataset and write a report.

    Args:
        model_dir: a folder made by `read-jax convert`.
        dataset, data_dir, compat: as for `load_source`; compat "read" also takes only the first [SEG] of an
            answer, where else the union of all masks counts, and the original's arithmetic of the metrics.
        output: folder for the answers and the report. One that holds answers of the same run is continued.
        mode: "forced": the right answer is given and its masks are scored; "generate": the model answers by
            itself. None: as the paper does for the dataset.
        conversation: prompt format; None: "llava_v1", but "vicuna_v1" to generate with compat "read".
        max_new_tokens: longest generated answer.
        dtype: type to compute in; None: as stored.
        images_per_batch: pictures that go through the device together. A run that is continued with another
            number may differ in the last bits.
        devices: of each process, that share a copy of the model.
        copies: in each process, each on its own devices, that answer about different pictures at a time;
            None: as many as the devices are enough for.
        limit: only the first so many pictures.
        overwrite: discard what an earlier run left in `output`.
        max_bad: the run fails when a larger share of the pictures cannot be read.
        progress: told after every picture.

    Returns:
        What `summarize` found. On several hosts, which share `output`, each answers its share of the pictures
        and all return the same.

    Raises:
        DataError: the dataset or `output` cannot be used, or too many pictures could not be read (the answers
            stay: when the pictures are repaired, the run can be continued).
        ReadJaxError: the model or a setting cannot be used.
    """
    settings = choose_settings(dataset, mode, compat, conversation, max_new_tokens)
    if not 0 <= max_bad <= 1:
        raise DataError(f"max_bad is a share of the pictures, from 0 to 1, not {max_bad}.")
    if limit is not None and limit < 1:
        raise DataError(f"limit must be at least 1, not {limit}.")
    if images_per_batch is not None and images_per_batch < 1:
        raise DataError(f"images_per_batch must be at least 1, not {images_per_batch}.")
    output = Path(output).expanduser()
    source = load_source(dataset, data_dir, compat)
    total = len(source) if limit is None else min(limit, len(source))
    if not total:
        raise DataError(f"{dataset} holds no pictures.")
    images_per_batch = images_per_batch or default_images_per_batch()
    model = load_record(model_dir)
    identity = {
        "dataset": dataset,
        "source_length": len(source),
        "source_content": fingerprint(source),
        "limit": limit,
        **settings._asdict(),
        "masks": "of the first [SEG]" if compat == "read" else "union over all [SEG]",
        "model_fingerprint": model.fingerprint,
        "dtype": dtype or model.dtype,
        "read_jax_version": read_jax.__version__,
    }
    host, hosts = rank()
    check_shared(output)
    environment = {
        "model": Path(model_dir).resolve().name,
        "device": jax.devices()[0].device_kind,
        "hosts": hosts,
        "devices_per_copy": devices,
        "copies_per_host": len(device_groups(devices, copies)),
        "images_per_batch": images_per_batch,
        "jax_version": importlib.metadata.version("jax"),
    }
    # a model that does not load must not cost the answers that are to be replaced
    load = functools.partial(load_copies, model_dir, dtype=dtype, devices=devices, copies=copies)
    segmenters = load() if overwrite else None
    with Journal(output, identity, environment, host=host, hosts=hosts, overwrite=overwrite) as journal:
        windows = _windows(total, images_per_batch)[host::hosts]
        if any(missing(window, journal) for window in windows):
            if host == 0:
                for name in (SUMMARY, MARKDOWN, PAGE):  # of an earlier run; this one's come at the end
                    (output / name).unlink(missing_ok=True)
            segmenters = segmenters or load()
            for segmenter in segmenters:
                segmenter.images_per_batch = images_per_batch
                segmenter.rows_per_batch = max(segmenter.rows_per_batch, images_per_batch)
            answer(
                segmenters,
                source,
                settings,
                windows,
                journal,
                check=lambda records: check_readable(records, total, max_bad),  # as soon as it is clear
                progress=progress,
            )
    wait_for_all("the answers")
    header, records = read_records(output)
    if len(records) != total:
        raise DataError(
            f"{total - len(records)} of {total} pictures have no answer yet: another host has not finished "
            "its share. Run the evaluation again."
        )
    check_readable(records, total, max_bad)
    summary = summarize(header, records)
    if host == 0:
        write_report(output, header, records, summary, source.__getitem__)
    wait_for_all("the report")
    return summary


def choose_settings(
    dataset: str, mode: Mode | None, compat: Compat, conversation: str | None, max_new_tokens: int
) -> Settings:
    """Fill in what the user left open; raises `DataError` or `PromptError` for what cannot be."""
    if mode not in (None, "forced", "generate"):
        raise DataError(f"mode must be 'forced' or 'generate', not {mode!r}.")
    family = dataset.partition("|")[0]
    if family == "llava_instruct":
        raise DataError("llava_instruct has no masks that answers could be scored with; it is for training.")
    if mode is None:
        mode = "forced" if family in FORCED_FAMILIES else "generate"
    notes = []
    if conversation is None:
        conversation = "llava_v1"
        if mode == "generate" and compat == "read":
            conversation = "vicuna_v1"
            notes.append("vicuna_v1 was chosen as the original's test script uses it, unlike its training")
    conversation = get_template(conversation).name
    check_sampling(max_new_tokens, 0.0, 1.0, 0)
    longest = max_new_tokens if mode == "generate" else None
    return Settings(mode, compat, conversation, longest, tuple(notes))


def fingerprint(source: Source) -> str:
    """A hash over items spread over the source: names, sizes, texts; not their pixels."""
    digest = hashlib.sha256()
    for index in sorted({i * (len(source) - 1) // (_SAMPLE - 1) for i in range(_SAMPLE)}):
        try:
            item = source[index]
        except ReadJaxError:
            content: list[Any] = [index, "unreadable"]
        else:
            texts = [(q.phrase, q.exists, q.question, q.answer) for q in item.queries]
            content = [index, item.key, item.height, item.width, texts]
        digest.update(json.dumps(content).encode())
    return digest.hexdigest()[:16]


def _windows(total: int, images_per_batch: int) -> list[range]:
    """Pictures that go to the device together; among several batches there are some of similar length."""
    size = images_per_batch if images_per_batch == 1 else _WINDOW * images_per_batch
    return [range(start, min(start + size, total)) for start in range(0, total, size)]


def check_readable(records: Iterable[Mapping[str, Any]], total: int, max_bad: float) -> None:
    """Raise `DataError` when the failures are a larger share of `total` pictures than allowed."""
    bad = [record for record in records if "error" in record]
    if len(bad) <= max_bad * total:
        return
    listed = "; ".join(f"{record['key'] or record['index']}: {record['error']}" for record in bad[:3])
    raise DataError(
        f"{len(bad)} of {total} pictures could not be read, a larger share than the {max_bad:.3g} allowed: "
        f"{listed}{'; ...' if len(bad) > 3 else ''} Repair them and run again to go on, or allow more with "
        "--max-bad."
    )
