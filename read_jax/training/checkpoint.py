"""Checkpoints of a training run: only what changes, written in the background, and checked when read.

    WORKDIR/checkpoints/STEP/state   an Orbax checkpoint of the `TrainState`, by dotted paths
    WORKDIR/checkpoints/STEP/meta    JSON: data loader's state, scores, configuration, base model, checksums

A checkpoint appears whole or not at all. The frozen parameters are named by path and fingerprint of their
model folder. Checksums are of the values and computed where these are: a chunk that went missing, which Zarr
would read as zeros, is noticed too.
"""

from __future__ import annotations

import contextlib
import dataclasses
import hashlib
import json
import logging
import shutil
import sys
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import orbax.checkpoint as ocp
from etils import epath
from orbax.checkpoint import checkpoint_managers as policies

from read_jax.errors import CheckpointError, ConfigError
from read_jax.files import write_file
from read_jax.processes import all_agree, is_first, wait_for_all
from read_jax.training.config import CheckpointConfig, TrainConfig
from read_jax.training.step import TrainState

FOLDER = "checkpoints"
_STATE, _META, _PARTIAL = "state", "meta", ".orbax-checkpoint-tmp"
_JSON = "metadata"  # Orbax's name of the file in meta

Say = Callable[[str], None]


@dataclasses.dataclass(frozen=True)
class Restored:
    """A checkpoint. state: on the devices of the template; loader: state of the data; validated: whether what
    has to be scored after this many updates was."""

    step: int
    state: TrainState
    loader: dict[str, Any]
    validated: bool


