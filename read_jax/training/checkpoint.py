"""Checkpoints of a training run: only what changes, written in the background, and checked when read.

    WORKDIR/checkpoints/STEP/state   an Orbax checkpoint of the `TrainState`, by dotted paths
    WORKDIR/checkpoints/STEP/meta    JSON: data loader's state, configuration, base model, checksums

A checkpoint appears whole or not at all. The frozen parameters are named by path and fingerprint of their
model folder. Checksums are of the values and computed where these are: a chunk that went missing, which Zarr
would read as zeros, is noticed too.
"""

from __future__ import annotations

import contextlib
import dataclasses
import json
import logging
import shutil
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import orbax.checkpoint as ocp
from orbax.checkpoint import checkpoint_managers as policies

from read_jax.errors import CheckpointError, ConfigError
from read_jax.processes import is_first, wait_for_all
from read_jax.training.config import CheckpointConfig, TrainConfig
from read_jax.training.step import TrainState

FOLDER = "checkpoints"
_STATE, _META, _PARTIAL = "state", "meta", ".orbax-checkpoint-tmp"

Say = Callable[[str], None]


@dataclasses.dataclass(frozen=True)
class Restored:
    """A checkpoint. state: on the devices of the template; loader: state of the data."""

    step: int
    state: TrainState
    loader: dict[str, Any]


