"""The table machinery: rows, their transforms, and the ledger that accounts for every tensor.

A `Row` pairs one upstream tensor with one place in our parameter tree and names the re-arrangement
between them; the same row serves import and export. A row is data: no row knows how to read or write.
"""

from __future__ import annotations

import dataclasses
import difflib
import functools
import math
import re
from collections import Counter
from collections.abc import Iterable, Iterator, Mapping, Sequence
from typing import Any

import numpy as np

from read_jax.errors import CheckpointError

# "upstream axes -> our axes". Brackets merge axes into one; 1 is an axis of length one that we drop.
TRANSFORMS: dict[str, str] = {
    "same": "",  # any shape, unchanged
    "linear": "o i -> i o",  # torch.nn.Linear -> nnx.Linear
    "row": "1 c -> c",  # an embedding table of one row -> a vector
    "grid": "1 h w c -> h w c",  # a position embedding without its batch axis
    "patches": "o i h w -> (h w i) o",  # a convolution whose stride is its size -> Linear over patches
    "conv": "o i h w -> h w i o",  # Conv2d -> nnx.Conv
    "transposed_conv": "i o h w -> i h w o",  # ConvTranspose2d whose stride is its size
}


@dataclasses.dataclass(frozen=True)
class Transform:
    """A permutation of axes followed by merging neighbours: `axes` upstream, grouped as `groups`."""

    axes: tuple[int, ...]
    groups: tuple[tuple[int, ...], ...]  # positions among `axes`

    def shape(self, upstream: Sequence[int]) -> tuple[int, ...]:
        """Our shape of a tensor of this upstream shape."""
        moved = [upstream[a] for a in self.axes]
        return tuple(math.prod(moved[i] for i in group) for group in self.groups)

    def forward(self, x: np.ndarray) -> np.ndarray:
        """Upstream's layout to ours (a view wherever no axes are merged)."""
        return x.transpose(self.axes).reshape(self.shape(x.shape))

    def inverse(self, x: np.ndarray, upstream: Sequence[int]) -> np.ndarray:
        """Our layout back to upstream's, of shape `upstream` (a view wherever no axes were merged)."""
        moved = x.reshape([upstream[a] for a in self.axes])
        return moved.transpose(np.argsort(self.axes))


@functools.cache
def transform(name: str, rank: int) -> Transform:
    """The named transform for tensors of this rank."""
    if not TRANSFORMS[name]:
        return Transform(tuple(range(rank)), tuple((i,) for i in range(rank)))
    left, right = (side.strip() for side in TRANSFORMS[name].split("->"))
    names = left.split()
    kept = re.findall(r"[a-z]", right)
    ones = [i for i, axis in enumerate(names) if axis == "1"]
    groups, position = [], len(ones)
    for token in re.findall(r"\([^)]*\)|[a-z]", right):
        width = len(re.findall(r"[a-z]", token))
        groups.append(tuple(range(position, position + width)))
        position += width
    # axes of length one go first; merging them into the first group leaves its length unchanged
    groups[0] = (*range(len(ones)), *groups[0])
    return Transform((*ones, *(names.index(axis) for axis in kept)), tuple(groups))


@dataclasses.dataclass(frozen=True)
class Row:
    """One upstream tensor and its place in our tree.

    key: upstream name. path: dotted path of our leaf. transform: a name in `TRANSFORMS`.
    shape: upstream shape. index, count: when the leaf stacks `count` upstream tensors on a leading
    axis, which of them this is.
    """

    key: str
    path: str
    transform: str
    shape: tuple[int, ...]
    index: int | None = None
    count: int = 1

    @property
    def slice_shape(self) -> tuple[int, ...]:
        """Our shape of this tensor alone, without the stacking axis."""
        return transform(self.transform, len(self.shape)).shape(self.shape)

    def forward(self, x: np.ndarray) -> np.ndarray:
        """Upstream tensor -> our slice."""
        return transform(self.transform, len(self.shape)).forward(x)

    def inverse(self, x: np.ndarray) -> np.ndarray:
        """Our slice -> upstream tensor."""
        return transform(self.transform, len(self.shape)).inverse(x, self.shape)


@dataclasses.dataclass(frozen=True)
class Allowed:
    """Upstream tensors that no leaf needs, by regular expression, and why that is right.

    kept: carried along unchanged, so that an export has them again.
    """

    pattern: str
    reason: str
    kept: bool = False

    def matches(self, key: str) -> bool:
        """Whether this entry covers the upstream tensor of that name."""
        return re.fullmatch(self.pattern, key) is not None


@dataclasses.dataclass(frozen=True)
class Table:
    """The rows of one upstream family, and its allow-list."""

    rows: tuple[Row, ...]
    allowed: tuple[Allowed, ...] = ()


Spec = tuple[str, str, str, tuple[int, ...]]
"""A row to be repeated: (upstream key, our path, transform, upstream shape), names relative to a prefix."""


def expand(key: str, path: str, specs: Iterable[Spec]) -> Iterator[Row]:
    """Rows of one module: each spec's names are appended to the two prefixes."""
    for name, leaf, change, shape in specs:
        yield Row(key + name, path + leaf, change, shape)


