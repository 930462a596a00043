"""The outlines of the things in a scene, and the patterns that may cover them.

Coordinates are in units of a thing's extent, origin at its centre, x right, y down; an outline fits the box
[-0.5, 0.5]², or when turned, a box a twentieth wider. A thing is a list of pieces, back to front: "add" and
"cut" make its silhouette, "paint" changes the tone of what is already there. No part is much thinner than a
sixth of the extent, so that small models can segment it too.
"""

from __future__ import annotations

import dataclasses
import math
from typing import Literal

BODY, LIGHT, DARK = 0, 1, 2
"""Tones: the thing's colour, a lighter and a darker one."""
Point = tuple[float, float]


@dataclasses.dataclass(frozen=True)
class Piece:
    """A polygon of `points`, or where there is only one point, the ellipse around it with these `radii`."""

    action: Literal["add", "cut", "paint"]
    tone: int
    points: tuple[Point, ...]
    radii: Point = (0.0, 0.0)


def _polygon(*points: Point, action: Literal["add", "cut", "paint"] = "add", tone: int = BODY) -> Piece:
    return Piece(action, tone, points)


def _ellipse(
    x: float,
    y: float,
    rx: float,
    ry: float | None = None,
    action: Literal["add", "cut", "paint"] = "add",
    tone: int = BODY,
) -> Piece:
    return Piece(action, tone, ((x, y),), (rx, rx if ry is None else ry))


def _box(
    x0: float,
    y0: float,
    x1: float,
    y1: float,
    action: Literal["add", "cut", "paint"] = "add",
    tone: int = BODY,
) -> Piece:
    return Piece(action, tone, ((x0, y0), (x1, y0), (x1, y1), (x0, y1)))


def _around(corners: int, radius: float, inner: float | None = None, y: float = 0.0) -> tuple[Point, ...]:
    """Corners of a regular polygon, the first at the top; of a star, with its inner corners in between."""
    steps = corners if inner is None else 2 * corners
    out = []
    for step in range(steps):
        r = radius if inner is None or step % 2 == 0 else inner
        angle = 2 * math.pi * step / steps
        out.append((r * math.sin(angle), y - r * math.cos(angle)))
    return tuple(out)


def _wedge(start: float, stop: float) -> tuple[Point, ...]:
    """A slice from the centre to beyond the outline; degrees clockwise from the top."""
    edge = [
        (math.sin(math.radians(a)), -math.cos(math.radians(a))) for a in (start, (start + stop) / 2, stop)
    ]
    return ((0.0, 0.0), *edge)


def _spoke(angle: float, half_width: float = 0.045, length: float = 0.37) -> tuple[Point, ...]:
    """A bar through the centre; degrees clockwise from upright."""
    s, c = math.sin(math.radians(angle)), math.cos(math.radians(angle))
    corners = ((-half_width, -length), (half_width, -length), (half_width, length), (-half_width, length))
    return tuple((x * c - y * s, x * s + y * c) for x, y in corners)


_ARM = 0.17  # half the width of the cross's arms
PLAIN_SHAPES: dict[str, tuple[Piece, ...]] = {
    "circle": (_ellipse(0, 0, 0.5),),
    "square": (_box(-0.44, -0.44, 0.44, 0.44),),
    "triangle": (_polygon((0, -0.48), (0.46, 0.4), (-0.46, 0.4)),),
    "star": (_polygon(*_around(5, 0.52, 0.25, y=0.04)),),
    "diamond": (_polygon((0, -0.5), (0.34, 0), (0, 0.5), (-0.34, 0)),),
    "hexagon": (_polygon(*_around(6, 0.5)),),
    "cross": (_box(-_ARM, -0.5, _ARM, 0.5), _box(-0.5, -_ARM, 0.5, _ARM)),
    "ring": (_ellipse(0, 0, 0.5), _ellipse(0, 0, 0.26, action="cut")),
}
"""Geometric shapes: turned a little, and covered with a pattern in harder scenes."""