class Checkpoints:
    """The checkpoints of one run.

    Args:
        folder: where they are.
        config: how many to keep.
        identity: JSON of what a checkpoint belongs to; another's is refused. Its "base" is the model folder
            {"path", "fingerprint"}, of which the fingerprint counts.
        say: told, in words, of what went wrong and how it was dealt with.
    """

    def __init__(self, folder: Path, config: CheckpointConfig, identity: Mapping[str, Any], say: Say) -> None:
        self._folder, self._identity, self._say = folder.absolute(), identity, say
        kept: list[Any] = [policies.LatestN(n=config.keep)]
        if config.best:
            kept.append(
                policies.BestN(
                    get_metric_fn=lambda m: m[config.best], n=1, keep_checkpoints_without_metrics=False
                )
            )
        options = ocp.CheckpointManagerOptions(
            preservation_policy=policies.AnyPreservationPolicy(kept),
            cleanup_tmp_directories=True,  # what a killed run left half written
            enable_async_checkpointing=True,
        )
        self._folder.mkdir(parents=True, exist_ok=True)
        # what matters is told in words; of a full disk Orbax's threads would write hundreds of lines
        self._quiet = contextlib.ExitStack()
        self._quiet.enter_context(_quiet())
        self._manager = ocp.CheckpointManager(self._folder, options=options)
        self._saving: int | None = None

    def tell(self, say: Say) -> None:
        """Tell another from now on."""
        self._say = say

    def save(
        self,
        step: int,
        state: TrainState,
        loader: Mapping[str, Any],
        scores: Mapping[str, float] | None = None,
        *,
        last: bool = False,
    ) -> None:
        """Begin to write a checkpoint; unless it is the last, the writing goes on beside the training.

        A checkpoint that cannot be written, on a full disk for example, is given up: those before it stay,
        and the training may go on. With `last` it is an error: `CheckpointError`.
        """
        self.poll(wait=True)
        if step in self._manager.all_steps():
            return
        leaves = named_leaves(state)
        meta = {
            "step": step,
            "loader": dict(loader),
            "identity": dict(self._identity),
            "checksums": checksums(leaves),
        }
        if jax.default_backend() == "cpu":
            # there the writer would look at the very memory that the next step is given to overwrite
            leaves = {name: jnp.copy(leaf) for name, leaf in leaves.items()}
        args = ocp.args.Composite(**{_STATE: ocp.args.PyTreeSave(leaves), _META: ocp.args.JsonSave(meta)})
        self._saving = step
        try:
            self._manager.save(step, args=args, metrics=dict(scores) if scores else None)
        except Exception as error:  # of whatever kind the storage gives
            self._give_up(error)
        if last:
            self.poll(wait=True)
            self._manager.reload()
            if step not in self._manager.all_steps():
                raise CheckpointError(
                    f"the state after {step} updates could not be saved in {self._folder}; the last one "
                    f"is {self._manager.latest_step()}. Make room and start again: it goes on from there."
                )

    def poll(self, wait: bool = False) -> None:
        """See how the writing stands; a failure is told and left behind."""
        if self._saving is None:
            return
        try:
            if wait:
                self._manager.wait_until_finished()
            self._manager.check_for_errors()
        except Exception as error:
            self._give_up(error)
            return
        if wait or not self._manager.is_saving_in_progress():
            self._saving = None

    def _give_up(self, error: Exception) -> None:
        step, self._saving = self._saving, None
        for partial in self._folder.glob(f"{step}{_PARTIAL}*"):
            shutil.rmtree(partial, ignore_errors=True)
        shutil.rmtree(self._folder / str(step), ignore_errors=True)  # not complete, whatever is there
        self._manager.reload()
        self._say(
            f"the checkpoint after {step} updates could not be written ({_reason(error)}); earlier ones are "
            "untouched and the training goes on."
        )

    def restore(self, template: TrainState) -> Restored | None:
        """The newest checkpoint that can be read, None if there is none at all.

        Args:
            template: a state of the same structure; its arrays' shardings are used.

        Raises:
            CheckpointError: it belongs to another run, naming what differs; or none of them can be read.
        """
        steps = sorted(self._manager.all_steps(), reverse=True)
        broken: list[int] = []
        for step in steps:
            try:
                meta = self._read_meta(step)
                self._check_identity(step, meta["identity"])
                state = self._read_state(step, template, meta["checksums"])
                loader = dict(meta["loader"])
            except CheckpointError:
                raise
            except Exception as error:  # a damaged file fails in any way
                self._say(f"the checkpoint after {step} updates is damaged ({_reason(error)}).")
                broken.append(step)
                continue
            for number in broken:
                self._set_aside(number)
            if broken:
                self._say(f"going on from the one before it, after {step} updates.")
            return Restored(step, state, loader)
        if broken:
            raise CheckpointError(
                f"none of the checkpoints in {self._folder} can be read ({', '.join(map(str, broken))}). "
                "Remove the folder to start anew."
            )
        return None

    def close(self) -> None:
        """Wait for what is being written."""
        self.poll(wait=True)
        self._manager.close()
        self._quiet.close()

    def _read_meta(self, step: int) -> dict[str, Any]:
        restored = self._manager.restore(step, args=ocp.args.Composite(**{_META: ocp.args.JsonRestore()}))
        meta = restored[_META]
        if meta["step"] != step:
            raise ValueError(f"it says it is of step {meta['step']}")
        return meta

    def _read_state(self, step: int, template: TrainState, wanted: Mapping[str, int]) -> TrainState:
        abstract = {
            name: jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=leaf.sharding)
            for name, leaf in named_leaves(template).items()
        }
        leaves = read_leaves(self._folder / str(step), abstract, wanted)
        return jax.tree.unflatten(jax.tree.structure(template), [leaves[name] for name in abstract])

    def _check_identity(self, step: int, theirs: Mapping[str, Any]) -> None:
        ours = json.loads(json.dumps(self._identity))
        base, own = theirs["base"], ours["base"]
        if base["fingerprint"] != own["fingerprint"]:
            raise CheckpointError(
                f"the checkpoint after {step} updates in {self._folder} was trained from another base: "
                f"{base['path']} ({base['fingerprint'][:19]}), not {own['path']} ({own['fingerprint'][:19]})."
            )
        theirs = {**theirs, "base": None, "config": _filled(theirs["config"])}
        found = list(differences(theirs, {**ours, "base": None}))
        if found:
            raise CheckpointError(
                f"the checkpoint after {step} updates in {self._folder} is of another configuration: "
                f"{'; '.join(found[:5])}. Continue with the same one, or use another workdir."
            )

    def _set_aside(self, step: int) -> None:
        aside = self._folder.parent / "damaged"
        aside.mkdir(exist_ok=True)
        target = aside / str(step)
        if is_first():
            shutil.rmtree(target, ignore_errors=True)
            (self._folder / str(step)).rename(target)
        wait_for_all(f"{step} set aside")
        self._manager.reload()
        self._say(f"moved it to {target}.")


