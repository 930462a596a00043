"""Shared fixtures. Set READ_JAX_GOLDENS to the folder of the big reference data to run those checks."""

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
