"""What Similarity as Points is worth: points off, discrete and continuous, on the nano model.

    python -m tests.benchmarks.ablation --start MODEL_DIR --output DIR [--seeds 0 1 2] [--limit 300]

Trains `configs/nano_ablation.py` once per variant and seed (of the data's order) from the same model, one
that points but whose masks are still to be learned; scores every run with the right answers given, which
leaves the masks alone to be judged; and prints a table in Markdown, as mean and standard deviation over
seeds. Each run is a process of its own; what is finished is kept, so that a run that is stopped goes on.
"""

from __future__ import annotations

import argparse
import json
import statistics
import subprocess
import sys
from pathlib import Path

VARIANTS = {
    "off": ["start.sasp=off"],
    "discrete": ["start.continuous=False"],
    "continuous": [],
}
SCORES = ("giou", "ciou", "precision@0.5", "precision@0.9")


def command(*arguments: str | Path) -> None:
    """Runs read-jax, and stops where it fails."""
    subprocess.run([sys.executable, "-m", "read_jax.cli", *map(str, arguments)], check=True)


def run(folder: Path, start: Path, changes: list[str], dataset: str, limit: int) -> dict[str, float]:
    """Scores of the questions whose target exists, after training into the folder."""
    report = folder / "scores" / "summary.json"
    if not report.is_file():
        settings = [f"--config.{change}" for change in (f"start.model={start.resolve()}", *changes)]
        command("train", "--config", "nano_ablation", "--workdir", folder / "run", *settings)
        command("merge", folder / "run", "--average", "--overwrite", "--output", folder / "model")
        command(
            *("evaluate", folder / "model", "--dataset", dataset, "--limit", str(limit)),
            *("--mode", "forced", "--output", folder / "scores", "--overwrite"),
        )
    groups = {group["name"]: group for group in json.loads(report.read_text())["groups"]}
    existing = next(row for row in groups["presence"]["rows"] if row["label"] == "target exists")
    return {score: 100 * existing["metrics"][score]["value"] for score in SCORES}


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--start", type=Path, required=True, help="model folder to train from")
    parser.add_argument("--output", type=Path, required=True, help="folder for the runs")
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2])
    parser.add_argument("--dataset", default="scenes|test")
    parser.add_argument("--limit", type=int, default=300, help="pictures of the dataset that are scored")
    parser.add_argument("--change", action="append", default=[], help="KEY=VALUE for every run")
    options = parser.parse_args()
    found: dict[str, list[dict[str, float]]] = {variant: [] for variant in VARIANTS}
    for seed in options.seeds:  # all variants of a seed first: a part of the table is fair too
        for variant, changes in VARIANTS.items():
            settings = [*options.change, *changes, f"data.seed={seed}"]
            folder = options.output / f"{variant}-{seed}"
            found[variant].append(run(folder, options.start, settings, options.dataset, options.limit))
            print(variant, seed, found[variant][-1], flush=True)
    print(f"| points | {' | '.join(SCORES)} |\n|---|{'---:|' * len(SCORES)}")
    for variant, runs in found.items():
        cells = []
        for score in SCORES:
            values = [scores[score] for scores in runs]
            spread = f" ± {statistics.stdev(values):.1f}" if len(values) > 1 else ""
            cells.append(f"{statistics.mean(values):.1f}{spread}")
        print(f"| {variant} | {' | '.join(cells)} |")


if __name__ == "__main__":
    main()