def read_leaves(
    checkpoint: Path, abstract: Mapping[str, jax.ShapeDtypeStruct], wanted: Mapping[str, int]
) -> dict[str, jax.Array]:
    """Leaves of a checkpoint by dotted path, held against their checksums.

    abstract: those to read, with shape, type and sharding. Raises `ValueError` when one is not what it was,
    and whatever Orbax raises for what it cannot read.
    """
    missing = sorted(set(abstract) - set(wanted))
    if missing:
        raise ValueError(f"it has no {missing[0]}")
    target = dict(abstract)
    with _quiet(), ocp.PyTreeCheckpointer() as checkpointer:
        leaves = checkpointer.restore(
            checkpoint / _STATE,
            args=ocp.args.PyTreeRestore(
                item=target,
                restore_args=ocp.checkpoint_utils.construct_restore_args(target),
                partial_restore=True,
            ),
        )
    found = checksums(leaves)
    for name in abstract:
        if found[name] != wanted[name]:
            raise ValueError(f"{name} is not what was saved")
    return leaves


def read_meta(checkpoint: Path) -> dict[str, Any]:
    """The JSON of a checkpoint; raises `CheckpointError` when it is damaged."""
    try:
        with _quiet(), ocp.Checkpointer(ocp.JsonCheckpointHandler()) as checkpointer:
            return checkpointer.restore(checkpoint / _META)
    except Exception as error:
        raise CheckpointError(f"the checkpoint {checkpoint} is damaged: {error}") from error


def named_leaves(tree: Any) -> dict[str, Any]:
    """Leaves by dotted path."""
    return {
        # a parameter's own "value" says nothing
        jax.tree_util.keystr(path, simple=True, separator=".").removesuffix(".value"): leaf
        for path, leaf in jax.tree_util.tree_leaves_with_path(tree)
    }


def checksums(leaves: Mapping[str, jax.Array]) -> dict[str, int]:
    """A number for each leaf that depends on every bit of it, and not on how it is sharded."""
    # one after the other: on a CPU devices share a few threads, and several programs in which they wait for
    # one another could take them all
    return {name: int(_checksum(leaf)) for name, leaf in leaves.items()}


@jax.jit
def _checksum(leaf: jax.Array) -> jax.Array:
    bits = jax.lax.bitcast_convert_type(leaf, jnp.uint32)
    # places along every axis: another order, or a part in another place, gives another sum
    for axis in range(bits.ndim):
        place = jax.lax.broadcasted_iota(jnp.uint32, bits.shape, axis)
        bits = (bits ^ (place * jnp.uint32(0x9E3779B1))) * jnp.uint32(0x85EBCA6B)
        bits = bits ^ (bits >> 15)
    return jnp.sum(bits, dtype=jnp.uint32)


def differences(theirs: Any, ours: Any, where: str = "") -> Iterator[str]:
    """Where two JSON values differ, in words."""
    if isinstance(theirs, Mapping) and isinstance(ours, Mapping):
        for key in dict.fromkeys((*theirs, *ours)):
            path = f"{where}.{key}".strip(".")
            if key not in ours or key not in theirs:
                yield f"only {'this run' if key in ours else 'the checkpoint'} has {path}"
            else:
                yield from differences(theirs[key], ours[key], path)
    elif theirs != ours:
        yield f"{where} was {theirs!r} and is {ours!r}"


def _filled(config: Mapping[str, Any]) -> Mapping[str, Any]:
    """With defaults for settings that did not exist yet when it was written."""
    try:
        return TrainConfig.from_dict(config).trajectory()
    except ConfigError:
        return config  # of another version altogether: compared as it is


def _reason(error: Exception) -> str:
    """The first line of an error, or what it comes down to."""
    text = str(error).strip() or type(error).__name__
    return "the disk is full" if "No space left" in text else text.splitlines()[0][:300]


@contextlib.contextmanager
def _quiet() -> Iterator[None]:
    """Without Orbax's messages."""
    logger = logging.getLogger("absl")
    before = logger.level
    logger.setLevel(logging.CRITICAL)
    try:
        yield
    finally:
        logger.setLevel(before)
