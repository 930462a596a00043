"""Pictures for people: masks over an image, and the similarity map with its points."""

from __future__ import annotations

import math
from collections.abc import Sequence

import numpy as np
from PIL import Image, ImageDraw, ImageFont

from read_jax.errors import ImageError

MASK_COLOURS = np.array(  # apart from each other also for colour-blind eyes (after Okabe and Ito)
    [
        (230, 60, 40),
        (0, 114, 178),
        (240, 190, 30),
        (0, 158, 115),
        (204, 121, 167),
        (86, 180, 233),
        (213, 120, 0),
    ],
    np.float32,
)
HEAT_ANCHORS = np.array(  # evenly spaced, brightness rising steadily: near-black violet to pale yellow
    [
        (10, 7, 35),
        (66, 15, 108),
        (132, 33, 107),
        (193, 58, 80),
        (236, 105, 37),
        (251, 176, 30),
        (250, 250, 160),
    ],
    np.float32,
)
TARGET_COLOUR = (0, 225, 255)  # far from the first mask colour, also for colour-blind eyes
IGNORED_COLOUR = (150, 150, 150)
POINT_COLOURS = {1: (30, 200, 70), 0: (225, 45, 45), -1: (160, 160, 160)}
_POINT_NAMES = {1: "positive", 0: "negative", -1: "neutral"}


def draw_overlay(
    image: np.ndarray, masks: np.ndarray | Sequence[np.ndarray], opacity: float = 0.45
) -> np.ndarray:
    """Masks as translucent colours with a contour, later ones on top; uint8 [h, w, 3].

    image: uint8 [h, w, 3]; masks: bool [M, h, w] in the same frame (M may be 0; [h, w] is one mask).
    Raises `ImageError` when their sizes differ.
    """
    _check_image(image)
    masks = np.asarray(masks, bool)
    if masks.ndim == 2:
        masks = masks[None]
    if masks.size and masks.shape[1:] != image.shape[:2]:
        raise ImageError(
            f"masks are {list(masks.shape)}, the image is {list(image.shape)}: heights and widths differ."
        )
    out = image.astype(np.float32)
    thickness = max(1, round(max(image.shape[:2]) / 500))
    for number, mask in enumerate(masks):
        colour = MASK_COLOURS[number % len(MASK_COLOURS)]
        out[mask] += opacity * (colour - out[mask])
        edge = mask & ~_erode(mask, thickness)
        out[edge] = colour
        out[_erode(mask, thickness) & ~_erode(mask, 2 * thickness)] *= (
            0.6  # dark inner line: visible on any ground
        )
    return out.round().astype(np.uint8)


def draw_comparison(image: np.ndarray, prediction: np.ndarray, target: np.ndarray) -> np.ndarray:
    """What was answered over what is right; uint8 [h, w, 3].

    image: uint8 [h, w, 3]; prediction: bool [h, w], shown as a translucent colour; target: uint8 [h, w],
    1 target (outlined in `TARGET_COLOUR`), 255 ignored by the metrics (outlined in grey).
    Raises `ImageError` when their sizes differ.
    """
    _check_image(image)
    target = np.asarray(target)
    if target.shape != image.shape[:2]:
        raise ImageError(
            f"the target is {list(target.shape)}, the image is {list(image.shape)}: sizes differ."
        )
    out = draw_overlay(image, prediction)
    ignored = target == 255
    _draw_outline(out, ignored, IGNORED_COLOUR)
    _draw_outline(out, (target != 0) & ~ignored, TARGET_COLOUR)
    return out


def draw_similarity(
    image: np.ndarray,
    similarity: np.ndarray,
    points: np.ndarray | None = None,
    labels: np.ndarray | None = None,
    opacity: float = 0.6,
) -> np.ndarray:
    """The similarity map as heat over the part of the image that CLIP saw, with points; uint8 [h, w, 3].

    image: uint8 [h, w, 3]; similarity: [n], a square grid in raster order, shown from its minimum to its
    maximum over the central square of the image; what CLIP did not see is grey. points: [P, 2] (x, y) in
    original pixels; labels: [P], 1 positive (green), 0 negative (red), -1 neutral (grey); both may be None.
    Raises `ImageError` when the arrays do not fit together.
    """
    _check_image(image)
    height, width = image.shape[:2]
    heat = heat_map(similarity)
    side = min(height, width)
    top, left = (height - side) // 2, (width - side) // 2
    grown = np.asarray(Image.fromarray(heat).resize((side, side), Image.Resampling.BILINEAR))
    grey = image.astype(np.float32) @ np.array([0.299, 0.587, 0.114], np.float32)
    out = np.repeat((0.5 * grey + 40)[..., None], 3, axis=2)
    square = (slice(top, top + side), slice(left, left + side))
    # Grey, not coloured, below the heat: then every hue in the picture is the map's.
    out[square] = (1 - opacity) * grey[square][..., None] + opacity * colourise(grown)
    canvas = Image.fromarray(np.clip(out.round(), 0, 255).astype(np.uint8))
    where, kinds = _check_points(points, labels)
    _draw_points(canvas, where, kinds)
    if min(height, width) >= 160:
        _draw_legend(canvas, sorted({int(k) for k in kinds}, reverse=True))
    return np.array(canvas)


def heat_map(similarity: np.ndarray) -> np.ndarray:
    """Similarity [n] -> float32 [side, side] in 0..1, minimum to maximum (a constant map gives zeros)."""
    values = np.asarray(similarity, np.float32)
    side = math.isqrt(values.size)
    if values.size == 0 or side * side != values.size:
        raise ImageError(f"a similarity map must be a square grid, not {list(values.shape)}.")
    if not np.isfinite(values).all():
        raise ImageError("the similarity map holds NaN or infinite values; were the weights loaded?")
    values = values.reshape(side, side) - values.min()
    return values / max(float(values.max()), 1e-30)


