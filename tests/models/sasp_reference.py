"""Similarity as Points the long way, in PyTorch: what `read_jax.models.sasp` must equal.

Nothing is shared with the code under test: maps are resized and padded as whole pictures, and the
discrete-to-continuous step weighs every pixel of the image. Selection is plain Python over numpy.
"""

from __future__ import annotations

from typing import Any

import numpy as np
import torch
import torch.nn.functional as F

from read_jax.config import SaspConfig

MAX_WEIGHTS = 2**24
"""Weights (points x pixels) held at once."""


def padding(height: int, width: int, side: int) -> tuple[int, int]:
    """Cells added above (= below) and left (= right) of a square map; negative crops."""
    cells_per_pixel = side / min(height, width)
    return (int(height * cells_per_pixel) - side) // 2, (int(width * cells_per_pixel) - side) // 2


def normalised(x: Any) -> Any:
    """Min-max of a torch or numpy map."""
    return (x - x.min()) / (x.max() - x.min())


def resized(x: torch.Tensor, size: tuple[int, int]) -> torch.Tensor:
    return F.interpolate(x[None, None], size, mode="bilinear", align_corners=False)[0, 0]


def padded(x: torch.Tensor, pad: tuple[int, int], value: float) -> torch.Tensor:
    return F.pad(x, (pad[1], pad[1], pad[0], pad[0]), value=value)


def thresholds(grid: np.ndarray, config: SaspConfig) -> tuple[float, float]:
    """(positive from, negative to) for a normalised map."""
    if config.threshold == "fixed":
        return config.t_pos, config.t_neg
    spread = config.epsilon * grid.std()
    return float(grid.mean() + spread), float(grid.mean() - spread)


def normalised_grid(similarity: torch.Tensor, config: SaspConfig) -> torch.Tensor:
    """The square map that points are chosen from, before padding."""
    side = similarity.shape[0] // config.down_sample
    return normalised(resized(similarity, (side, side)))


def choose(
    similarity: torch.Tensor, height: int, width: int, config: SaspConfig
) -> tuple[np.ndarray, np.ndarray]:
    """(pixels int [P, 2] as (x, y), labels [P]) of a [side, side] map."""
    square = normalised_grid(similarity.detach(), config)
    high, low = thresholds(square.numpy(), config)
    grid = padded(square, padding(height, width, square.shape[0]), -1.0).numpy()

    cells = [(float(v), row, column) for (row, column), v in np.ndenumerate(grid) if v >= 0]
    positive = sorted((c for c in cells if c[0] >= high), key=lambda c: -c[0])
    negative = sorted((c for c in cells if c[0] <= low), key=lambda c: c[0])
    neutral = [c for c in cells if low < c[0] < high]
    chosen = (positive + negative + neutral)[: config.num_points]
    labels = ([1] * len(positive) + [0] * len(negative) + [-1] * len(neutral))[: config.num_points]

    def pixel(cell: int, size: int, count: int) -> int:
        return int(min((np.float32(cell) + np.float32(0.5)) * np.float32(size / count), np.float32(size - 1)))

    points = [(pixel(c, width, grid.shape[1]), pixel(r, height, grid.shape[0])) for _, r, c in chosen]
    return np.array(points, np.int64).reshape(-1, 2), np.array(labels)


def make_continuous(
    similarity: torch.Tensor, points: np.ndarray, height: int, width: int, side: int = 336
) -> torch.Tensor:
    """Expected (x, y) around each pixel [P, 2], over all the pixels of the image."""
    full = resized(normalised(similarity), (side, side))
    full = resized(padded(full, padding(height, width, side), 0.0), (height, width))
    probability = full.flatten().softmax(0).reshape(height, width)
    y = torch.arange(height, dtype=full.dtype)
    x = torch.arange(width, dtype=full.dtype)
    results = []
    for some in torch.tensor(points).split(max(1, MAX_WEIGHTS // (height * width))):
        distance = (x - some[:, 0, None, None]) ** 2 + (y[:, None] - some[:, 1, None, None]) ** 2
        weight = torch.exp(-distance) * probability  # [P, h, w]
        weight = weight / weight.sum((1, 2), keepdim=True)
        results.append(torch.stack([(weight * x).sum((1, 2)), (weight * y[:, None]).sum((1, 2))], -1))
    return torch.cat(results)


def reference_points(
    similarity: torch.Tensor, height: int, width: int, config: SaspConfig
) -> tuple[np.ndarray, np.ndarray, torch.Tensor]:
    """(discrete, labels, points) of a float [N] map; `points` is differentiable in it."""
    side = round(similarity.shape[0] ** 0.5)
    similarity = similarity.reshape(side, side)
    discrete, labels = choose(similarity, height, width, config)
    if not config.continuous:
        return discrete, labels, torch.from_numpy(discrete).to(similarity.dtype)
    return discrete, labels, make_continuous(similarity, discrete, height, width)


def margin(similarity: np.ndarray, config: SaspConfig) -> float:
    """How far the choice is from depending on rounding, in units of the normalised map.

    The smallest gap between two positive (or two negative) values, or between a value and a threshold.
    """
    side = round(similarity.size**0.5)
    grid = normalised_grid(
        torch.from_numpy(similarity.astype(np.float64)).reshape(side, side), config
    ).numpy()
    high, low = thresholds(grid, config)
    values = np.sort(grid.flatten())
    gaps = [np.abs(values - high), np.abs(values - low), np.diff(values[values >= high])]
    return float(np.concatenate([*gaps, np.diff(values[values <= low])]).min())
