"""The package's own model, and a small dataset of one's own, written on the spot."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from read_jax.images.masks import mask_to_rle
from read_jax.weights.checkpoint import BUNDLED_MODELS
from tests.inference.conftest import picture


@pytest.fixture(scope="session")
def tiny_model() -> Path:
    """The model that comes with the package: the smallest there is."""
    return BUNDLED_MODELS / "nano"


def write_own_dataset(folder: Path, pictures: int, seed: int = 0) -> Path:
    """Pictures of 1 to 3 questions, each third about something absent, as JSON lines; returns their file."""
    folder.mkdir(parents=True, exist_ok=True)
    rng = np.random.default_rng(seed)
    lines = []
    for number in range(pictures):
        height, width = (int(side) for side in rng.integers(40, 90, 2))
        Image.fromarray(picture(height, width, number)).save(folder / f"{number}.png")
        for _ in range(int(rng.integers(1, 4))):
            record: dict = {"image": f"{number}.png", "class": f"blue thing {len(lines)}"}
            if len(lines) % 3 == 2:
                record["exists"] = False
            else:
                top, left = (int(side) for side in rng.integers(0, 20, 2))
                mask = np.zeros((height, width), bool)
                mask[top : top + 25, left : left + 30] = True
                record["mask"] = mask_to_rle(mask)
            lines.append(json.dumps(record))
    path = folder / "own.jsonl"
    path.write_text("\n".join(lines) + "\n")
    return path
