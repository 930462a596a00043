"""Pixels and masks of drawn scenes, against rasterisations of the test's own."""

from __future__ import annotations

import dataclasses
import math
from fractions import Fraction

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from read_jax.data.scenes import Scenes
from read_jax.data.scenes.drawing import NOTHING, draw, inside_polygon
from read_jax.data.scenes.shapes import PATTERNS, PLAIN_SHAPES, SHAPES
from read_jax.data.scenes.world import COLOURS, Scene, Thing

PAPER = (240, 230, 220)


def one(shape: str, extent: float = 40, x: float = 40, y: float = 40, size: int = 80, **more) -> Scene:
    """A scene of one thing; lengths in pixels."""
    place = {"x": round(64 * x), "y": round(64 * y), "extent": round(64 * extent)}
    thing = Thing(shape, "blue", "large", **{**place, "rgb": (20, 60, 200), **more})
    return Scene(size, size, (thing,), background=((PAPER,),))


def coverage(scene: Scene, inside) -> np.ndarray:
    """How many of each pixel's 16 samples are inside(x, y), x and y in pixels; int [h, w]."""
    at = (np.arange(4 * scene.height) + 0.5) / 4
    hits = inside(at[None, :], at[:, None])
    return hits.reshape(scene.height, 4, scene.width, 4).sum((1, 3))


def polygon(corners, slack: float):
    """Inside test of a convex polygon given clockwise on the screen, its edges moved outwards."""

    def inside(x, y):
        out = np.ones(np.broadcast(x, y).shape, bool)
        for (x0, y0), (x1, y1) in zip(corners, corners[1:] + corners[:1], strict=True):
            out &= (x1 - x0) * (y - y0) - (y1 - y0) * (x - x0) >= -slack * math.dist((x0, y0), (x1, y1))
        return out

    return inside


CONVEX = {
    "square": [(-0.44, -0.44), (0.44, -0.44), (0.44, 0.44), (-0.44, 0.44)],
    "triangle": [(0, -0.48), (0.46, 0.4), (-0.46, 0.4)],
    "diamond": [(0, -0.5), (0.34, 0), (0, 0.5), (-0.34, 0)],
    "hexagon": [(0.5 * math.sin(k * math.pi / 3), -0.5 * math.cos(k * math.pi / 3)) for k in range(6)],
}


@pytest.mark.parametrize("shape", CONVEX)
@given(angle=st.integers(-10, 10), extent=st.floats(17, 70), x=st.floats(38, 42), y=st.floats(38, 42))
@settings(max_examples=15, deadline=None)
def test_masks_of_polygons_are_half_covered_pixels(shape, angle, extent, x, y):
    scene = one(shape, extent, x, y, angle=angle)
    c, s = math.cos(math.radians(angle)), math.sin(math.radians(angle))
    corners = [(x + extent * (u * c - v * s), y + extent * (u * s + v * c)) for u, v in CONVEX[shape]]
    mask = draw(scene)[1] == 0
    # corners and centre are rounded to whole 64ths of a pixel, so an edge may be off by one
    assert mask[coverage(scene, polygon(corners, -1 / 50)) >= 8].all()
    assert not mask[coverage(scene, polygon(corners, 1 / 50)) < 8].any()


@given(extent=st.integers(17, 70), x=st.integers(38, 42), y=st.integers(38, 42))
@settings(max_examples=25, deadline=None)
def test_masks_of_discs_and_rings_are_exactly_the_half_covered_pixels(extent, x, y):
    disc = coverage(
        one("circle", extent, x, y), lambda u, v: (u - x) ** 2 + (v - y) ** 2 <= (extent / 2) ** 2
    )
    np.testing.assert_array_equal(draw(one("circle", extent, x, y))[1] == 0, disc >= 8)
    hole = round(0.26 * extent * 64) / 64
    inner = coverage(one("ring", extent, x, y), lambda u, v: (u - x) ** 2 + (v - y) ** 2 <= hole**2)
    np.testing.assert_array_equal(draw(one("ring", extent, x, y))[1] == 0, disc - inner >= 8)


@given(
    shape=st.sampled_from(sorted(PLAIN_SHAPES)),
    extent=st.floats(17, 60),
    x=st.floats(35, 45),
    angle=st.integers(-10, 10),
)
@settings(max_examples=40, deadline=None)
def test_the_mask_holds_where_the_picture_shows_at_least_half_the_thing(shape, extent, x, angle):
    image, labels = draw(one(shape, extent, x, angle=angle, rgb=(0, 0, 0)))
    samples = np.round(16 * (1 - image[..., 0] / PAPER[0]))  # dark on pale: how many of the 16
    np.testing.assert_array_equal(labels == 0, samples >= 8)


@given(
    corners=st.lists(st.tuples(st.integers(-60, 60), st.integers(-60, 60)), min_size=3, max_size=8),
    points=st.lists(st.tuples(st.integers(-60, 60), st.integers(-60, 60)), min_size=1, max_size=8),
)
def test_inside_is_the_even_odd_rule_in_exact_numbers(corners, points):
    xs, ys = (np.array(sorted(set(v)), np.int64) for v in zip(*points, strict=True))
    got = inside_polygon(corners, xs, ys)
    for row, y in enumerate(ys.tolist()):
        for column, x in enumerate(xs.tolist()):
            crossings = 0
            for (x0, y0), (x1, y1) in zip(corners, corners[1:] + corners[:1], strict=True):
                if (y0 <= y) != (y1 <= y):
                    crossings += x < x0 + Fraction((y - y0) * (x1 - x0), y1 - y0)
            assert got[row, column] == crossings % 2


