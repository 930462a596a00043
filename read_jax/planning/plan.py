"""`make_plan`: compile a run's step for machines that are not there, and say what it will need."""

from __future__ import annotations

import dataclasses
import math
import tempfile
import time
from collections.abc import Mapping, Sequence
from typing import Any

from jax.sharding import Mesh

from read_jax.errors import ConfigError
from read_jax.planning.chips import Chip, parse_topology, topology_devices
from read_jax.planning.compiler import (
    Memory,
    compile_lowered,
    link_seconds,
    serialize_compiled,
    traffic_of,
)
from read_jax.planning.cost import Cost, held, train_cost
from read_jax.planning.hlo import Traffic
from read_jax.planning.programs import Setup, check_mesh, prefix_length, train_program
from read_jax.sharding import MeshConfig, batch_devices, make_mesh

UTILISATIONS = (0.4, 0.6)
"""Shares of the peak that well-made training reaches."""


@dataclasses.dataclass(frozen=True)
class Plan:
    """What a training step needs on a machine.

    Attributes:
        topology, slices, chip, mesh: the machine, and how its devices are arranged.
        pictures, questions, tokens, prefix: of an update; tokens are those of a question with its answer,
            prefix those before all questions about a picture.
        micro_batches, remat: how it is cut, and what is recomputed.
        cost: per device, by our own count.
        memory, traffic: per device, as the compiler has them; traffic is None where that cannot be read.
        seconds: that compiling took.
        serialized: the executable, for the machine itself to load.
    """

    topology: str
    slices: int
    chip: Chip
    mesh: Mapping[str, int]
    pictures: int
    questions: int
    tokens: int
    prefix: int
    micro_batches: int
    remat: bool | str
    cost: Cost
    memory: Memory
    traffic: Mapping[str, Traffic] | None
    seconds: float
    serialized: bytes | None = None

    @property
    def tokens_per_update(self) -> int:
        """Through the language model, as a run's log counts them."""
        return self.pictures * (self.prefix + self.questions * self.tokens)

    @property
    def fits(self) -> bool:
        """Whether the peak is within what the compiler grants."""
        return self.memory.fits(self.chip)

    @property
    def devices(self) -> int:
        return math.prod(self.mesh.values())

    @property
    def times(self) -> dict[str, float]:
        """Seconds that an update takes at least, by what would bound it. The network between slices of TPUs
        is there by itself; that between nodes of GPUs is taken for as fast as the links."""
        return {
            "arithmetic": self.cost.done / self.chip.flops,
            "memory": self.cost.bytes / self.chip.bandwidth,
            **link_seconds(self.traffic, self.chip),
        }

    def to_dict(self) -> dict[str, Any]:
        """Ready for JSON."""
        data = dataclasses.asdict(self) | {"fits": self.fits, "devices": self.devices, "times": self.times}
        data["cost"] = self.cost._asdict()
        if self.traffic is not None:
            data["traffic"] = {kind: traffic._asdict() for kind, traffic in self.traffic.items()}
        del data["serialized"]
        return data


def make_plan(
    setup: Setup, topology: str, mesh: MeshConfig | None = None, *, serialize: bool = False
) -> Plan:
    """Compile the step of a run for a topology.

    Args:
        setup: of `set_up`.
        topology: such as "v5e:4x4", of one slice, or "h100:8", of one node.
        mesh: None: the run's own.
        serialize: keep the executable. The compiler then does not write the program down too, since it would
            keep the folder's name in the executable: what JAX cannot read of it is not known.

    Raises:
        ConfigError: no such topology, no compiler, or the mesh does not suit model or batch.
        ReadJaxError: the compiler fails, other than for want of memory.
    """
    mesh = mesh or setup.config.mesh
    chip, _ = parse_topology(topology)
    if serialize and chip.generation:
        raise ConfigError("an executable for GPUs is not kept: without one, nothing in it was tried out.")
    placed = mesh_of(topology, mesh)
    program = train_program(setup, placed)
    lowered = program.function.lower(*program.arguments)
    began = time.perf_counter()
    serialized, traffic = None, {}
    with tempfile.TemporaryDirectory() as dump:
        compiled, memory = compile_lowered(lowered, chip, None if serialize else dump)
        if compiled is not None:
            traffic = traffic_of(compiled, placed.size, dump=dump)
    if compiled is not None and serialize:
        serialized = serialize_compiled(compiled)
    data = setup.config.data
    cost = train_cost(setup, placed, kernels=chip.generation is None)
    return Plan(
        topology=topology,
        slices=mesh.slices,
        chip=chip,
        mesh=dict(placed.shape),
        pictures=data.global_batch,
        questions=data.questions,
        tokens=data.tokens,
        prefix=prefix_length(setup.model),
        micro_batches=setup.config.step.micro_batches,
        remat=setup.config.step.remat,
        cost=cost,
        memory=memory,
        traffic=traffic,
        seconds=time.perf_counter() - began,
        serialized=serialized,
    )


