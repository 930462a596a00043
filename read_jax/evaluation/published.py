"""What the paper reports, to be shown beside our own numbers and never mixed with them."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from typing import Any


@dataclasses.dataclass(frozen=True)
class Published:
    """One row of the paper (READ, CVPR 2025); every value in percent, None where it gives none."""

    dataset: str
    model: str
    mode: str
    giou: float | None = None
    ciou: float | None = None
    see_accuracy: float | None = None


PUBLISHED = (
    Published("ReasonSeg|val", "READ 7B", "forced", giou=59.8, ciou=67.6),
    Published("ReasonSeg|val", "READ 7B, fully fine-tuned", "forced", giou=62.3, ciou=70.7),
    Published("ReasonSeg|test", "READ 7B", "forced", giou=58.5, ciou=58.6),
    Published("ReasonSeg|test", "READ 13B", "forced", giou=62.2, ciou=62.8),
    Published("refcoco|val", "READ 7B", "forced", ciou=78.1),
    Published("refcoco+|val", "READ 7B", "forced", ciou=68.4),
    Published("refcocog|val", "READ 7B", "forced", ciou=70.1),
    Published("fprefcoco|val", "READ 7B", "generate", ciou=61.50, see_accuracy=82.87),
    Published("fprefcoco+|val", "READ 7B", "generate", ciou=54.54),
    Published("fprefcocog|val", "READ 7B", "generate", ciou=56.12),
)


def published(header: Mapping[str, Any]) -> list[Published]:
    """The paper's rows for the dataset and mode of a run."""
    return [p for p in PUBLISHED if (p.dataset, p.mode) == (header.get("dataset"), header.get("mode"))]


def differences(header: Mapping[str, Any], evaluated: int) -> list[str]:
    """In words, what keeps a run from being comparable with the paper's rows; empty when nothing does.

    evaluated: pictures whose answers were scored.
    """
    found = []
    length = header.get("source_length")
    if length is not None and evaluated != length:
        found.append(f"{evaluated} of the split's {length} pictures were evaluated")
    if header.get("compat") != "read":
        found.append("the original's defects were not reproduced (compat is off)")
    return found
