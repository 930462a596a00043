"""How the cost of an update of READ-7B grows with chips, questions, their length and the picture's size.

    python -m tests.benchmarks.growth [--plot launch/growth.svg]

By our own count (`read_jax.planning.cost`), which compiles nothing: per chip, one picture on each at a time.
What the compiler says of some of these is in launch/PLANS.md.
"""

from __future__ import annotations

import argparse
import dataclasses
import math
from collections.abc import Iterator
from pathlib import Path

from jax.sharding import AbstractMesh, AxisType

from read_jax.planning.cost import Cost, train_cost
from read_jax.planning.programs import Setup, architecture, set_up
from read_jax.sharding import AXES
from read_jax.training.config import load_config

RECIPE = "read_7b_reasonseg"
GIB = 2**30
COLOURS = ("#2563a8", "#c2410c")


def setup(chips: int = 16, *, image: int | None = None, **data: int) -> Setup:
    """A step with one picture per chip."""
    settings = [f"data.global_batch={chips}", "step.micro_batches=1"]
    config = load_config(RECIPE, settings + [f"data.{name}={value}" for name, value in data.items()])
    model = architecture(config)
    if image:
        model = model.replace(sam=dataclasses.replace(model.sam, image_size=image))
    return set_up(config, model)


def cost(step: Setup, chips: int = 16, fsdp: int = 16) -> Cost:
    """Of an update, per chip."""
    mesh = AbstractMesh((chips // fsdp, fsdp, 1), AXES, axis_types=(AxisType.Auto,) * 3)
    return train_cost(step, mesh)


def series() -> Iterator[tuple[str, list[tuple[str, Cost]]]]:
    """(what grows, its values with their costs)."""
    yield (
        "chips, all sharing the parameters",
        [(str(n), cost(setup(n), n, n)) for n in (4, 16, 64, 256)],
    )
    yield (
        "chips, 16 sharing the parameters",
        [(str(n), cost(setup(n), n, 16)) for n in (16, 64, 256)],
    )
    yield (
        "questions about each picture",
        [(str(n), cost(setup(questions=n))) for n in (1, 3, 10, 30)],
    )
    yield (
        "tokens of a question with its answer",
        [(str(n), cost(setup(tokens=n))) for n in (64, 128, 256, 512)],
    )
    yield (
        "pixels of SAM's square",
        [(str(n), cost(setup(image=n))) for n in (512, 1024, 2048)],
    )


def panel(title: str, points: list[tuple[str, Cost]], left: int) -> str:
    """Memory and operations over what grows, each as a factor of its first value."""
    lines = {
        "memory": [c.memory / points[0][1].memory for _, c in points],
        "operations": [c.done / points[0][1].done for _, c in points],
    }
    low, high = -2.0, 4.0  # powers of two

    def at(index: int, factor: float) -> str:
        x = left + 40 + index * 130 / max(len(points) - 1, 1)
        y = 200 - 160 * (min(max(math.log2(factor), low), high) - low) / (high - low)
        return f"{x:.1f},{y:.1f}"

    parts = [f'<text x="{left + 105}" y="20" text-anchor="middle">{title}</text>']
    for power in range(int(low), int(high) + 1):
        y = 200 - 160 * (power - low) / (high - low)
        parts.append(f'<path d="M{left + 35},{y:.1f}h140" stroke="#8888" stroke-width="0.5"/>')
        parts.append(f'<text x="{left + 30}" y="{y + 4:.1f}" text-anchor="end">x{2.0**power:g}</text>')
    for index, (label, _) in enumerate(points):
        x = at(index, 1).partition(",")[0]
        parts.append(f'<text x="{x}" y="218" text-anchor="middle">{label}</text>')
    for colour, (name, factors) in zip(COLOURS, lines.items(), strict=True):
        path = " ".join(at(i, factor) for i, factor in enumerate(factors))
        dashes = ' stroke-dasharray="5 3"' if name == "operations" else ""
        parts.append(f'<polyline points="{path}" fill="none" stroke="{colour}" stroke-width="2"{dashes}/>')
    return "".join(parts)


def plot(found: list[tuple[str, list[tuple[str, Cost]]]]) -> str:
    """All panels, as an SVG file."""
    panels = "".join(panel(title, points, 10 + 220 * i) for i, (title, points) in enumerate(found))
    width = 220 * len(found) + 20
    legend = (
        f'<text x="{width / 2}" y="245" text-anchor="middle">per chip, as a factor of the first: '
        f'<tspan fill="{COLOURS[0]}">memory</tspan>, '
        f'<tspan fill="{COLOURS[1]}">operations (dashed)</tspan></text>'
    )
    return (
        f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {width} 255" font-family="sans-serif" '
        f'font-size="10" role="img" aria-label="Growth of memory and operations per chip">'
        f'<rect width="{width}" height="255" fill="white"/>{panels}{legend}</svg>\n'
    )


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--plot", type=Path, help="file of the plot, SVG")
    options = parser.parse_args()
    found = list(series())
    for title, points in found:
        print(f"\n| {title} | memory | TFLOP | of these useful | GB to and from memory |")
        print("|---:|---:|---:|---:|---:|")
        for label, c in points:
            print(
                f"| {label} | {c.memory / GIB:.2f} GiB | {c.done / 1e12:.1f} | {c.useful / 1e12:.1f} "
                f"| {c.bytes / 1e9:.0f} |"
            )
    if options.plot:
        options.plot.write_text(plot(found))


if __name__ == "__main__":
    main()
