"""The tables of a report as rows of text, the same for Markdown and HTML."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping, Sequence
from typing import Any

from read_jax.evaluation.metrics import THRESHOLDS
from read_jax.evaluation.published import differences, published
from read_jax.evaluation.wording import (
    METRIC_NAMES,
    interval,
    model_name,
    number,
    percent,
    plural,
    settings,
    shown,
)

_MOST_SKIPPED = 200


@dataclasses.dataclass(frozen=True)
class Table:
    """Rows under columns; a cell's text after a line break is its interval.

    words: the cells are sentences rather than numbers; notes: what is to be said below.
    """

    columns: Sequence[str]
    rows: Sequence[Sequence[str]]
    title: str = ""
    words: bool = False
    notes: Sequence[str] = ()


def headline(header: Mapping[str, Any], summary: Mapping[str, Any]) -> str:
    """What was evaluated, in one sentence."""
    counts = summary["counts"]
    parts = [f"{plural(counts['questions'], 'question')} about {plural(counts['pictures'], 'picture')}"]
    if counts["absent"]:
        parts.append(f"{number(counts['absent'])} of them with a target that is absent")
    if counts["skipped"]:
        parts.append(f"{plural(counts['skipped'], 'picture')} could not be read")
    mode = {"forced": "teacher-forced", "generate": "generated answers"}.get(str(header.get("mode")), "")
    return "; ".join([*parts, mode] if mode else parts) + "."


def intervals_in_words(summary: Mapping[str, Any]) -> str:
    """How the intervals were made."""
    how = summary["intervals"]
    return (
        f"All values in percent. Intervals: {100 * how['level']:.0f}%, {how['method']}, "
        f"{number(how['resamples'])} draws, seed {how['seed']}; none where fewer than two pictures bear on a "
        "value; one of no width only says that all of them agree."
    )


def existing_only(summary: Mapping[str, Any]) -> Mapping[str, Any] | None:
    """The metrics over the questions whose target exists; None when that is all of them, or none."""
    counts = summary["counts"]
    if not counts["absent"] or not counts["existing"]:
        return None
    rows = next(group["rows"] for group in summary["groups"] if group["name"] == "presence")
    return rows[0]["metrics"]  # existing ones come first


def absent_note(header: Mapping[str, Any], summary: Mapping[str, Any]) -> str:
    """What absent targets do to gIoU, and its value without them; empty when there are none."""
    metrics = existing_only(summary)
    if metrics is None:
        return ""
    why = ", which a given denial always earns" if header.get("mode") == "forced" else ""
    giou = metrics["giou"]
    bounds = f" ({interval(giou)})" if interval(giou) else ""
    return (
        f"gIoU counts a question whose target is absent as 1 when no mask is drawn{why}; over the "
        f"{number(summary['counts']['existing'])} whose target exists it is {percent(giou['value'])}{bounds}."
    )


def terminal_text(summary: Mapping[str, Any]) -> str:
    """The results in a few lines for a terminal."""
    header = summary["header"]
    lines = [f"{shown(header.get('dataset', ''))}: {headline(header, summary)}".replace("\n", " ")]
    table = overall_table(summary)
    if table:
        lines += [f"  {name:<6} {value:>6}  {bounds}" for name, value, bounds in table.rows]
        lines.append(f"  In percent, with {table.columns[-1]}s.")
        lines += [f"  {note}" for note in table.notes[:-1]]
    return "\n".join(lines)


def overall_table(summary: Mapping[str, Any]) -> Table | None:
    """Every metric that has a value, with its interval."""
    rows = [
        (METRIC_NAMES[key], percent(entry["value"]), interval(entry) or "–")
        for key, entry in summary["overall"].items()
        if entry["value"] is not None
    ]
    note = absent_note(summary["header"], summary)
    notes = [*([note] if note else []), intervals_in_words(summary)]
    level = f"{100 * summary['intervals']['level']:.0f}% interval"
    return Table(("metric", "%", level), rows, notes=notes) if rows else None


def group_table(group: Mapping[str, Any], summary: Mapping[str, Any]) -> Table | None:
    """One way of grouping; None when it puts everything in one group."""
    rows = group["rows"]
    if len(rows) == 1 and rows[0]["questions"] == summary["counts"]["questions"]:
        return None
    keys = [
        key
        for key in METRIC_NAMES
        if key not in (f"precision@{t}" for t in THRESHOLDS[1:-1:2])  # .6 and .8 only where there is room
        and any(row["metrics"][key]["value"] is not None for row in rows)
    ]
    cells = []
    for row in rows:
        values = [
            f"{percent(row['metrics'][key]['value'])}\n{interval(row['metrics'][key])}".rstrip()
            for key in keys
        ]
        cells.append((row["label"], number(row["questions"]), number(row["pictures"]), *values))
    columns = ("", "questions", "pictures", *(METRIC_NAMES[key] for key in keys))
    return Table(columns, cells, title=group["title"])


def published_table(header: Mapping[str, Any], summary: Mapping[str, Any]) -> Table | None:
    """The paper's numbers for this dataset and mode above ours; None where it has none."""
    paper = published(header)
    if not paper or not summary["counts"]["questions"]:
        return None
    keys = [k for k in ("giou", "ciou", "see_accuracy") if any(getattr(p, k) is not None for p in paper)]
    rows = [
        (f"paper: {p.model}", *("–" if getattr(p, k) is None else str(getattr(p, k)) for k in keys))
        for p in paper
    ]
    name = f"this run: {model_name(header)}"
    for label, metrics in ((name, summary["overall"]), (f"{name}, existing targets", existing_only(summary))):
        if metrics:
            values = (f"{percent(metrics[k]['value'])}\n{interval(metrics[k])}".rstrip() for k in keys)
            rows.append((label, *values))
    apart = differences(header, summary["counts"]["pictures"])
    note = (
        f"Not the paper's settings: {'; '.join(apart)}."
        if apart
        else "Same dataset, mode and arithmetic. The paper's rows are for the named models only."
    )
    return Table(("", *(METRIC_NAMES[k] for k in keys)), rows, notes=[note])


def skipped_table(summary: Mapping[str, Any]) -> Table | None:
    """Pictures without answers; None when there are none."""
    skipped = summary["skipped"]
    if not skipped:
        return None
    rows = [
        (shown(entry["image"] or entry["key"] or f"number {entry['index']}"), shown(entry["error"]))
        for entry in skipped[:_MOST_SKIPPED]
    ]
    rest = len(skipped) - len(rows)
    notes = [f"{number(rest)} more in summary.json."] if rest else []
    return Table(("picture", "error"), rows, words=True, notes=notes)


def settings_table(header: Mapping[str, Any]) -> Table:
    """Every setting of the run, in words where it changes what the numbers mean."""
    return Table(("setting", "value"), settings(header), words=True)
