"""What an expression means in a scene: the things it denotes, computed from the scene alone.

A property of a thing is true, false, or unclear (None) where people could disagree: just left of the middle,
nearly as far away, a ring that might roll. An expression whose denotation hangs on something unclear has none
(`Unclear`), so that no question is ever borderline. Lengths are in 64ths of a pixel, y down; places are those
of the things' centres, even of a thing that is partly hidden.

    Noun(...)                       small red circle on the left; thing you could drink from
    Related(head, relation, anchor) circle left of the red square, star behind the ring
    Between(head, first, second)    thing between the ball and the tree
    Nearest(head, anchor, far)      circle closest to / farthest from the tree
    Extreme(head, which)            leftmost star, largest triangle
    Alike(head, attribute, anchor)  thing of the same colour as the ball
    Riddle(name)                    the odd one out, the two alike, most or fewest corners

Heads are `Noun`s, anchors any expression that denotes one thing.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Iterable, Sequence

from read_jax.data.scenes.drawing import SUBPIXELS
from read_jax.data.scenes.knowledge import CONFUSABLE, CORNERS, USES
from read_jax.data.scenes.shapes import EVERYDAY
from read_jax.data.scenes.world import Scene, Thing

Truth = bool | None
_APART = 0.08  # of the shorter side: nearer than this, neither left nor right, above nor below
_FARTHER = 1.25  # how many times as far the next nearest thing must be
_LARGER = 1.12  # how many times as large the largest
OPPOSITE = {
    **{"left": "right", "right": "left", "above": "below", "below": "above"},
    **{"behind": "in front", "in front": "behind"},
}
RELATIONS = tuple(OPPOSITE)
PLACES = ("left", "right", "top", "bottom", "middle")
EXTREMES = ("leftmost", "rightmost", "topmost", "bottommost", "largest", "smallest")
RIDDLES = ("odd", "twins", "most corners", "fewest corners")


class Unclear(Exception):
    """What the expression denotes depends on something borderline."""


@dataclasses.dataclass(frozen=True)
class Noun:
    """Things by their attributes; None: whatever."""

    shape: str | None = None
    colour: str | None = None
    size: str | None = None
    pattern: str | None = None
    place: str | None = None
    use: str | None = None


@dataclasses.dataclass(frozen=True)
class Related:
    head: Noun
    relation: str
    anchor: Expression


@dataclasses.dataclass(frozen=True)
class Between:
    head: Noun
    first: Expression
    second: Expression


@dataclasses.dataclass(frozen=True)
class Nearest:
    head: Noun
    anchor: Expression
    far: bool = False


@dataclasses.dataclass(frozen=True)
class Extreme:
    head: Noun
    which: str


@dataclasses.dataclass(frozen=True)
class Alike:
    head: Noun
    attribute: str  # "colour" or "shape"
    anchor: Expression


@dataclasses.dataclass(frozen=True)
class Riddle:
    name: str


Expression = Noun | Related | Between | Nearest | Extreme | Alike | Riddle


def denote(expression: Expression, scene: Scene) -> tuple[int, ...]:
    """Indices of the things it denotes, ascending; () when there is none. Raises `Unclear`."""
    if isinstance(expression, Noun):
        return _where(scene, lambda k: is_a(expression, scene, k))
    if isinstance(expression, Riddle):
        return _solve(expression.name, scene)
    if isinstance(expression, Extreme):
        return _extreme(expression, scene)
    anchors = (
        [expression.first, expression.second] if isinstance(expression, Between) else [expression.anchor]
    )
    found = [denote(anchor, scene) for anchor in anchors]
    if any(len(things) > 1 for things in found) or (len(found) == 2 and found[0] == found[1] != ()):
        raise Unclear
    if not all(found):
        return ()  # nothing is left of what is not there
    ones = [things[0] for things in found]
    if isinstance(expression, Nearest):
        return _nearest(expression, ones[0], scene)

    def holds(k: int) -> Truth:
        if k in ones:
            return False
        if isinstance(expression, Related):
            relation = related(expression.relation, k, ones[0], scene)
        elif isinstance(expression, Alike):
            relation = _alike(expression.attribute, scene.things[k], scene.things[ones[0]])
        else:
            relation = _between(scene.things[k], *(scene.things[one] for one in ones))
        return _all((is_a(expression.head, scene, k), relation))

    return _where(scene, holds)


def is_a(noun: Noun, scene: Scene, k: int) -> Truth:
    """Whether the noun, with all its attributes, is true of thing k."""
    thing = scene.things[k]
    truths: list[Truth] = [
        noun.colour in (None, thing.colour),
        noun.size in (None, thing.size),
        noun.pattern in (None, thing.pattern),
    ]
    if noun.shape is not None:
        truths.append(_is_shape(noun.shape, thing.shape))
    if noun.place is not None:
        truths.append(is_at(noun.place, thing, scene))
    if noun.use is not None:
        use = USES[noun.use]
        truths.append(True if thing.shape in use.yes else None if thing.shape in use.unclear else False)
    return _all(truths)


def is_at(place: str, thing: Thing, scene: Scene) -> Truth:
    """Whether the thing is at that part of the picture."""
    x, y = thing.x / (SUBPIXELS * scene.width), thing.y / (SUBPIXELS * scene.height)
    if place == "middle":
        off = max(abs(x - 0.5), abs(y - 0.5))
        return True if off < 0.11 else None if off < 0.2 else False
    share = {"left": x, "right": 1 - x, "top": y, "bottom": 1 - y}[place]
    return True if share < 0.38 else None if share < 0.56 else False


def related(relation: str, k: int, anchor: int, scene: Scene) -> Truth:
    """Whether thing k stands so to the anchor."""
    if relation in ("behind", "in front"):
        front, back = (anchor, k) if relation == "behind" else (k, anchor)
        return (front, back) in scene.covers
    a, b = scene.things[k], scene.things[anchor]
    along, across = {
        "left": (b.x - a.x, b.y - a.y),
        "right": (a.x - b.x, b.y - a.y),
        "above": (b.y - a.y, b.x - a.x),
        "below": (a.y - b.y, b.x - a.x),
    }[relation]
    if along < -_APART * SUBPIXELS * min(scene.height, scene.width):
        return False
    # far more beside than beyond: some would say so, some not
    clear = along > _APART * SUBPIXELS * min(scene.height, scene.width) and abs(across) <= 2 * along
    return True if clear else None


def _is_shape(name: str, shape: str) -> Truth:
    if name == shape:
        return True
    return None if (name, shape) in CONFUSABLE or (shape, name) in CONFUSABLE else False


def _alike(attribute: str, a: Thing, b: Thing) -> Truth:
    if attribute == "colour":
        return a.colour == b.colour
    return _is_shape(a.shape, b.shape)


def _between(thing: Thing, first: Thing, second: Thing) -> Truth:
    """Whether the thing's centre is near the middle part of the line from one to the other."""
    dx, dy = second.x - first.x, second.y - first.y
    length2 = dx * dx + dy * dy
    along = ((thing.x - first.x) * dx + (thing.y - first.y) * dy) / length2
    beside = abs((thing.x - first.x) * dy - (thing.y - first.y) * dx) / length2
    if 0.25 <= along <= 0.75 and beside <= 0.22:
        return True
    return False if not 0.0 <= along <= 1.0 or beside > 0.55 else None


