"""How an evaluation's numbers and settings are put into words, for the report and the terminal alike."""

from __future__ import annotations

import unicodedata
from collections.abc import Mapping
from typing import Any

METRIC_NAMES = {
    "giou": "gIoU",
    "ciou": "cIoU",
    "see_accuracy": "See",
    "n_acc": "N-acc",
    "t_acc": "T-acc",
    **{f"precision@{t}": f"P@{t:.1f}".replace("0.", ".") for t in (0.5, 0.6, 0.7, 0.8, 0.9)},
}
METRIC_MEANINGS = {
    "giou": "mean over questions of intersection over union; 1 where there is nothing and nothing is drawn",
    "ciou": "summed intersections over summed unions",
    "see_accuracy": "questions whose target's presence was judged rightly",
    "n_acc": "of the questions whose target is absent, those answered without a mask",
    "t_acc": "of the questions whose target exists, those answered with a mask",
    "precision@0.5": "of the questions whose target exists, those with an IoU of at least .5, and so on",
}
MODES = {
    "forced": "the right answer was given to the model and its masks were scored; whether it would have "
    "answered so is not tested",
    "generate": "the model answered by itself, greedily, and was scored on what it said and drew",
}
COMPAT = {
    None: "off: pieces of one target are united, all masks of an answer count, and no defect of the original "
    "is reproduced",
    "read": "read: the original's defects are reproduced where its published numbers depend on them. Pixels "
    "where pieces of one target overlap are neither target nor background, so they can never be hit; of an "
    "answer with several masks only the first counts; what the original's loaders leave out is left out (of "
    "a ReasonSeg picture all texts but the first); sums are rounded to float32 and carry small constants",
}


def percent(value: float | None, digits: int = 2) -> str:
    """A share as a percentage without its sign; a dash where there is none."""
    return "–" if value is None else f"{100 * value:.{digits}f}"


def interval(entry: Mapping[str, Any]) -> str:
    """The interval of a summary's metric, such as "58.1–61.3"; empty where there is none."""
    if entry.get("low") is None:
        return ""
    return f"{percent(entry['low'], 1)}–{percent(entry['high'], 1)}"


def number(value: int) -> str:
    """With its thousands set apart."""
    return f"{value:,}"


def plural(count: int, noun: str) -> str:
    """ "1 picture", "2 pictures"."""
    return f"{number(count)} {noun}{'' if count == 1 else 's'}"


def shown(text: Any) -> str:
    """A text of someone else's, safe to look at: no control characters and no lone surrogates."""
    return "".join(
        c if c in "\n\t" or unicodedata.category(c) not in ("Cc", "Cs") else "\N{REPLACEMENT CHARACTER}"
        for c in str(text)
    )


def settings(header: Mapping[str, Any]) -> list[tuple[str, str]]:
    """Every setting of the run as (name, words), the ones that change the numbers first."""
    rest = dict(header)
    rows = [("dataset", shown(rest.pop("dataset", "–")))]
    mode, compat = rest.pop("mode", None), rest.pop("compat", None)
    if mode is not None:
        rows.append(("mode", f"{mode}: {MODES[mode]}" if mode in MODES else shown(mode)))
    rows.append(("compat", COMPAT.get(compat, shown(compat))))
    return rows + flat(rest)


def flat(settings: Mapping[str, Any], before: str = "") -> list[tuple[str, str]]:
    """(name, value) of every setting, those of inner mappings named after both."""
    rows: list[tuple[str, str]] = []
    for key, value in settings.items():
        name = f"{before}{key}".replace("_", " ")
        if isinstance(value, Mapping):
            rows += flat(value, f"{name}: ")
            continue
        if isinstance(value, list | tuple):
            value = ", ".join(map(str, value)) or None
        rows.append((shown(name), "–" if value is None else shown(value)))
    return rows


def model_name(header: Mapping[str, Any]) -> str:
    """The model's folder, from the header or what it says of the environment."""
    return shown(header.get("model") or (header.get("environment") or {}).get("model") or "")
