"""The `read-jax` command. Subcommands are thin: they parse, call one function, and print."""

from __future__ import annotations

import argparse
import errno
import io
import os
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import read_jax
from read_jax.config import SASP_PRESETS
from read_jax.errors import ReadJaxError


def main(argv: Sequence[str] | None = None) -> int:
    """Run the command line; returns the exit status (0 done, 1 bad input, 2 bad usage, 130 interrupted)."""
    for stream in (sys.stdout, sys.stderr):
        if isinstance(stream, io.TextIOWrapper):  # names and answers may hold what the terminal cannot show
            stream.reconfigure(errors="backslashreplace")
    arguments = _parser().parse_args(argv)
    try:
        arguments.run(arguments)
        sys.stdout.flush()
    except ReadJaxError as error:
        return _fail(str(error))
    except BrokenPipeError:  # the reader of our output has left, as `| head` does
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 1
    except OSError as error:
        if error.errno in (errno.ENOSPC, errno.EDQUOT):
            return _fail(f"no space left on the device while writing {error.filename or 'the output'}.")
        return _fail(f"{error.strerror or error}: {error.filename}" if error.filename else str(error))
    except KeyboardInterrupt:
        print("read-jax: interrupted", file=sys.stderr)
        return 130
    except Exception as error:
        if not (isinstance(error, MemoryError) or "RESOURCE_EXHAUSTED" in str(error)):
            raise
        return _fail("out of memory. Try --dtype bfloat16, fewer prompts at a time, or a larger device.")
    return 0


def _fail(message: str) -> int:
    """One plain line on standard error, whatever the message holds; the exit status."""
    print(f"read-jax: error: {' '.join(message.split())}", file=sys.stderr)
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
        "point of training. The checkpoint is streamed: memory stays small, whatever its size.",
    )
    parser.add_argument("source", metavar="SOURCE", help="checkpoint folder, or its Hugging Face id")
    parser.add_argument(
        "--vision-tower",
        required=True,
        metavar="DIR",
        help="folder of the CLIP that the checkpoint was trained with, or its Hugging Face id",
    )
    parser.add_argument("--output", required=True, metavar="MODEL_DIR", help="model folder to write")
    parser.add_argument("--sam", metavar="FILE", help="SAM weights (.pth) to use instead of the checkpoint's")
    parser.add_argument(
        "--lora",
        metavar="PATH",
        help="LoRA adapter to merge: PEFT folder or its Hugging Face id, or one file",
    )
    parser.add_argument(
        "--lora-alpha",
        type=float,
        metavar="A",
        help="LoRA alpha (default: what the adapter says, else twice its rank)",
    )
    parser.add_argument(
        "--dtype",
        choices=("float32", "bfloat16"),
        help="type to store (default: bfloat16 if the source is, else float32)",
    )
    parser.add_argument(
        "--sasp",
        choices=tuple(SASP_PRESETS),
        help="Similarity-as-Points settings (default: by the width of the published models; "
        "SESAME checkpoints want off)",
    )
    parser.add_argument("--overwrite", action="store_true", help="replace MODEL_DIR if it exists")


def _convert(arguments: argparse.Namespace) -> None:
    from read_jax.weights.convert import convert

    with _Progress("converting", "B") as progress:
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
        commands,
        "export",
        _export,
        "write a model folder as a checkpoint that the original PyTorch code loads",
    )
    parser.add_argument("model", metavar="MODEL_DIR", help="model folder made by read-jax convert")
    parser.add_argument("--output", required=True, metavar="DIR", help="checkpoint folder to write")
    parser.add_argument(
        "--format",
        choices=("safetensors", "bin"),
        default="safetensors",
        help="file format of the weights; bin needs torch (default: %(default)s)",
    )
    parser.add_argument("--overwrite", action="store_true", help="replace DIR if it exists")


def _export(arguments: argparse.Namespace) -> None:
    from read_jax.weights.export import export

    with _Progress("exporting", "B") as progress:
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
    parser.add_argument("model", metavar="MODEL_DIR", help="model folder made by read-jax convert")


def _inspect(arguments: argparse.Namespace) -> None:
    from read_jax.weights.checkpoint import inspect

    print(inspect(arguments.model))


