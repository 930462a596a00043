"""Shared fixtures. Set READ_JAX_GOLDENS to the folder of the big reference data to run those checks."""

from __future__ import annotations

import os
from pathlib import Path

import pytest

TESTS = Path(__file__).resolve().parent


def goldens_dir() -> Path | None:
    """The folder of the original's own numbers (tiny-a/, unit/, manifests/), or None when absent."""
    candidates = [os.environ.get("READ_JAX_GOLDENS"), TESTS.parent.parent / "shared" / "goldens"]
    return next((Path(c) for c in candidates if c and Path(c, "README.md").is_file()), None)


@pytest.fixture(scope="session")
def goldens() -> Path:
    """Path of the big reference data; a test that asks for it is skipped, plainly, when it is absent."""
    path = goldens_dir()
    if path is None:
        pytest.skip("reference data absent: set READ_JAX_GOLDENS to the folder that holds tiny-a/ and unit/")
    return path
