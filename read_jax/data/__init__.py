"""Datasets: readers, prompts, mixtures, the input pipeline, drawn scenes.

load_source      every dataset by its name
Item, Query      what a source gives: a picture with all its questions
"""

from read_jax.data.item import Compat, Item, Query, Source
from read_jax.data.sources import load_source

__all__ = ["Compat", "Item", "Query", "Source", "load_source"]
