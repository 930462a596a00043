"""Speed of our input pipeline, beside PyTorch's DataLoader with the original's transforms, on the same work.

    python -m tests.benchmarks.pipeline --workers 0 1 2 --examples 96 --rounds 3

640x480 JPEG pictures drawn on the fly, three questions with a mask each; CLIP at 336 and SAM at 1024 pixels.
Both sides decode, make both pictures, tokenise the three conversations with targets, and decode and batch the
masks. The original's side: OpenCV, transformers' CLIPImageProcessor (its Pillow variant), Pillow's bilinear
resize, torch for normalising and padding; float32 pictures. Ours leaves normalising to the device: uint8.
The tokens are ours on both sides. Rounds of the two alternate in one run; the table gives medians. Needs
torch, transformers and opencv-python.
"""

from __future__ import annotations

import argparse
import dataclasses
import json
import os
import statistics
import tempfile
import time
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image

from read_jax.config import SAM_MEAN, SAM_STD, ReadConfig
from read_jax.data.item import Compat, Item, Query
from read_jax.data.mixture import Mixture, Row, picture
from read_jax.data.packing import Limits, Packer, batch_examples
from read_jax.data.pipeline import TrainingLoader
from read_jax.data.recipes import Group
from read_jax.geometry import image_geometry, sam_input_size
from read_jax.images.decode import read_image
from read_jax.images.masks import CompactMask
from read_jax.images.preprocess import clip_crop, sam_resize
from read_jax.text.tokenizer import Tokenizer

HEIGHT, WIDTH, QUESTIONS = 480, 640, 3


@dataclasses.dataclass
class Jpegs:
    """A folder of JPEG files, three phrases and masks each."""

    folder: str
    count: int
    name: str = "jpegs|train"
    compat: Compat = None

    def __len__(self) -> int:
        return self.count

    def __getitem__(self, index: int) -> Item:
        path = str(Path(self.folder) / f"{index}.jpg")
        queries = tuple(Query(f"the thing number {i} on the left") for i in range(QUESTIONS))
        load_mask = partial(_mask, index)
        return Item(str(index), HEIGHT, WIDTH, path, queries, partial(read_image, path), load_mask)


def _mask(index: int, query: int) -> CompactMask:
    return _ellipse(index % 8, query)


_MASKS: dict[tuple[int, int], CompactMask] = {}


def _ellipse(index: int, query: int) -> CompactMask:
    """One of a few masks, encoded once: datasets bring theirs encoded."""
    if (index, query) not in _MASKS:
        y, x = np.mgrid[:HEIGHT, :WIDTH]
        at = 60 + 40 * index, 100 + 150 * query
        _MASKS[index, query] = CompactMask.encode(((y - at[0]) / 90) ** 2 + ((x - at[1]) / 130) ** 2 < 1)
    return _MASKS[index, query]


def draw_jpegs(folder: Path, count: int) -> None:
    """Pictures with large shapes and fine texture, about 100 kB each, as photographs have."""
    for index in range(count):
        rng = np.random.default_rng(index)
        coarse = Image.fromarray(rng.integers(0, 256, (12, 16, 3), np.uint8)).resize((WIDTH, HEIGHT))
        noise = rng.normal(0, 12, (HEIGHT, WIDTH, 1))
        pixels = np.clip(np.asarray(coarse) + noise, 0, 255).astype(np.uint8)
        Image.fromarray(pixels).save(folder / f"{index}.jpg", quality=90)


class Original:
    """The original's transforms, as a torch data set over the same choices; index -> dict of tensors."""

    def __init__(self, mixture: Mixture, packer: Packer) -> None:
        from transformers.models.clip.image_processing_pil_clip import CLIPImageProcessorPil

        self.mixture, self.packer = mixture, packer
        self.clip = CLIPImageProcessorPil(
            size={"shortest_edge": 336}, crop_size={"height": 336, "width": 336}
        )

    def __len__(self) -> int:
        return 1 << 30

    def __getitem__(self, k: int) -> dict[str, Any]:
        import cv2
        import torch

        cv2.setNumThreads(0)
        source = self.mixture.subsets[0].source
        item = source[self.mixture.choose(k).index]
        image = cv2.cvtColor(cv2.imread(item.image_path), cv2.COLOR_BGR2RGB)
        clip_pixels = self.clip.preprocess(image, return_tensors="pt")["pixel_values"][0]
        height, width = sam_input_size(*image.shape[:2])
        resized = np.array(Image.fromarray(image).resize((width, height), Image.Resampling.BILINEAR))
        sam_pixels = torch.from_numpy(resized).permute(2, 0, 1).contiguous()
        mean, std = (torch.tensor(x).view(-1, 1, 1) for x in (SAM_MEAN, SAM_STD))
        sam_pixels = torch.nn.functional.pad((sam_pixels - mean) / std, (0, 1024 - width, 0, 1024 - height))
        rows = [
            self.packer.pack_row(Row(((query.phrase, f"It is [SEG], {i}."),), True, None))
            for i, query in enumerate(item.queries)
        ]
        masks = np.stack([item.compact_mask(i).decode() for i in range(QUESTIONS)]).astype(np.float32)
        ids, labels = ([torch.from_numpy(row[i]) for row in rows] for i in range(2))
        return {
            "clip": clip_pixels,
            "sam": sam_pixels,
            "masks": torch.from_numpy(masks),
            "ids": torch.nn.utils.rnn.pad_sequence(ids, batch_first=True),
            "labels": torch.nn.utils.rnn.pad_sequence(labels, batch_first=True, padding_value=-100),
        }