def _add_segment(commands: Any) -> None:
    parser = _command(
        commands,
        "segment",
        _segment,
        "ask questions about pictures and write masks",
        "Every prompt is asked about every image. The folder receives, per answer, a mask, an overlay and "
        "the similarity map with its points, and one result.json.",
    )
    parser.add_argument("model", metavar="MODEL_DIR", help="model folder made by read-jax convert")
    parser.add_argument("images", metavar="IMAGE", nargs="+", help="picture files (JPEG, PNG, WebP, ...)")
    parser.add_argument(
        "--prompt",
        dest="prompts",
        action="append",
        required=True,
        metavar="TEXT",
        help="question in plain words, such as 'Where is the dog? Please output segmentation mask.'; may be "
        "repeated",
    )
    parser.add_argument("--output", required=True, metavar="DIR", help="folder for the results")
    parser.add_argument("--overwrite", action="store_true", help="replace earlier results in DIR")
    parser.add_argument(
        "--conversation",
        default="llava_v1",
        metavar="NAME",
        help="prompt format, as the checkpoint was trained: llava_v1, vicuna_v1 or llava_llama_2 "
        "(default: %(default)s)",
    )
    parser.add_argument(
        "--max-new-tokens",
        type=int,
        default=512,
        metavar="N",
        help="longest answer, in tokens (default: %(default)s)",
    )
    parser.add_argument(
        "--temperature",
        type=float,
        default=0.0,
        metavar="T",
        help="above 0, answers are sampled, the more freely the higher (default: %(default)s, the likeliest "
        "token every time)",
    )
    parser.add_argument(
        "--top-p",
        type=float,
        default=1.0,
        metavar="P",
        help="sample only among the likeliest tokens that together have this probability "
        "(default: %(default)s)",
    )
    parser.add_argument(
        "--seed", type=int, default=0, metavar="N", help="seed of the sampling (default: %(default)s)"
    )
    parser.add_argument(
        "--dtype", choices=("float32", "bfloat16"), help="type to compute in (default: as stored)"
    )


def _segment(arguments: argparse.Namespace) -> None:
    from read_jax.images.decode import read_image
    from read_jax.inference.output import RESULT, ResultFolder
    from read_jax.inference.request import check_sampling, prepare_prompt
    from read_jax.text.conversation import check_question, get_template
    from read_jax.text.tokenizer import Tokenizer
    from read_jax.weights.checkpoint import UPSTREAM, load_config
    from read_jax.weights.folders import terminate_politely

    settings = {
        "conversation": arguments.conversation,
        "max_new_tokens": arguments.max_new_tokens,
        "temperature": arguments.temperature,
        "top_p": arguments.top_p,
        "seed": arguments.seed,
    }
    header = {"read_jax": read_jax.__version__, "model": arguments.model, "settings": settings}

    # everything that can be wrong with the request is found before the weights are loaded
    template = get_template(arguments.conversation)
    check_sampling(arguments.max_new_tokens, arguments.temperature, arguments.top_p, arguments.seed)
    for prompt in arguments.prompts:
        check_question(prompt)
    output = ResultFolder(arguments.output, header, overwrite=arguments.overwrite)
    config = load_config(arguments.model)
    tokenizer = Tokenizer.load(Path(arguments.model).expanduser() / UPSTREAM)
    for prompt in arguments.prompts:
        prepare_prompt(prompt, template, config, tokenizer)
    for path in arguments.images:
        read_image(path)

    bar = _Progress("loading the model", "picture", len(arguments.images))
    with terminate_politely(), output as folder, bar as progress:
        segmenter = read_jax.load(arguments.model, dtype=arguments.dtype)
        progress.label("segmenting")
        together = segmenter.images_per_batch
        for first in range(0, len(arguments.images), together):
            pictures = [(path, read_image(path)) for path in arguments.images[first : first + together]]
            asked = [(path, image, prompt) for path, image in pictures for prompt in arguments.prompts]
            results = segmenter.segment_batch([(image, prompt) for _, image, prompt in asked], **settings)
            for (path, image, prompt), result in zip(asked, results, strict=True):
                entry = folder.add(path, prompt, image, result)
                progress.say(_describe(entry, folder.folder))
            progress(first + len(pictures), len(arguments.images))
    print(f"results: {output.folder / RESULT}")


def _describe(entry: dict[str, Any], folder: Path) -> str:
    """An answer for the terminal."""
    if entry["present"]:
        found = f"{len(entry['masks'])} mask{'s' if len(entry['masks']) > 1 else ''}"
    else:
        found = "empty mask" if entry["masks"] else "no mask: the model gave none"
    return (
        f"{entry['image']}\n  asked:    {entry['prompt']}\n  answered: {entry['text']}\n"
        f"  {found}: see {folder / entry['files']['overlay']}"
    )


class _Progress:
    """A progress bar on standard error, only on a terminal; called as `progress(done, total)`."""

    def __init__(self, label: str, unit: str, total: int | None = None):
        from tqdm import tqdm

        self._bar = tqdm(
            desc=label,
            unit=unit,
            unit_scale=unit == "B",
            total=total,
            file=sys.stderr,
            disable=None,
            leave=False,
        )

    def __enter__(self) -> _Progress:
        return self

    def __exit__(self, *_: Any) -> None:
        self._bar.close()

    def __call__(self, done: int, total: int, what: str = "") -> None:
        self._bar.total = total
        self._bar.update(done - self._bar.n)

    def label(self, label: str) -> None:
        """Say what is being done now."""
        self._bar.set_description(label)

    def say(self, text: str) -> None:
        """Print lines above the bar."""
        self._bar.write(text, file=sys.stdout)


if __name__ == "__main__":
    sys.exit(main())
