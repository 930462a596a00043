"""What is in a scene: things with their attributes and places, laid out at random from a stream of draws."""

from __future__ import annotations

import dataclasses

from read_jax.data.scenes.drawing import SUBPIXELS, hidden_share
from read_jax.data.scenes.draws import Random
from read_jax.data.scenes.shapes import EVERYDAY, PATTERNS, PLAIN_SHAPES, SHAPES

COLOURS: dict[str, tuple[int, int, int]] = {
    "red": (220, 40, 40),
    "orange": (245, 140, 30),
    "yellow": (245, 215, 50),
    "green": (50, 160, 70),
    "cyan": (60, 200, 215),
    "blue": (45, 85, 205),
    "purple": (130, 60, 170),
    "pink": (245, 150, 190),
    "brown": (125, 80, 45),
    "black": (35, 35, 40),
}
SIZES = {"small": (200, 250), "large": (340, 400)}
"""Extent in thousandths of the picture's shorter side, from and to."""
LEVELS = (1, 2, 3, 4)

HELD_OUT = {
    shape: list(COLOURS)[(3 * number + 1) % len(COLOURS)] for number, shape in enumerate(SHAPES)
}  # by the numbers, so that every shape loses one colour and every colour two shapes
"""Of each shape, the colour that it never has, and is never said to have, in train and val."""

_PAPERS = (
    (238, 238, 235),
    (226, 232, 238),
    (240, 232, 220),
    (228, 238, 226),
    (236, 228, 238),
    (214, 218, 222),
)
_COUNTS = {1: (2, 3), 2: (3, 6), 3: (3, 7), 4: (3, 7)}
_OVERLAP = {1: 0.0, 2: 0.0, 3: 0.75, 4: 0.3}  # how often two things overlap
_HIDDEN = (0.1, 0.35)  # share of the thing behind that is covered
_TRIES = 40


@dataclasses.dataclass(frozen=True)
class Thing:
    """One drawn thing; centre, extent in 64ths of a pixel, (0, 0) the picture's top-left corner.

    Attributes:
        shape, colour, size, pattern: what it is said to be.
        x, y: its centre.
        extent: the longer side of its outline's box.
        angle: degrees, clockwise.
        mirrored: left and right swapped.
        rgb: its own shade of the colour.
    """

    shape: str
    colour: str
    size: str
    pattern: str = "plain"
    x: int = 0
    y: int = 0
    extent: int = 0
    angle: int = 0
    mirrored: bool = False
    rgb: tuple[int, int, int] = (0, 0, 0)


@dataclasses.dataclass(frozen=True)
class Scene:
    """A picture to draw.

    Attributes:
        height, width: in pixels.
        things: back to front.
        covers: (front, back), indices of the things of which one hides part of the other.
        background: rows of RGB colours, spread smoothly over the picture.
        level: how hard, 1 to 4.
    """

    height: int
    width: int
    things: tuple[Thing, ...]
    covers: tuple[tuple[int, int], ...] = ()
    background: tuple[tuple[tuple[int, int, int], ...], ...] = (((238, 238, 235),),)
    level: int = 1


def make_scene(draws: Random, level: int, held_out: bool) -> Scene:
    """A scene of that level; `held_out`: the pairs of `HELD_OUT` may, and often do, appear."""
    while True:
        scene = _try_scene(draws, level, held_out)
        if len(scene.things) >= _COUNTS[level][0]:  # enough of them found room
            return scene


