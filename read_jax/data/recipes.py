"""The paper's training mixtures, as data. Rates: the original's training script."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping


@dataclasses.dataclass(frozen=True)
class Group:
    """Sources that share one rate.

    Attributes:
        name: for people.
        rate: how often, in proportion to the other groups' rates.
        sources: names as `load_source` takes them.
        source_rates: how often each, in proportion to one another; None: all alike.
    """

    name: str
    rate: float
    sources: tuple[str, ...]
    source_rates: tuple[float, ...] | None = None


REFER_SEG = ("refclef|train", "refcoco|train", "refcoco+|train", "refcocog|train")
NEG_REFER_SEG = ("R-refcocog|train", "R-refcoco|train", "R-refcoco+|train")
CORRECT_REFER_SEG = ("fprefcoco|train", "fprefcoco+|train", "fprefcocog|train")
SEM_SEG = ("ade20k|train", "cocostuff|train", "pascal_part|train", "paco_lvis|train", "mapillary|train")

RECIPES: dict[str, tuple[Group, ...]] = {
    "referseg": (  # the paper's mixture for referring segmentation and false premises
        Group("refer_seg", 12, REFER_SEG),
        Group("correct_refer_seg", 2, CORRECT_REFER_SEG),
        Group("vqa", 2, ("llava_instruct|train",)),
        Group("neg_refer_seg", 1, NEG_REFER_SEG),
    ),
    "reasonseg": (  # the paper's mixture for ReasonSeg
        Group("sem_seg", 10, SEM_SEG),
        Group("refer_seg", 1, REFER_SEG),
        Group("correct_refer_seg", 1, CORRECT_REFER_SEG),
        Group("vqa", 1, ("llava_instruct|train",)),
        Group("neg_refer_seg", 1, NEG_REFER_SEG),
        Group("reason_seg", 10, ("ReasonSeg|train",)),
    ),
}

Premises = Mapping[str, float]
"""What a picture is asked for, drawn once per example at these rates:

"true": things that are there; "stated": false premises that the dataset itself states; "deny": names from
`Item.absent`, answered by a denial; "correct": the same, answered by what is there instead.
What a picture cannot offer becomes "true"."""
PREMISE_KINDS = ("true", "stated", "deny", "correct")

_VOCABULARY: Premises = {"true": 0.85, "deny": 0.07, "correct": 0.08}
PREMISES: dict[str, Premises] = {
    "ReasonSeg": {"true": 0.85, "stated": 0.15},
    **{name.partition("|")[0]: _VOCABULARY for name in SEM_SEG},
}
"""By dataset family (the paper's rates). Elsewhere nothing is drawn: the texts themselves say what exists."""
