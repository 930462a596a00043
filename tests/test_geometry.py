"""Coordinate frames: the integers that the original finds in doubles."""

from __future__ import annotations

import dataclasses
import math
from fractions import Fraction

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from read_jax.config import SaspConfig
from read_jax.geometry import (
    ImageGeometry,
    SaspGeometry,
    image_geometry,
    padded_size,
    sam_input_size,
    sasp_geometry,
    stack_geometries,
)

SIZES = st.integers(1, 20000)
CONFIG = SaspConfig.preset("7b")

CROPPED_GRIDS = (321, 346, 355, 365, 367, 376, 383, 535, 559, 588, 591, 607, 613, 614, 618, 625, 637, 642)
"""Short sides (from 321 to 642) whose 12- and 24-cell grids the original crops."""
CROPPED_MAPS = (79, 158, 165, 285, 291, 316, 321, 330, 333, 570, 582, 601, 617, 632, 642)
"""Short sides (up to 642) whose 336-pixel map the original crops."""


@pytest.mark.parametrize("side", [12, 24])
@pytest.mark.parametrize("short", CROPPED_GRIDS)
def test_rounding_crops_a_cell_on_every_side_of_a_square_image(short, side):
    assert padded_size(short, short, side) == (side - 2, side - 2, -1, -1)


@pytest.mark.parametrize("short", CROPPED_GRIDS)
def test_rounding_crops_the_short_side_and_still_pads_the_long_one(short):
    rows, columns, top, left = padded_size(short, 2 * short, 12)
    assert (rows, top) == (10, -1)
    assert columns == 12 + 2 * left
    assert left in (5, 6)


@pytest.mark.parametrize("short", CROPPED_MAPS)
def test_rounding_crops_a_pixel_of_the_full_map(short):
    assert padded_size(short, short, 336) == (334, 334, -1, -1)


@pytest.mark.parametrize(("side", "known"), [(12, CROPPED_GRIDS), (24, CROPPED_GRIDS), (336, CROPPED_MAPS)])
def test_sizes_between_the_known_ones_are_not_cropped(side, known):
    cropped = {s for s in range(known[0], known[-1] + 1) if padded_size(s, s, side)[2] < 0}
    assert cropped == set(known)


@pytest.mark.parametrize(
    ("height", "width", "side", "expected"),
    [
        (480, 640, 12, (12, 16, 0, 2)),
        (640, 480, 24, (32, 24, 4, 0)),
        (427, 640, 12, (12, 16, 0, 2)),  # int(17.98) = 17 columns are wanted, halves of 5 give 16
        (427, 640, 24, (24, 34, 0, 5)),
        (512, 512, 12, (12, 12, 0, 0)),
        (1, 1, 12, (12, 12, 0, 0)),
        (1, 500, 12, (12, 6000, 0, 2994)),
        (30, 3000, 336, (336, 33600, 0, 16632)),
        (100, 101, 12, (12, 12, 0, 0)),
    ],
)
def test_padded_size_truncates_then_halves(height, width, side, expected):
    assert padded_size(height, width, side) == expected


@settings(max_examples=300, deadline=None)
@given(SIZES, SIZES, st.sampled_from([12, 16, 24, 336]))
def test_padding_is_within_a_cell_and_a_half_of_the_images_proportions(height, width, side):
    rows, columns, top, left = padded_size(height, width, side)
    assert (rows, columns) == (side + 2 * top, side + 2 * left)
    short = min(height, width)
    assert min(top, left) in (0, -1)
    assert -3 < rows - height * side / short <= 1e-6
    assert -3 < columns - width * side / short <= 1e-6


@settings(max_examples=300, deadline=None)
@given(SIZES, SIZES, st.sampled_from([64, 512, 1024]))
def test_sam_input_size_is_the_exact_proportion_rounded_half_up(height, width, side):
    for scaled, size in zip(sam_input_size(height, width, side), (height, width), strict=True):
        exact = Fraction(size * side, max(height, width))
        near_half = abs(exact % 1 - Fraction(1, 2)) < Fraction(1, 10**9)  # where doubles may round down
        allowed = {math.floor(exact), math.ceil(exact)} if near_half else {math.floor(exact + Fraction(1, 2))}
        assert scaled in {max(size, 1) for size in allowed}


