"""Several processes that work as one job: how they find one another, and what each of them holds.

On one process every function here does the obvious, so that callers need not ask how many there are.
"""

from __future__ import annotations

import functools
import itertools
from typing import Any

import jax
import numpy as np
from jax.sharding import NamedSharding

from read_jax.errors import ConfigError, ReadJaxError

_WAITS = itertools.count()  # a barrier's name must be new; all processes count alike
HEARTBEAT = 30
"""Seconds after which a process that is not heard of ends the job."""


def join(
    coordinator: str | None = None, processes: int | None = None, process: int | None = None, wait: int = 300
) -> None:
    """Become one of the processes of a job; before anything else asks JAX for its devices.

    When one of them dies, the others end too, within about `HEARTBEAT` seconds, and say so.

    Args:
        coordinator: HOST:PORT where process 0 listens.
        processes, process: how many there are, and the number of this one. Without any of the three the
            cluster tells: a TPU pod, Slurm, Kubernetes or Open MPI.
        wait: seconds to wait for the others.

    Raises:
        ConfigError: some of the three are missing, or the cluster does not tell.
        ReadJaxError: the processes do not find one another.
    """
    given = (coordinator, processes, process)
    if None in given and given != (None, None, None):
        raise ConfigError("give --coordinator, --processes and --process together, or none of them.")
    if processes is not None and process is not None and not 0 <= process < processes:
        raise ConfigError(f"there is no process {process} among {processes}; they count from 0.")
    try:
        jax.distributed.initialize(
            coordinator_address=coordinator,
            num_processes=processes,
            process_id=process,
            initialization_timeout=wait,
            heartbeat_timeout_seconds=HEARTBEAT,
            shutdown_timeout_seconds=HEARTBEAT,
        )
    except ValueError as error:  # JAX names what it could not find out
        raise ConfigError(
            f"this machine is part of no cluster that tells who belongs together ({error}). Give "
            "--coordinator HOST:PORT, --processes N and --process I to every process."
        ) from error
    except RuntimeError as error:
        if "before any JAX" in str(error):
            raise  # a mistake of ours, or of a program that uses us
        where = f" at {coordinator}" if coordinator else ""
        line = str(error).strip().splitlines()[0]
        raise ReadJaxError(f"the processes did not find one another{where} in {wait} s: {line}") from error


def rank() -> tuple[int, int]:
    """The number of this process, and how many there are."""
    return jax.process_index(), jax.process_count()


def several() -> bool:
    """Whether this process is one of several."""
    return jax.process_count() > 1


def is_first() -> bool:
    """Whether this is the process that writes what is written once."""
    return jax.process_index() == 0


def wait_for_all(what: str, seconds: int = 24 * 3600) -> None:
    """Go on when every process has come here; what: it is waited for, in words."""
    if several():
        from orbax.checkpoint import multihost

        # by way of the coordinator, not of the devices: their networks give up on a late one within seconds
        barrier = multihost.get_barrier_sync_fn()
        assert barrier is not None
        barrier(key=f"{what} {next(_WAITS)}", timeout_ms=1000 * seconds)


def share_of_rows(sharding: NamedSharding, rows: int) -> tuple[int, int]:
    """Which share of a batch this process has to make for its devices: (index, count).

    Processes whose devices hold the same rows make the same share. Raises `ConfigError` when a process's
    devices do not hold one run of rows.
    """
    places = sharding.addressable_devices_indices_map((rows,)).values()
    held = sorted({place[0].indices(rows)[:2] for place in places if place is not None})
    first, last = held[0][0], held[-1][1]
    size = last - first
    if sum(stop - start for start, stop in held) != size or rows % size or first % size:
        raise ConfigError(
            f"the mesh {dict(sharding.mesh.shape)} gives the devices of one process pictures from several "
            "places of the batch. Choose data and fsdp so that those of one process lie together."
        )
    return first // size, rows // size


def from_shares(sharding: NamedSharding, arrays: Any) -> Any:
    """A tree of arrays of which every process has its share of rows, as one tree on all devices."""
    if not several():
        return jax.device_put(arrays, sharding)
    return jax.tree.map(lambda x: jax.make_array_from_process_local_data(sharding, np.asarray(x)), arrays)


def from_equals(places: Any, arrays: Any) -> Any:
    """A tree of arrays of which every process has the same whole, on all devices.

    places: one sharding, or a tree of them. Arrays that are on all devices already only move.
    """
    if not several():
        return jax.device_put(arrays, places)

    def put(x: Any, place: NamedSharding) -> jax.Array:
        if isinstance(x, jax.Array) and not x.is_fully_addressable:
            return jax.device_put(x, place)
        x = np.asarray(x)
        return jax.make_array_from_callback(x.shape, place, lambda index: x[index])

    if isinstance(places, NamedSharding):
        return jax.tree.map(lambda x: put(x, places), arrays)
    return jax.tree.map(put, arrays, places)


def together(function: Any) -> Any:
    """A jitted function that every one of several processes compiles before any of them runs it.

    Their networks give up within seconds on one that comes late, and compiling takes minutes. On one process
    it is the function itself.
    """
    if not several():
        return function
    compiled: list[Any] = []

    @functools.wraps(function)
    def run(*arguments: Any) -> Any:
        if not compiled:
            compiled.append(function.lower(*arguments).compile())
            wait_for_all("a compiled program")
        return compiled[0](*arguments)

    return run


class Agreement:
    """Whether any process wants to stop, found out without waiting: what was asked is told a round later."""

    def __init__(self) -> None:
        self._asked: jax.Array | None = None
        if several():
            mesh = jax.sharding.Mesh(np.asarray(jax.devices()), ("all",))
            self._shared = NamedSharding(mesh, jax.sharding.PartitionSpec("all"))
            whole = NamedSharding(mesh, jax.sharding.PartitionSpec())
            self._any = jax.jit(lambda flags: flags.any(), out_shardings=whole)

    def __call__(self, wants: bool) -> bool:
        """The same answer in every process: of the round before, on one process of this one."""
        if not several():
            return wants
        before, flags = self._asked, np.full(jax.local_device_count(), wants)
        self._asked = self._any(jax.make_array_from_process_local_data(self._shared, flags))
        return bool(before) if before is not None else False
