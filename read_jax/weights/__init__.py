"""PyTorch checkpoints in and out, and the model folder between: nothing else sees a PyTorch name.

`convert` and `export` are the two directions; `load_config`, `load_params` and `inspect` read the
model folder that lies between them.
"""

from read_jax.weights.checkpoint import ModelInfo, ModelRecord, inspect, load_config, load_params, load_record
from read_jax.weights.convert import ConversionSummary, convert
from read_jax.weights.export import ExportSummary, export

__all__ = [
    "ConversionSummary",
    "ExportSummary",
    "ModelInfo",
    "ModelRecord",
    "convert",
    "export",
    "inspect",
    "load_config",
    "load_params",
    "load_record",
]