def _nearest(expression: Nearest, anchor: int, scene: Scene) -> tuple[int, ...]:
    heads = [k for k in denote(expression.head, scene) if k != anchor]
    b = scene.things[anchor]
    distances = [(scene.things[k].x - b.x) ** 2 + (scene.things[k].y - b.y) ** 2 for k in heads]
    scores = [float(d) if expression.far else -float(d) for d in distances]
    return _best(heads, scores, lambda best, next: max(best / next, next / best) >= _FARTHER**2)


def _extreme(expression: Extreme, scene: Scene) -> tuple[int, ...]:
    heads = denote(expression.head, scene)
    things = [scene.things[k] for k in heads]
    if expression.which in ("largest", "smallest"):
        if len({t.shape for t in things}) > 1:
            raise Unclear  # of different shapes, which is the larger?
        scores = [float(t.extent if expression.which == "largest" else -t.extent) for t in things]
        return _best(heads, scores, lambda best, next: max(best / next, next / best) >= _LARGER)
    sign = -1 if expression.which in ("leftmost", "topmost") else 1
    sideways = expression.which in ("leftmost", "rightmost")
    scores = [float(sign * (t.x if sideways else t.y)) for t in things]
    apart = _APART * SUBPIXELS * min(scene.height, scene.width)
    return _best(heads, scores, lambda best, next: best - next >= apart)


