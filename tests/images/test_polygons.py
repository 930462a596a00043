"""Polygons to masks: OpenCV's pixels and pycocotools'."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from read_jax.images.masks import MaskError, mask_to_rle
from read_jax.images.polygons import coco_mask, coco_piece_sum, fill_polygon

SIZES = st.integers(1, 40)
POINTS = st.lists(st.tuples(st.integers(-60, 100), st.integers(-60, 100)), min_size=1, max_size=12)
FAR_POINTS = st.lists(
    st.tuples(st.integers(-(2**23), 2**23), st.integers(-(2**23), 2**23)), min_size=1, max_size=6
)
DRAWN_BY_OPENCV = [
    (
        [(1, 1), (10, 3), (4, 8)],
        """
        ............
        .###........
        .#######....
        ..#########.
        ..########..
        ...######...
        ...#####....
        ....##......
        ....#.......
        """,
    ),
    (
        [(-4, 2), (14, -3), (6, 11)],
        """
        ...#########
        ############
        ############
        ###########.
        ###########.
        ##########..
        .#########..
        ..#######...
        """,
    ),
    (
        [(0, 0), (11, 7), (11, 0), (0, 7)],
        """
        #..........#
        ###......###
        ####....####
        ############
        ############
        ####....####
        ###......###
        #..........#
        """,
    ),
    (
        [(-3, -5), (13, 9)],
        """
        ..##......
        ...##.....
        .....##...
        ......##..
        .......##.
        .........#
        """,
    ),
    (
        [(5, 0), (8, 8), (0, 3), (10, 3), (2, 8)],
        """
        .....#.....
        .....#.....
        ....###....
        ###########
        .###..####.
        ...##..#...
        ...#####...
        ..###.###..
        ..#.....#..
        """,
    ),
]


@pytest.mark.parametrize(("points", "picture"), DRAWN_BY_OPENCV)
def test_draws_what_opencv_drew(points, picture):
    expected = np.array([[c == "#" for c in row] for row in picture.split()])
    np.testing.assert_array_equal(fill_polygon(np.array(points), *expected.shape), expected)


@settings(max_examples=200, deadline=None)
@given(SIZES, SIZES, st.one_of(POINTS, FAR_POINTS))
def test_equals_opencv_on_any_polygon(height, width, points):
    cv2 = pytest.importorskip("cv2")
    expected = np.zeros((height, width), np.uint8)
    array = np.array(points, np.int32)
    cv2.polylines(expected, [array], True, 1, 1)
    cv2.fillPoly(expected, [array], 1)
    np.testing.assert_array_equal(fill_polygon(array, height, width), expected.astype(bool))


def test_square_includes_its_boundary():
    square = np.array([(2, 2), (8, 2), (8, 8), (2, 8)])
    assert fill_polygon(square, 20, 20).sum() == 49


@given(SIZES, SIZES, *[st.integers(-50, 90)] * 4)
def test_upright_rectangle_is_the_part_of_it_inside_the_picture(height, width, x1, y1, x2, y2):
    x1, x2, y1, y2 = min(x1, x2), max(x1, x2), min(y1, y2), max(y1, y2)
    expected = np.zeros((height, width), bool)
    expected[max(y1, 0) : max(y2 + 1, 0), max(x1, 0) : max(x2 + 1, 0)] = True
    corners = np.array([(x1, y1), (x2, y1), (x2, y2), (x1, y2)])
    np.testing.assert_array_equal(fill_polygon(corners, height, width), expected)


def test_one_point_is_one_pixel():
    assert np.argwhere(fill_polygon(np.array([(3, 1)]), 4, 5)).tolist() == [[1, 3]]


@given(*[st.integers(0, 30)] * 4)
def test_two_points_are_a_line_without_gaps(x1, y1, x2, y2):
    mask = fill_polygon(np.array([(x1, y1), (x2, y2)]), 31, 31)
    assert mask[y1, x1] and mask[y2, x2] and mask.sum() == max(abs(x2 - x1), abs(y2 - y1)) + 1


@given(POINTS, st.integers(0, 11))
def test_does_not_depend_on_which_point_comes_first(points, shift):
    points = np.array(points)
    np.testing.assert_array_equal(
        fill_polygon(points, 33, 21), fill_polygon(np.roll(points, shift, 0), 33, 21)
    )


def test_enclosed_twice_is_outside():
    star = np.array(DRAWN_BY_OPENCV[-1][0])
    assert not fill_polygon(star, 9, 11)[4, 5]


@pytest.mark.parametrize("points", [[(-9, -9), (-2, -9), (-2, -2)], [(50, 1), (60, 1), (60, 9)], [(-1, 4)]])
def test_polygon_beyond_one_side_draws_nothing(points):
    assert not fill_polygon(np.array(points), 10, 20).any()


@pytest.mark.parametrize(
    "points", [np.zeros((0, 2), int), np.zeros((3, 3), int), np.zeros((3, 2)), np.full((3, 2), 2**31)]
)
def test_refuses_what_is_no_integer_polygon(points):
    with pytest.raises(MaskError, match="polygon"):
        fill_polygon(points, 10, 10)


LEFT = [1, 1, 7, 1, 7, 7, 1, 7]
RIGHT = [5, 3, 12, 3, 12, 9, 5, 9]
LEFT_PIXELS, RIGHT_PIXELS = np.zeros((2, 10, 14), bool)
LEFT_PIXELS[1:7, 1:7] = True
RIGHT_PIXELS[3:9, 5:12] = True


def rle(mask, compressed=True):
    if compressed:
        return mask_to_rle(mask)
    changes = np.flatnonzero(np.diff(np.concatenate([[0], mask.T.ravel(), [2]]).astype(int)))
    return {"size": list(mask.shape), "counts": np.diff(changes, prepend=0).tolist()}


@pytest.mark.parametrize(
    "segmentation",
    [
        [LEFT, RIGHT],
        [np.array(LEFT, float), RIGHT],
        [rle(LEFT_PIXELS), rle(RIGHT_PIXELS)],
        [rle(LEFT_PIXELS, compressed=False), RIGHT],
    ],
    ids=["polygons", "arrays", "rles", "mixed"],
)
def test_pieces_are_united_or_summed(segmentation):
    union = coco_mask(segmentation, 10, 14).decode()
    np.testing.assert_array_equal(union, LEFT_PIXELS | RIGHT_PIXELS)
    total = coco_piece_sum(segmentation, 10, 14)
    np.testing.assert_array_equal(total, LEFT_PIXELS.astype(np.uint8) + RIGHT_PIXELS)
    assert total.dtype == np.uint8


@pytest.mark.parametrize("compressed", [True, False])
def test_bare_rle_is_one_piece(compressed):
    segmentation = rle(LEFT_PIXELS, compressed)
    np.testing.assert_array_equal(coco_mask(segmentation, 10, 14).decode(), LEFT_PIXELS)
    np.testing.assert_array_equal(coco_piece_sum(segmentation, 10, 14), LEFT_PIXELS)


def test_no_pieces_are_an_empty_mask():
    assert coco_mask([], 10, 14).planes == ()
    assert coco_piece_sum([], 10, 14).tolist() == [[0] * 14] * 10


def test_polygon_without_pixels_is_an_empty_mask():
    assert coco_mask([[3, 3, 3, 3, 3, 3]], 10, 14).planes == ()


def test_polygon_is_clipped_to_the_picture():
    mask = coco_mask([[-5, -5, 400, -5, 400, 4, -5, 4]], 10, 14).decode()
    expected = np.zeros((10, 14), np.uint8)
    expected[:4] = 1
    np.testing.assert_array_equal(mask, expected)


@pytest.mark.parametrize(
    ("segmentation", "message"),
    [
        ([[20, 1, 30, 1, 30, 5]], "outside its picture of 10x14"),
        ([[1, -9, 5, -9, 5, -2]], "outside its picture of 10x14"),
        ([[1, 1, 5, float("nan"), 5, 5]], "not a finite number"),
        ([[1, 1, 5, float("inf"), 5, 5]], "not a finite number"),
        ([[1, 1, 5, 10**400, 5, 5]], "not a finite number"),
        ([[1, 1, 1e12, 1, 5, 5]], "absurdly long"),
        ([[1, 1, 5, 5]], "at least 6"),
        ([[1, 1, 5, 5, 7, 7, 9]], "even number"),
        ([[1, 1, 5, "5", 7, 7]], "flat list of numbers"),
        ([[[1, 1], [5, 5], [7, 7]]], "flat list of numbers"),
        ([[1, 1, True, 5, 7, 7]], "flat list of numbers"),
        ([1, 1, 5, 5, 7, 7], "flat list of numbers"),
        ([np.zeros((3, 2))], r"\[3, 2\]"),
        ("polygon", "list of polygons"),
        (None, "list of polygons"),
        (rle(LEFT_PIXELS.T), "14x10 pixels .* does not fit its picture of 10x14"),
        ({"size": [10, 14], "counts": [140, 1]}, "impossible run|cover"),
        ({"counts": "abc"}, "'size' and 'counts'"),
    ],
)
@pytest.mark.parametrize("rasterise", [coco_mask, coco_piece_sum])
def test_malformed_segmentation_is_refused(rasterise, segmentation, message):
    with pytest.raises(MaskError, match=message):
        rasterise(segmentation, 10, 14)
