"""Shared fixtures, what a run's processes share, and how long a test may take.

Property tests try the same cases in every run; `pytest --hypothesis-profile=default` tries new ones.
Set READ_JAX_GOLDENS and READ_JAX_FIXTURES to the folders of the big reference data to run those checks. What
is compiled is kept for the run, in a temporary folder; JAX_COMPILATION_CACHE_DIR names one that stays.
"""

from __future__ import annotations

import os
import shutil
import tempfile
from collections.abc import Iterator
from pathlib import Path

import pytest
from hypothesis import settings

settings.register_profile("repeatable", derandomize=True, deadline=None)
settings.load_profile("repeatable")

HOURS = 2 * 3600
"""Seconds that a slow test may take."""
LONGEST = {"test_resume", "test_goldens", "test_meshes", "test_step", "test_processes", "test_tiny_model"}
"""Files that take minutes: begun last, one of them would keep one process busy while the others wait."""
CACHE = "JAX_COMPILATION_CACHE_DIR"
_made: list[str] = []


def pytest_configure(config: pytest.Config) -> None:
    """One folder of compiled programs for all processes of a run: workers and children inherit its name.

    How often something is compiled is still seen: a function counts its programs, wherever they come from.
    """
    if CACHE not in os.environ:
        _made.append(tempfile.mkdtemp(prefix="read-jax-compiled-"))
        os.environ[CACHE] = _made[0]  # before anything imports jax
        os.environ.setdefault("JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS", "0")
        os.environ.setdefault("JAX_PERSISTENT_CACHE_MIN_ENTRY_SIZE_BYTES", "-1")


def pytest_unconfigure(config: pytest.Config) -> None:
    """The run that made the folder removes it."""
    while _made:
        shutil.rmtree(_made.pop(), ignore_errors=True)


@pytest.hookimpl(optionalhook=True)
def pytest_xdist_make_scheduler(config: pytest.Config) -> None:
    """Files are handed out in the order below: xdist would begin with the most tests, not the longest."""
    config.option.loadscopereorder = False


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Slow tests have hours, the others what pyproject.toml says; the longest files come first."""
    items.sort(key=lambda item: (item.path.stem not in LONGEST, "training" not in item.path.parts))
    for item in items:
        if item.get_closest_marker("slow") and not item.get_closest_marker("timeout"):
            item.add_marker(pytest.mark.timeout(HOURS))


@pytest.fixture(scope="module")
def compiled_quickly() -> Iterator[None]:
    """Programs are hardly optimised, children's too: for tests that take longer to compile than to run."""
    import jax

    name = "jax_disable_most_optimizations"
    before = jax.config.values[name]
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv(name.upper(), "1")
        jax.config.update(name, True)
        yield
        jax.config.update(name, before)


@pytest.fixture(scope="session")
def compiler() -> None:
    """The TPU's, which needs no TPU; a test that asks for it is skipped, plainly, without it."""
    pytest.importorskip("libtpu", reason="the TPU compiler is not installed: pip install libtpu")


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
