"""What counts as unclear in a scene, on scenes of 100 x 100 pixels made by hand."""

from __future__ import annotations

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from read_jax.data.scenes.meaning import (
    Alike,
    Between,
    Extreme,
    Nearest,
    Noun,
    Related,
    Riddle,
    Unclear,
    denote,
)
from read_jax.data.scenes.world import Scene, Thing


def scene(*things: str) -> Scene:
    """Each thing as "shape colour x y" and perhaps its extent."""
    made = []
    for thing in things:
        shape, colour, x, y, extent = (thing + " 20").split()[:5]
        name = "large" if int(extent) > 25 else "small"
        made.append(Thing(shape, colour, name, x=64 * int(x), y=64 * int(y), extent=64 * int(extent)))
    return Scene(100, 100, tuple(made))


CIRCLE, SQUARE, STAR, RING = (Noun(name) for name in ("circle", "square", "star", "ring"))
PAIR = scene("circle red 20 50", "square blue 80 50")


@pytest.mark.parametrize(
    ("expression", "where"),
    [
        (CIRCLE, scene("ring red 50 50")),  # a ring may be called a circle
        (SQUARE, scene("diamond red 50 50")),
        (Noun(use="roll"), scene("circle red 50 50")),
        (Noun(use="four corners"), scene("book red 50 50")),
        (Noun(place="left"), scene("circle red 45 50")),
        (Noun(place="middle"), scene("circle red 35 50")),
        (Related(CIRCLE, "left", SQUARE), scene("circle red 49 20", "square red 54 80")),
        (Related(CIRCLE, "left", SQUARE), scene("circle red 40 10", "square red 55 90")),
        (Related(STAR, "left", Noun(colour="red")), scene("star red 9 9", "square red 55 90")),
        (Extreme(STAR, "leftmost"), scene("star red 30 10", "star blue 34 90")),
        (Extreme(STAR, "leftmost"), scene("star red 30 10")),
        (Extreme(STAR, "largest"), scene("star red 30 10 33", "star blue 70 90 35")),
        (Extreme(Noun(), "largest"), scene("star red 30 10 20", "ring blue 70 90 35")),
        (Nearest(STAR, RING), scene("ring red 50 50", "star red 20 50", "star red 82 50")),
        (Between(STAR, CIRCLE, SQUARE), scene("circle red 20 50", "square blue 80 50", "star red 50 70")),
        (Between(Noun(), CIRCLE, CIRCLE), PAIR),
        (Alike(Noun(), "shape", Noun("circle", "red")), scene("circle red 20 50", "ball red 80 50")),
        (Riddle("most corners"), scene("star red 20 50", "hexagon red 80 50")),
        (Riddle("most corners"), scene("house red 20 50", "hexagon red 80 50")),
        (Riddle("odd"), PAIR),
        (Riddle("twins"), scene("star red 20 50 20", "star red 80 50 35")),
    ],
)
def test_the_borderline_is_not_asked(expression, where):
    with pytest.raises(Unclear):
        denote(expression, where)


@pytest.mark.parametrize(
    ("expression", "things"),
    [
        (CIRCLE, (0,)),
        (Noun("circle", colour="blue"), ()),
        (Noun(), (0, 1)),
        (Related(Noun(), "left", SQUARE), (0,)),
        (Related(Noun(), "right", SQUARE), ()),
        (Related(Noun(), "left", Noun("tree")), ()),
        (Related(Noun(), "in front", SQUARE), ()),
        (Extreme(Noun(), "rightmost"), (1,)),
        (Extreme(Noun("tree"), "rightmost"), ()),
        (Riddle("most corners"), (1,)),
        (Riddle("fewest corners"), (0,)),
        (Riddle("twins"), ()),
    ],
)
def test_the_clear_is_answered(expression, things):
    assert denote(expression, PAIR) == things


@given(dx=st.integers(-40, 40), dy=st.integers(-40, 40))
@settings(max_examples=60)
def test_left_and_right_are_each_others_opposite(dx, dy):
    where = scene(f"circle red {50 + dx} {50 + dy}", "square blue 50 50")
    there, back = Related(CIRCLE, "left", SQUARE), Related(SQUARE, "right", CIRCLE)

    def clear(expression):
        try:
            return bool(denote(expression, where))
        except Unclear:
            return None

    assert clear(there) == clear(back)
    if clear(there) is not None:
        assert clear(there) == (dx < 0)
