"""The two preprocessings: sizes, places, exactness of the short cut, transformers' own processor."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image

from read_jax.errors import ImageError
from read_jax.images import preprocess
from read_jax.images.preprocess import clip_crop, normalize_clip, normalize_sam, sam_resize


def noise(height: int, width: int, seed: int = 0) -> np.ndarray:
    return np.random.default_rng(seed).integers(0, 256, (height, width, 3), np.uint8)


@given(st.integers(1, 90), st.integers(1, 90), st.integers(1, 40))
@settings(max_examples=60, deadline=None)
def test_crop_is_always_the_full_square(height, width, size):
    crop = clip_crop(noise(height, width), size)
    assert crop.shape == (size, size, 3) and crop.dtype == np.uint8


def both_routes(image: np.ndarray, size: int) -> tuple[np.ndarray, np.ndarray]:
    """The crop by way of the whole resized picture, and computed directly."""
    whole = clip_crop(image, size)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(preprocess, "_MAX_RESIZED", 0)
        return whole, clip_crop(image, size)


@given(st.integers(1, 60), st.integers(1, 300), st.booleans(), st.integers(2, 64))
@settings(max_examples=80, deadline=None)
def test_direct_crop_equals_resize_then_crop(short, long, tall, size):
    image = noise(long, short) if tall else noise(short, long)
    np.testing.assert_array_equal(*both_routes(image, size))


@pytest.mark.parametrize("shape", [(40, 2400), (2400, 40), (335, 1999), (1999, 335), (3, 60), (100, 7001)])
def test_direct_crop_equals_resize_then_crop_at_full_size(shape):
    np.testing.assert_array_equal(*both_routes(noise(*shape), 336))


@pytest.mark.parametrize("shape", [(10, 30_000), (30_000, 10), (1, 500_000)])
def test_extremely_long_pictures_are_never_resized_whole(shape, monkeypatch):
    monkeypatch.setattr(Image.Image, "resize", lambda *a, **k: pytest.fail("the whole picture was resized"))
    assert clip_crop(noise(*shape)).shape == (336, 336, 3)


def test_extremely_long_picture_shows_its_centre():
    image = np.zeros((10, 30_000, 3), np.uint8)
    image[:, 15_000:] = 200
    crop = clip_crop(image)
    assert (crop[:, :120] == 0).all() and (crop[:, -120:] == 200).all()


def test_crop_is_the_centre_of_a_wide_picture():
    image = np.zeros((336, 900, 3), np.uint8)
    image[:, 282 : 282 + 336] = 77
    assert (clip_crop(image) == 77).all()


def test_square_of_the_right_size_is_unchanged():
    image = noise(336, 336)
    np.testing.assert_array_equal(clip_crop(image), image)


@given(st.integers(1, 120), st.integers(1, 120))
@settings(max_examples=50, deadline=None)
def test_sam_picture_lies_at_the_top_left_of_zeros(height, width):
    padded, (h, w) = sam_resize(np.full((height, width, 3), 9, np.uint8), 64)
    assert padded.shape == (64, 64, 3) and max(h, w) == 64
    assert (padded[:h, :w] == 9).all() and padded.sum() == 9 * 3 * h * w


def test_extremely_thin_pictures_keep_one_sam_pixel():
    assert sam_resize(noise(1, 30_000))[1] == (1, 1024)


def test_normalised_sam_padding_is_zero():
    out = normalize_sam(np.full((8, 8, 3), 124, np.uint8), 5, 3)
    assert (out[5:] == 0).all() and (out[:, 3:] == 0).all()
    np.testing.assert_allclose(out[0, 0, 0], (124 - 123.675) / 58.395, rtol=1e-4)


def test_results_are_writable():
    assert clip_crop(noise(20, 30), 10).flags.writeable and sam_resize(noise(20, 30), 16)[0].flags.writeable


@pytest.mark.parametrize(
    "bad", [np.zeros((4, 4), np.uint8), np.zeros((4, 4, 3)), None, np.zeros((0, 4, 3), np.uint8)]
)
@pytest.mark.parametrize("function", [clip_crop, sam_resize])
def test_other_arrays_are_refused(function, bad):
    with pytest.raises(ImageError):
        function(bad)


@pytest.mark.parametrize(
    "shape", [(100, 150), (337, 1000), (20, 333), (336, 336), (500, 300), (801, 799), (40, 30)]
)
def test_transformers_processor_gives_the_same_pixels(shape):
    module = pytest.importorskip("transformers.models.clip.image_processing_pil_clip")
    processor = module.CLIPImageProcessorPil(
        size={"shortest_edge": 336}, crop_size={"height": 336, "width": 336}
    )
    image = noise(*shape)
    theirs = processor(image, return_tensors="np")["pixel_values"][0].transpose(1, 2, 0)
    np.testing.assert_allclose(normalize_clip(clip_crop(image)), theirs, atol=1e-5)
