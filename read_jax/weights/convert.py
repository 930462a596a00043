"""PyTorch checkpoints -> a model folder, as a stream."""

from __future__ import annotations

import dataclasses
import math
import os
import shutil
import time
from collections.abc import Callable, Mapping
from concurrent.futures import FIRST_COMPLETED, Future, ThreadPoolExecutor, wait
from pathlib import Path

import numpy as np

import read_jax
from read_jax.weights import checkpoint, engine, store
from read_jax.weights.checkpoint import BUFFERS, PARAMS, UPSTREAM, ModelRecord
from read_jax.weights.export import write_safetensors
from read_jax.weights.folders import atomic_folder, check_output, check_space, fsync
from read_jax.weights.plan import Plan, make_plan
from read_jax.weights.sources import Tensor
from read_jax.weights.tables import model_table

Progress = Callable[[int, int, str], None]
"""Called as (bytes done, bytes in all, what was just done)."""

_COPIED = ("config.json", "generation_config.json")
_SPARE = 64 << 20  # for the small files


@dataclasses.dataclass(frozen=True)
class ConversionSummary:
    """What a conversion did.

    tensors_read, tensors_used: upstream tensors seen, and those that fill parameters; allowed: how many
    were left out, by reason; bytes: of parameters; peak_memory: most anonymous memory seen, in bytes;
    sasp: the point settings chosen and why; new_tokens: added to the vocabulary.
    """

    output: Path
    kind: str
    dtype: str
    tensors_read: int
    tensors_used: int
    allowed: dict[str, int]
    parameters: int
    bytes: int
    seconds: float
    peak_memory: int
    sasp: str
    new_tokens: list[str]
    fingerprint: str
    warnings: list[str]

    def __str__(self) -> str:
        lines = [
            f"{self.output}: {self.parameters:,} parameters, {self.dtype}, {self.bytes / 1e9:.2f} GB "
            f"in {self.seconds:.1f} s, peak memory {self.peak_memory / 1e9:.2f} GB",
            f"  tensors: {self.tensors_read} read, {self.tensors_used} used",
            *(f"  {count} not needed: {reason}" for reason, count in self.allowed.items()),
            f"  SasP: {self.sasp}",
            *([f"  added tokens: {', '.join(self.new_tokens)}"] if self.new_tokens else []),
            *(f"  warning: {warning}" for warning in self.warnings),
        ]
        return "\n".join(lines)


def anonymous_memory() -> int:
    """Anonymous memory of this process in bytes: mapped files do not count where the system tells (Linux)."""
    try:
        with open("/proc/self/status", encoding="ascii") as status:
            for line in status:
                if line.startswith("RssAnon:"):
                    return int(line.split()[1]) * 1024
    except OSError:
        pass  # not Linux: the peak of all resident memory is the nearest figure
    import resource
    import sys

    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * (1 if sys.platform == "darwin" else 1024)