@settings(max_examples=300, deadline=None)
@given(SIZES, SIZES)
def test_the_longer_side_becomes_1024(height, width):
    scaled = sam_input_size(height, width)
    assert max(scaled) == 1024
    assert min(scaled) >= 1


@pytest.mark.parametrize(
    ("size", "scaled"),
    [
        ((480, 640), (768, 1024)),
        ((1, 1), (1024, 1024)),
        ((1, 3000), (1, 1024)),  # segment-anything rounds this side to no pixel at all
        ((3000, 1), (1024, 1)),
        ((1, 2048), (1, 1024)),
        ((683, 1024), (683, 1024)),
        ((333, 1000), (341, 1024)),
        ((1025, 2048), (513, 1024)),  # 512.5 rounds up
    ],
)
def test_sam_input_size_of_known_sizes(size, scaled):
    assert sam_input_size(*size) == scaled


def test_sasp_geometry_holds_both_frames():
    assert sasp_geometry(480, 640, CONFIG) == SaspGeometry(
        grid_height=12,
        grid_width=16,
        pad_y=0,
        pad_x=2,
        step_y=40.0,
        step_x=40.0,
        map_height=336,
        map_width=448,
        map_pad_y=0,
        map_pad_x=56,
    )


def test_sasp_geometry_follows_down_sample_and_grid_side():
    full = sasp_geometry(480, 640, SaspConfig.preset("13b"))
    assert (full.grid_height, full.grid_width) == (24, 32)
    small = sasp_geometry(480, 640, dataclasses.replace(CONFIG, down_sample=1), side=16)
    assert (small.grid_height, small.grid_width) == (16, 20)  # 21 wanted


@settings(max_examples=100, deadline=None)
@given(SIZES, SIZES)
def test_scales_lead_to_the_sam_frame(height, width):
    g = image_geometry(height, width, CONFIG)
    assert (g.height, g.width) == (height, width)
    assert (g.sam_height, g.sam_width) == sam_input_size(height, width)
    assert g.scale_y == np.float32(g.sam_height / height)
    assert g.scale_x == np.float32(g.sam_width / width)
    assert g.sasp == sasp_geometry(height, width, CONFIG)


def test_scales_are_ratios_of_the_rounded_sizes():
    g = image_geometry(333, 1000, CONFIG)  # 340.99 rows become 341
    assert g.scale_y == np.float32(341 / 333)
    assert g.scale_x == np.float32(1.024)


def test_every_field_is_a_fixed_width_scalar():
    g = image_geometry(427, 640, CONFIG)
    kinds = {type(field) for field in (*g[:-1], *g.sasp)}
    assert kinds == {np.int32, np.float32}


def test_stacking_adds_a_batch_axis_to_every_field():
    sizes = [(480, 640), (321, 321), (1, 500)]
    geometries = [image_geometry(h, w, CONFIG) for h, w in sizes]
    stacked = stack_geometries(geometries)
    assert isinstance(stacked, ImageGeometry)
    assert isinstance(stacked.sasp, SaspGeometry)
    for field in ImageGeometry._fields[:-1]:
        wanted = [getattr(g, field) for g in geometries]
        column = getattr(stacked, field)
        assert column.dtype == wanted[0].dtype
        np.testing.assert_array_equal(column, wanted)
    for field in SaspGeometry._fields:
        wanted = [getattr(g.sasp, field) for g in geometries]
        column = getattr(stacked.sasp, field)
        assert column.dtype == wanted[0].dtype
        np.testing.assert_array_equal(column, wanted)


@pytest.mark.parametrize("size", [(0, 10), (10, 0), (0, 0), (-3, 10)])
def test_an_image_without_pixels_has_no_geometry(size):
    with pytest.raises(ValueError, match=f"{size[0]}x{size[1]} pixels has no geometry"):
        image_geometry(*size, CONFIG)
    with pytest.raises(ValueError, match="has no geometry"):
        sasp_geometry(*size, CONFIG)
