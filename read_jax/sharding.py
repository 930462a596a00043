"""Where arrays live on many devices: the mesh, one table of names, and a rule for every parameter.

    mesh = make_mesh(MeshConfig(fsdp=8, tensor=2))
    shardings = parameter_shardings(config, shapes, mesh)

The mesh has three axes. Along `data` every device has the parameters of its own and other pictures; along
`fsdp` the pictures are shared too, and so are the parameters, which are gathered layer by layer when they are
used; along `tensor` the heads and the hidden channels of each layer are shared, over the same pictures.
Several slices of a pod, which talk over a slow network, lie along `data`: only gradients go between them.

A parameter's dimensions have names (`RULES`), and a name says which axes of the mesh share it (`TABLE`). The
rules know a parameter by the end of its path, so that what has one value for each of its elements (gradients,
moments, averages) lies where it does.

The vocabulary (32003 tokens, a prime number) divides over no axis, and padding it would put rows into every
checkpoint that no token means. Its two tables are shared along the width instead, over `fsdp` and `tensor`:
exact, even, and the most parts there are for the largest trained arrays. The price: with `tensor` above 1 its
devices each compute all logits of their pictures.
"""

from __future__ import annotations

import dataclasses
import fnmatch
import functools
import math
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import jax
import numpy as np
from jax.experimental import mesh_utils
from jax.sharding import AbstractMesh, AxisType, Mesh, NamedSharding, PartitionSpec

from read_jax.config import Config, ReadConfig
from read_jax.errors import ConfigError

Array = jax.Array

DATA, FSDP, TENSOR = AXES = ("data", "fsdp", "tensor")

TABLE: dict[str, tuple[str, ...]] = {
    "batch": (DATA, FSDP),
    "embed": (FSDP,),  # a network's width
    "table": (FSDP, TENSOR),  # the width in the vocabulary's tables
    "looked_up": (DATA,),  # pictures, while the width of their embeddings is shared as the table's
    "heads": (TENSOR,),  # all heads' channels, whole heads together
    "adapted": (TENSOR, FSDP),  # heads' or hidden channels in adapters, cut further
    "mlp": (TENSOR,),
    "layers": (),
    "vocab": (),
    "rank": (),  # of the adapters
    "qkv": (),  # queries, keys and values in one: cut in two it would split the queries
    "projected": (),
    "place": (),  # patches, positions
}
"""Mesh axes that share a dimension, by its name."""

RULES: tuple[tuple[str, str], ...] = (
    ("llama.embed_tokens.embedding", "vocab table"),
    ("llama.lm_head.kernel", "table vocab"),
    ("llama.layers.attn.[qkv]_proj.kernel", "layers embed heads"),
    ("llama.layers.attn.[qkv]_proj.lora_a", "layers embed rank"),
    ("llama.layers.attn.[qkv]_proj.lora_b", "layers rank adapted"),
    ("llama.layers.attn.o_proj.kernel", "layers heads embed"),
    ("llama.layers.attn.o_proj.lora_a", "layers adapted rank"),
    ("llama.layers.attn.o_proj.lora_b", "layers rank embed"),
    ("llama.layers.mlp.down_proj.kernel", "layers mlp embed"),
    ("llama.layers.mlp.*_proj.kernel", "layers embed mlp"),
    ("llama.layers.mlp.down_proj.lora_a", "layers adapted rank"),
    ("llama.layers.mlp.down_proj.lora_b", "layers rank embed"),
    ("llama.layers.mlp.*_proj.lora_a", "layers embed rank"),
    ("llama.layers.mlp.*_proj.lora_b", "layers rank adapted"),
    ("clip.layers.attn.out_proj.kernel", "layers heads embed"),
    ("clip.layers.attn.[qkv]_proj.kernel", "layers embed heads"),
    ("clip.layers.attn.[qkv]_proj.bias", "layers heads"),
    ("clip.layers.mlp.fc1.kernel", "layers embed mlp"),
    ("clip.layers.mlp.fc1.bias", "layers mlp"),
    ("clip.layers.mlp.fc2.kernel", "layers mlp embed"),
    ("clip.patch_embed.kernel", "place embed"),
    ("clip.position_embed", "place embed"),
    ("clip.class_embed", "..."),
    ("projector.layers.*.kernel", "embed projected"),
    ("text_projection.fc?.kernel", "embed projected"),
    ("sam.image_encoder.*_blocks.attn.qkv.kernel", "layers embed qkv"),
    ("sam.image_encoder.*_blocks.attn.proj.kernel", "layers embed projected"),
    ("sam.image_encoder.*_blocks.attn.rel_pos_?", "..."),
    ("sam.image_encoder.*_blocks.mlp.lin1.kernel", "layers embed mlp"),
    ("sam.image_encoder.*_blocks.mlp.lin1.bias", "layers mlp"),
    ("sam.image_encoder.*_blocks.mlp.lin2.kernel", "layers mlp embed"),
    ("sam.image_encoder.patch_embed.kernel", "place embed"),
    ("sam.image_encoder.position_embed", "place place embed"),
    ("sam.image_encoder.neck.*", "..."),
    ("sam.prompt_encoder.*", "..."),
    ("sam.mask_decoder.*", "..."),  # 4 million parameters in all
    ("*.scale", "..."),
    ("*.bias", "..."),
    ("ns_coeffs", "..."),  # of Muon, among its moments
)
"""Names of the dimensions of every parameter, by pattern of its path; the first that fits counts. "...": the
whole array on every device, because it is small."""