def stack(key: str, path: str, members: Sequence[int], specs: Iterable[Spec]) -> Iterator[Row]:
    """Rows of repeated modules stacked on a leading axis: `{i}` in `key` runs over `members`."""
    specs = tuple(specs)
    for index, member in enumerate(members):
        for name, leaf, change, shape in specs:
            yield Row(
                key.format(i=member) + name, path + leaf, change, shape, index=index, count=len(members)
            )


def linear(name: str, ours: str, inputs: int, outputs: int, *, bias: bool = True) -> Iterator[Spec]:
    """A Linear layer: kernel, and its bias unless it has none."""
    yield f"{name}.weight", f"{ours}.kernel", "linear", (outputs, inputs)
    if bias:
        yield f"{name}.bias", f"{ours}.bias", "same", (outputs,)


def layer_norm(name: str, ours: str, width: int) -> Iterator[Spec]:
    """A LayerNorm: scale and bias."""
    yield f"{name}.weight", f"{ours}.scale", "same", (width,)
    yield f"{name}.bias", f"{ours}.bias", "same", (width,)


@dataclasses.dataclass(frozen=True)
class Leaf:
    """One parameter of ours and the rows that fill it, in stacking order."""

    path: str
    shape: tuple[int, ...]
    rows: tuple[Row, ...]


def leaves(table: Table) -> dict[str, Leaf]:
    """Our parameters by path, in the table's order; each is filled exactly once or the table is wrong."""
    by_path: dict[str, list[Row]] = {}
    for row in table.rows:
        by_path.setdefault(row.path, []).append(row)
    twice = [key for key, n in Counter(row.key for row in table.rows).items() if n > 1]
    if twice:
        raise AssertionError(f"tables name these upstream tensors more than once: {twice}")
    result: dict[str, Leaf] = {}
    for path, rows in by_path.items():
        first = rows[0]
        rows.sort(key=lambda row: row.index or 0)
        indices = [row.index for row in rows]
        wanted = [None] if first.index is None else list(range(first.count))
        if indices != wanted or any(row.slice_shape != first.slice_shape for row in rows):
            raise AssertionError(f"tables do not fill {path} exactly once: {indices}")
        lead = () if first.index is None else (first.count,)
        result[path] = Leaf(path, (*lead, *first.slice_shape), tuple(rows))
    return result


@dataclasses.dataclass
class Ledger:
    """Where every upstream tensor goes: used by a row, or allowed to be left out for a reason."""

    used: list[Row]
    allowed: dict[str, Allowed]

    def reasons(self) -> dict[str, int]:
        """How many tensors were left out for each reason."""
        return dict(Counter(entry.reason for entry in self.allowed.values()))


def nearest(key: str, known: Iterable[str]) -> str:
    """A hint naming the known key that looks most like `key`, or nothing when none does."""
    close = difflib.get_close_matches(key, list(known), n=1, cutoff=0.8)
    return f" (did you mean {close[0]!r}?)" if close else ""


def settle(table: Table, found: Mapping[str, Any], where: str) -> Ledger:
    """Account for every tensor of `found` (name -> anything with shape, dtype) against the table.

    Raises `CheckpointError` naming the tensors that are missing, of another shape, not floating point,
    or unknown. Nothing is read from the tensors themselves.
    """
    rows = {row.key: row for row in table.rows}
    missing = [key for key in rows if key not in found]
    ledger = Ledger(used=[], allowed={})
    unknown = []
    for key in found:
        if key in rows:
            ledger.used.append(rows[key])
            continue
        entry = next((entry for entry in table.allowed if entry.matches(key)), None)
        if entry is None:
            unknown.append(key)
        else:
            ledger.allowed[key] = entry
    if missing:
        absent = ", ".join(key + nearest(key, unknown) for key in missing[:3])
        more = f" and {len(missing) - 3} more" if len(missing) > 3 else ""
        raise CheckpointError(
            f"{where}: {len(missing)} tensor(s) missing: {absent}{more}. The checkpoint is "
            "incomplete, or its "
            "config.json describes another model."
        )
    for row in ledger.used:
        tensor = found[row.key]
        if tuple(tensor.shape) != row.shape:
            raise CheckpointError(
                f"{where}: {row.key} has shape {list(tensor.shape)}, expected {list(row.shape)}. The "
                "weights and "
                "config.json do not belong together."
            )
        if not is_floating(tensor.dtype):
            raise CheckpointError(
                f"{where}: {row.key} is {tensor.dtype}, not floating point. Quantized weights cannot be "
                "converted; start from the unquantized checkpoint."
            )
    if unknown:
        named = ", ".join(key + nearest(key, rows) for key in unknown[:3])
        more = f" and {len(unknown) - 3} more" if len(unknown) > 3 else ""
        raise CheckpointError(
            f"{where}: {len(unknown)} tensor(s) of no known use: {named}{more}. Nothing is dropped "
            "silently: this "
            "is not a READ, SESAME, LISA or LLaVA-1.5 layout."
        )
    return ledger


def is_floating(dtype: Any) -> bool:
    """Whether a numpy (or ml_dtypes) dtype is one of the types weights are published in."""
    return str(dtype) in ("float16", "bfloat16", "float32", "float64")
