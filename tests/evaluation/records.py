"""Hand-made records of evaluations, as the journal gives them."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from read_jax.data.item import Item, Query
from read_jax.evaluation.journal import Journal
from read_jax.evaluation.metrics import counts
from read_jax.images.masks import CompactMask, mask_to_rle

HEIGHT, WIDTH = 60, 90


def header(**settings: Any) -> dict[str, Any]:
    return {
        "dataset": "fprefcoco|val",
        "source_length": 3,
        "compat": None,
        "mode": "generate",
        "conversation": "llava_v1",
        "model_fingerprint": "0123",
        "environment": {"model": "tiny"},
    } | settings


def box(top: int, left: int, height: int, width: int, value: int = 1) -> np.ndarray:
    """uint8 [HEIGHT, WIDTH] with a filled box."""
    mask = np.zeros((HEIGHT, WIDTH), np.uint8)
    mask[top : top + height, left : left + width] = value
    return mask


NOTHING = np.zeros((HEIGHT, WIDTH), np.uint8)


def question(target: np.ndarray, pred: np.ndarray, *, forced: bool = False, **more: Any) -> dict[str, Any]:
    counted = counts(pred[None].astype(bool), target[None])
    hit, union, wanted, given, valid = (int(field[0]) for field in counted)
    return {
        "phrase": "the box",
        "question": "What is the box in this image?",
        "kind": None,
        "tags": [],
        "is_sentence": False,
        "ref_id": 0,
        "sent_id": 0,
        "exists": bool((target == 1).any()),
        "pred_exists": None if forced else bool(pred.any()),
        "text": "Sure, [SEG].",
        "iou_estimate": 0.5,
        "intersection": hit,
        "union": union,
        "target_pixels": wanted,
        "pred_pixels": given,
        "valid_pixels": valid,
        "mask": mask_to_rle(pred) if pred.any() else None,
    } | more


def record(index: int, *questions: Mapping[str, Any], **more: Any) -> dict[str, Any]:
    return {
        "index": index,
        "key": f"val/{index}",
        "image": f"images/{index}.jpg",
        "height": HEIGHT,
        "width": WIDTH,
        "questions": list(questions),
    } | more


def failed(index: int, error: str = "the file ends early") -> dict[str, Any]:
    return {"index": index, "key": f"val/{index}", "image": f"images/{index}.jpg", "error": error}


def random_records(seed: int, pictures: int, forced: bool = False, noise: int = 12) -> list[dict[str, Any]]:
    """Boxes answered by shifted boxes, some absent, some missed, of one to four questions a picture."""
    made = []
    for index in range(pictures):
        what = np.random.default_rng([7, index])  # the dataset is the same whatever the seed
        answers = np.random.default_rng([seed, index])
        questions = []
        for sent in range(int(what.integers(1, 5))):
            top, left = int(what.integers(0, 30)), int(what.integers(0, 40))
            shape = int(what.integers(2, 30)), int(what.integers(2, 45))
            exists = what.random() < 0.7
            dy, dx = answers.integers(-noise, noise + 1, 2).tolist()
            pred = box(max(0, top + dy), max(0, left + dx), *shape)
            pred = pred if answers.random() < (0.9 if exists else 0.3) else NOTHING
            text = "which of these could roll away on a slope" if what.random() < 0.4 else "box"
            questions.append(
                question(
                    box(top, left, *shape) if exists else NOTHING,
                    pred,
                    forced=forced,
                    phrase=text,
                    is_sentence=text != "box",
                    ref_id=index,
                    sent_id=sent,
                    kind=("referring", "reasoning")[int(what.integers(2))],
                )
            )
        made.append(record(index, *questions))
    return made


def item(made: Mapping[str, Any], targets: Sequence[np.ndarray]) -> Item:
    """The item that a record was made from, a grey picture."""
    return Item(
        key=made["key"],
        height=made["height"],
        width=made["width"],
        image_path=made["image"],
        queries=tuple(Query(q["phrase"], exists=q["exists"]) for q in made["questions"]),
        load_image=lambda: np.full((made["height"], made["width"], 3), 128, np.uint8),
        load_mask=lambda number: CompactMask.encode(targets[number]),
    )


def write_run(folder: Any, head: Mapping[str, Any], records: Sequence[Mapping[str, Any]]) -> None:
    """A folder as a run leaves it."""
    identity = {key: value for key, value in head.items() if key != "environment"}
    with Journal(folder, identity, head["environment"]) as journal:
        for made in records:
            journal.append(made)
