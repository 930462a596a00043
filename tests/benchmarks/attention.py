"""Every way of attention at SAM ViT-H's and LLaMA-7B's shapes: values, gradients, memory, time.

    python -m tests.benchmarks.attention                    # on an accelerator
    python -m tests.benchmarks.attention --scale 8 --implementations plain splash-interpreted    # on a CPU

One JSON object per case and way of READ_JAX_ATTENTION (by default those of the device at hand):

    values, gradients    largest difference from the plain one in float32, of the largest value
    forward, training    seconds of the values alone, and with all gradients
    share_of_peak        of training: operations of visible pairs, three times the forward ones, per second,
                         of the data sheet's
    temporaries_mib      of training, by the compiler

Ways that a case does not take (short sequences, masks) are left out. `--scale N` takes an Nth of the tokens.
"""

from __future__ import annotations

import argparse
import functools
import json
import os
import statistics
import time
from collections.abc import Callable
from typing import Any, NamedTuple
from unittest import mock

import jax
import jax.numpy as jnp
import numpy as np

from read_jax.models import attention as door
from read_jax.models.kernels import Packed, cudnn_channels
from read_jax.training.flops import peak

OF_PLATFORM = {"tpu": ("plain", "splash"), "gpu": ("plain", "cudnn"), "cpu": ("plain",)}


class Case(NamedTuple):
    """Self-attention. layout: which tokens see which; None: all. size, values: channels of a head."""

    tokens: int
    heads: int
    size: int
    values: int
    layout: Packed | None

    def attend(self, q: jax.Array, k: jax.Array, v: jax.Array) -> jax.Array:
        """Through the door."""
        if self.layout:
            return door.packed_attention(q, k, v, self.layout)
        return door.attention(q, k, v, scale=1.0)

    def takes(self, implementation: str) -> bool:
        """Whether the door leads there."""
        if implementation == "plain":
            return True
        least = door.KERNEL_FROM if self.layout else door.WHOLE_FROM
        fits = implementation in door.SPLASH or self.size <= cudnn_channels()
        return self.tokens >= least and fits

    def operations(self) -> float:
        """Of a picture's values."""
        pairs = self.layout.visible().sum() if self.layout else self.tokens**2
        return 2.0 * float(pairs) * self.heads * (self.size + self.values)


def cases(scale: int) -> dict[str, Case]:
    """By name."""
    side = int(64 / scale**0.5)
    layout = Packed(613 // scale, 3, 256 // scale)
    return {
        "SAM ViT-H, a global layer": Case(side**2, 16, 80 + 2 * side, 80, None),
        "LLaMA-7B, three questions": Case(layout.tokens, 32, 128, 128, layout),
    }


def inputs(case: Case, pictures: int, kind: Any) -> list[jax.Array]:
    """q, k, v, and weights for a sum of the results."""
    keys = jax.random.split(jax.random.key(0), 4)
    q, k, v, weights = (
        jax.random.normal(key, (pictures, case.tokens, case.heads, size), jnp.bfloat16)
        for key, size in zip(keys, (case.size, case.size, case.values, case.values), strict=True)
    )
    # SAM's are not scaled: as large as its trained scores are
    return [x.astype(kind) for x in (q if case.layout else 0.1 * q, k, v, weights)]


def timed(function: Callable[..., Any], arguments: list[jax.Array], rounds: int) -> float:
    """Median seconds."""
    times = []
    for _ in range(rounds + 1):
        start = time.perf_counter()
        jax.block_until_ready(function(*arguments))
        times.append(time.perf_counter() - start)
    return statistics.median(times[1:])


def difference(ours: Any, wanted: Any) -> float:
    """Largest, of the largest value of each array."""
    pairs = zip(jax.tree.leaves(ours), jax.tree.leaves(wanted), strict=True)
    return max(float(jnp.max(jnp.abs(a.astype(jnp.float32) - b)) / jnp.max(jnp.abs(b))) for a, b in pairs)


def compiled(case: Case, implementation: str, arguments: list[jax.Array]) -> list[Any]:
    """Two programs: (q, k, v) -> values, and (q, k, v, weights) -> gradients."""

    def loss(q: jax.Array, k: jax.Array, v: jax.Array, weights: jax.Array) -> jax.Array:
        return jnp.sum(case.attend(q, k, v).astype(jnp.float32) * weights)

    with mock.patch.dict(os.environ, READ_JAX_ATTENTION=implementation):
        return [
            jax.jit(case.attend).lower(*arguments[:3]).compile(),
            jax.jit(jax.grad(loss, (0, 1, 2))).lower(*arguments).compile(),
        ]


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    default = OF_PLATFORM.get(jax.default_backend(), ("plain",))
    parser.add_argument("--implementations", nargs="+", default=default, choices=door.IMPLEMENTATIONS[1:])
    parser.add_argument("--pictures", type=int, default=1)
    parser.add_argument("--rounds", type=int, default=10)
    parser.add_argument("--scale", type=int, default=1, metavar="N")
    parser.add_argument("--dtype", default="bfloat16", choices=("bfloat16", "float32"))
    options = parser.parse_args()
    most = peak(jax.devices()[0].device_kind)
    for name, case in cases(options.scale).items():
        exact = inputs(case, options.pictures, jnp.float32)
        with jax.default_matmul_precision("highest"):
            wanted = [f(*exact[:n]) for f, n in zip(compiled(case, "plain", exact), (3, 4), strict=True)]
        wanted = jax.tree.map(np.asarray, wanted)
        arguments = inputs(case, options.pictures, options.dtype)
        for implementation in filter(case.takes, options.implementations):
            values, gradients = compiled(case, implementation, arguments)
            run = functools.partial(timed, rounds=options.rounds)
            training = run(gradients, arguments)
            operations = 3 * options.pictures * case.operations()
            found = {
                "case": name,
                "implementation": implementation,
                "values": difference(values(*arguments[:3]), wanted[0]),
                "gradients": difference(gradients(*arguments), wanted[1]),
                "forward": run(values, arguments[:3]),
                "training": training,
                "share_of_peak": operations / training / most if most else None,
                "temporaries_mib": gradients.memory_analysis().temp_size_in_bytes / 2**20,
            }
            print(json.dumps(found), flush=True)


if __name__ == "__main__":
    main()
