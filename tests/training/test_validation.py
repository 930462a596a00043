"""What the current parameters are scored at, with points and without."""

from __future__ import annotations

import dataclasses

import numpy as np
import pytest
from flax import nnx

from read_jax.config import SaspConfig
from read_jax.data.packing import Packer
from read_jax.data.sources import load_source
from read_jax.errors import DataError
from read_jax.models.read import Read
from read_jax.sharding import MeshConfig, batch_sharding, make_mesh
from read_jax.training.step import split_model
from read_jax.training.validation import Validator
from read_jax.weights.model import load_model
from tests.training.tiny import packer_of, write_model

pytestmark = pytest.mark.usefixtures("compiled_quickly")


@pytest.fixture(scope="module")
def tiny(tmp_path_factory):
    """(model, packer)."""
    folder = write_model(tmp_path_factory.mktemp("tiny"))
    return load_model(folder), packer_of(folder)


@pytest.mark.parametrize("points", [True, False], ids=["points", "no points"])
def test_pictures_are_scored_and_drawn(points, tiny):
    model, packer = tiny
    if not points:
        config = dataclasses.replace(model.config, sasp=SaspConfig(enabled=False))
        plain = Read(config, rngs=nnx.Rngs(0))
        nnx.update(plain, nnx.state(model))
        model, packer = plain, Packer(config, packer.tokenizer, limits=packer.limits)
    graphdef, params, frozen = split_model(model, ("text_projection",))
    source = load_source("scenes|val", None)
    sharding = batch_sharding(make_mesh(MeshConfig()))
    score = Validator(source, packer, graphdef, batch=2, sharding=sharding, limit=3, pictures=2)
    scores, pictures = score(params, frozen)
    score.close()
    wanted = sum(query.exists for i in range(3) for query in source[i].queries)
    assert scores["masks"] == wanted > 0
    assert 0 <= scores["giou"] <= 1 and scores["ce"] > 0
    panels = 2 if points else 1  # beside the answer, the similarity with the points on it
    assert len(pictures) == 2
    for picture in pictures:
        height, width = packer.limits.mask_canvas  # which the pictures fill at least on one side
        rows, columns = picture.pixels.shape[:2]
        assert rows == height or columns == panels * width
        assert rows <= height and (panels - 1) * width < columns <= panels * width


class Damaged:
    """A source of which some pictures cannot be read."""

    def __init__(self, source, *damaged):
        self.name, self.compat, self._source, self._damaged = source.name, source.compat, source, damaged

    def __len__(self):
        return len(self._source)

    def __getitem__(self, index):
        if index in self._damaged:
            raise DataError(f"number {index} is damaged")
        return self._source[index]


def validate(tiny, source, **options):
    model, packer = tiny
    graphdef, params, frozen = split_model(model, ("text_projection",))
    score = Validator(source, packer, graphdef, sharding=batch_sharding(make_mesh(MeshConfig())), **options)
    return score(params, frozen)


def test_scores_and_pictures_are_the_same_however_many_are_taken_at_a_time(tiny):
    source = load_source("scenes|val", None)
    scores, pictures = validate(tiny, source, batch=1, limit=3, pictures=2)
    others, same = validate(tiny, source, batch=2, limit=3, pictures=2)
    assert others == pytest.approx(scores, rel=1e-5)
    assert [picture.name for picture in same] == [picture.name for picture in pictures]
    for picture, wanted in zip(same, pictures, strict=True):
        np.testing.assert_array_equal(picture.pixels, wanted.pixels)


def test_what_cannot_be_used_is_counted_and_too_much_of_it_is_an_error(tiny):
    source = Damaged(load_source("scenes|val", None), 1)
    scores, pictures = validate(tiny, source, batch=2, limit=3, pictures=2, max_bad_share=0.5)
    assert scores["unusable"] == len(pictures) == 1
    with pytest.raises(DataError, match=r"1 of \d pictures could not be used.*number 1 is damaged"):
        validate(tiny, source, batch=2, limit=3, pictures=2)