def colourise(heat: np.ndarray) -> np.ndarray:
    """Heat in 0..1 [...] -> float32 RGB in 0..255 [..., 3], between the anchors of the colour map."""
    places = np.linspace(0, 1, len(HEAT_ANCHORS))
    channels = [np.interp(heat, places, HEAT_ANCHORS[:, c]) for c in range(3)]
    return np.stack(channels, axis=-1).astype(np.float32)


def _check_image(image: np.ndarray) -> None:
    if not isinstance(image, np.ndarray) or image.dtype != np.uint8 or image.ndim != 3 or image.shape[2] != 3:
        raise ImageError("drawing wants a uint8 [h, w, 3] image; read_image makes one.")


def _check_points(points: np.ndarray | None, labels: np.ndarray | None) -> tuple[np.ndarray, np.ndarray]:
    where = np.zeros((0, 2)) if points is None else np.asarray(points, np.float64).reshape(-1, 2)
    kinds = np.ones(len(where), int) if labels is None else np.asarray(labels, int).reshape(-1)
    if (
        len(kinds) != len(where)
        or not np.isin(kinds, list(POINT_COLOURS)).all()
        or not np.isfinite(where).all()
    ):
        raise ImageError(f"{len(where)} points and {len(kinds)} labels (1, 0 or -1) do not fit together.")
    return where, kinds


def _erode(mask: np.ndarray, times: int) -> np.ndarray:
    """The mask without its outermost `times` pixels; the image border counts as outside."""
    for _ in range(times):
        padded = np.pad(mask, 1)
        mask = mask & padded[:-2, 1:-1] & padded[2:, 1:-1] & padded[1:-1, :-2] & padded[1:-1, 2:]
    return mask


def _draw_outline(canvas: np.ndarray, mask: np.ndarray, colour: tuple[int, int, int]) -> None:
    """A line around the mask with a dark seam, so that it shows on any ground; changes the canvas."""
    line = max(1, round(max(canvas.shape[:2]) / 200))
    grown = []
    for reach in (line, line + 1):
        outside = np.pad(~mask, reach, constant_values=True)
        grown.append(~_erode(outside, reach)[reach:-reach, reach:-reach])
    canvas[grown[1] & ~grown[0]] = (20, 20, 20)
    canvas[grown[0] & ~mask] = colour
    border = np.ones(mask.shape, bool)
    border[line:-line, line:-line] = False
    canvas[mask & border] = colour  # the picture's edge cuts the mask: close the line along it


def _dot(radius: int, colour: tuple[int, int, int]) -> Image.Image:
    """A disc with a white and a dark outline, smooth-edged; RGBA, 2 * radius + 5 pixels wide."""
    zoom, side = 4, 2 * radius + 5
    big = Image.new("RGBA", (zoom * side, zoom * side), (0, 0, 0, 0))
    pen = ImageDraw.Draw(big)
    middle = zoom * side / 2
    for extra, fill in ((2.0, (20, 20, 20)), (1.0, (255, 255, 255)), (0.0, colour)):
        reach = zoom * (radius + extra)
        pen.ellipse([middle - reach, middle - reach, middle + reach, middle + reach], fill=(*fill, 255))
    return big.resize((side, side), Image.Resampling.BOX)


def _draw_points(canvas: Image.Image, points: np.ndarray, labels: np.ndarray) -> None:
    radius = max(2, round(max(canvas.size) / 160))
    for kind in (-1, 0, 1):  # positives last: on top
        dot = _dot(radius, POINT_COLOURS[kind])
        for x, y in points[labels == kind]:
            corner = (round(float(x)) - radius - 2, round(float(y)) - radius - 2)
            canvas.paste(dot, corner, dot)


def _draw_legend(canvas: Image.Image, kinds: list[int]) -> None:
    """A bar of the colour map, and one dot per kind of point drawn, at the bottom left."""
    size = max(9, round(min(canvas.size) / 40))
    font = ImageFont.load_default(size)
    gap, bar = size // 2, 5 * size
    names = [_POINT_NAMES[k] for k in kinds]
    items = bar + sum(round(font.getlength(n)) + 2 * size + gap for n in names)
    words = round(font.getlength("low") + font.getlength("high")) + 4 * gap
    box_w, box_h = items + words + 2 * gap, size + 2 * gap
    if box_w > canvas.width:
        return  # no room; the colours are documented
    plate = Image.new("RGB", (box_w, box_h), (25, 25, 25))
    pen = ImageDraw.Draw(plate)
    x, y = gap, box_h / 2

    def write(text: str) -> None:
        nonlocal x
        pen.text((x, y), text, fill=(235, 235, 235), font=font, anchor="lm")
        x += round(font.getlength(text)) + gap

    write("low")
    ramp = colourise(np.broadcast_to(np.linspace(0, 1, bar), (size, bar))).round().astype(np.uint8)
    plate.paste(Image.fromarray(ramp), (x, gap))
    x += bar + gap
    write("high")
    for kind, name in zip(kinds, names, strict=True):
        x += gap
        dot = _dot(max(2, size // 3), POINT_COLOURS[kind])
        plate.paste(dot, (x, round(y - dot.height / 2)), dot)
        x += dot.width + gap // 2
        write(name)
    canvas.paste(plate, (0, canvas.height - box_h))
