"""Questions behind their picture's shared prefix, against one whole sequence per question: cost of gradients.

    python -m tests.benchmarks.packing [--questions 3] [--rounds 7] [--model small | read-7b | read-13b]
    python -m tests.benchmarks.packing --model read-7b --run --remat True    # on a device that holds it

FLOPs are the compiler's own count of the program for losses and gradients, with every scan unrolled, since
it counts the body of a loop once. For `small`, which keeps the paper's lengths (576 image tokens, 64 of a
question), of the optimised program, and the two are timed in turns. The published sizes are only lowered,
never compiled or run: abstract shapes, and the count before optimisation. With `--run` they are not counted
but timed, in bfloat16 and with random weights.

The encoders are left out: they run once per picture in both.
"""

from __future__ import annotations

import argparse
import statistics
import time
from typing import Any
from unittest import mock

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx

from read_jax.config import ClipVisionConfig, LlamaConfig, ReadConfig, SamConfig
from read_jax.models.read import Read
from read_jax.training.lora import LoraConfig, add_adapters
from read_jax.training.objective import LossWeights
from read_jax.training.step import StepConfig, make_gradients, split_model
from tests.benchmarks.made_up import example, features_of, filled
from tests.training.tiny import separate

SMALL = ReadConfig(
    llama=LlamaConfig(4000, 256, 688, 4, 8, 8, 32),
    clip=ClipVisionConfig(64, 128, 2, 2),
    sam=SamConfig(
        64,
        2,
        2,
        (1,),
        128,
        image_size=256,
        window_size=8,
        out_chans=64,
        decoder_num_heads=4,
        decoder_mlp_dim=128,
    ),
    prompt_dim=64,
)
PREFIX, TOKENS, IMAGE_START = 610, 64, 32


def unrolled_map(function: Any, xs: Any, **_: Any) -> Any:
    """`jax.lax.map` without a loop."""
    length = jax.tree.leaves(xs)[0].shape[0]
    parts = [function(jax.tree.map(lambda x, i=i: x[i], xs)) for i in range(length)]
    return jax.tree.map(lambda *leaves: jnp.stack(leaves), *parts)


def count_flops(function: Any, arguments: tuple[Any, ...], optimised: bool) -> float:
    """Of the program with every loop unrolled."""
    scan = jax.lax.scan

    def unrolled_scan(f: Any, init: Any, xs: Any = None, length: int | None = None, **kwargs: Any) -> Any:
        return scan(f, init, xs, length, **(kwargs | {"unroll": True}))

    with mock.patch("jax.lax.scan", unrolled_scan), mock.patch("jax.lax.map", unrolled_map):
        lowered = jax.jit(function).lower(*arguments)
        program = lowered.compile() if optimised else lowered
    cost = program.cost_analysis()
    return float((cost[0] if isinstance(cost, list) else cost)["flops"])


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else None)
    parser.add_argument("--model", choices=("small", "read-7b", "read-13b"), default="small")
    parser.add_argument("--questions", type=int, default=3)
    parser.add_argument("--pictures", type=int, default=1)
    parser.add_argument("--rounds", type=int, default=7)
    parser.add_argument("--run", action="store_true", help="time a published size too, and count nothing")
    parser.add_argument("--remat", default="False", choices=("True", "dots", "False"))
    options = parser.parse_args()
    small = options.model == "small"
    kind = jnp.float32 if small else jnp.bfloat16
    config = SMALL if small else ReadConfig.preset(options.model)

    def make() -> Read:
        model = Read(config, dtype=kind, param_dtype=kind, rngs=nnx.Rngs(0))
        add_adapters(model.llama, LoraConfig(dropout=0.0), nnx.Rngs(1))
        return model

    graphdef, params, frozen = split_model(make() if small else nnx.eval_shape(make))
    remat: Any = {"True": True, "False": False}.get(options.remat, options.remat)
    gradients = make_gradients(
        graphdef, np.zeros(PREFIX, np.int32), IMAGE_START, LossWeights(), StepConfig(remat=remat)
    )

    def run(params: Any, frozen: Any, batch: Any, features: Any) -> Any:
        return gradients(params, frozen, batch, jax.random.key(0), features)

    packed = example(config, options.pictures, options.questions, TOKENS)
    alone = separate(packed)
    forms = {
        "packed": (packed, features_of(config, options.pictures, kind)),
        "separate": (alone, features_of(config, options.pictures * options.questions, kind)),
    }
    if not options.run:
        counts = {name: count_flops(run, (params, frozen, *form), small) for name, form in forms.items()}
        for name, flops in counts.items():
            print(
                f"{name:9} {flops / 1e12:10.4f} TFLOP per batch of {options.pictures} x {options.questions}"
            )
        print(f"packed / separate: {counts['packed'] / counts['separate']:.3f}")
        if not small:
            return
    if not small:
        params = jax.tree.map(lambda x: jax.ShapeDtypeStruct(x.shape, jnp.float32), params)
    params, frozen = filled(params), filled(frozen)

    compiled, inputs, times = {}, {}, {name: [] for name in forms}
    for name, (batch, features) in forms.items():
        inputs[name] = (params, frozen, *jax.device_put((batch, filled(features))))
        compiled[name] = jax.jit(run).lower(*inputs[name]).compile()
    for _ in range(options.rounds + 1):
        for name, program in compiled.items():
            start = time.perf_counter()
            jax.block_until_ready(program(*inputs[name]))
            times[name].append(time.perf_counter() - start)
    medians = {name: statistics.median(values[1:]) for name, values in times.items()}
    for name, seconds in medians.items():
        print(f"{name:9} {seconds:8.3f} s")
    print(f"packed / separate: {medians['packed'] / medians['separate']:.3f}")


if __name__ == "__main__":
    main()
