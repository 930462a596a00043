"""`read-jax segment`: questions about pictures on the command line."""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import Any

import read_jax
from read_jax.commands.shared import Progress, command


def add_segment(commands: Any) -> None:
    parser = command(
        commands,
        "segment",
        _segment,
        "ask questions about pictures and write masks",
        "Every prompt is asked about every image. The folder receives, per answer, a mask, an overlay and "
        "the similarity map with its points, and one result.json.",
    )
    parser.add_argument("model", metavar="MODEL_DIR", help="model folder made by read-jax convert, or nano")
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
    parser.add_argument(
        "--output",
        metavar="DIR",
        help="folder for the results (default: NAME-answers, after the picture, or answers for several)",
    )
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
    parser.add_argument(
        "--devices",
        type=int,
        default=1,
        metavar="N",
        help="devices that share the model, where one is too small for it (default: %(default)s)",
    )


def _segment(arguments: argparse.Namespace) -> None:
    from read_jax.images.decode import read_image
    from read_jax.inference.output import RESULT, ResultFolder
    from read_jax.inference.request import check_sampling, prepare_prompt
    from read_jax.text.conversation import check_question, get_template
    from read_jax.text.tokenizer import Tokenizer
    from read_jax.weights.checkpoint import UPSTREAM, load_config, model_folder
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
    pictures = arguments.images
    chosen = arguments.output or (f"{Path(pictures[0]).stem}-answers" if len(pictures) == 1 else "answers")
    output = ResultFolder(chosen, header, overwrite=arguments.overwrite)
    config = load_config(arguments.model)
    tokenizer = Tokenizer.load(model_folder(arguments.model) / UPSTREAM)
    for prompt in arguments.prompts:
        prepare_prompt(prompt, template, config, tokenizer)
    for path in arguments.images:
        read_image(path)

    bar = Progress("loading the model", "picture", len(arguments.images))
    with terminate_politely(), output as folder, bar as progress:
        segmenter = read_jax.load(arguments.model, dtype=arguments.dtype, devices=arguments.devices)
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
