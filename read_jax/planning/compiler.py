"""What the compiler says of a program: the memory it needs, or that it does not fit."""

from __future__ import annotations

import dataclasses
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import jax

from read_jax.errors import ReadJaxError
from read_jax.planning.chips import GIB, Chip
from read_jax.planning.gpus import COMPILER_OPTIONS
from read_jax.planning.hlo import BETWEEN_SLICES, Traffic, UnknownTraffic, collectives

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


def compile_lowered(
    lowered: jax.stages.Lowered, chip: Chip, dump: str | None = None
) -> tuple[jax.stages.Compiled | None, Memory]:
    """The program, None if it does not fit, and its memory; raises `ReadJaxError` when compiling fails
    otherwise.

    dump: a folder, into which the TPU compiler then writes the program, for `traffic_of`.
    """
    options: dict[str, Any] | None = COMPILER_OPTIONS if chip.generation else None
    if dump is not None and not chip.generation:
        options = {"xla_dump_to": dump, "xla_dump_hlo_as_text": True}
    try:
        compiled = lowered.compile(compiler_options=options)
    except jax.errors.JaxRuntimeError as error:
        return None, Memory(None, None, None, _wanted(error))
    return compiled, memory_of(compiled)


def traffic_of(
    compiled: jax.stages.Compiled, devices: int, open_rounds: int = 1, dump: str | None = None
) -> Mapping[str, Traffic] | None:
    """`collectives` of a program for so many devices; None where the compiler's text cannot be read.

    libtpu may be newer than what JAX prints programs with, and know operations that it does not: then it is
    read from what the compiler itself has written into the folder `dump`.
    """
    if devices == 1:
        return {}
    try:
        text = compiled.as_text()
    except jax.errors.JaxRuntimeError:
        text = _dumped(dump)
    if not text:
        return None
    try:
        return collectives(text, open_rounds)
    except UnknownTraffic:
        return None


def _dumped(folder: str | None) -> str | None:
    """A program's optimised text; None where the folder has no such text, or those of several programs."""
    found = list(Path(folder).glob("*.after_optimizations.txt")) if folder else []
    return found[0].read_text(encoding="utf-8", errors="replace") if len(found) == 1 else None


def link_seconds(traffic: Mapping[str, Traffic] | None, chip: Chip) -> dict[str, float]:
    """Seconds that sending takes at least: over the "links", and "between slices" where that is told apart;
    nothing where it is not known what is sent."""
    if traffic is None:
        return {}
    near = sum(sent.bytes for kind, sent in traffic.items() if kind != BETWEEN_SLICES)
    far = traffic.get(BETWEEN_SLICES)
    return {"links": near / chip.link} | ({BETWEEN_SLICES: far.bytes / chip.network} if far else {})


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
