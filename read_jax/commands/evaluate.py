"""`read-jax evaluate`: score a model on a dataset, and compare two runs."""

from __future__ import annotations

import argparse
from typing import Any

from read_jax.commands.shared import Progress, add_processes, command, join_processes


def add_evaluate(commands: Any) -> None:
    """Add `read-jax evaluate`."""
    parser = command(
        commands,
        "evaluate",
        _evaluate,
        "score a model on a dataset",
        "Writes every answer as it comes, so that a run that is stopped goes on where it was, and ends with "
        "a report: summary.json, report.md, report.html.",
    )
    parser.add_argument("model", metavar="MODEL_DIR", help="model folder made by read-jax convert, or nano")
    parser.add_argument(
        "--dataset",
        required=True,
        metavar="NAME",
        help="such as 'ReasonSeg|val', 'refcoco|testA', 'fprefcocog|val', 'R-refcoco|val', 'scenes|test', or "
        "a .jsonl file of your own",
    )
    parser.add_argument("--data", metavar="DIR", help="folder with the datasets in their original layout")
    parser.add_argument("--output", required=True, metavar="OUT", help="folder for answers and report")
    parser.add_argument(
        "--mode",
        choices=("forced", "generate"),
        help="forced: the right answer is given and its masks are scored, as the paper validates ReasonSeg "
        "and RefCOCO; generate: the model answers by itself, as the paper tests false premises (default: as "
        "the paper does for the dataset)",
    )
    parser.add_argument(
        "--compat",
        choices=("read",),
        help="reproduce the original's defects, on which its published numbers depend",
    )
    parser.add_argument(
        "--conversation",
        metavar="NAME",
        help="prompt format: llava_v1, vicuna_v1 or llava_llama_2 (default: llava_v1; with --compat read, "
        "what the original used for the mode)",
    )
    parser.add_argument(
        "--max-new-tokens",
        type=int,
        default=512,
        metavar="N",
        help="longest generated answer, in tokens (default: %(default)s)",
    )
    parser.add_argument(
        "--dtype", choices=("float32", "bfloat16"), help="type to compute in (default: as stored)"
    )
    parser.add_argument(
        "--images-per-batch", type=int, metavar="N", help="pictures that go through the device together"
    )
    parser.add_argument(
        "--devices",
        type=int,
        default=1,
        metavar="N",
        help="devices that share a copy of the model, where one is too small for it (default: %(default)s)",
    )
    parser.add_argument(
        "--copies",
        type=int,
        metavar="N",
        help="of the model in each process, that answer about different pictures at a time (default: as many "
        "as its devices are enough for)",
    )
    parser.add_argument("--limit", type=int, metavar="N", help="only the first N pictures")
    parser.add_argument(
        "--max-bad",
        type=float,
        default=0.01,
        metavar="SHARE",
        help="fail when more than this share of the pictures cannot be read (default: %(default)s)",
    )
    parser.add_argument("--overwrite", action="store_true", help="discard an earlier run in OUT")
    parser.add_argument(
        "--compare", metavar="OTHER", help="the OUT of another run: print the two side by side, paired"
    )
    add_processes(parser)


def _evaluate(arguments: argparse.Namespace) -> None:
    from read_jax.evaluation.compare import check_comparable, compare
    from read_jax.evaluation.runner import evaluate
    from read_jax.evaluation.tables import terminal_text
    from read_jax.processes import is_first
    from read_jax.weights.folders import terminate_politely

    if arguments.compare:
        check_comparable(arguments.compare, arguments.dataset)
    join_processes(arguments)

    def advance(done: int, total: int, what: str) -> None:
        progress.label("evaluating")
        progress(done, total, what)

    with terminate_politely(), Progress("loading the model", "picture") as progress:
        result = evaluate(
            arguments.model,
            arguments.dataset,
            arguments.data,
            arguments.output,
            mode=arguments.mode,
            compat=arguments.compat,
            conversation=arguments.conversation,
            max_new_tokens=arguments.max_new_tokens,
            dtype=arguments.dtype,
            images_per_batch=arguments.images_per_batch,
            devices=arguments.devices,
            copies=arguments.copies,
            limit=arguments.limit,
            max_bad=arguments.max_bad,
            overwrite=arguments.overwrite,
            progress=advance,
        )
    if is_first():
        print(terminal_text(result))
        if arguments.compare:
            print(compare(arguments.output, arguments.compare))
