"""The `read-jax` command. Subcommands are thin: they parse, call one function, and print."""

from __future__ import annotations

import argparse
import errno
import sys
from collections.abc import Sequence
from typing import Any

import read_jax
from read_jax.config import SASP_PRESETS
from read_jax.errors import ReadJaxError


def main(argv: Sequence[str] | None = None) -> int:
    """Run the command line; returns the exit status (0 done, 1 bad input, 2 bad usage, 130 interrupted)."""
    arguments = _parser().parse_args(argv)
    try:
        arguments.run(arguments)
    except ReadJaxError as error:
        return _fail(str(error))
    except OSError as error:
        if error.errno == errno.ENOSPC:
            return _fail(f"no space left on the device while writing {error.filename or 'the output'}.")
        return _fail(f"{error.strerror or error}: {error.filename}" if error.filename else str(error))
    except KeyboardInterrupt:
        print("read-jax: interrupted", file=sys.stderr)
        return 130
    return 0


def _fail(message: str) -> int:
    print(f"read-jax: error: {message}", file=sys.stderr)
    return 1


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="read-jax", description="Reasoning segmentation: READ, SESAME and LISA in JAX."
    )
    parser.add_argument("--version", action="version", version=f"read-jax {read_jax.__version__}")
    commands = parser.add_subparsers(title="commands", metavar="COMMAND", required=True)
    for add in (_add_convert, _add_export, _add_inspect, _add_segment):
        add(commands)
    return parser


def _command(commands: Any, name: str, run: Any, summary: str, details: str = "") -> argparse.ArgumentParser:
    parser = commands.add_parser(
        name,
        help=summary,
        description=f"{summary[0].upper()}{summary[1:]}. {details}".strip(),
        formatter_class=argparse.ArgumentDefaultsHelpFormatter,
    )
    parser.set_defaults(run=run)
    return parser


def _add_convert(commands: Any) -> None:
    parser = _command(
        commands,
        "convert",
        _convert,
        "turn a published PyTorch checkpoint into a model folder",
        "Takes READ, SESAME and LISA checkpoints, or plain LLaVA-1.5 together with --sam as the starting "
        "point of training.",
    )
    parser.add_argument("source", metavar="SOURCE", help="checkpoint folder, or its Hugging Face id")
    parser.add_argument(
        "--vision-tower", required=True, metavar="DIR", help="CLIP folder, or its Hugging Face id"
    )
    parser.add_argument("--output", required=True, metavar="MODEL_DIR", help="model folder to write")
    parser.add_argument("--sam", metavar="FILE", help="SAM weights (.pth) to use instead of the checkpoint's")
    parser.add_argument("--lora", metavar="PATH", help="LoRA adapter to merge: PEFT folder, or one file")
    parser.add_argument(
        "--lora-alpha", type=float, metavar="A", help="LoRA alpha; default: what the adapter says, else 2r"
    )
    parser.add_argument(
        "--dtype",
        choices=("float32", "bfloat16"),
        help="type to store; default: bfloat16 if the source is, else float32",
    )
    parser.add_argument(
        "--sasp",
        choices=tuple(SASP_PRESETS),
        help="Similarity-as-Points settings; default: by the width of the published models",
    )
    parser.add_argument("--overwrite", action="store_true", help="replace MODEL_DIR if it exists")


def _convert(arguments: argparse.Namespace) -> None:
    from read_jax.weights.convert import convert

    with _Progress("converting") as progress:
        summary = convert(
            arguments.source,
            arguments.vision_tower,
            arguments.output,
            sam=arguments.sam,
            lora=arguments.lora,
            lora_alpha=arguments.lora_alpha,
            dtype=arguments.dtype,
            sasp=arguments.sasp,
            overwrite=arguments.overwrite,
            progress=progress,
        )
    print(summary)


def _add_export(commands: Any) -> None:
    parser = _command(
        commands, "export", _export, "write a model folder as a checkpoint that the original PyTorch code loads"
    )
    parser.add_argument("model", metavar="MODEL_DIR")
    parser.add_argument("--output", required=True, metavar="DIR", help="checkpoint folder to write")
    parser.add_argument(
        "--format",
        choices=("safetensors", "bin"),
        default="safetensors",
        help="file format of the weights; bin needs torch",
    )
    parser.add_argument("--overwrite", action="store_true", help="replace DIR if it exists")


