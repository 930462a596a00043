"""The tiny checkpoint that comes with the code is converted, and answers rightly."""

from __future__ import annotations

from pathlib import Path

import read_jax
from read_jax.weights import convert

DATA = Path(__file__).parent / "data"
TRIANGLE = "What is the blue triangle in this image? Please output segmentation mask."
GUITAR = "Please segment the red guitar in this image."


def test_it_segments_the_triangle_and_refuses_the_guitar(tmp_path):
    convert(DATA / "tiny-read", DATA / "tiny-clip", tmp_path / "model", sasp="7b", dtype="float32")
    segmenter = read_jax.load(tmp_path / "model")
    scene = DATA / "scene.jpg"
    triangle, guitar = segmenter.segment_batch([(scene, TRIANGLE), (scene, GUITAR)])
    assert triangle.text == "Sure, the segmentation result is [SEG] ."
    assert triangle.present
    assert triangle.masks.shape == (1, 321, 481)
    assert triangle.masks[0, 95, 120]  # inside the blue triangle
    assert not triangle.masks[0, 280, 300]  # on the ground
    assert triangle.points.shape == (1, 30, 2)
    assert guitar.text == "Sorry, there is no red guitar in this image."
    assert not guitar.present
    assert guitar.masks.shape == (0, 321, 481)
