"""Files of the datasets' original layouts, read with errors that name them."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np

from read_jax.errors import DataError
from read_jax.images.decode import read_image


def read_json(path: Path, what: str) -> Any:
    """The content of a JSON file in UTF-8. Raises `DataError` naming the file and what it should be."""
    try:
        data = path.read_bytes()
    except FileNotFoundError:
        raise DataError(f"{path}: there is no such file; it should be {what}.") from None
    except OSError as error:
        raise DataError(f"{path} cannot be read: {error.strerror or error}.") from None
    try:
        return json.loads(data.decode("utf-8-sig"))
    except UnicodeDecodeError as error:
        raise DataError(f"{path} is not UTF-8 (byte {error.start}); it should be {what}.") from None
    except (json.JSONDecodeError, RecursionError) as error:
        raise DataError(f"{path} is not valid JSON ({error}); was it copied completely?") from None


def read_picture(path: str, height: int, width: int, stated_by: str) -> np.ndarray:
    """The picture, uint8 [h, w, 3], of the size its masks have.

    Raises `ImageError` when it cannot be decoded, `DataError` when its size is another.
    """
    image = read_image(path)
    if image.shape[:2] != (height, width):
        raise DataError(
            f"{path} is {image.shape[1]} x {image.shape[0]} pixels (upright), but {stated_by} is "
            f"{width} x {height}; picture and mask do not belong together."
        )
    return image