def _best(
    heads: Sequence[int], scores: list[float], clearly: Callable[[float, float], bool]
) -> tuple[int, ...]:
    """The one of several with the highest score, if it is clearly ahead; () of none."""
    if not heads:
        return ()
    if len(heads) == 1:
        raise Unclear  # nobody speaks of the leftmost of one
    order = sorted(range(len(heads)), key=lambda i: -scores[i])
    if not clearly(scores[order[0]], scores[order[1]]):
        raise Unclear
    return (heads[order[0]],)


def _solve(name: str, scene: Scene) -> tuple[int, ...]:
    if name == "odd":
        return _odd_one_out(scene)
    if name == "twins":
        return _twins(scene)
    if not all(t.shape in CORNERS for t in scene.things) or len(scene.things) < 2:
        raise Unclear
    low, high = zip(*(CORNERS[t.shape] for t in scene.things), strict=True)  # a star has 5, or 10
    if name == "most corners":
        best = max(range(len(low)), key=lambda k: low[k])
        if any(k != best and high[k] >= low[best] for k in range(len(low))):
            raise Unclear
    else:
        best = min(range(len(low)), key=lambda k: high[k])
        if any(k != best and low[k] <= high[best] for k in range(len(low))):
            raise Unclear
    return (best,)


def _odd_one_out(scene: Scene) -> tuple[int, ...]:
    """The one that differs in shape or colour where all the others agree, if nothing points to another."""
    ways: tuple[Callable[[Thing], object], ...] = (
        lambda t: t.shape,
        lambda t: t.colour,
        lambda t: t.size,
        lambda t: t.pattern,
        lambda t: t.shape in EVERYDAY,
    )
    if len(scene.things) < 4:
        raise Unclear
    odd: list[int | None] = []  # by each way
    for way in ways:
        values = [way(thing) for thing in scene.things]
        alone = [k for k, value in enumerate(values) if values.count(value) == 1]
        odd.append(alone[0] if len(alone) == 1 and len(set(values)) == 2 else None)
    found = {k for k in odd if k is not None}
    if len(found) != 1 or odd[:2] == [None, None]:
        raise Unclear
    return tuple(found)


def _twins(scene: Scene) -> tuple[int, ...]:
    """The two that agree in everything, where no two others agree even in shape and colour."""
    look = [(t.shape, t.colour) for t in scene.things]
    pairs = [(i, j) for i in range(len(look)) for j in range(i + 1, len(look)) if look[i] == look[j]]
    if not pairs:
        return ()
    a, b = (scene.things[k] for k in pairs[0])
    if len(pairs) > 1 or (a.size, a.pattern) != (b.size, b.pattern):
        raise Unclear
    return pairs[0]


def _where(scene: Scene, holds: Callable[[int], Truth]) -> tuple[int, ...]:
    truths = [holds(k) for k in range(len(scene.things))]
    if None in truths:
        raise Unclear
    return tuple(k for k, truth in enumerate(truths) if truth)


def _all(truths: Iterable[Truth]) -> Truth:
    """False if any is, else unclear if any is, else true."""
    seen = tuple(truths)
    if False in seen:
        return False
    return None if None in seen else True
