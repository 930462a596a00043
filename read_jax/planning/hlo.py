"""What a compiled program sends between devices: its collectives, counted as often as their loops run."""

from __future__ import annotations

import collections
import math
import re
from collections.abc import Iterator, Mapping, Sequence
from typing import NamedTuple

COLLECTIVES = ("all-gather", "all-reduce", "reduce-scatter", "all-to-all", "collective-permute")
BETWEEN_SLICES = "between slices"
"""A kind of its own: what chips hand to their hosts, for the network that joins slices of TPUs."""

_BYTES = {"pred": 1, "bf16": 2, "f16": 2, "f32": 4, "f64": 8, "c64": 8}
_HEAD = re.compile(r"^(?:ENTRY )?%?([\w.\-]+) \(.*\{\s*$")
_OPERATION = re.compile(r"^\s+(?:ROOT )?%?([\w.\-]+) = (\(.*?\)|\S+) ([\w\-]+)\((.*)$")
_SHAPE = re.compile(r"\b(pred|bf16|f\d+(?:e\w+)?|[su]\d+|c64)\[([\d,]*)\]")
_BEGUN = re.compile(r"^\s+(?:ROOT )?%?async-collective-start[\w.\-]* = .*calls=%?([\w.\-]+)")
_FUSED = re.compile(r" fusion\(.*calls=%?([\w.\-]+)")
_CALLED = re.compile(r"(?:to_apply|calls|body|condition)=%?([\w.\-]+)|branch_computations=\{([^}]*)\}")
_CHANNEL = re.compile(r"channel_id=(\d+)")
_EVERYBODY = re.compile(r"replica_groups=\{\}")
_LISTED = re.compile(r"replica_groups=\{(\{[\d,]+\}(?:,\{[\d,]+\})*)\}")
_COUNTED = re.compile(r"replica_groups=\[\d+,(\d+)\]<=")
_OF_MESH = re.compile(r"replica_groups=mesh\[([^\]]*)\](?:, device_ids=\(.*?\))? \{([^}]*)\}")
_AXIS = re.compile(r"'?([\w.\-]+)'?=(\d+)")
_TAKEN = re.compile(r"'?([\w.\-]+)'?(?::\(\d+\)(\d+))?")
_SIZES = re.compile(r"\b(?:replica_count|num_partitions)=(\d+)")
_MEGASCALE = re.compile(r' send\(.*_xla_host_transfer_handler_name="xla_megascale_runtime"')
_TRANSFER = re.compile(r'_xla_megascale_transfer_type="(\w+)"')
_SLICES = re.compile(r'_xla_megascale_target="\{([\d,:]+)\}x')
_ENDS = re.compile(r"_xla_megascale_target=\{(\{[\d,]+\}(?:,\{[\d,]+\})*)\}")
_SLICE = 100000  # in a list of ends: a device of slice 2 is 200000 and its number
_TRIPS = re.compile(r'"known_trip_count":\{"n":"(\d+)"\}')
_CONDITION = re.compile(r" while\(.*condition=%?([\w.\-]+), body=%?([\w.\-]+)")
_CONSTANT = re.compile(r"^\s+%?([\w.\-]+) = [su]\d+\[\]\S* constant\((\d+)\)")
_BELOW = re.compile(r"^\s+ROOT .* compare\(%?([\w.\-]+), %?([\w.\-]+)\), direction=LT")
_PART = re.compile(r"^\s+%?([\w.\-]+) = .* get-tuple-element\(.*\), index=(\d+)")
_ADDED = re.compile(r"^\s+%?([\w.\-]+) = [su]\d+\[\]\S* add\(%?([\w.\-]+), %?([\w.\-]+)\)")
_AFTER = re.compile(r"^\s+ROOT .* tuple\((.*?)\)(?:, metadata|, backend_config|$)")


class UnknownTraffic(ValueError):
    """A program's text does not tell, in a way known here, who takes part in what is sent."""


class Traffic(NamedTuple):
    """Of one kind of collective. number: how often it runs; bytes: that one device sends and receives at
    least, in all runs: around a ring, which is what moves the fewest."""

    number: int
    bytes: float


