"""The image room against the original's own pixels."""

from __future__ import annotations

import json

import numpy as np
import pytest

from read_jax.images.decode import read_image
from read_jax.images.preprocess import clip_crop, normalize_clip, normalize_sam, sam_resize

SAMPLES = [f"s{i}" for i in range(9)]


@pytest.mark.parametrize("sample", SAMPLES)
def test_network_inputs(goldens, sample):
    meta = json.loads((goldens / "tiny-a" / "goldens" / "index.json").read_text())["samples"][sample]
    want = np.load(goldens / "tiny-a" / "goldens" / f"{sample}.npz")
    image = read_image(goldens / "tiny-a" / meta["image"])
    assert list(image.shape[:2]) == meta["original_hw"]

    clip = normalize_clip(clip_crop(image)).transpose(2, 0, 1)[:, ::4, ::4]
    np.testing.assert_allclose(clip, want["clip_pixel_values_sub4"], atol=1e-5)
    padded, size = sam_resize(image)
    assert list(size) == meta["sam_input_hw"]
    sam = normalize_sam(padded, *size).transpose(2, 0, 1)[:, ::8, ::8]
    np.testing.assert_allclose(sam, want["sam_input_sub8"], atol=1e-5)


@pytest.fixture(scope="module")
def fixtures(goldens):
    folder = goldens.parent / "fixtures"
    if not (folder / "golden_dev" / "preprocess.npz").is_file():
        pytest.skip("reference data absent: no fixtures/golden_dev beside the goldens")
    return folder


@pytest.mark.parametrize("number", range(8))
def test_loader_pictures(fixtures, number):
    """Eight pictures (EXIF, grey, tiny, long) as the original's loaders decoded and preprocessed them."""
    item = json.loads((fixtures / "golden_dev" / "preprocess.json").read_text())["items"][number]
    want = np.load(fixtures / "golden_dev" / "preprocess.npz")
    image = read_image(fixtures / "dataset" / item["image"])
    np.testing.assert_array_equal(image, want[f"rgb_{number}"])

    clip = normalize_clip(clip_crop(image)).transpose(2, 0, 1)[:, ::8, ::8]
    np.testing.assert_allclose(clip, want[f"clip_{number}"], atol=1e-5)
    padded, (h, w) = sam_resize(image)
    assert [h, w] == item["sam_input_hw"]
    np.testing.assert_array_equal(padded[:h:8, :w:8], want[f"sam_resized_u8_{number}"])
    sam = normalize_sam(padded, h, w).transpose(2, 0, 1)[:, ::8, ::8]
    np.testing.assert_allclose(sam, want[f"sam_{number}"], atol=1e-5)
    small, size = sam_resize(image, 96)
    np.testing.assert_allclose(
        normalize_sam(small, *size).transpose(2, 0, 1), want[f"sam96_{number}"], atol=1e-5
    )


def test_every_picture_has_the_size_the_original_saw(fixtures):
    sizes = json.loads((fixtures / "golden_dev" / "preprocess.json").read_text())["decoded_hw_all"]
    assert len(sizes) > 20
    for name, size in sizes.items():
        assert list(read_image(fixtures / "dataset" / name).shape[:2]) == size
