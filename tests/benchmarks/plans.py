"""READ-7B and 13B compiled for machines that are not at hand: the table of launch/PLANS.md.

    python -m tests.benchmarks.plans --output DIR [--only TEXT ...]

Each case is a `read-jax plan` in a process of its own and takes minutes on two cores. Its figures are kept in
DIR, so that a run that is stopped goes on, and the table is printed of what is there.
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
from pathlib import Path
from typing import Any

RECIPES = {"7b": "read_7b_reasonseg", "13b": "read_13b_reasonseg"}
MACHINES = (("v5e:4x4", 1), ("v5e:16x16", 1), ("v6e:4x4", 1), ("v5p:2x2x4", 1), ("v5e:4x4", 2))
GROWN = {  # READ-7B's step, with more of one thing or less
    "4 chips": ("v5e:2x2", 4, []),
    "1 question": ("v5e:4x4", 16, ["data.questions=1"]),
    "10 questions": ("v5e:4x4", 16, ["data.questions=10"]),
    "512 tokens": ("v5e:4x4", 16, ["data.tokens=512"]),
}
PIXELS = (512, 2048)  # of SAM's square, instead of 1024
OTHER_PIXELS = """
import dataclasses

from ml_collections import ConfigDict
from read_jax.config import ReadConfig
from read_jax.training.config import recipe

def get_config():
    config = recipe({recipe!r})
    model = ReadConfig.preset("sesame-7b")
    model = model.replace(sam=dataclasses.replace(model.sam, image_size={pixels}))
    with config.unlocked(), config.ignore_type():
        config.start.model, config.start.scratch = "", ConfigDict(model.to_dict())
    return config
"""
GROUPS = {"v5e:4x4": 4, "v6e:4x4": 4, "v5p:2x2x4": 1}  # chips that share the weights to answer
GIB = 2**30


def cases(folder: Path) -> dict[str, list[str]]:
    """Options of `read-jax plan` by name; one picture per chip and update, in training.

    folder: for recipes that the package does not have.
    """
    found = {}
    for size, recipe in RECIPES.items():
        for machine, slices in MACHINES:
            chips = 1
            for side in machine.partition(":")[2].split("x"):
                chips *= int(side)
            fsdp = min(chips, 16)  # beyond, copies: what is gathered need not cross the whole machine
            found[f"train {size} {slices}x{machine}"] = [
                *("train", "--config", recipe, "--topology", machine, "--slices", str(slices)),
                *("--mesh", f"fsdp={fsdp}", "--batch", str(chips * slices)),
                "--config.step.micro_batches=1",
            ]
        for mode in ("evaluate", "serve"):
            for machine, group in GROUPS.items():
                found[f"{mode} {size} {machine}"] = [
                    *(mode, "--config", recipe, "--topology", machine, "--mesh", f"tensor={group}"),
                ]
    found["serve 13b v5e:4x4, half"] = [*found["serve 13b v5e:4x4"], "--batch", "4"]  # the whole does not fit
    for what, (machine, chips, changes) in GROWN.items():
        found[f"train 7b {what}"] = [
            *("train", "--config", RECIPES["7b"], "--topology", machine),
            *("--mesh", f"fsdp={chips}", "--batch", str(chips), "--config.step.micro_batches=1"),
            *(f"--config.{change}" for change in changes),
        ]
    for pixels in PIXELS:
        recipe = folder / f"read_7b_{pixels}_pixels.py"
        recipe.write_text(OTHER_PIXELS.format(recipe=RECIPES["7b"], pixels=pixels))
        found[f"train 7b {pixels} pixels"] = [
            *("train", "--config", str(recipe), "--topology", "v5e:4x4", "--mesh", "fsdp=16"),
            *("--batch", "16", "--config.step.micro_batches=1"),
        ]
    for size, recipe in RECIPES.items():  # these need XLA's CUDA compiler, and say how to get it
        found[f"train {size} h100:8"] = [
            *("train", "--config", recipe, "--topology", "h100:8", "--mesh", "fsdp=8", "--batch", "8"),
            "--config.step.micro_batches=1",
        ]
        for mode in ("evaluate", "serve"):
            found[f"{mode} {size} h100:8"] = [
                *(mode, "--config", recipe, "--topology", "h100:8", "--mesh", "tensor=1"),
            ]
    return found


def row(name: str, data: dict[str, Any]) -> str:
    """Of the table."""
    if name.startswith("train"):
        peak, times, together = data["memory"]["peak"], data["times"], f"{data['pictures']} pictures"
        mesh = " x ".join(f"{axis} {n}" for axis, n in data["mesh"].items() if n > 1)
        bound = max(times, key=times.__getitem__)
        least, parts = f"{times[bound]:.2f} s, {bound}", [data]
    else:
        peak, parts, mesh = data["peak"], data["stages"], f"tensor {data['group']}"
        together = f"{data['load']['pictures']} x {data['load']['questions']} questions"
        least = f"{sum(max(part['times'].values()) for part in parts):.2f} s"
    known = all(part["traffic"] is not None for part in parts)
    sent = sum(traffic["bytes"] for part in parts for traffic in (part["traffic"] or {}).values())
    cells = [
        name,
        mesh,
        together,
        "yes" if data["fits"] else "no",
        f"{peak / GIB:.2f} of {data['chip']['memory'] / GIB:.2f} GiB",
        f"{sent / 1e9:.1f} GB" if known else "not known",
        least,
        f"{sum(part['seconds'] for part in parts):.0f} s",
    ]
    return f"| {' | '.join(cells)} |"


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--output", type=Path, required=True, help="folder of the figures")
    parser.add_argument("--only", nargs="+", default=[""], help="cases whose name has one of these in it")
    parser.add_argument("--table", action="store_true", help="compile nothing")
    options = parser.parse_args()
    options.output.mkdir(parents=True, exist_ok=True)
    print("| plan | mesh | together | fits | peak of a chip | sent per chip | at least | compiled in |")
    print("|---|---|---|---|---|---:|---:|---:|")
    failed = []
    for name, arguments in cases(options.output).items():
        kept = options.output / f"{name.replace(' ', '_').replace(':', '-')}.json"
        if not kept.is_file() and not options.table and any(text in name for text in options.only):
            command = [sys.executable, "-m", "read_jax.cli", "plan", *arguments, "--json", str(kept)]
            done = subprocess.run(command, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE, text=True)
            if not kept.is_file():
                failed.append(f"{name}: {done.stderr.strip().splitlines()[-1]}")
        if kept.is_file():
            print(row(name, json.loads(kept.read_text())), flush=True)
    if failed:
        sys.exit("\n".join(failed))


if __name__ == "__main__":
    main()