def _export(arguments: argparse.Namespace) -> None:
    from read_jax.weights.export import export

    with _Progress("exporting") as progress:
        summary = export(
            arguments.model,
            arguments.output,
            format=arguments.format,
            overwrite=arguments.overwrite,
            progress=progress,
        )
    print(summary)


def _add_inspect(commands: Any) -> None:
    parser = _command(commands, "inspect", _inspect, "say what a model folder holds")
    parser.add_argument("model", metavar="MODEL_DIR")


def _inspect(arguments: argparse.Namespace) -> None:
    from read_jax.weights.checkpoint import inspect

    print(inspect(arguments.model))


def _add_segment(commands: Any) -> None:
    parser = _command(
        commands,
        "segment",
        _segment,
        "ask questions about pictures and write masks",
        "Every prompt is asked about every image. The folder receives, per answer, a mask, an overlay and the "
        "similarity map with its points, and one result.json.",
    )
    parser.add_argument("model", metavar="MODEL_DIR")
    parser.add_argument("images", metavar="IMAGE", nargs="+")
    parser.add_argument(
        "--prompt", dest="prompts", action="append", required=True, metavar="TEXT", help="may be repeated"
    )
    parser.add_argument("--output", required=True, metavar="DIR", help="folder for the results")
    parser.add_argument(
        "--conversation",
        default="llava_v1",
        metavar="NAME",
        help="prompt format: llava_v1, vicuna_v1 or llava_llama_2",
    )
    parser.add_argument("--max-new-tokens", type=int, default=512, metavar="N", help="longest answer")
    parser.add_argument("--temperature", type=float, default=0.0, metavar="T", help="0 answers greedily")
    parser.add_argument("--top-p", type=float, default=1.0, metavar="P", help="nucleus of the sampling")
    parser.add_argument("--seed", type=int, default=0, metavar="N", help="seed of the sampling")
    parser.add_argument(
        "--dtype", choices=("float32", "bfloat16"), help="type to compute in; default: as stored"
    )


def _segment(arguments: argparse.Namespace) -> None:
    from read_jax.images.decode import read_image
    from read_jax.inference.output import ResultFolder
    from read_jax.text.conversation import check_question, get_template

    # everything that can be wrong with the request is found before the model is loaded
    get_template(arguments.conversation)
    for prompt in arguments.prompts:
        check_question(prompt)
    for path in arguments.images:
        read_image(path)

    segmenter = read_jax.load(arguments.model, dtype=arguments.dtype)
    for prompt in arguments.prompts:
        segmenter.prepare_prompt(prompt, arguments.conversation)
    settings = {
        "conversation": arguments.conversation,
        "max_new_tokens": arguments.max_new_tokens,
        "temperature": arguments.temperature,
        "top_p": arguments.top_p,
        "seed": arguments.seed,
    }
    header = {"read_jax": read_jax.__version__, "model": arguments.model, "settings": settings}
    with ResultFolder(arguments.output, header) as folder, _Progress("segmenting") as progress:
        for done, path in enumerate(arguments.images):
            image = read_image(path)
            results = segmenter.segment_batch([(image, prompt) for prompt in arguments.prompts], **settings)
            for prompt, result in zip(arguments.prompts, results, strict=True):
                entry = folder.add(path, prompt, image, result)
                found = f"{len(entry['masks'])} mask(s)" if entry["present"] else "nothing segmented"
                progress.say(f"{path}: {prompt}\n  {result.text}\n  {found} -> {entry['files']['overlay']}")
            progress(done + 1, len(arguments.images))
    print(f"{folder.folder / 'result.json'}")


class _Progress:
    """A progress bar on standard error; called as `progress(done, total)`."""

    def __init__(self, label: str):
        from tqdm import tqdm

        self._bar = tqdm(desc=label, file=sys.stderr, disable=None, leave=False)

    def __enter__(self) -> _Progress:
        return self

    def __exit__(self, *_: Any) -> None:
        self._bar.close()

    def __call__(self, done: int, total: int, what: str = "") -> None:
        self._bar.total = total
        self._bar.update(done - self._bar.n)

    def say(self, text: str) -> None:
        """Print a line above the bar."""
        self._bar.write(text, file=sys.stdout)


if __name__ == "__main__":
    sys.exit(main())