@dataclasses.dataclass(frozen=True)
class MeshConfig(Config):
    """How the devices are arranged: slices x data x fsdp x tensor of them.

    Attributes:
        data: copies of the parameters in every slice; -1: as many as the devices make.
        fsdp: devices that share parameters and pictures.
        tensor: devices that share heads and hidden channels.
        slices: parts of the machine with a slow network between them: slices of a TPU pod, or GPU nodes.
    """

    data: int = -1
    fsdp: int = 1
    tensor: int = 1
    slices: int = 1

    def __post_init__(self) -> None:
        self._require_positive("fsdp", "tensor", "slices")
        self._require(self.data > 0 or self.data == -1, f"data must be positive or -1, not {self.data}.")

    def shape(self, devices: int) -> tuple[int, int, int]:
        """(data, fsdp, tensor) of every slice; raises `ConfigError` when so many devices do not fit."""
        known = self.slices * self.fsdp * self.tensor
        data = devices // known if self.data == -1 else self.data
        if data * known != devices or not data:
            named = ", ".join(f"{name} {n}" for name, n in self.to_dict().items() if n != -1)
            wanted = f"a multiple of {known}" if self.data == -1 else f"{data * known}"
            raise ConfigError(f"a mesh of {named} needs {wanted} devices; there are {devices}.")
        return data, self.fsdp, self.tensor


def make_mesh(config: MeshConfig, devices: Sequence[Any] | None = None) -> Mesh:
    """The mesh of all devices, or of those given; slices lie along `data`.

    Raises `ConfigError` when the devices do not fit the configuration.
    """
    grid = device_grid(config, jax.devices() if devices is None else devices)
    return Mesh(grid, AXES, axis_types=(AxisType.Auto,) * len(AXES))


def device_grid(config: MeshConfig, devices: Sequence[Any]) -> np.ndarray:
    """The devices as [slices * data, fsdp, tensor], neighbours near each other; errors as in `make_mesh`.

    Machines without slices of their own are cut into equal runs of processes.
    """
    shape = config.shape(len(devices))

    def slice_of(device: Any) -> int:
        return getattr(device, "slice_index", None) or 0

    found = len({slice_of(device) for device in devices})
    if devices[0].platform == "tpu" and found != config.slices:
        raise ConfigError(f"the devices are in {found} slices, the mesh has {config.slices}: set slices.")
    ordered = sorted(devices, key=lambda d: (slice_of(d), d.process_index, d.id))
    size = len(ordered) // config.slices
    parts = [ordered[start : start + size] for start in range(0, len(ordered), size)]
    try:
        grids = [mesh_utils.create_device_mesh(shape, p, allow_split_physical_axes=True) for p in parts]
    except (ValueError, NotImplementedError) as error:  # the second: no such grid on a TPU's torus
        raise ConfigError(f"{size} devices cannot be arranged as {shape} {AXES}: {error}") from None
    return np.concatenate(grids, axis=0)


def batch_devices(mesh: Mesh | AbstractMesh) -> int:
    """How many devices, or groups of them, have pictures of their own."""
    return _parts("batch", mesh)


def spec(names: Sequence[str | None], mesh: Mesh | AbstractMesh) -> PartitionSpec:
    """How dimensions of these names are shared; None for one that is not. Axes of one device are left out."""
    axes = [tuple(a for a in TABLE[name] if mesh.shape[a] > 1) if name else () for name in names]
    entries: list[Any] = [a[0] if len(a) == 1 else a or None for a in axes]
    while entries and entries[-1] is None:
        entries.pop()
    return PartitionSpec(*entries)


def batch_sharding(mesh: Mesh) -> NamedSharding:
    """Of arrays with a leading [B]."""
    return NamedSharding(mesh, spec(("batch",), mesh))


def replicated(mesh: Mesh | AbstractMesh) -> NamedSharding:
    """The whole array on every device."""
    return NamedSharding(mesh, PartitionSpec())


