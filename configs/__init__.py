"""Recipes: one file per published number. `read-jax train --config NAME`, NAME a file's name here."""
