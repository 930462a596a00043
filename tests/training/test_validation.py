"""What the current parameters are scored at, with points and without."""

from __future__ import annotations

import dataclasses

import pytest
from flax import nnx

from read_jax.config import SaspConfig
from read_jax.data.packing import Packer
from read_jax.data.sources import load_source
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