def collectives(text: str, open_rounds: int = 1) -> dict[str, Traffic]:
    """What a program's optimised text (`Compiled.as_text()`) sends between devices, by kind of collective.

    open_rounds: of a loop whose number of rounds the program does not tell.

    Raises `UnknownTraffic` where a collective's groups are not understood: nothing is guessed.
    """
    everybody = _everybody(text)
    computations = dict(_computations(text))
    entry = next(name for name, (is_entry, _) in computations.items() if is_entry)
    bodies = {name: lines for name, (_, lines) in computations.items()}
    times = _times(entry, bodies, open_rounds)
    begun = {match[1] for lines in bodies.values() for match in map(_BEGUN.match, lines) if match}
    fused = {match[1] for lines in bodies.values() for match in map(_FUSED.search, lines) if match}
    found = []  # (whether it is a piece, channel, kind, rounds, bytes)
    for name, lines in bodies.items():
        for line in lines:
            match = _OPERATION.match(line)
            if match and _MEGASCALE.search(line):
                found.append((False, None, BETWEEN_SLICES, times[name], _to_other_slices(match[2], line)))
                continue
            kind = match[3].removesuffix("-start") if match else ""
            if match is None or kind not in COLLECTIVES:
                continue
            size = _result_bytes(match[2], kind, asynchronous=match[3].endswith("-start"))
            if kind != "collective-permute":
                size *= _moved(kind, _members(line, everybody))
            channel = _CHANNEL.search(line)
            piece = name in fused and name not in begun
            found.append((piece, channel and channel[1], kind, times[name], size))
    # one that runs beside other work is written where it begins, and in every piece of that work
    begins = {channel for piece, channel, *_ in found if channel and not piece}
    traffic = {}
    for kind in (*COLLECTIVES, BETWEEN_SLICES):
        own = [
            (rounds, size)
            for piece, channel, of, rounds, size in found
            if of == kind and not (piece and channel in begins)
        ]
        if own:
            traffic[kind] = Traffic(sum(n for n, _ in own), sum(n * size for n, size in own))
    return traffic


def _computations(text: str) -> Iterator[tuple[str, tuple[bool, list[str]]]]:
    """(name, (whether the program begins there, its lines)) of each computation."""
    name, lines, is_entry = "", [], False
    for line in text.splitlines():
        head = _HEAD.match(line)
        if head:
            name, lines, is_entry = head[1], [], line.startswith("ENTRY")
        elif (
            line.rstrip() == "}" and name
        ):  # a kernel's settings go over several lines, some of them "}}, ..."
            yield name, (is_entry, lines)
            name = ""
        elif name:
            lines.append(line)


def _times(entry: str, computations: Mapping[str, list[str]], open_rounds: int) -> collections.Counter[str]:
    """How often each computation runs."""
    times: collections.Counter[str] = collections.Counter()

    def visit(name: str, rounds: int) -> None:
        times[name] += rounds
        for line in computations.get(name, ()):
            called = [
                part.strip().lstrip("%")
                for one, several in _CALLED.findall(line)
                for part in (several.split(",") if several else (one,))
            ]
            inner = rounds * (_rounds(line, computations, open_rounds) if called else 1)
            for other in called:
                visit(other, inner)

    visit(entry, 1)
    return times


