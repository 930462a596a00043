"""`plan_inference`: what answering questions will need on chips that are not there.

A group of chips that share the model answers by itself (`--devices` of segment and evaluate). Its programs
are compiled in their order, each over what the one before it leaves on the chips.
"""

from __future__ import annotations

import dataclasses
import tempfile
import time
from collections.abc import Iterator, Mapping, Sequence
from typing import Any, Literal

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from jax.sharding import Mesh

from read_jax.config import Config, ReadConfig
from read_jax.errors import ConfigError
from read_jax.geometry import image_geometry, stack_geometries
from read_jax.inference.programs import Programs, bucket
from read_jax.inference.segmenter import ROWS_PER_BATCH
from read_jax.models.read import Read
from read_jax.planning.chips import Chip, group_topology, parse_topology, topology_devices
from read_jax.planning.compiler import Memory, compile_lowered, link_seconds, traffic_of
from read_jax.planning.hlo import Traffic
from read_jax.planning.programs import PROMPT_TOKENS, bytes_per_device, placed, prefix_length
from read_jax.sharding import MeshConfig, make_mesh, parameter_shardings
from read_jax.training.flops import (
    clip_forward,
    llama_pairs,
    llama_weights,
    mask_decoder_forward,
    sam_encoder_forward,
)

Mode = Literal["evaluate", "serve"]

_BFLOAT16 = 2
_END = 2  # any token: it changes no shape


@dataclasses.dataclass(frozen=True)
class Load(Config):
    """What goes through the chips together; the programs have the next power of two of each.

    Attributes:
        pictures: encoded together.
        questions: about each of them; with `rows_per_batch` of them all, the others wait for their turn.
        tokens: of a question, with its answer where that is given.
        new_tokens: room for an answer that is generated.
    """

    pictures: int = 8
    questions: int = 4
    tokens: int = 64
    new_tokens: int = 512

    def __post_init__(self) -> None:
        self._require_positive("pictures", "questions", "tokens", "new_tokens")
        rows = bucket(self.pictures) * bucket(self.questions)
        self._require(
            rows <= ROWS_PER_BATCH,
            f"{rows} questions do not go through together, at most {ROWS_PER_BATCH} do: plan for fewer "
            "pictures, or fewer questions about each.",
        )

    def padded(self) -> Load:
        """As the programs have it."""
        return Load(
            bucket(self.pictures),
            bucket(self.questions),
            bucket(self.tokens, 32),
            bucket(self.new_tokens, 32),
        )


@dataclasses.dataclass(frozen=True)
class Stage:
    """One program. memory: on a chip, with what waits there for later programs; flops, bytes: per chip, by
    our own count; traffic: between the chips, as the compiler has it; seconds: that compiling took."""

    name: str
    memory: Memory
    flops: float
    bytes: float
    traffic: Mapping[str, Traffic] | None
    seconds: float

    def times(self, chip: Chip) -> dict[str, float]:
        """Seconds that it takes at least, by what would bound it."""
        return {
            "arithmetic": self.flops / chip.flops,
            "memory": self.bytes / chip.bandwidth,
            **link_seconds(self.traffic, chip),
        }


@dataclasses.dataclass(frozen=True)
class InferencePlan:
    """What answering needs on a group of chips.

    Attributes:
        mode: "evaluate": answers are given; "serve": they are generated.
        topology, chip: the machine.
        group: chips that share one model.
        load: what goes through them together.
        stages: the programs, up to the first that does not fit.
    """

    mode: Mode
    topology: str
    chip: Chip
    group: int
    load: Load
    stages: tuple[Stage, ...]

    @property
    def peak(self) -> float:
        """Bytes on a chip, at the most."""
        return max(stage.memory.peak for stage in self.stages)

    @property
    def fits(self) -> bool:
        """Whether the peak is within what the compiler grants."""
        return all(stage.memory.fits(self.chip) for stage in self.stages)

    @property
    def seconds(self) -> float:
        """For all questions about the pictures, at least."""
        return sum(max(stage.times(self.chip).values()) for stage in self.stages)

    def to_dict(self) -> dict[str, Any]:
        """Ready for JSON."""
        data = dataclasses.asdict(self) | {
            "fits": self.fits,
            "peak": self.peak,
            "seconds_at_least": self.seconds,
        }
        for stage, entry in zip(self.stages, data["stages"], strict=True):
            entry["times"] = stage.times(self.chip)
            if stage.traffic is not None:
                entry["traffic"] = {kind: traffic._asdict() for kind, traffic in stage.traffic.items()}
        return data