def convert(
    source: str | Path,
    vision_tower: str | Path,
    output: str | Path,
    *,
    sam: str | Path | None = None,
    lora: str | Path | None = None,
    lora_alpha: float | None = None,
    dtype: str | None = None,
    sasp: str | None = None,
    overwrite: bool = False,
    progress: Progress | None = None,
) -> ConversionSummary:
    """Convert a READ, SESAME, LISA or plain LLaVA-1.5 checkpoint to a model folder.

    Args:
        source: Hugging Face folder or id of the checkpoint.
        vision_tower: folder or id of the CLIP it was trained with.
        output: the model folder to make.
        sam: a SAM file (.pth) to take SAM from: needed for plain LLaVA, replaces the checkpoint's own else.
        lora: a LoRA adapter to merge: PEFT folder or id, or a zero_to_fp32 file.
        lora_alpha: alpha of an adapter that does not state it; default twice its rank.
        dtype: "float32" or "bfloat16"; default bfloat16 for a bfloat16 source, float32 for any other.
        sasp: preset of the point settings ("7b", "13b", "paper", "off"); default by the model's width.
        overwrite: replace an existing model folder, once the new one is complete.
        progress: called after every tensor.

    Raises:
        CheckpointError: anything wrong with the source or the output; nothing is left behind.
    """
    start = time.monotonic()
    output = Path(output).expanduser()
    inputs = [Path(p).expanduser() for p in (source, vision_tower, sam, lora) if p is not None]
    check_output(
        output,
        [path for path in inputs if path.exists()],
        overwrite=overwrite,
        replaceable=checkpoint.is_model_folder,
        kind="a model folder of this package",
    )
    plan = make_plan(
        source, vision_tower, sam_file=sam, adapter=lora, lora_alpha=lora_alpha, dtype=dtype, sasp=sasp
    )
    leaves = engine.leaves(model_table(plan.config))
    stored = np.dtype(store.DTYPES[plan.dtype])
    buffers = {key: plan.tensors[key] for key, entry in plan.ledger.allowed.items() if entry.kept}
    check_space(output, store.stored_bytes(leaves, stored) + sum(t.nbytes for t in buffers.values()) + _SPARE)
    parameters = sum(math.prod(leaf.shape) for leaf in leaves.values())
    with atomic_folder(output) as folder:
        writer = store.ParamsWriter(folder / PARAMS, leaves, stored)
        peak = _copy(plan, writer, progress or (lambda done, total, what: None))
        fingerprint = writer.finish()
        _write_upstream(folder / UPSTREAM, plan, buffers)
        record = ModelRecord(
            config=plan.config,
            dtype=plan.dtype,
            source=plan.source,
            parameters=parameters,
            fingerprint=fingerprint,
            version=read_jax.__version__,
        )
        record.save(folder)
        fsync(folder / checkpoint.CONFIG)
    return ConversionSummary(
        output=output,
        kind=plan.source["kind"],
        dtype=plan.dtype,
        tensors_read=plan.tensors_read,
        tensors_used=len(plan.ledger.used),
        allowed=plan.ledger.reasons(),
        parameters=parameters,
        bytes=parameters * stored.itemsize,
        seconds=time.monotonic() - start,
        peak_memory=peak,
        sasp=plan.sasp_choice,
        new_tokens=plan.new_tokens,
        fingerprint=fingerprint,
        warnings=plan.warnings,
    )


def _copy(plan: Plan, writer: store.ParamsWriter, progress: Progress) -> int:
    """Move every used tensor, in the order of the source's files; returns the peak of anonymous memory."""
    total = sum(math.prod(row.shape) for row in plan.ledger.used)
    item = np.dtype(store.DTYPES[plan.dtype]).itemsize
    done, peak = 0, anonymous_memory()

    def move(row: engine.Row, tensor: Tensor) -> engine.Row:
        writer.write(row.path, row.index, row.forward(tensor.read()))
        return row

    workers = min(4, os.cpu_count() or 1)
    pool = ThreadPoolExecutor(workers, thread_name_prefix="convert")
    try:
        waiting: set[Future[engine.Row]] = set()
        queue = iter(plan.ledger.used)
        while True:
            for row in queue:
                waiting.add(pool.submit(move, row, plan.tensors[row.key]))
                if len(waiting) > workers:  # bounded: at most a tensor per worker and one in wait
                    break
            if not waiting:
                return peak
            finished, waiting = wait(waiting, return_when=FIRST_COMPLETED)
            for future in finished:
                row = future.result()
                done += math.prod(row.shape)
                peak = max(peak, anonymous_memory())
                progress(done * item, total * item, row.key)
    finally:
        pool.shutdown(cancel_futures=True)


def _write_upstream(folder: Path, plan: Plan, buffers: Mapping[str, Tensor]) -> None:
    """The source's small files, and the tensors that only an export needs."""
    plan.tokenizer.save(folder)
    for name in _COPIED:
        if (plan.folder / name).is_file():
            shutil.copyfile(plan.folder / name, folder / name)
    image_processor = plan.tower / "preprocessor_config.json"
    if image_processor.is_file():
        shutil.copyfile(image_processor, folder / image_processor.name)
    if buffers:
        entries = {key: (tensor.shape, tensor.dtype, tensor.read) for key, tensor in buffers.items()}
        write_safetensors(folder / BUFFERS, entries)
