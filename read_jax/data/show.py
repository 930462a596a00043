"""Pictures of a dataset for people: each with its targets, questions and answers."""

from __future__ import annotations

import textwrap
from collections.abc import Callable, Iterable
from pathlib import Path

import numpy as np
from PIL import Image, ImageDraw, ImageFont

from read_jax.data.item import Item, Source
from read_jax.errors import DataError
from read_jax.images.drawing import MASK_COLOURS, draw_overlay

_SIDE = 640  # of a drawn picture's longer edge, in pixels
_TEXT = 14  # height of the writing
_LINE = 18
_COLUMNS = 84  # characters per line


def show(
    source: Source,
    indices: Iterable[int],
    folder: str | Path,
    progress: Callable[[int, int], None] | None = None,
) -> Path:
    """Draw items of a source into a folder, one PNG each; returns the folder.

    Raises:
        DataError: the folder cannot be made, or an item's files are broken.
        ImageError: a picture cannot be decoded.
    """
    folder, indices = Path(folder), list(indices)
    try:
        folder.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise DataError(f"the folder {folder} cannot be made: {error.strerror or error}.") from None
    for done, index in enumerate(indices, 1):
        name = source.name.replace("|", "_").rpartition("/")[2]
        Image.fromarray(draw_item(source[index])).save(folder / f"{name}_{index:06d}.png")
        if progress:
            progress(done, len(indices))
    return folder


def draw_item(item: Item) -> np.ndarray:
    """uint8 [H, W, 3]: the picture with every target in the colour of its question below it, ignored pixels
    darkened."""
    scale = _SIDE / max(item.height, item.width)
    size = max(round(item.width * scale), 1), max(round(item.height * scale), 1)
    picture = np.asarray(Image.fromarray(item.image).resize(size, Image.Resampling.BILINEAR)).copy()
    # index by index: the masks of a long list of questions never lie in memory together
    rows = np.minimum((np.arange(size[1]) / scale).astype(int), item.height - 1)
    columns = np.minimum((np.arange(size[0]) / scale).astype(int), item.width - 1)
    masks = np.zeros((len(item.queries), size[1], size[0]), np.uint8)
    for i in range(len(item.queries)):
        masks[i] = item.compact_mask(i).decode()[rows[:, None], columns]
    picture[(masks == 255).any(axis=0)] //= 3
    picture = draw_overlay(picture, (masks != 0) & (masks != 255))

    lines = [(None, f"{item.key}   {item.width} x {item.height}")]
    for i, (question, answer) in enumerate(zip(item.questions, item.answers, strict=True)):
        colour = MASK_COLOURS[i % len(MASK_COLOURS)] if item.exists[i] else np.full(3, 170)
        wrapped = textwrap.wrap(f"{question}  --  {answer}", _COLUMNS)
        lines += [(colour if n == 0 else None, text) for n, text in enumerate(wrapped)]
    width = max(size[0], _SIDE)
    canvas = Image.new("RGB", (width, size[1] + _LINE * len(lines) + 12), "white")
    canvas.paste(Image.fromarray(picture), ((width - size[0]) // 2, 0))
    pen, font = ImageDraw.Draw(canvas), ImageFont.load_default(_TEXT)
    for n, (colour, text) in enumerate(lines):
        top = size[1] + 6 + n * _LINE
        if colour is not None:
            fill = tuple(int(c) for c in colour)
            pen.rectangle((6, top + 2, 18, top + 14), fill=fill)
        pen.text((24, top), text, fill="black", font=font)
    return np.asarray(canvas)