def plan_inference(
    model: ReadConfig, topology: str, mode: Mode, group: int = 1, load: Load | None = None
) -> InferencePlan:
    """Compile the programs that answer questions, in bfloat16.

    Args:
        model: the architecture.
        topology: such as "v5e:4x4".
        mode: "evaluate" or "serve".
        group: chips of one host that share the model.
        load: None: a batch as `read_jax.load` has it, four questions about each picture.

    Raises:
        ConfigError: no such topology or group, no compiler, or the chips cannot share the model.
        ReadJaxError: the compiler fails, other than for want of memory.
    """
    load = (load or Load()).padded()
    chip, _ = parse_topology(topology)
    devices = topology_devices(group_topology(topology, group))
    if len(devices) != group:
        raise ConfigError(f"{group} chip(s) of {topology} are {len(devices)} devices.")
    mesh = make_mesh(MeshConfig(tensor=group), devices)
    stages = []
    for stage in _stages(model, mode, chip, mesh, load):
        stages.append(stage)
        if not stage.memory.fits(chip):
            break
    return InferencePlan(mode, topology, chip, group, load, tuple(stages))


def _stages(model: ReadConfig, mode: Mode, chip: Chip, mesh: Mesh, load: Load) -> Iterator[Stage]:
    """The programs in their order; nothing can be asked for behind one that does not fit."""
    graphdef, params = nnx.split(
        nnx.eval_shape(lambda: Read(model, dtype=jnp.bfloat16, param_dtype=jnp.bfloat16, rngs=nnx.Rngs(0)))
    )
    shapes = {".".join(map(str, path)): leaf.shape for path, leaf in nnx.to_flat_state(params)}
    parameter_shardings(model, shapes, mesh)  # says what cannot be shared
    programs = Programs(graphdef, placed(params, mesh), end_id=_END, exact=False)
    counts = Counts(model, load, mesh.size)
    geometry = stack_geometries(
        [image_geometry(480, 640, model.sasp, model.clip.grid_size, model.sam.image_size)] * load.pictures
    )
    pixels = [
        jax.ShapeDtypeStruct((load.pictures, side, side, 3), np.uint8)
        for side in (model.clip.image_size, model.sam.image_size)
    ]

    def made(name: str, waiting: Any, *args: Any, open_rounds: int = 1) -> tuple[Stage, Any]:
        """The stage, and what it leaves; waiting: abstract arrays that stay meanwhile beside its own."""
        lowered = programs.lower(name, *args)
        began = time.perf_counter()
        with tempfile.TemporaryDirectory() as dump:
            compiled, memory = compile_lowered(lowered, chip, dump)
            seconds, traffic, out = time.perf_counter() - began, {}, None
            if compiled is not None:
                traffic = traffic_of(compiled, mesh.size, open_rounds, dump)
        if compiled is not None and memory.arguments is not None:
            # a program's own arguments are those that it uses; the others stay where they are all the same
            held = bytes_per_device((programs.params, waiting)) + _whole_bytes(args)
            memory = dataclasses.replace(memory, peak=memory.peak - memory.arguments + held)
            out = jax.tree.map(
                lambda leaf, place: jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=place),
                compiled.out_info,
                compiled.output_shardings,
            )
        flops, moved = getattr(counts, name)()
        return Stage(name, memory, flops, moved, traffic, seconds), out

    stage, features = made("encode", (), *pixels, geometry.sam_height, geometry.sam_width)
    yield stage
    ids = np.zeros(prefix_length(model), np.int32)
    rest = (features.clip_features, features.image_embedding)
    stage, prefix = made("prefix", rest, ids, features.image_tokens, PROMPT_TOKENS)
    yield stage
    rows = np.zeros((load.pictures, load.questions), np.int32)
    asked = np.zeros((*rows.shape, load.tokens), np.int32)
    if mode == "evaluate":
        stage, given = made("teacher_force", features, prefix, asked)
    else:
        args = (prefix, asked, rows, rows, load.new_tokens, None)
        stage, given = made("generate", features, *args, open_rounds=load.new_tokens - 1)
    yield stage
    states = given if mode == "evaluate" else given.states
    count, width = rows.size, model.llama.hidden_size
    every = jax.tree.map(lambda x: np.resize(np.asarray(x), (count, *np.shape(x)[1:])), geometry)
    inputs = (
        jax.ShapeDtypeStruct((count, width), states.dtype),
        jax.ShapeDtypeStruct((count, model.clip.num_image_tokens, width), states.dtype),
        jax.ShapeDtypeStruct((count, *features.image_embedding.shape[1:]), features.image_embedding.dtype),
        every,
    )
    yield made("predict", (features, prefix, given), *inputs)[0]