def mesh_of(topology: str, mesh: MeshConfig) -> Mesh:
    """The mesh of a machine that is not there; raises `ConfigError`."""
    return make_mesh(mesh, topology_devices(topology, mesh.slices))


@dataclasses.dataclass(frozen=True)
class Candidate:
    """A way to run the step: pictures of an update, mesh, parts and what is recomputed, and what it costs by
    our count."""

    pictures: int
    mesh: MeshConfig
    micro_batches: int
    remat: bool | str
    cost: Cost
    chip: Chip

    @property
    def fits(self) -> bool:
        """By the estimate."""
        return self.cost.memory <= self.chip.memory

    @property
    def seconds(self) -> float:
        """Of an update, at least, without the network between devices."""
        return max(self.cost.done / self.chip.flops, self.cost.bytes / self.chip.bandwidth)

    @property
    def rate(self) -> float:
        """Pictures per second, at most."""
        return self.pictures / self.seconds

    def applied(self, setup: Setup) -> Setup:
        """A run that does it this way, its mesh apart."""
        return setup.with_batch(self.pictures).with_step(micro_batches=self.micro_batches, remat=self.remat)


def search(setup: Setup, topology: str, slices: int = 1, batches: Sequence[int] = ()) -> list[Candidate]:
    """All meshes, parts and remat policies for a topology, best first, by our own count alone.

    Those that are expected to fit come first, by pictures per second; of equally fast ones (within a
    hundredth) those that share a picture among fewer devices, since what these send to one another is not
    counted, then those with fewer pictures in an update, and then those that need less memory, as the
    estimate is good within some tens of percent. Then the others, by memory.

    batches: pictures of an update to try; none: the run's own.

    Raises `ConfigError` when no mesh of these devices can share any of the batches.
    """
    chip, _ = parse_topology(topology)
    devices = len(topology_devices(topology, slices)) // slices
    found: list[Candidate] = []
    refused = None
    for tensor in (size for size in (1, 2, 4, 8) if devices % size == 0):
        for fsdp in _divisors(devices // tensor):
            mesh = MeshConfig(devices // tensor // fsdp, fsdp, tensor, slices)
            try:
                found += _ways(setup, mesh, mesh_of(topology, mesh), batches, chip)
            except ConfigError as error:
                refused = error
    if refused and not found:
        raise refused
    best = max((c.rate for c in found if c.fits), default=1.0)

    def rank(c: Candidate) -> tuple[float, ...]:
        if not c.fits:
            return (True, c.cost.memory)
        return (False, math.log(best / c.rate) // 0.01, c.mesh.tensor, c.pictures, c.cost.memory)

    return sorted(found, key=rank)


def _ways(
    setup: Setup, mesh: MeshConfig, placed: Mesh, batches: Sequence[int], chip: Chip
) -> list[Candidate]:
    """Candidates of a `search` on one mesh; raises `ConfigError` when it can share none of the batches."""
    found: list[Candidate] = []
    refused = on_device = None
    for pictures in batches or (setup.config.data.global_batch,):
        sized = setup.with_batch(pictures)
        try:
            check_mesh(sized, placed)
        except ConfigError as error:
            refused = error
            continue
        on_device = on_device or held(setup, placed)
        for parts in _divisors(pictures // batch_devices(placed)):
            for remat in (True, "dots", False):
                cut = sized.with_step(micro_batches=parts, remat=remat)
                cost = train_cost(cut, placed, kernels=chip.generation is None, on_device=on_device)
                found.append(Candidate(pictures, mesh, parts, remat, cost, chip))
    if refused and not found:
        raise refused
    return found


def suggested_mesh(setup: Setup, topology: str, slices: int = 1) -> MeshConfig:
    """That of the best candidate of a `search` that recomputes as the run does."""
    found = search(setup, topology, slices)
    return next((c for c in found if c.remat == setup.config.step.remat), found[0]).mesh


def nearest_parts(setup: Setup, topology: str, mesh: MeshConfig, wanted: int) -> int:
    """Parts of the run's batch that the devices of a mesh can share evenly, as near as can be to so many.

    1 if there are none: it is refused, with the reason, when the step is made.
    """
    each, left = divmod(setup.config.data.global_batch, batch_devices(mesh_of(topology, mesh)))
    possible = [] if left else _divisors(each)
    return min(possible, key=lambda n: (abs(n - wanted), n), default=1)


def _divisors(number: int) -> list[int]:
    return [n for n in range(1, number + 1) if number % n == 0]
