"""Pictures for people: what is coloured, and where."""

from __future__ import annotations

import numpy as np
import pytest

from read_jax.errors import ImageError
from read_jax.images.drawing import (
    IGNORED_COLOUR,
    POINT_COLOURS,
    TARGET_COLOUR,
    colourise,
    draw_comparison,
    draw_overlay,
    draw_similarity,
    heat_map,
)

GREY = np.full((60, 90, 3), 128, np.uint8)


def test_overlay_changes_the_masked_pixels_only():
    mask = np.zeros((1, 60, 90), bool)
    mask[0, 10:40, 20:70] = True
    before = GREY.copy()
    out = draw_overlay(GREY, mask)
    assert (out[~mask[0]] == 128).all() and (out[mask[0]] != 128).any(axis=-1).all()
    assert (before == GREY).all()


def test_overlay_has_a_contour():
    mask = np.zeros((60, 90), bool)
    mask[10:40, 20:70] = True
    out = draw_overlay(GREY, mask).astype(int)
    assert np.abs(out[10, 45] - out[25, 45]).max() > 40


def test_overlapping_masks_have_different_colours():
    out = draw_overlay(GREY, np.ones((2, 60, 90), bool)).astype(int)
    one = draw_overlay(GREY, np.ones((1, 60, 90), bool)).astype(int)
    assert np.abs(out[30, 45] - one[30, 45]).max() > 30


@pytest.mark.parametrize("masks", [np.zeros((0, 60, 90), bool), [], np.zeros((2, 60, 90), bool)])
def test_nothing_to_show_leaves_the_picture(masks):
    np.testing.assert_array_equal(draw_overlay(GREY, masks), GREY)


def test_masks_of_another_size_are_refused():
    with pytest.raises(ImageError, match="differ"):
        draw_overlay(GREY, np.zeros((1, 90, 60), bool))


@pytest.mark.parametrize("shape", [(60, 90, 3), (90, 60, 3), (60, 60, 3), (1, 1, 3), (61, 90, 3)])
def test_similarity_is_grey_outside_the_central_square(shape):
    out = draw_similarity(np.full(shape, 128, np.uint8), np.arange(576.0))
    assert out.shape == shape and out.dtype == np.uint8
    height, width = shape[:2]
    side = min(height, width)
    top, left = (height - side) // 2, (width - side) // 2
    outside = np.ones((height, width), bool)
    outside[top : top + side, left : left + side] = False
    assert (np.ptp(out[outside].astype(int), axis=-1) == 0).all()
    assert np.ptp(out[~outside].astype(int), axis=-1).max() > 20


def test_the_hottest_cell_is_drawn_at_its_place():
    similarity = np.zeros((24, 24))
    similarity[5, 20] = 1.0
    out = draw_similarity(np.zeros((240, 480, 3), np.uint8), similarity.ravel()).astype(int).sum(axis=-1)
    out[200:] = 0  # the legend
    y, x = np.unravel_index(out.argmax(), out.shape)
    assert abs(x - (120 + 205)) <= 6 and abs(y - 55) <= 6


@pytest.mark.parametrize("label", POINT_COLOURS)
def test_points_are_drawn_in_the_colour_of_their_label(label):
    out = draw_similarity(GREY, np.zeros(4), np.array([[40.0, 30.0]]), np.array([label]))
    assert tuple(out[30, 40]) == POINT_COLOURS[label]


def test_points_beyond_the_border_are_harmless():
    points = np.array([[-50.0, 3.0], [89.0, 59.0], [1e6, 1e6]])
    assert draw_similarity(GREY, np.zeros(4), points, np.ones(3)).shape == GREY.shape


@pytest.mark.parametrize("nothing", [(None, None), ([], []), (np.zeros((0, 2)), np.zeros(0))])
def test_points_may_be_absent(nothing):
    heat = np.arange(9.0)
    np.testing.assert_array_equal(draw_similarity(GREY, heat, *nothing), draw_similarity(GREY, heat))


def test_large_pictures_get_a_legend():
    out = draw_similarity(
        np.full((300, 400, 3), 200, np.uint8), np.zeros(4), np.array([[9.0, 9.0]]), np.array([0])
    )
    assert (out[-4, 2] == 25).all()


@pytest.mark.parametrize(
    ("similarity", "points", "labels", "message"),
    [
        (np.zeros(575), None, None, "square grid"),
        (np.zeros(0), None, None, "square grid"),
        (np.full(4, np.nan), None, None, "NaN"),
        (np.zeros(4), np.zeros((2, 2)), np.zeros(3), "2 points and 3 labels"),
        (np.zeros(4), np.zeros((1, 2)), np.array([7]), "labels"),
        (np.zeros(4), np.full((1, 2), np.nan), np.array([1]), "fit together"),
    ],
)
def test_arrays_that_do_not_fit_are_refused(similarity, points, labels, message):
    with pytest.raises(ImageError, match=message):
        draw_similarity(GREY, similarity, points, labels)


def test_a_constant_map_is_cold_and_finite():
    assert (heat_map(np.full(16, 3.5)) == 0).all()


def test_the_colour_map_gets_steadily_brighter():
    brightness = colourise(np.linspace(0, 1, 200)) @ np.array([0.299, 0.587, 0.114])
    assert (np.diff(brightness) > 0).all() and brightness[-1] - brightness[0] > 180


def test_comparison_outlines_the_target_and_fills_the_prediction():
    prediction, target = np.zeros((60, 90), bool), np.zeros((60, 90), np.uint8)
    prediction[20:40, 50:80] = True
    target[10:30, 10:40] = 1
    target[45:55, 10:40] = 255
    out = draw_comparison(GREY, prediction, target)
    assert tuple(out[9, 25]) == TARGET_COLOUR and tuple(out[44, 25]) == IGNORED_COLOUR
    assert (out[12:28, 12:38] == 128).all() and (out[47:53, 12:38] == 128).all()
    assert (out[prediction] != 128).any(axis=-1).all()


def test_comparison_closes_the_outline_along_the_pictures_edge():
    out = draw_comparison(GREY, np.zeros((60, 90), bool), np.ones((60, 90), np.uint8))
    assert all(tuple(out[y, x]) == TARGET_COLOUR for y, x in ((0, 45), (59, 45), (30, 0), (30, 89)))
    assert (out[5:-5, 5:-5] == 128).all()


def test_comparison_refuses_a_target_of_another_size():
    with pytest.raises(ImageError, match="sizes differ"):
        draw_comparison(GREY, np.zeros((60, 90), bool), np.zeros((60, 91), np.uint8))