def _try_scene(draws: Random, level: int, held_out: bool) -> Scene:
    short = draws.between(96, 192)
    long = short + draws.below(short // 3 + 1)
    height, width = (short, long) if draws.chance(0.5) else (long, short)
    themes = {"mixed": 50, "geometry": 14, "odd": 18, "twins": 18} if level == 4 else {"mixed": 1}
    theme = draws.weighted(themes)
    cast = _cast(draws, level, theme, held_out)
    things, covers = _lay_out(draws, cast, height, width, level)
    return Scene(height, width, things, covers, _background(draws), level)


def _cast(draws: Random, level: int, theme: str, held_out: bool) -> list[Thing]:
    """The things by their attributes, not yet placed."""
    count = draws.between(*_COUNTS[level])
    if theme == "odd":
        return _odd_cast(draws, max(count, 4), held_out)
    if theme == "geometry":
        pool = tuple(PLAIN_SHAPES)
    else:
        pool = tuple(EVERYDAY) if level == 4 and draws.chance(0.6) else SHAPES
    # few shapes and colours, so that one word seldom tells a thing from the others
    shapes = draws.sample(pool, max(2, (2 * count + 2) // 3))
    colours = draws.sample(tuple(COLOURS), max(2, (2 * count + 2) // 3))
    cast: list[Thing] = []
    while len(cast) < count:
        shape = draws.choice(shapes)
        colour = _colour(draws, shape, colours, held_out)
        if held_out and draws.chance(0.25):
            colour = HELD_OUT[shape]
        thing = _attributes(draws, shape, colour, level)
        same = [t for t in cast if (t.shape, t.colour) == (shape, colour)]
        if same and (level == 1 or theme == "twins"):
            shapes, colours = list(pool), list(COLOURS)  # few combinations: widen the choice
            continue
        cast.append(thing)
    if theme == "twins":
        cast[draws.below(count - 1)] = cast[-1]
    return cast


def _odd_cast(draws: Random, count: int, held_out: bool) -> list[Thing]:
    """Things that share their shape or their colour, but for one."""
    odd = draws.below(count)
    if draws.chance(0.5):
        common, other = draws.sample(SHAPES, 2)
        shapes = [other if k == odd else common for k in range(count)]
        return [
            _attributes(draws, shape, _colour(draws, shape, tuple(COLOURS), held_out), 1) for shape in shapes
        ]
    common, other = draws.sample(tuple(COLOURS), 2)
    colours = [other if k == odd else common for k in range(count)]
    cast = []
    for colour in colours:
        shapes = [s for s in SHAPES if held_out or HELD_OUT[s] != colour]
        cast.append(_attributes(draws, draws.choice(shapes), colour, 1))
    return cast


def _colour(draws: Random, shape: str, colours: list[str] | tuple[str, ...], held_out: bool) -> str:
    """One of the colours, or any other where the shape may have none of them."""
    allowed = [c for c in colours if held_out or HELD_OUT[shape] != c]
    return draws.choice(allowed or [c for c in COLOURS if HELD_OUT[shape] != c])


def _attributes(draws: Random, shape: str, colour: str, level: int) -> Thing:
    geometric = shape in PLAIN_SHAPES
    pattern = "plain"
    if geometric and level >= 3 and draws.chance(0.35):
        pattern = draws.choice(PATTERNS[1:])
    red, green, blue = (max(0, min(255, value + draws.between(-8, 8))) for value in COLOURS[colour])
    return Thing(
        shape=shape,
        colour=colour,
        size="small" if draws.chance(0.5) else "large",
        pattern=pattern,
        angle=draws.between(-10, 10) if geometric else 0,
        mirrored=not geometric and draws.chance(0.5),
        rgb=(red, green, blue),
    )


def _lay_out(
    draws: Random, cast: list[Thing], height: int, width: int, level: int
) -> tuple[tuple[Thing, ...], tuple[tuple[int, int], ...]]:
    """The cast placed inside the picture, apart but for at most one pair; who finds no room stays out."""
    overlap = draws.chance(_OVERLAP[level])
    room = 3 if len(cast) < 6 else 2  # for large ones
    placed: list[Thing] = []
    covers: list[tuple[int, int]] = []
    for thing in cast:
        size = "small" if sum(t.size == "large" for t in placed) >= room else thing.size
        low, high = SIZES[size]
        extent = min(height, width) * SUBPIXELS * draws.between(low, high) // 1000
        thing = dataclasses.replace(thing, size=size, extent=extent)
        large = [k for k, t in enumerate(placed) if t.size == "large"]  # still known when partly hidden
        if overlap and large and not covers:
            back = draws.choice(large)
            found = _in_front(draws, thing, back, placed, height, width)
            if found is not None:
                covers.append((len(placed), back))
                placed.append(found)
                continue
        found = _apart(draws, thing, placed, height, width)
        if found is not None:
            placed.append(found)
    return tuple(placed), tuple(covers)


def _apart(draws: Random, thing: Thing, placed: list[Thing], height: int, width: int) -> Thing | None:
    (left, right), (top, bottom) = _stage(thing, height, width)
    for _ in range(_TRIES):
        moved = dataclasses.replace(thing, x=draws.between(left, right), y=draws.between(top, bottom))
        if _is_apart(moved, placed, height, width):
            return moved
    return None


def _in_front(
    draws: Random, thing: Thing, back: int, placed: list[Thing], height: int, width: int
) -> Thing | None:
    """The thing moved so that it hides part of another, of another colour, and nothing of the rest."""
    behind = placed[back]
    rest = placed[:back] + placed[back + 1 :]
    if behind.colour == thing.colour:
        return None
    (left, right), (top, bottom) = _stage(thing, height, width)
    reach = (thing.extent + behind.extent) // 2
    for _ in range(_TRIES // 2):
        x, y = behind.x + draws.between(-reach, reach), behind.y + draws.between(-reach, reach)
        moved = dataclasses.replace(thing, x=x, y=y)
        if not left <= x <= right or not top <= y <= bottom:
            continue
        if not _is_apart(moved, rest, height, width):
            continue
        if _HIDDEN[0] <= hidden_share(moved, behind, height, width) <= _HIDDEN[1]:
            return moved
    return None


def _stage(thing: Thing, height: int, width: int) -> tuple[tuple[int, int], tuple[int, int]]:
    """Least and greatest x, then y, of a thing's centre.

    Things keep to the picture's central square: of the rest CLIP, and so the language model, sees nothing.
    """
    side, margin = min(height, width) * SUBPIXELS, thing.extent * 54 // 100
    left, top = (width * SUBPIXELS - side) // 2, (height * SUBPIXELS - side) // 2
    return (left + margin, left + side - margin), (top + margin, top + side - margin)


def _is_apart(thing: Thing, others: list[Thing], height: int, width: int) -> bool:
    gap = min(height, width) * SUBPIXELS // 25
    return all(
        max(abs(thing.x - other.x), abs(thing.y - other.y)) >= (thing.extent + other.extent) // 2 + gap
        for other in others
    )


def _background(draws: Random) -> tuple[tuple[tuple[int, int, int], ...], ...]:
    """Plain, a gradient, or soft clouds; always pale."""
    style = draws.weighted({"plain": 40, "gradient": 35, "clouds": 25})
    paper = draws.choice(_PAPERS)
    if style == "plain":
        return ((paper,),)
    if style == "gradient":
        other = draws.choice([p for p in _PAPERS if p != paper])
        return draws.choice((((paper, other),), ((paper,), (other,)), ((paper, other), (other, paper))))
    rows, columns = draws.between(4, 6), draws.between(4, 6)
    red, green, blue = paper
    shades = [[draws.between(-10, 10) for _ in range(columns)] for _ in range(rows)]
    return tuple(tuple((red + s, green + s, blue + s) for s in row) for row in shades)