def logical_axes(path: str, ndim: int) -> tuple[str | None, ...]:
    """Names of a parameter's dimensions, None for those that are not shared.

    path: dotted, as in the model; whatever stands before it (in an optimizer's state) does not matter.
    Raises `ConfigError` for a parameter that no rule knows, or knows with other dimensions.
    """
    if ndim == 0:
        return ()
    for pattern, names in RULES:
        if fnmatch.fnmatchcase(path, pattern) or fnmatch.fnmatchcase(path, f"*.{pattern}"):
            axes = (None,) * ndim if names == "..." else tuple(names.split())
            if len(axes) != ndim:
                raise ConfigError(f"parameter {path} has {ndim} dimensions, its rule in RULES: {names}.")
            return axes
    raise ConfigError(f"parameter {path} fits no rule: say in read_jax.sharding.RULES how it is shared.")


def parameter_sharding(path: str, shape: Sequence[int], mesh: Any) -> NamedSharding:
    """The place of one parameter on a mesh (or an abstract one).

    Raises `ConfigError` naming the parameter, its shape and the axis, when the axis cannot be shared evenly.
    """
    axes = logical_axes(path, len(shape))
    for at, (name, size) in enumerate(zip(axes, shape, strict=True)):
        if name and size % _parts(name, mesh):
            raise _uneven(f"parameter {path}", shape, at, name, f"{size}", mesh)
    return NamedSharding(mesh, spec(axes, mesh))


def parameter_shardings(
    config: ReadConfig, shapes: Mapping[str, Sequence[int]], mesh: Any
) -> dict[str, NamedSharding]:
    """The places of a model's parameters, by path.

    Args:
        config: the architecture.
        shapes: of the parameters, by dotted path.
        mesh: a mesh or an abstract one.

    Raises `ConfigError` naming parameter, shape and axis, when a dimension, or the number of heads in it,
    cannot be shared evenly.
    """
    heads = {
        "llama.layers.attn.q_proj.kernel": config.llama.num_heads,
        "llama.layers.attn.k_proj.kernel": config.llama.num_kv_heads,
        "clip.layers.attn.q_proj.kernel": config.clip.num_heads,
    }
    for path, count in heads.items():
        if path in shapes and count % _parts("heads", mesh):
            at = logical_axes(path, len(shapes[path])).index("heads")
            raise _uneven(f"parameter {path}", shapes[path], at, "heads", f"{count} heads", mesh)
    return {path: parameter_sharding(path, shape, mesh) for path, shape in shapes.items()}


def tree_shardings(tree: Any, mesh: Any) -> Any:
    """The places of parameters, or of anything that follows them, as a tree of the same structure.

    tree: arrays or abstract ones; scalars are everywhere. Raises `ConfigError` as `parameter_sharding`.
    """
    return jax.tree_util.tree_map_with_path(
        lambda path, leaf: parameter_sharding(_dotted(path), leaf.shape, mesh), tree
    )


def on_mesh(function: Callable[..., Any], mesh: Mesh | AbstractMesh) -> Callable[..., Any]:
    """The function, to be jitted, whose `constrain` knows the mesh."""

    @functools.wraps(function)
    def inside(*args: Any, **kwargs: Any) -> Any:
        with jax.sharding.use_abstract_mesh(mesh.abstract_mesh):
            return function(*args, **kwargs)

    return inside


def constrain(x: Array, *names: str | None) -> Array:
    """Say how an activation is shared, where the compiler would have to guess: names of its first dimensions,
    all others whole. Without a mesh (see `on_mesh`) nothing is said.

    Raises `ConfigError` when a dimension cannot be shared evenly.
    """
    mesh = jax.sharding.get_abstract_mesh()
    if mesh.empty or mesh.size == 1:
        return x
    for at, name in enumerate(names):
        if name and x.shape[at] % _parts(name, mesh):
            raise _uneven("an activation", x.shape, at, name, f"{x.shape[at]}", mesh)
    return jax.lax.with_sharding_constraint(x, spec(names, mesh))


def constrain_parameters(tree: Any) -> Any:
    """As `constrain`, for gradients and other trees that follow the parameters, by their paths."""
    mesh = jax.sharding.get_abstract_mesh()
    if mesh.empty or mesh.size == 1:
        return tree
    places = tree_shardings(tree, mesh)
    return jax.tree.map(lambda x, place: jax.lax.with_sharding_constraint(x, place.spec), tree, places)


def _parts(name: str, mesh: Any) -> int:
    return math.prod(mesh.shape[axis] for axis in TABLE[name])


def _dotted(path: tuple[Any, ...]) -> str:
    # a parameter's own "value" says nothing
    return jax.tree_util.keystr(path, simple=True, separator=".").removesuffix(".value")


def _uneven(tensor: str, shape: Sequence[int], at: int, name: str, what: str, mesh: Any) -> ConfigError:
    axes = " x ".join(f"{axis} {mesh.shape[axis]}" for axis in TABLE[name])
    return ConfigError(
        f"{tensor} {list(shape)}: its axis {at} ({name}: {what}) cannot be shared evenly by the "
        f"{_parts(name, mesh)} devices of the mesh's {axes}."
    )
