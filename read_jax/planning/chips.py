"""What accelerators can do, from their data sheets, and descriptions of machines that are not at hand."""

from __future__ import annotations

import dataclasses
import functools
import math
import os
import re
from collections.abc import Sequence
from typing import Any

from read_jax.errors import ConfigError
from read_jax.planning.gpus import gpu_devices, target
from read_jax.planning.libtpu import ALONE

GIB = 2**30

JAX_TAKES = 0.75
"""Of a GPU's memory, unless XLA_PYTHON_CLIENT_MEM_FRACTION says otherwise."""


@dataclasses.dataclass(frozen=True)
class Chip:
    """One device.

    Attributes:
        name: as in a topology.
        kind: as JAX calls it.
        memory: bytes that programs may use.
        flops: bfloat16 operations per second, dense.
        bandwidth: bytes per second of its memory.
        link: bytes per second that leave it towards its neighbours, over all links together.
        network: bytes per second that leave it towards other slices or nodes, its share of a host's cards.
        generation: of a GPU, the major number of its compute capability; None: a TPU.
    """

    name: str
    kind: str
    memory: float
    flops: float
    bandwidth: float
    link: float
    network: float
    generation: int | None = None


CHIPS = {
    chip.name: chip
    for chip in (
        # memory: what the compiler grants of 32, 16, 95 and 32 GB
        # network, from Google's pages on each kind: v5e 2 x 100 Gbit/s for 8 chips (6.4 Tbit/s for 256); v5p
        # 50 Gbit/s per chip; v6e 4 x 200 Gbit/s for 8 (25.6 Tbit/s for 256). That on v4 names none: one card
        # of 100 Gbit/s for the 4 chips of a host is assumed, which is on the safe side
        Chip("v4", "TPU v4", 30.75 * GIB, 275e12, 1228e9, 270e9, 3.125e9),
        Chip("v5e", "TPU v5 lite", 15.75 * GIB, 197e12, 819e9, 180e9, 3.125e9),
        Chip("v5p", "TPU v5", 95.74 * GIB, 459e12, 2765e9, 540e9, 6.25e9),
        Chip("v6e", "TPU v6 lite", 31.25 * GIB, 918e12, 1640e9, 360e9, 12.5e9),
        # link: NVLink; network: NVIDIA's DGX data sheets, 8 cards of 200 Gbit/s (A100) or 400 for 8 GPUs
        Chip("a100", "NVIDIA A100-SXM4-80GB", JAX_TAKES * 79.2 * GIB, 312e12, 2039e9, 300e9, 25e9, 8),
        Chip("h100", "NVIDIA H100 80GB HBM3", JAX_TAKES * 79.1 * GIB, 989e12, 3352e9, 450e9, 50e9, 9),
        Chip("h200", "NVIDIA H200", JAX_TAKES * 139.8 * GIB, 989e12, 4800e9, 450e9, 50e9, 9),
    )
}
"""By name in a topology."""

_TOPOLOGY = re.compile(r"(?P<chip>\w+):(?P<shape>\d+(?:x\d+)*)")
_SIDES = re.compile(r"[1-9][0-9]*(?:x[1-9][0-9]*){1,2}")  # of a side of 0 the compiler dies, Python with it


def parse_topology(text: str) -> tuple[Chip, str]:
    """(chip, shape) of a text such as "v5e:4x4", or "h100:8"; raises `ConfigError`."""
    match = _TOPOLOGY.fullmatch(text)
    if not match or match["chip"] not in CHIPS:
        known = ", ".join(CHIPS)
        raise ConfigError(
            f"no topology {text!r}: write CHIP:SHAPE, for example v5e:4x4, v5p:2x2x4 or h100:8, with a chip "
            f"of: {known}."
        )
    chip = CHIPS[match["chip"]]
    if chip.generation and (not match["shape"].isdecimal() or int(match["shape"]) not in range(1, 17)):
        raise ConfigError(
            f"no topology {text!r}: of GPUs write how many a node has, for example {chip.name}:8, and by "
            "slices how many nodes."
        )
    if not chip.generation and not _SIDES.fullmatch(match["shape"]):
        raise ConfigError(f"no topology {text!r}: of TPUs write two or three sides, for example v5e:4x4.")
    return chip, match["shape"]


def group_topology(text: str, devices: int) -> str:
    """So many neighbouring chips of one host of a machine, as a topology of their own.

    Raises `ConfigError` when a host has fewer, or the compiler knows no such machine.
    """
    chip, shape = parse_topology(text)
    sides = [int(side) for side in shape.split("x")]
    if chip.generation:
        if devices > sides[0]:
            raise ConfigError(f"a model is shared by GPUs of one node: {text} has {sides[0]}, not {devices}.")
        return f"{chip.name}:{devices}"
    flat = len(sides) == 2
    hosts = {1: (1, 1, 1), 2: (2, 1, 1), 4: (2, 2, 1)} | ({8: (2, 4, 1)} if sides == [2, 4] else {})
    known = {size: chips for size, chips in hosts.items() if size <= math.prod(sides)}
    topology_devices(text)  # raises: a machine that there is not has no group either
    chips = known.get(devices)
    if chips is None:
        known_sizes = ", ".join(map(str, known))
        raise ConfigError(
            f"a model is shared by chips of one host: on {text} by {known_sizes}, not {devices} of them."
        )
    return f"{chip.name}:" + "x".join(map(str, chips[:2] if flat else chips))


@functools.lru_cache
def topology_devices(text: str, slices: int = 1) -> Sequence[Any]:
    """Devices of a machine that is not there, for the compiler alone.

    Args:
        text: such as "v5e:4x4", of one slice; or "h100:8", of one node.
        slices: how many of these.

    Raises `ConfigError` when the text is wrong, the compiler knows no such machine, or is not installed.
    """
    from jax.experimental import topologies

    chip, shape = parse_topology(text)
    if chip.generation:
        description = target(chip.kind, chip.generation, chip.memory / JAX_TAKES, chip.bandwidth)
        return gpu_devices(description, slices, int(shape))
    for name, value in ALONE.items():
        os.environ.setdefault(name, value)
    options: dict[str, Any] = {"num_slices": slices} if slices > 1 else {}
    if chip.name == "v4":
        options["chip_config_name"] = "megacore"  # both cores of a chip are one device
    try:
        found = topologies.get_topology_desc(f"{chip.name}:{shape}", platform="tpu", **options)
    except RuntimeError as error:
        if "not installed" in str(error):
            raise ConfigError(
                "the TPU compiler is not installed. It needs no TPU: pip install 'read-jax[plan]'"
            ) from error
        line = str(error).strip().splitlines()[0]
        raise ConfigError(f"the compiler knows no topology {text!r}: {line}") from error
    return found.devices