def _rounds(line: str, computations: Mapping[str, list[str]], open_rounds: int) -> int:
    """Of the loop in a line, 1 of anything else: as the line says, or as its condition compares."""
    condition = _CONDITION.search(line)
    if not condition:
        return 1
    told = _TRIPS.search(line)
    if told:
        return int(told[1])
    lines = computations.get(condition[1], ())
    below = next((match for match in map(_BELOW.match, lines) if match), None)
    limit = _constants(lines).get(below[2]) if below else None
    if below is None or not limit:
        return open_rounds
    parts = {match[1]: int(match[2]) for match in map(_PART.match, lines) if match}
    return -(-limit // _step(computations.get(condition[2], ()), parts.get(below[1])))


def _step(body: Sequence[str], counter: int | None) -> int:
    """What a loop's body adds to its counter, a place in what it yields: 1 unless it is unrolled."""
    after = next((match for match in map(_AFTER.match, body) if match), None)
    if after is None or counter is None:
        return 1
    names = [name.rpartition("%")[2].rpartition(" ")[2] for name in after[1].split(",")]
    added = {match[1]: (match[2], match[3]) for match in map(_ADDED.match, body) if match}
    constants = _constants(body)
    steps = [constants[name] for name in added.get(names[counter], ()) if name in constants]
    return steps[0] if steps and steps[0] else 1


def _constants(lines: Sequence[str]) -> dict[str, int]:
    return {match[1]: int(match[2]) for match in map(_CONSTANT.match, lines) if match}


def _result_bytes(shapes: str, kind: str, asynchronous: bool) -> float:
    """Bytes of a result, which may be several arrays.

    What begins an asynchronous collective yields its operands, its results, and numbers of its own; only of a
    sum, results alone.
    """
    sizes = [
        math.prod(int(n) for n in dims.split(",") if n) * _item_bytes(item)
        for item, dims in _SHAPE.findall(shapes)
        if not (asynchronous and item == "u32" and not dims)
    ]
    if asynchronous and kind != "all-reduce":
        return sum(sizes[len(sizes) // 2 :])
    return sum(sizes)


def _moved(kind: str, members: int) -> float:
    """Bytes that a device sends, for each byte of its result, with so many devices in a group."""
    if kind == "all-reduce":  # a reduce-scatter, and an all-gather
        return 2 * (members - 1) / members
    if kind == "reduce-scatter":  # the result is a device's part alone
        return members - 1
    return (members - 1) / members


def _members(line: str, everybody: int | None) -> int:
    """Devices of a collective's (largest) group; raises `UnknownTraffic`.

    Groups are written {{0,1},{2,3}}; [groups,members]<=[...]; mesh['a'=2,'b'=4] {'a','b':(1)2}, which is all
    of axis a and two of axis b; or {}: everybody.
    """
    listed, counted, of_mesh = (form.search(line) for form in (_LISTED, _COUNTED, _OF_MESH))
    if listed:
        return max(group.count(",") + 1 for group in listed[1].split("},{"))
    if counted:
        return int(counted[1])
    if of_mesh:
        axes = {name: int(size) for name, size in _AXIS.findall(of_mesh[1])}
        taken = [_TAKEN.fullmatch(axis.strip()) for axis in of_mesh[2].split(",") if axis.strip()]
        sizes = [axis and (int(axis[2]) if axis[2] else axes.get(axis[1])) for axis in taken]
        if None not in sizes:
            return math.prod(size for size in sizes if size)
    if _EVERYBODY.search(line) and everybody:
        return everybody
    raise UnknownTraffic(f"the groups of a collective are not understood: {line.strip()[:300]}")


def _everybody(text: str) -> int | None:
    """Devices that run the program (of one slice, where there are several); None: it does not tell."""
    head = text.partition("\n")[0]
    return math.prod(map(int, _SIZES.findall(head))) if head.startswith("HloModule") else None


def _to_other_slices(shapes: str, line: str) -> float:
    """Bytes that a device sends to other slices at least, by what it hands to its host; raises
    `UnknownTraffic`."""
    transfer, slices = _TRANSFER.search(line), _slices(line)
    # what is handed over, and then a number of its own
    size = sum(
        math.prod(int(n) for n in dims.split(",") if n) * _item_bytes(item)
        for item, dims in _SHAPE.findall(shapes)[:-1]
    )
    moved = {
        "ONE_TO_ONE": 1.0,
        "ALL_GATHER": slices - 1,  # it hands over its part alone
        "ALL_REDUCE": 2 * (slices - 1) / slices,
        "REDUCE_SCATTER": (slices - 1) / slices,
        "ALL_TO_ALL": (slices - 1) / slices,
    }
    if transfer is None or transfer[1] not in moved or (slices < 2 and transfer[1] != "ONE_TO_ONE"):
        raise UnknownTraffic(f"what is sent between slices is not understood: {line.strip()[:600]}")
    return size * moved[transfer[1]]


def _slices(line: str) -> int:
    """Slices that take part in what is sent between them, written "{1,2}x{0:3}" or {{100000,200000},...}; 1:
    it does not tell."""
    slices, ends = _SLICES.search(line), _ENDS.search(line)
    if slices:
        ranges = [part.split(":") for part in slices[1].split(",")]
        return sum(int(part[-1]) - int(part[0]) + 1 for part in ranges)
    groups = ends[1].strip("{}").split("},{") if ends else []
    return max((len({int(end) // _SLICE for end in group.split(",")}) for group in groups), default=1)


def _item_bytes(kind: str) -> float:
    return _BYTES.get(kind) or int(re.sub(r"\D.*", "", kind[1:])) / 8