def _collate(examples: list[dict[str, Any]]) -> dict[str, Any]:
    """As the original: pictures stacked, the rest in lists."""
    import torch

    stacked = {name: torch.stack([one[name] for one in examples]) for name in ("clip", "sam")}
    return stacked | {name: [one[name] for one in examples] for name in ("masks", "ids", "labels")}


def _one_thread(worker: int) -> None:
    import torch

    torch.set_num_threads(1)


def original_batches(mixture: Mixture, packer: Packer, batch: int, workers: int) -> Iterator[Any]:
    """PyTorch's DataLoader."""
    from torch.utils.data import DataLoader, SequentialSampler

    data: Any = Original(mixture, packer)
    options: dict[str, Any] = {"prefetch_factor": 2} if workers else {}
    return iter(
        DataLoader(
            data,
            batch,
            sampler=SequentialSampler(data),
            num_workers=workers,
            collate_fn=_collate,
            worker_init_fn=_one_thread,
            multiprocessing_context="spawn" if workers else None,
            **options,
        )
    )


def throughput(batches: Iterator[Any], batch: int, examples: int) -> tuple[float, float]:
    """(examples per second, processor seconds per example of this process), after the buffers are filled."""
    for _ in range(4):
        next(batches)
    start, cpu = time.perf_counter(), time.process_time()
    for _ in range(examples // batch):
        next(batches)
    done = examples // batch * batch
    return done / (time.perf_counter() - start), (time.process_time() - cpu) / done


def stages(mixture: Mixture, packer: Packer, repeat: int) -> dict[str, float]:
    """Median milliseconds of the parts of one example on our side."""
    source, config = mixture.subsets[0].source, packer.config
    times: dict[str, list[float]] = {}

    def timed(name: str, work: Callable[..., Any], *args: Any) -> Any:
        start = time.process_time()
        out = work(*args)
        times.setdefault(name, []).append(time.process_time() - start)
        return out

    for k in range(repeat):
        item = source[k % len(source)]
        image = timed("decode", picture, item)
        timed("CLIP 336", clip_crop, image)
        timed("SAM 1024", sam_resize, image)
        sample = mixture[k]
        timed("tokens", lambda s: [packer.pack_row(row) for row in s.rows], sample)
        timed("geometry", image_geometry, HEIGHT, WIDTH, config.sasp)
        timed("choice", mixture.choose, k)
        timed("masks and batch", batch_examples, [packer.pack(sample)], config, packer.limits)
    return {name: round(1000 * statistics.median(runs), 2) for name, runs in times.items()}


def measure(workers: list[int], batch: int, examples: int, rounds: int) -> dict[str, Any]:
    """All figures; see the module."""
    import torch

    torch.set_num_threads(1)
    config = ReadConfig.preset("read-7b")
    tokenizer = Tokenizer.load(Path(__file__).parents[1] / "data" / "tiny-read")
    packer = Packer(config, tokenizer, limits=Limits(QUESTIONS, 128, (HEIGHT, WIDTH)))
    rows = []
    with tempfile.TemporaryDirectory() as folder:
        draw_jpegs(Path(folder), 32)
        source = Jpegs(folder, 32)
        mixture = Mixture([Group("jpegs", 1, (source.name,))], {source.name: source})
        for count in workers:
            runs: dict[str, list[tuple[float, float]]] = {"ours": [], "original": []}
            for _ in range(rounds):
                with TrainingLoader(mixture, packer, batch, workers=count) as batches:
                    runs["ours"].append(throughput(batches, batch, examples))
                other = original_batches(mixture, packer, batch, count)
                runs["original"].append(throughput(other, batch, examples))
                del other  # ends its workers
            for name, figures in runs.items():
                wall, cpu = (statistics.median(column) for column in zip(*figures, strict=True))
                row = {"workers": count, "side": name, "examples_per_second": round(wall, 2)}
                row["per_core"] = round(1 / cpu if count == 0 else wall / count, 2)
                rows.append(row)
        parts = stages(mixture, packer, 24)
    return {"cores": os.cpu_count(), "batch": batch, "rows": rows, "our_milliseconds": parts}


def main() -> None:
    """Parse, measure, print."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--workers", type=int, nargs="+", default=[0, 1])
    parser.add_argument("--batch", type=int, default=4)
    parser.add_argument("--examples", type=int, default=96)
    parser.add_argument("--rounds", type=int, default=3)
    a = parser.parse_args()
    figures = measure(a.workers, a.batch, a.examples, a.rounds)
    print("| workers | side | examples/s | examples/s per core |\n|---|---|---|---|")
    for row in figures["rows"]:
        print(f"| {row['workers']} | {row['side']} | {row['examples_per_second']} | {row['per_core']} |")
    print(json.dumps({name: value for name, value in figures.items() if name != "rows"}, indent=1))


if __name__ == "__main__":
    main()
