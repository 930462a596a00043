"""Several processes that work as one job: how they find one another, and what each of them holds.

On one process every function here does the obvious, so that callers need not ask how many there are.
"""

from __future__ import annotations

import functools
import itertools
import os
import re
import secrets
import socket
import sys
import time
import traceback
from pathlib import Path
from typing import Any, NamedTuple

import jax
import numpy as np
from jax.sharding import NamedSharding

from read_jax.errors import ConfigError, LostProcessError, ReadJaxError

_joined = False
_WAITS = itertools.count()  # a barrier's name must be new; all processes count alike
HEARTBEAT = 30
"""Seconds after which a process that is not heard of ends the job."""
PARTING = 600
"""Seconds that a process waits for the others at its end: they may have more to write."""


def join(
    coordinator: str | None = None, processes: int | None = None, process: int | None = None, wait: int = 300
) -> None:
    """Become one of the processes of a job; before anything else asks JAX for its devices.

    When one of them dies, the others end too, within about `HEARTBEAT` seconds, and say so. When the others
    do not come, JAX ends the process, after saying on standard error what it waited for.

    Args:
        coordinator: HOST:PORT where process 0 listens.
        processes, process: how many there are, and the number of this one. Without any of the three the
            cluster tells: a TPU pod, Slurm, Kubernetes or Open MPI.
        wait: seconds to wait for the others.

    Raises:
        ConfigError: some of the three are missing, or the cluster does not tell.
        ReadJaxError: nobody listens at the coordinator's address.
    """
    given = (coordinator, processes, process)
    if None in given and given != (None, None, None):
        raise ConfigError("give --coordinator, --processes and --process together, or none of them.")
    if processes is not None and process is not None and not 0 <= process < processes:
        raise ConfigError(f"there is no process {process} among {processes}; they count from 0.")
    if coordinator:
        host, port = _address(coordinator)
        print(f"waiting at most {wait} s for {processes} processes at {coordinator} ...", file=sys.stderr)
        if process:
            _knock(host, port, wait)
    try:
        jax.distributed.initialize(
            coordinator_address=coordinator,
            num_processes=processes,
            process_id=process,
            initialization_timeout=wait,
            heartbeat_timeout_seconds=HEARTBEAT,
            shutdown_timeout_seconds=PARTING,
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
    global _joined
    _joined = True


def _address(coordinator: str) -> tuple[str, int]:
    """Host and port; raises `ConfigError` for what is none: JAX would abort, or wait for nobody."""
    match = re.fullmatch(r"(\[[0-9a-fA-F:.%]+\]|[^\s:/\[\]]+):(\d{1,5})", coordinator)
    if not match or not 0 < int(match[2]) < 2**16:
        raise ConfigError(
            f"--coordinator must be HOST:PORT with a port from 1 to 65535, for example 10.0.0.2:8476, not "
            f"{coordinator!r}."
        )
    return match[1].strip("[]"), int(match[2])


def _knock(host: str, port: int, wait: int) -> None:
    """Wait until somebody listens there: JAX itself would end the process without a word that helps."""
    until = time.monotonic() + wait
    while True:
        try:
            with socket.create_connection((host, port), timeout=5):
                return
        except OSError as error:
            if time.monotonic() > until:
                raise ReadJaxError(
                    f"nobody listens at {host}:{port} after {wait} s ({error}): process 0 is not running, or "
                    "a firewall is between."
                ) from error
            time.sleep(0.2)


def leave_the_job(status: int, error: BaseException | None = None) -> None:
    """End this process at once if it is one of several: it is alone with an error, which is shown.

    The usual end waits for the others, who wait for this one; so they notice within about `HEARTBEAT`
    seconds.
    """
    if not _joined:
        return
    if error is not None:
        traceback.print_exception(error)
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(status)


def all_agree(mine: bool) -> bool:
    """Whether it is so in every process; all of them ask."""
    if not several():
        return mine
    from jax.experimental import multihost_utils

    wait_for_all("an answer")  # the devices' network gives up on one that comes late
    return bool(np.all(multihost_utils.process_allgather(np.array(mine))))


def check_shared(folder: Path) -> None:
    """Raises `ConfigError` in every process unless all of them see this folder as the same one."""
    if not several():
        return
    from jax.experimental import multihost_utils

    wait_for_all("a folder")
    number = int(multihost_utils.broadcast_one_to_all(np.int32(secrets.randbits(31))))
    file = folder / f".seen-by-all-{number}"  # a name that no cache of a network's disk knows
    if is_first():
        folder.mkdir(parents=True, exist_ok=True)
        file.touch()
    wait_for_all("what the first wrote")
    seen = all_agree(file.is_file())
    if is_first():
        file.unlink()
    if not seen:
        raise ConfigError(f"not every process sees the same {folder}: it must be on a disk that all share.")


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
    """Go on when every process has come here; what: it is waited for, in words.

    Raises `LostProcessError` when one of them is heard of no more, or does not come in so many seconds.
    """
    if several():
        from orbax.checkpoint import multihost

        # by way of the coordinator, not of the devices: their networks give up on a late one within seconds
        barrier = multihost.get_barrier_sync_fn()
        assert barrier is not None
        try:
            barrier(key=f"{what} {next(_WAITS)}", timeout_ms=1000 * seconds)
        except jax.errors.JaxRuntimeError as error:
            why = str(error).splitlines()[0]
            raise LostProcessError(
                f"another process of this job has died, or is heard of no more ({why}). "
                "Start the job again: it goes on where it was."
            ) from error


class Share(NamedTuple):
    """What a process makes of every batch.

    index, count: share number `index` of `count` equal ones. blocks: where its rows go: the batch is cut into
    `of` equal runs of rows, and these of them are its own, in their order. They need not lie together: a
    machine's chips are neighbours in the network, not in the mesh.
    """

    index: int
    count: int
    blocks: tuple[int, ...]
    of: int


def batch_shares(sharding: NamedSharding) -> dict[int, Share]:
    """The share of each process in a batch that is placed so, by the process's number.

    Processes whose devices hold the same rows make the same share. Raises `ConfigError` when two processes
    hold rows of which some are the same and others not.
    """
    mesh = sharding.mesh
    of = mesh.size // sharding.shard_shape((mesh.size,))[0]
    held: dict[int, set[int]] = {}
    for device, index in sharding.devices_indices_map((of,)).items():
        assert index is not None
        held.setdefault(device.process_index, set()).add(index[0].indices(of)[0])
    blocks = {process: tuple(sorted(own)) for process, own in held.items()}
    shares = sorted(set(blocks.values()))
    if sum(map(len, shares)) != of or len(set(map(len, shares))) > 1:
        raise ConfigError(
            f"the mesh {dict(mesh.shape)} gives some processes a part of the same pictures. Choose tensor so "
            "that its devices belong to one process, or to whole processes."
        )
    return {process: Share(shares.index(own), len(shares), own, of) for process, own in blocks.items()}


def from_shares(sharding: NamedSharding, arrays: Any) -> Any:
    """A tree of arrays of which every process has its share of rows, as one tree on all devices."""
    if not several():
        return jax.device_put(arrays, sharding)
    share = batch_shares(sharding)[jax.process_index()]

    def put(leaf: Any) -> jax.Array:
        x = np.asarray(leaf)
        rows = len(x) // len(share.blocks)
        shape = (rows * share.of, *x.shape[1:])
        return jax.make_array_from_callback(shape, sharding, lambda index: own_rows(share, x, index or ()))

    return jax.tree.map(put, arrays)


def own_rows(share: Share, x: np.ndarray, index: tuple[slice, ...]) -> np.ndarray:
    """Of a share's rows [R, ...], those at `index` of the whole batch, which are one block."""
    rows = len(x) // len(share.blocks)
    place = share.blocks.index(index[0].indices(rows * share.of)[0] // rows)
    return x[place * rows : (place + 1) * rows][(slice(None), *index[1:])]


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
            self._devices = mesh.size
            self._any = jax.jit(lambda flags: flags.any(), out_shardings=whole)

    def __call__(self, wants: bool) -> bool:
        """The same answer in every process: of the round before, on one process of this one."""
        if not several():
            return wants
        before, flag = self._asked, np.full(1, wants)
        flags = jax.make_array_from_callback((self._devices,), self._shared, lambda index: flag)
        self._asked = self._any(flags)
        return bool(before) if before is not None else False
