"""What the compiler says of a program: the memory it needs, or that it does not fit."""

from __future__ import annotations

import dataclasses
import re
from collections.abc import Mapping
from typing import Any

import jax

from read_jax.errors import ReadJaxError
from read_jax.planning.chips import GIB, Chip
from read_jax.planning.gpus import COMPILER_OPTIONS
from read_jax.planning.hlo import Traffic, collectives

_USED = re.compile(
    r"Used ([\d.]+)([KMG]) of [\d.]+[KMG] hbm|required for HLO temporaries \(([\d.]+)([KMG])\) exceeds",
    re.IGNORECASE,
)
_UNITS = {"K": 2**10, "M": 2**20, "G": GIB}


@dataclasses.dataclass(frozen=True)
class Memory:
    """Bytes on one device, as the compiler has it.

    arguments: parameters, moments and batch; temporaries: of the step; code: the program; peak: the most
    that is held at once. All but peak are None when the compiler refuses the program, which does not fit.
    """

    arguments: float | None
    temporaries: float | None
    code: float | None
    peak: float

    def fits(self, chip: Chip) -> bool:
        """Whether the compiler made the program, and its peak is within what programs may use."""
        return self.arguments is not None and self.peak <= chip.memory


def compile_lowered(lowered: jax.stages.Lowered, chip: Chip) -> tuple[jax.stages.Compiled | None, Memory]:
    """The program, None if it does not fit, and its memory; raises `ReadJaxError` when compiling fails
    otherwise."""
    try:
        compiled = lowered.compile(compiler_options=COMPILER_OPTIONS if chip.generation else None)
    except jax.errors.JaxRuntimeError as error:
        return None, Memory(None, None, None, _wanted(error))
    return compiled, memory_of(compiled)


def traffic_of(
    compiled: jax.stages.Compiled, devices: int, open_rounds: int = 1
) -> Mapping[str, Traffic] | None:
    """`collectives` of a program for so many devices; None where this JAX cannot read the compiler's text.

    libtpu may be newer than what JAX prints programs with, and know operations that it does not.
    """
    if devices == 1:
        return {}
    try:
        text = compiled.as_text() or ""
    except jax.errors.JaxRuntimeError:
        return None
    return collectives(text, open_rounds)


def link_seconds(traffic: Mapping[str, Traffic] | None, chip: Chip) -> dict[str, float]:
    """{"links": seconds that sending takes at least}; nothing where it is not known what is sent."""
    if traffic is None:
        return {}
    return {"links": sum(kind.bytes for kind in traffic.values()) / chip.link}


def serialize_compiled(compiled: jax.stages.Compiled) -> bytes:
    """The executable, for the machine that it was compiled for to load."""
    executable: Any = compiled.runtime_executable()
    return executable.serialize()


def memory_of(compiled: Any) -> Memory:
    """What a compiled program takes on each device."""
    found = compiled.memory_analysis()
    return Memory(
        found.argument_size_in_bytes,
        found.temp_size_in_bytes,
        found.generated_code_size_in_bytes,
        max(
            found.peak_memory_in_bytes,
            # what leaves does so in the arguments' place, as far as it is the same
            found.argument_size_in_bytes
            + found.output_size_in_bytes
            - found.alias_size_in_bytes
            + found.temp_size_in_bytes,
        ),
    )


def _wanted(error: Exception) -> float:
    """Bytes that a program would have needed which the compiler refused; raises what is no such refusal."""
    match = _USED.search(str(error))
    if "RESOURCE_EXHAUSTED" not in str(error) or not match:
        line = str(error).strip().splitlines()[0]
        raise ReadJaxError(f"the compiler failed: {line}") from error
    number, unit = (part for part in match.groups() if part)
    return float(number) * _UNITS[unit.upper()]