EVERYDAY: dict[str, tuple[Piece, ...]] = {
    "ball": (
        _ellipse(0, 0, 0.5),
        *(Piece("paint", LIGHT, _wedge(a, a + 60)) for a in (20, 140, 260)),
        _ellipse(0, 0, 0.1, action="paint"),
    ),
    "wheel": (
        _ellipse(0, 0, 0.5),
        _ellipse(0, 0, 0.36, action="paint", tone=LIGHT),
        *(Piece("paint", BODY, _spoke(a)) for a in (0, 60, 120)),
        _ellipse(0, 0, 0.12, action="paint"),
    ),
    "cup": (
        _ellipse(0.25, -0.02, 0.24, 0.27),
        _ellipse(0.25, -0.02, 0.13, 0.15, action="cut"),
        _polygon((-0.48, -0.44), (0.24, -0.44), (0.15, 0.46), (-0.39, 0.46)),
        _box(-0.5, -0.44, 0.3, -0.34, action="paint", tone=LIGHT),
    ),
    "bottle": (
        _polygon(
            *((-0.1, -0.5), (0.1, -0.5), (0.1, -0.22), (0.24, -0.04)),
            *((0.24, 0.5), (-0.24, 0.5), (-0.24, -0.04), (-0.1, -0.22)),
        ),
        _box(-0.24, 0.08, 0.24, 0.32, action="paint", tone=LIGHT),
        _box(-0.1, -0.5, 0.1, -0.4, action="paint", tone=DARK),
    ),
    "book": (
        _polygon((0, -0.26), (0.5, -0.38), (0.5, 0.28), (0, 0.4), (-0.5, 0.28), (-0.5, -0.38)),
        *(
            _polygon(
                *((side * 0.08, y), (side * 0.42, y - 0.08)),
                *((side * 0.42, y - 0.02), (side * 0.08, y + 0.06)),
                action="paint",
                tone=LIGHT,
            )
            for side in (-1, 1)
            for y in (-0.14, 0.02, 0.18)
        ),
        _box(-0.03, -0.5, 0.03, 0.5, action="paint", tone=DARK),
    ),
    "house": (
        _box(-0.38, -0.06, 0.38, 0.5),
        _polygon((0, -0.5), (0.5, -0.04), (-0.5, -0.04)),
        _polygon((0, -0.5), (0.5, -0.04), (-0.5, -0.04), action="paint", tone=DARK),
        _box(-0.22, 0.16, -0.02, 0.5, action="paint", tone=DARK),
        _box(0.1, 0.1, 0.28, 0.28, action="paint", tone=LIGHT),
    ),
    "tree": (
        _box(-0.09, 0.1, 0.09, 0.5, tone=DARK),
        _ellipse(-0.2, 0, 0.24),
        _ellipse(0.2, 0, 0.24),
        _ellipse(0, -0.22, 0.28),
    ),
    "fish": (
        _polygon((0.16, 0), (0.5, -0.26), (0.42, 0), (0.5, 0.26)),
        _ellipse(-0.1, 0, 0.4, 0.25),
        _ellipse(-0.32, -0.06, 0.07, action="paint", tone=LIGHT),
        _box(-0.18, -0.5, -0.13, 0.5, action="paint", tone=DARK),
        _polygon((0.3, -0.5), (0.6, -0.5), (0.6, 0.5), (0.3, 0.5), action="paint", tone=DARK),
    ),
    "lamp": (
        _box(-0.08, -0.06, 0.08, 0.42, tone=DARK),
        _ellipse(0, 0.4, 0.3, 0.1, tone=DARK),
        _polygon((-0.18, -0.5), (0.18, -0.5), (0.38, -0.02), (-0.38, -0.02)),
    ),
    "car": (
        _box(-0.5, -0.04, 0.5, 0.2),
        _polygon((-0.36, -0.02), (-0.22, -0.3), (0.14, -0.3), (0.32, -0.02)),
        _polygon((-0.26, -0.05), (-0.18, -0.23), (-0.06, -0.23), (-0.06, -0.05), action="paint", tone=LIGHT),
        _polygon((0.02, -0.05), (0.02, -0.23), (0.11, -0.23), (0.22, -0.05), action="paint", tone=LIGHT),
        _ellipse(-0.28, 0.2, 0.13, tone=DARK),
        _ellipse(0.28, 0.2, 0.13, tone=DARK),
    ),
    "boat": (
        _box(-0.06, -0.5, 0.05, 0.2, tone=DARK),
        _polygon((-0.5, 0.16), (0.5, 0.16), (0.34, 0.46), (-0.34, 0.46)),
        _polygon((0.05, -0.46), (0.48, 0.12), (0.05, 0.12)),
        _polygon((-0.06, -0.36), (-0.42, 0.12), (-0.06, 0.12)),
    ),
    "chair": (
        _box(-0.38, -0.5, -0.18, 0.5),
        _box(-0.38, -0.02, 0.38, 0.2),
        _box(0.18, 0.0, 0.38, 0.5),
        _box(-0.38, -0.02, 0.38, 0.2, action="paint", tone=DARK),
    ),
}
"""Everyday things: upright, some mirrored, recognisable by outline and detail."""

OUTLINES = {**PLAIN_SHAPES, **EVERYDAY}
SHAPES = tuple(OUTLINES)
PATTERNS = ("plain", "striped", "dotted")
