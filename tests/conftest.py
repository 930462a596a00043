"""Shared fixtures. Set READ_JAX_GOLDENS and READ_JAX_FIXTURES to the folders of the big reference data to run
those checks."""

from __future__ import annotations

import os
from pathlib import Path

import pytest


@pytest.fixture(scope="session")
def goldens() -> Path:
    """The folder of the original's own numbers; a test that asks for it is skipped, plainly, without it."""
    path = Path(os.environ.get("READ_JAX_GOLDENS", ""))
    if not (path / "tiny-a").is_dir():
        pytest.skip("reference data absent: set READ_JAX_GOLDENS to the folder that holds tiny-a/ and unit/")
    return path.resolve()


@pytest.fixture(scope="session")
def fixtures() -> Path:
    """Small copies of the datasets, what the original's loaders give on them; skipped, plainly, without."""
    path = Path(os.environ.get("READ_JAX_FIXTURES", ""))
    if not (path / "golden_dev").is_dir():
        pytest.skip(
            "reference data absent: set READ_JAX_FIXTURES to the folder that holds dataset/ and golden_dev/"
        )
    return path.resolve()