class Checkpoints:
    """The checkpoints of one run.

    Args:
        folder: where they are.
        config: how many to keep.
        identity: JSON of what a checkpoint belongs to; another's is refused. Its "base" is the model folder
            {"path", "fingerprint", "frozen"}, of which the fingerprint, that its config.json states, and the
            digest of the frozen parameters as they were loaded count (see `digest`).
        say: told, in words, of what went wrong and how it was dealt with.
    """

    def __init__(self, folder: Path, config: CheckpointConfig, identity: Mapping[str, Any], say: Say) -> None:
        self._folder, self._identity, self._say = folder.absolute(), identity, say
        self._folder.mkdir(parents=True, exist_ok=True)
        self._best = _Best(config.best, scores_in(self._folder, config.best)) if config.best else None
        kept = [policies.LatestN(n=config.keep), *([self._best] if self._best else [])]
        options = ocp.CheckpointManagerOptions(
            preservation_policy=policies.AnyPreservationPolicy(kept),
            cleanup_tmp_directories=True,  # what a killed run left half written
            enable_async_checkpointing=True,
        )
        # what matters is told in words; of a full disk Orbax's threads would write hundreds of lines
        self._quiet = contextlib.ExitStack()
        self._quiet.enter_context(quiet())
        self._manager = ocp.CheckpointManager(self._folder, options=options)
        self._saving: int | None = None
        self._last = False
        self._open = True

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
        validated: bool = True,
    ) -> None:
        """Begin to write a checkpoint; unless it is the last, the writing goes on beside the training.

        validated: False where a validation is still due at this point, see `Restored`.

        A checkpoint that cannot be written, on a full disk for example, is given up: those before it stay,
        and the training may go on. With `last` it is an error: `CheckpointError`.
        """
        self.poll(wait=True)
        self._last = last
        if step in self._manager.all_steps():
            return
        leaves = named_leaves(state)
        meta = {
            "step": step,
            "loader": dict(loader),
            "validated": validated,
            "scores": {name: float(value) for name, value in (scores or {}).items()},
            "identity": dict(self._identity),
            "checksums": checksums(leaves),
        }
        if jax.default_backend() == "cpu":
            # there the writer would look at the very memory that the next step is given to overwrite
            leaves = {name: jnp.copy(leaf) for name, leaf in leaves.items()}
        args = ocp.args.Composite(**{_STATE: ocp.args.PyTreeSave(leaves), _META: ocp.args.JsonSave(meta)})
        self._saving = step
        if self._best and scores:
            self._best.note(step, scores)
        try:
            self._manager.save(step, args=args)
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

    def scored(self, step: int, scores: Mapping[str, float]) -> None:
        """Write to a checkpoint that was saved before its validation what that gave; a failure is told."""
        if self._best:
            self._best.note(step, scores)
        if not is_first():
            return
        folder = self._folder / str(step)
        try:
            meta = _read_json(folder)
            meta |= {"validated": True, "scores": {name: float(value) for name, value in scores.items()}}
            write_file(folder / _META / _JSON, json.dumps(meta).encode())
        except OSError as error:
            self._say(f"the scores after {step} updates could not be written ({reason(error)}).")

    def poll(self, wait: bool = False) -> None:
        """See how the writing stands; a failure is told and left behind."""
        if self._saving is None or (not wait and self._manager.is_saving_in_progress()):
            return
        try:
            self._manager.wait_until_finished()  # here, too, it tells what went wrong in the background
            self._manager.check_for_errors()
        except Exception as error:
            self._give_up(error)
        self._saving = None

    def _give_up(self, error: Exception) -> None:
        step, self._saving = self._saving, None
        # what Orbax left running complains until the very end of the process
        logging.getLogger("asyncio").disabled = True
        for partial in self._folder.glob(f"{step}{_PARTIAL}*"):
            shutil.rmtree(partial, ignore_errors=True)
        self._manager.reload()
        if step in self._manager.all_steps():  # it got its name when it was whole
            self._say(
                f"the checkpoint after {step} updates is written, but an older one could not be removed "
                f"({reason(error)})."
            )
            return
        self._say(
            f"the checkpoint after {step} updates could not be written ({reason(error)}); earlier ones are "
            f"untouched{'' if self._last else ' and the training goes on'}."
        )

    def restore(self, template: TrainState) -> Restored | None:
        """The newest checkpoint that can be read, None if there is none at all.

        Args:
            template: a state of the same structure; its arrays' shardings are used.

        Raises:
            CheckpointError: it belongs to another run, naming what differs; or none of them can be read; or
                there is no memory for it, or no permission, which says nothing against the checkpoint.
        """
        steps = sorted(self._manager.all_steps(), reverse=True)
        broken: dict[int, str] = {}
        for step in steps:
            try:
                meta, state = self._read(step, template)
                loader = dict(meta["loader"])
            except CheckpointError:
                raise
            except Exception as error:  # a damaged file fails in any way
                if isinstance(error, MemoryError | PermissionError) or "RESOURCE_EXHAUSTED" in str(error):
                    raise CheckpointError(
                        f"the checkpoint after {step} updates in {self._folder} cannot be read: "
                        f"{reason(error)}. It was left as it was."
                    ) from error
                self._say(f"the checkpoint after {step} updates is damaged ({reason(error)}).")
                broken[step] = reason(error)
                continue
            for number in broken:
                self._set_aside(number)
            if broken:
                self._say(f"going on from the one before it, after {step} updates.")
            return Restored(step, state, loader, meta.get("validated", True))
        if broken:
            found = "; ".join(f"{step}: {why}" for step, why in broken.items())
            raise CheckpointError(
                f"none of the checkpoints in {self._folder} can be read ({found}). They were left as they "
                "were; without that folder, or with another workdir, the run starts anew."
            )
        return None

    def close(self) -> None:
        """Wait for what is being written; closed already, it does nothing."""
        with self._quiet:
            self._quiet = contextlib.ExitStack()
            self.poll(wait=True)
            if self._open:
                self._open = False
                try:
                    self._manager.close()
                except Exception as error:  # of whatever kind the storage gives
                    self._say(f"the checkpoints in {self._folder} could not be closed ({reason(error)}).")

    def _read(self, step: int, template: TrainState) -> tuple[dict[str, Any], TrainState]:
        """(meta, state); every process comes to the same end, whichever of them finds something damaged."""
        folder, error = self._folder / str(step), None
        meta: dict[str, Any] = {}
        leaves: dict[str, jax.Array] = {}
        try:
            meta = _read_json(folder)
            if meta["step"] != step:
                raise ValueError(f"it says it is of step {meta['step']}")
            self._check_identity(step, meta["identity"])
            abstract = {
                name: jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=leaf.sharding)
                for name, leaf in named_leaves(template).items()
            }
            leaves = _load_leaves(folder, abstract, meta["checksums"])
        except Exception as own:
            error = own
        if not all_agree(error is None):
            raise error or ValueError("another process cannot read it")
        _check_leaves(leaves, meta["checksums"])
        names = named_leaves(template)
        return meta, jax.tree.unflatten(jax.tree.structure(template), [leaves[name] for name in names])

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
        if base.get("frozen", own.get("frozen")) != own.get("frozen"):  # runs of before did not know theirs
            raise CheckpointError(
                f"the parameters in {own['path']} are not those that the checkpoint after {step} updates in "
                f"{self._folder} was trained from, though its config.json says so: they were changed, or are "
                "damaged. Put the model folder back as it was."
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
    leaves = _load_leaves(checkpoint, abstract, wanted)
    _check_leaves(leaves, wanted)
    return leaves


def _load_leaves(
    checkpoint: Path, abstract: Mapping[str, jax.ShapeDtypeStruct], wanted: Mapping[str, int]
) -> dict[str, jax.Array]:
    """Without a check; no process waits for another, which may have failed."""
    missing = sorted(set(abstract) - set(wanted))
    if missing:
        raise ValueError(f"it has no {missing[0]}")
    target = dict(abstract)
    handler = ocp.PyTreeCheckpointHandler()
    try:
        with quiet():
            return handler.restore(
                epath.Path(checkpoint / _STATE),
                args=ocp.args.PyTreeRestore(
                    item=target,
                    restore_args=ocp.checkpoint_utils.construct_restore_args(target),
                    partial_restore=True,
                ),
            )
    finally:
        handler.close()


def _check_leaves(leaves: Mapping[str, jax.Array], wanted: Mapping[str, int]) -> None:
    for name, found in checksums(leaves).items():
        if found != wanted[name]:
            raise ValueError(f"{name} is not what was saved")


def read_meta(checkpoint: Path) -> dict[str, Any]:
    """The JSON of a checkpoint; raises `CheckpointError` when it is damaged."""
    try:
        return _read_json(checkpoint)
    except Exception as error:
        raise CheckpointError(f"the checkpoint {checkpoint} is damaged: {reason(error)}") from error


def _read_json(checkpoint: Path) -> dict[str, Any]:
    return json.loads((checkpoint / _META / _JSON).read_bytes())


def scores_in(folder: Path, score: str) -> dict[int, float]:
    """What each checkpoint in the folder scored, by step; not of those without it, or damaged."""
    found = {}
    for checkpoint in folder.glob("*"):
        if checkpoint.name.isdigit():
            with contextlib.suppress(CheckpointError):  # told when it is its turn to be read
                scores = read_meta(checkpoint).get("scores", {})
                if score in scores:
                    found[int(checkpoint.name)] = scores[score]
    return found


def best_of(scores: Mapping[int, float]) -> int | None:
    """The step with the highest score, of equal ones the latest; None of none."""
    return max(scores, key=lambda step: (scores[step], step), default=None)


class _Best:
    """Orbax's policy of what to keep: the checkpoint with the highest score."""

    def __init__(self, score: str, known: dict[int, float]) -> None:
        self._score, self._known = score, known

    def note(self, step: int, scores: Mapping[str, float]) -> None:
        """A checkpoint that is about to be written; a validation without masks has no score."""
        if self._score in scores:
            self._known[step] = scores[self._score]

    def should_preserve(self, checkpoints: Sequence[Any], *, context: Any) -> Sequence[bool]:
        steps = [checkpoint.step for checkpoint in checkpoints]
        best = best_of({step: value for step, value in self._known.items() if step in steps})
        return [step == best for step in steps]


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


def digest(leaves: Mapping[str, jax.Array]) -> str:
    """Of all the leaves together, by their checksums."""
    return hashlib.sha256(json.dumps(checksums(leaves), sort_keys=True).encode()).hexdigest()


@jax.jit
def _checksum(leaf: jax.Array) -> jax.Array:
    width = {1: jnp.uint8, 2: jnp.uint16, 4: jnp.uint32}[leaf.dtype.itemsize]
    bits = jax.lax.bitcast_convert_type(leaf, width).astype(jnp.uint32)
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


def reason(error: Exception) -> str:
    """The first line of an error, or what it comes down to."""
    text = str(error).strip() or type(error).__name__
    return "the disk is full" if "No space left" in text else text.splitlines()[0][:300]


@contextlib.contextmanager
def quiet() -> Iterator[None]:
    """Without Orbax's messages, and those of its threads that outlive their loop."""
    hook = sys.excepthook
    logger = logging.getLogger("absl")
    before = logger.level
    logger.setLevel(logging.CRITICAL)

    def tell(kind: type[BaseException], error: BaseException, trace: Any) -> None:
        if str(error) != "Event loop is closed":  # a write that ends after the one that failed
            hook(kind, error, trace)

    sys.excepthook = tell
    try:
        yield
    finally:
        sys.excepthook = hook
        logger.setLevel(before)
