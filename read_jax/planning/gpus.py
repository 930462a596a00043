"""GPUs that are not there, for XLA's CUDA compiler alone.

The compiler is a library of JAX's CUDA plugin. Installed among other packages without the rest of CUDA it
would fail, loudly, whenever JAX starts; so it may lie in a folder of its own, which READ_JAX_CUDA names.
"""

from __future__ import annotations

import os
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import jax

from read_jax.errors import ConfigError

FOLDER = "READ_JAX_CUDA"

COMPILER_OPTIONS: dict[str, Any] = {
    # without a GPU nothing can be tried out; cuBLAS then does the products
    "xla_gpu_enable_triton_gemm": False,
    "xla_gpu_autotune_level": 0,
}

# of a multiprocessor and the whole device, from NVIDIA's architecture papers and data sheets
_AMPERE = {
    "shared_memory_per_core": 167936,
    "shared_memory_per_block_optin": 166912,
    "core_count": 108,
    "fpus_per_core": 64,
    "l2_cache_size": 40 << 20,
    "clock_rate_ghz": 1.41,
}
_HOPPER = {
    "shared_memory_per_core": 233472,
    "shared_memory_per_block_optin": 232448,
    "core_count": 132,
    "fpus_per_core": 128,
    "l2_cache_size": 50 << 20,
    "clock_rate_ghz": 1.98,
}
_EVERY = {
    "threads_per_block_limit": 1024,
    "threads_per_warp": 32,
    "threads_per_core_limit": 2048,
    "shared_memory_per_block": 49152,
    "block_dim_limit_x": 2**31 - 1,
    "block_dim_limit_y": 65535,
    "block_dim_limit_z": 65535,
    "registers_per_core_limit": 65536,
    "registers_per_block_limit": 65536,
}
_GENERATIONS = {8: _AMPERE, 9: _HOPPER}


def target(kind: str, generation: int, memory: float, bandwidth: float) -> str:
    """The compiler's description of a GPU, as a protocol buffer's text.

    Args:
        kind: the device's name.
        generation: 8 (Ampere, A100) or 9 (Hopper): the major number of its compute capability.
        memory, bandwidth: bytes, and bytes per second.
    """
    figures = _EVERY | _GENERATIONS[generation]
    figures |= {"device_memory_size": int(memory), "memory_bandwidth": int(bandwidth)}
    lines = [f"  {name}: {value}" for name, value in figures.items()]
    lines.append(f"  cuda_compute_capability {{ major: {generation} }}")
    inside = "\n".join(lines)
    return f'gpu_device_info {{\n{inside}\n}}\nplatform_name: "CUDA"\ndevice_description_str: "{kind}"\n'


def gpu_devices(description: str, nodes: int, each: int) -> Sequence[Any]:
    """Descriptions of `nodes` machines with so many GPUs each; raises `ConfigError` without the compiler."""
    from jax.experimental import topologies

    _register()
    try:
        found = topologies.get_topology_desc(
            "", platform="cuda", target_config=description, topology=f"1x{nodes}x{each}"
        )
    except RuntimeError as error:  # not registered, or it fails
        line = (str(error).strip() or type(error).__name__).splitlines()[0]
        raise ConfigError(
            f"the CUDA compiler is not at hand ({line}). It needs no GPU: pip install --no-deps --target DIR "
            f"jax-cuda13-pjrt=={jax.__version__} nvidia-cuda-nvcc nvidia-nvvm, and set {FOLDER}=DIR."
        ) from error
    return found.devices


def _register() -> None:
    """Makes JAX know the compiler in the folder; raises `ConfigError` if there is none."""
    from jax._src import xla_bridge  # the documented way for plugins, but not among the public modules

    named = os.environ.get(FOLDER)
    if not named or "cuda" in xla_bridge._backend_factories:
        return
    libraries = sorted(Path(named).expanduser().glob("jax_plugins/xla_cuda*/xla_cuda_plugin.so"))
    if not libraries:
        raise ConfigError(f"{FOLDER}={named}: there is no jax_plugins/xla_cuda*/xla_cuda_plugin.so.")
    # a priority below the CPU's: nothing but the compiler is wanted of it
    xla_bridge.register_plugin("cuda", priority=-1, library_path=str(libraries[-1]), options={})
