"""READ in JAX: reasoning segmentation with LLaVA, SAM, and Similarity as Points.

import read_jax
segmenter = read_jax.load("model_dir")
result = segmenter.segment("photo.jpg", "Where is the dog? Please output segmentation mask.")
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

__version__ = "0.1.0"
__all__ = ["Segmentation", "Segmenter", "load"]

if TYPE_CHECKING:
    from read_jax.inference.segmenter import Segmentation, Segmenter, load


def __getattr__(name: str) -> Any:
    # `import read_jax.config` and `read-jax --help` stay quick: jax loads on first use of the model
    if name in __all__:
        from read_jax.inference import segmenter

        return getattr(segmenter, name)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
