"""What Similarity as Points is worth: points off, discrete and continuous, on the nano model.

    python -m tests.benchmarks.ablation --output DIR [--seeds 0 1 2] [--limit 300]

All begin from one model: the nano model, whose mask decoder, prompt encoder and projection are new ones, so
that it answers and points and has its masks still to learn. `configs/nano_ablation.py` trains it once per
variant and seed (of the data's order); every run is scored with the right answers given, which leaves the
masks alone to be judged. Prints a table in Markdown, as mean and standard deviation over seeds. Each run is a
process of its own; what is finished is kept, so that a run that is stopped goes on.
"""

from __future__ import annotations

import argparse
import json
import shutil
import statistics
import subprocess
import sys
from pathlib import Path

import numpy as np
from flax import nnx

from read_jax.models.read import Read
from read_jax.weights.checkpoint import UPSTREAM, load_record, model_folder
from read_jax.weights.model import load_model, save_model

VARIANTS = {
    "off": ["start.sasp=off"],
    "discrete": ["start.continuous=False"],
    "continuous": [],
}
FORGOTTEN = ("sam.mask_decoder.", "sam.prompt_encoder.", "text_projection.")
SCORES = ("giou", "ciou", "precision@0.5", "precision@0.9")


def command(*arguments: str | Path) -> None:
    """Runs read-jax, and stops where it fails."""
    subprocess.run([sys.executable, "-m", "read_jax.cli", *map(str, arguments)], check=True)


def forget(start: Path, output: Path) -> None:
    """Write the model folder `start` with new parameters in all that draws masks, the encoder excepted."""
    record = load_record(start)
    known, new = (
        {".".join(map(str, path)): leaf[...] for path, leaf in nnx.to_flat_state(nnx.state(model))}
        for model in (load_model(start), Read(record.config, rngs=nnx.Rngs(0)))
    )
    leaves = {name: new[name] if name.startswith(FORGOTTEN) else known[name] for name in known}
    save_model(
        output,
        record.config,
        record.dtype,
        {**record.source, "forgotten": list(FORGOTTEN)},
        lambda row: np.asarray(leaves[row.path] if row.index is None else leaves[row.path][row.index]),
        lambda upstream: shutil.copytree(start / UPSTREAM, upstream) and None,
        inputs=[start],
    )


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
    parser.add_argument("--start", default="nano", help="model folder whose masks are learned anew")
    parser.add_argument("--output", type=Path, required=True, help="folder for the runs")
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2])
    parser.add_argument("--dataset", default="scenes|test")
    parser.add_argument("--limit", type=int, default=300, help="pictures of the dataset that are scored")
    parser.add_argument("--change", action="append", default=[], help="KEY=VALUE for every run")
    options = parser.parse_args()
    start = options.output / "start"
    if not start.is_dir():
        forget(model_folder(options.start), start)
    found: dict[str, list[dict[str, float]]] = {variant: [] for variant in VARIANTS}
    for seed in options.seeds:  # all variants of a seed first: a part of the table is fair too
        for variant, changes in VARIANTS.items():
            settings = [*options.change, *changes, f"data.seed={seed}"]
            folder = options.output / f"{variant}-{seed}"
            found[variant].append(run(folder, start, settings, options.dataset, options.limit))
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