@pytest.mark.parametrize("shape", SHAPES)
def test_outlines_fill_their_extent_and_stay_within(shape):
    rows, columns = np.nonzero(draw(one(shape, 48))[1] == 0)
    assert max(np.ptp(rows), np.ptp(columns)) + 1 >= 0.87 * 48
    assert min(rows.min(), columns.min()) >= 40 - 24 - 2
    assert max(rows.max(), columns.max()) <= 40 + 24 + 2


@pytest.mark.parametrize("shape", SHAPES)
def test_a_mirrored_thing_is_the_mirror_image(shape):
    image, labels = draw(one(shape, 33))
    mirrored, mirrored_labels = draw(one(shape, 33, mirrored=True))
    # samples exactly on an outline fall on one side only: allow those pixels
    assert (labels != mirrored_labels[:, ::-1]).mean() < 0.005
    assert np.abs(image.astype(int) - mirrored[:, ::-1]).mean() < 1


@pytest.mark.parametrize("shape", SHAPES)
def test_the_colour_that_is_named_fills_most_of_the_thing(shape):
    image, labels = draw(one(shape, 60, rgb=COLOURS["blue"]))
    shown = image[labels == 0].astype(int)
    nearest = [min(COLOURS, key=lambda c: np.abs(np.subtract(COLOURS[c], p)).sum()) for p in shown]
    assert nearest.count("blue") > 0.5 * len(nearest)


@pytest.mark.parametrize("pattern", PATTERNS)
def test_patterns_leave_the_mask_alone(pattern):
    plain, patterned = draw(one("square")), draw(one("square", pattern=pattern))
    np.testing.assert_array_equal(plain[1], patterned[1])
    assert (pattern == "plain") == np.array_equal(plain[0], patterned[0])


def test_a_pixel_that_two_things_halve_belongs_to_the_front_one():
    # squares that meet in the middle of a column of pixels
    side = 25 / 0.88
    left, right = (one("square", side, x, 40).things[0] for x in (28, 53))
    for things in ((left, right), (right, left)):
        labels = draw(Scene(80, 80, things, background=((PAPER,),)))[1]
        assert (labels[30:50, 40] == 1).all()


def test_the_front_thing_hides_the_one_behind():
    for i in range(60):
        scene = Scenes("train", level=3).drawing(i).scene
        labels = draw(scene)[1]
        for front, back in scene.covers:
            alone = {
                k: draw(dataclasses.replace(scene, things=(scene.things[k],)))[1] == 0 for k in (front, back)
            }
            np.testing.assert_array_equal(labels == front, alone[front])
            assert not (labels == back)[alone[front]].any()
            assert (alone[front] & alone[back]).sum() >= 0.05 * alone[back].sum()
            assert (labels == back).sum() >= 0.5 * alone[back].sum()


def test_things_that_do_not_cover_each_other_are_apart():
    for i in range(50):
        scene = Scenes("train").drawing(i).scene
        labels = draw(scene)[1]
        hidden = {back for _, back in scene.covers}
        for k, thing in enumerate(scene.things):
            alone = draw(dataclasses.replace(scene, things=(thing,)))[1] == 0
            assert k in hidden or np.array_equal(labels == k, alone)
            assert not alone[[0, -1]].any() and not alone[:, [0, -1]].any()  # whole within the picture


def test_beyond_the_things_there_is_only_background():
    for i in range(40):
        scene = Scenes("train").drawing(i).scene
        image, labels = draw(scene)
        empty, nothing = draw(dataclasses.replace(scene, things=(), covers=()))
        assert (nothing == NOTHING).all() and empty.min() >= 190
        far = np.ones_like(labels, bool)
        for thing in scene.things:
            x, y, half = thing.x // 64, thing.y // 64, thing.extent * 55 // 6400 + 1
            far[max(0, y - half) : y + half + 1, max(0, x - half) : x + half + 1] = False
        assert far.any() and (labels[far] == NOTHING).all()
        np.testing.assert_array_equal(image[far], empty[far])


def test_masks_of_several_things_are_the_union_of_theirs():
    seen = 0
    for i in range(30):
        drawing, item = Scenes("val").drawing(i), Scenes("val")[i]
        labels = draw(drawing.scene)[1]
        for question, mask in zip(drawing.questions, item.masks, strict=True):
            union = np.zeros_like(labels, bool)
            for thing in question.things:
                assert (labels == thing).any()
                union |= labels == thing
            np.testing.assert_array_equal(mask, union)
            seen += len(question.things) > 1
    assert seen > 5


def test_colours_stay_apart_from_each_other_and_from_the_paper():
    shades = [
        *COLOURS.values(),
        *(draw(dataclasses.replace(Scenes("train").drawing(i).scene, things=()))[0][0, 0] for i in range(30)),
    ]
    for k, a in enumerate(COLOURS.values()):
        for b in shades[k + 1 :]:
            assert np.abs(np.subtract(a, b, dtype=int)).max() >= 40
