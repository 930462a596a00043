"""Time and work of Similarity as Points, against the full-image formulation in PyTorch.

    python -m tests.benchmarks.sasp [--height 480] [--width 640] [--preset 7b] [--batch 8] [--repeats 20]

Seconds are the median over the repeats, per map, compilation excluded. Operations and bytes are not
measured but counted, by the formulas below: the large arrays only, one operation per element and step.
"""

from __future__ import annotations

import argparse
import functools
import statistics
import time
from collections.abc import Callable

import jax
import numpy as np
import torch

from read_jax.config import SaspConfig
from read_jax.geometry import CLIP_MAP_SIDE, SaspGeometry, sasp_geometry
from read_jax.models.sasp import WINDOW, similarity_points
from tests.models.sasp_reference import reference_points

SIDE = 24
FLOAT = 4  # bytes


def full_image_work(height: int, width: int, config: SaspConfig) -> tuple[float, float]:
    """(operations, bytes) of the full-image formulation, per map."""
    g = sasp_geometry(height, width, config)
    pixels = height * width
    resizes = 8 * (CLIP_MAP_SIDE**2 + pixels)  # four neighbours, weighed and added
    softmax = 4 * pixels  # maximum, exponential, sum, division
    weights = config.num_points * pixels * (3 + 2 + 2 + 4)  # d^2; exp, product; norm; two expectations
    maps = CLIP_MAP_SIDE**2 + int(g.map_height) * int(g.map_width) + 2 * pixels
    passes = 9  # writes and reads of [P, h, w]: d^2, exp, product, quotient, two expectations
    return float(resizes + softmax + weights), float(FLOAT * (2 * maps + passes * config.num_points * pixels))


def windowed_work(config: SaspConfig) -> tuple[float, float]:
    """(operations, bytes) of ours, per map: the image's size does not enter."""
    offsets = 2 * WINDOW + 1
    cells = SIDE // config.down_sample
    choose = 2 * cells * SIDE * (SIDE + cells) + cells**2 * 2 * np.log2(cells**2)
    rows = 2 * config.num_points * offsets * SIDE * 4 * 3  # both axes, four taps, compare-select-add
    window = 2 * config.num_points * offsets * SIDE * (SIDE + offsets)
    weights = config.num_points * offsets**2 * 8
    elements = SIDE**2 + config.num_points * (3 * offsets * SIDE + 2 * offsets**2)
    return float(choose + rows + window + weights), float(FLOAT * 2 * elements)


def seconds(call: Callable[[], object], repeats: int) -> float:
    """Median seconds of a call, after two unmeasured ones."""
    taken = []
    for i in range(repeats + 2):
        start = time.perf_counter()
        call()
        taken.append(time.perf_counter() - start)
        if i == 1:
            taken.clear()
    return statistics.median(taken)


def ours(height: int, width: int, config: SaspConfig, maps: np.ndarray) -> Callable[[], object]:
    """One call for the whole batch, its arguments already on the device."""
    one = [*sasp_geometry(height, width, config), np.int32(height), np.int32(width)]
    *geometry, h, w = jax.device_put([np.repeat(x, len(maps)) for x in one])
    operands = jax.device_put(maps), h, w, SaspGeometry(*geometry)
    compiled = jax.jit(jax.vmap(functools.partial(similarity_points, config=config)))
    return lambda: jax.block_until_ready(compiled(*operands))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--height", type=int, default=480)
    parser.add_argument("--width", type=int, default=640)
    parser.add_argument("--preset", choices=["7b", "13b", "paper"], default="7b")
    parser.add_argument("--batch", type=int, default=8)
    parser.add_argument("--repeats", type=int, default=20)
    args = parser.parse_args()
    config = SaspConfig.preset(args.preset)
    size = args.height, args.width
    maps = np.random.default_rng(0).standard_normal((args.batch, SIDE**2)).astype(np.float32)

    tensor = torch.from_numpy(maps[0])
    with torch.no_grad():
        full = seconds(lambda: reference_points(tensor, *size, config), max(args.repeats // 4, 3))
    rows = [("torch, full image", full, *full_image_work(*size, config))]
    for batch in sorted({1, args.batch}):
        taken = seconds(ours(*size, config, maps[:batch]), args.repeats)
        rows.append((f"jax {jax.default_backend()}, batch {batch}", taken / batch, *windowed_work(config)))

    threads = torch.get_num_threads()
    print(
        f"SasP {args.preset}, {args.height}x{args.width} pixels (h x w), torch threads: {threads}; per map:"
    )
    print(f"{'':24}{'ms':>10}{'Mop':>12}{'MB moved':>12}{'faster':>10}")
    for name, taken, operations, moved in rows:
        print(f"{name:24}{taken * 1e3:10.3f}{operations / 1e6:12.2f}{moved / 1e6:12.3f}{full / taken:9.0f}x")


if __name__ == "__main__":
    main()
