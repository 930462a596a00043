"""Updates of a recipe at its true shapes with random weights: time, share of the peak, memory.

    python -m tests.benchmarks.training_step --config read_7b_reasonseg --pictures 4 8 --remat True dots False
    python -m tests.benchmarks.training_step --config read_7b_reasonseg:runlocal --pictures 4    # a laptop

No checkpoint and no dataset are needed: arithmetic costs the same whatever the numbers say. Each case is
compiled, run once, and then `--rounds` times; one JSON object per case:

    seconds           the median
    share_of_peak     useful operations per second, of the data sheet's (what is recomputed does not count)
    estimate_gib      memory by our own count, as `read-jax plan --search` ranks by
    compiler_gib      peak by the compiler, as `read-jax plan` prints
    measured_gib      peak that the device saw, where it tells; of this case and those before it

Cases that do not fit say so, and the next one follows. `--minutes` begins no further case after so long.
`tests/benchmarks/packing.py --run` times packed against separate questions.
"""

from __future__ import annotations

import argparse
import json
import statistics
import sys
import time
from typing import Any

import jax

from read_jax.planning.compiler import memory_of
from read_jax.planning.cost import train_cost
from read_jax.planning.programs import Setup, architecture, set_up, train_program
from read_jax.sharding import make_mesh
from read_jax.training.config import load_config
from read_jax.training.flops import peak
from read_jax.training.logs import memory_in_use
from tests.benchmarks.made_up import example, filled

GIB = 2**30


def measure(setup: Setup, rounds: int) -> dict[str, Any]:
    """One case."""
    mesh = make_mesh(setup.config.mesh)
    program = train_program(setup, mesh)
    began = time.perf_counter()
    compiled = program.function.lower(*program.arguments).compile()
    compiling = time.perf_counter() - began
    cost, memory = train_cost(setup, mesh, kernels=jax.default_backend() == "tpu"), memory_of(compiled)
    state, frozen, places = program.arguments
    state, frozen = filled(state), filled(frozen)
    data = setup.config.data
    batch = example(setup.model, data.global_batch, data.questions, data.tokens, data.mask_canvas)
    batch = jax.device_put(batch, jax.tree.map(lambda leaf: leaf.sharding, places))
    times = []
    for _ in range(rounds + 1):
        start = time.perf_counter()
        state, metrics = compiled(state, frozen, batch)
        jax.block_until_ready((state, metrics))
        times.append(time.perf_counter() - start)
    seconds = statistics.median(times[1:])
    most = peak(jax.devices()[0].device_kind)
    held = memory_in_use(jax.local_devices()).get("peak_memory_gb")
    return {
        "seconds": seconds,
        "useful_tflop_per_second": cost.useful / seconds / 1e12,
        "share_of_peak": cost.useful / seconds / most if most else None,
        "estimate_gib": cost.memory / GIB,
        "compiler_gib": memory.peak / GIB,
        "measured_gib": held * 1e9 / GIB if held else None,
        "compiled_in": compiling,
        "loss": float(metrics["total"]),
    }


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--config", default="read_7b_reasonseg", metavar="RECIPE")
    parser.add_argument("--model", help="architecture, such as read-7b (default: by the recipe's start)")
    parser.add_argument("--pictures", type=int, nargs="+", default=[1, 4, 8], help="of a batch")
    parser.add_argument("--remat", nargs="+", default=["True", "dots"], choices=("True", "dots", "False"))
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--minutes", type=float, default=10.0)
    parser.add_argument("--change", action="append", default=[], metavar="KEY=VALUE", help="of the recipe")
    options = parser.parse_args()
    began = time.perf_counter()
    for remat in options.remat:
        for pictures in options.pictures:
            if time.perf_counter() - began > 60 * options.minutes:
                print("the time is up; what is left was not begun", file=sys.stderr)
                return
            changes = [f"step.remat={remat}", "step.micro_batches=1", f"data.global_batch={pictures}"]
            config = load_config(options.config, [*changes, *options.change])
            case = {"remat": remat, "pictures": pictures, "questions": config.data.questions}
            try:
                case |= measure(set_up(config, architecture(config, options.model)), options.rounds)
            except Exception as error:
                if "RESOURCE_EXHAUSTED" not in str(error):
                    raise
                case["fits"] = False
            print(json.dumps(case), flush=True)


if __name__ == "__main__":
    main()