def _whole_bytes(arguments: Sequence[Any]) -> float:
    """On a chip, of what a program takes beside parameters: as it is shared, or the whole."""
    leaves = [x for x in jax.tree.leaves(arguments) if hasattr(x, "shape")]
    shared = [x for x in leaves if getattr(x, "sharding", None) is not None]
    whole = [x for x in leaves if getattr(x, "sharding", None) is None]
    return bytes_per_device(shared) + float(sum(np.prod(x.shape) * x.dtype.itemsize for x in whole))


@dataclasses.dataclass(frozen=True)
class Counts:
    """(operations, bytes) per chip of each program: products, and what they must read and write.

    model: the architecture; load: what goes through; group: chips that share LLaMA, CLIP, and the hidden
    channels of SAM's encoder.
    """

    model: ReadConfig
    load: Load
    group: int

    def encode(self) -> tuple[float, float]:
        clip, sam, pictures = self.model.clip, self.model.sam, self.load.pictures
        cells, hidden = sam.grid_size**2, sam.mlp_dim / self.group
        shared = sam.depth * 4.0 * cells * sam.embed_dim * (sam.mlp_dim - hidden)  # by the others
        flops = pictures * (clip_forward(clip) / self.group + sam_encoder_forward(sam) - shared)
        wide = cells * (12 * sam.embed_dim + 2 * hidden) * sam.depth
        weights = sam.depth * (4 * sam.embed_dim**2 + 2 * sam.embed_dim * hidden)
        return flops, _BFLOAT16 * pictures * (weights + wide)  # SAM takes the pictures in turn

    def prefix(self) -> tuple[float, float]:
        tokens = prefix_length(self.model)
        return self._llama(self.load.pictures * tokens, self.load.pictures * llama_pairs(tokens, []))

    def teacher_force(self) -> tuple[float, float]:
        before, length = prefix_length(self.model), self.load.tokens
        pairs = llama_pairs(before, [length] * self.load.questions) - llama_pairs(before, [])
        rows = self.load.pictures * self.load.questions
        return self._llama(rows * length, self.load.pictures * pairs)

    def generate(self) -> tuple[float, float]:
        llama, load = self.model.llama, self.load
        flops, moved = self.teacher_force()
        rows, before = load.pictures * load.questions, prefix_length(self.model)
        cached = load.pictures * before + rows * (load.tokens + load.new_tokens)
        head = llama.hidden_size * llama.vocab_size
        for step in range(1, load.new_tokens):
            pairs = rows * (before + load.tokens + step)
            more = self._llama(rows, pairs)
            flops, moved = flops + more[0], moved + more[1]
        entry = 2 * llama.num_layers * llama.num_kv_heads * llama.head_dim * _BFLOAT16 / self.group
        flops += load.new_tokens * rows * 2 * head  # every chip of the group has the whole head's work
        return flops, moved + load.new_tokens * (cached * entry + head * _BFLOAT16)

    def predict(self) -> tuple[float, float]:
        sasp, sam = self.model.sasp, self.model.sam
        rows = self.load.pictures * self.load.questions
        tokens = 2 + sam.num_mask_tokens + (sasp.num_points + 1 if sasp.enabled else 0)
        cells = sam.grid_size**2 * sam.out_chans
        return rows * mask_decoder_forward(sam, tokens), rows * cells * 4 * _BFLOAT16 * 8.0

    def _llama(self, tokens: float, pairs: float) -> tuple[float, float]:
        """All layers over so many tokens."""
        llama = self.model.llama
        weights = llama_weights(llama)
        flops = 2.0 * weights * tokens + 4.0 * llama.num_layers * llama.num_heads * llama.head_dim * pairs
        wide = llama.num_layers * tokens * (8 * llama.hidden_size + 4 * llama.intermediate_size)
        return flops / self.group, _BFLOAT16 * (weights + wide) / self.group
