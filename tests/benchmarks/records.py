"""Items per second from original files and from the records built of them, in random order.

    python -m tests.benchmarks.records [--pictures 300]

Writes an ADE20K tree of 640x480 photographs-to-be (noise, blurred; about 100 kB each) with label images of
twelve classes into a temporary folder, builds it, and reads both, warm, in one process.
"""

from __future__ import annotations

import argparse
import tempfile
import time
from collections.abc import Callable
from pathlib import Path

import numpy as np
from PIL import Image, ImageFilter

from read_jax.data import Item, Source, load_source
from read_jax.data.build import build

READS: dict[str, Callable[[Item], object]] = {
    "questions": lambda item: item.questions,
    "questions, masks": lambda item: item.masks,
    "questions, picture": lambda item: item.image,
}


def write_tree(folder: Path, count: int) -> None:
    """An ade20k training split of so many pictures."""
    pictures = folder / "ade20k/images/training"
    labels = folder / "ade20k/annotations/training"
    for place in (pictures, labels):
        place.mkdir(parents=True)
    for i in range(count):
        random = np.random.default_rng(i)
        noise = Image.fromarray(random.integers(0, 256, (480, 640, 3), np.uint8))
        noise.filter(ImageFilter.GaussianBlur(1.2)).save(pictures / f"{i:05d}.jpg", quality=92)
        classes = random.choice(150, 12, replace=False).astype(np.uint8)
        coarse = Image.fromarray(classes[random.integers(0, 12, (6, 8))])
        coarse.resize((640, 480), Image.Resampling.NEAREST).save(labels / f"{i:05d}.png")


def rate(source: Source, read: Callable[[Item], object], seconds: float = 3.0) -> float:
    """Items per second."""
    order = np.random.default_rng(0).permutation(len(source))
    read(source[int(order[0])])
    start, done = time.perf_counter(), 0
    while (taken := time.perf_counter() - start) < seconds:
        read(source[int(order[done % len(order)])])
        done += 1
    return done / taken


def main() -> None:
    """Print the figures."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--pictures", type=int, default=300)
    count = parser.parse_args().pictures
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        write_tree(folder, count)
        start = time.perf_counter()
        (result,) = (one for one in build("ade20k|train", folder).built)
        taken = time.perf_counter() - start
        factor = result.record_bytes / result.image_bytes
        print(
            f"{count} pictures, {result.image_bytes / count / 1e3:.0f} kB each: built in {taken:.1f} s "
            f"({count / taken:.0f}/s), records {factor:.3f} times the pictures"
        )
        print(f"{'items/s':22}{'original':>10}{'records':>10}")
        for what, read in READS.items():
            rates = [rate(load_source("ade20k|train", folder, built=built), read) for built in (False, True)]
            print(f"{what:22}{rates[0]:10.0f}{rates[1]:10.0f}")


if __name__ == "__main__":
    main()
