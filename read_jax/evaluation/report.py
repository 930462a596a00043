"""The report of an evaluation: numbers for programs, a text for notes, and a page to look at."""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

from read_jax.data.item import Item
from read_jax.errors import ReadJaxError
from read_jax.evaluation.cases import Case, Cases, Figure, choose_cases, picture
from read_jax.evaluation.groups import Questions
from read_jax.evaluation.page import render_page
from read_jax.evaluation.tables import (
    Table,
    group_table,
    headline,
    overall_table,
    published_table,
    settings_table,
    skipped_table,
)
from read_jax.evaluation.wording import number, percent, shown
from read_jax.files import write_file

SUMMARY, MARKDOWN, PAGE = "summary.json", "report.md", "report.html"


def write_report(
    folder: str | Path,
    header: Mapping[str, Any],
    records: Sequence[Mapping[str, Any]],
    summary: Mapping[str, Any],
    load_item: Callable[[int], Item],
) -> None:
    """Write `summary.json`, `report.md` and `report.html`, each in one step.

    Args:
        folder: where to; must exist.
        header, records: of the run.
        summary: what `summarize` made of them.
        load_item: gives the dataset's item of a picture again, to draw the worst and best cases. One that is
            gone or has changed is described without its picture.
    """
    folder = Path(folder)
    cases = cases_of(records)

    def pictures(case: Case) -> Sequence[Figure] | str:
        try:
            return picture(case, load_item)
        except (ReadJaxError, OSError, LookupError) as error:
            return " ".join(str(error).split()) or type(error).__name__

    page = render_page(header, summary, cases, pictures)
    write_file(folder / SUMMARY, (json.dumps(summary, indent=1, allow_nan=False) + "\n").encode())
    write_file(folder / MARKDOWN, render_markdown(header, summary, cases).encode())
    write_file(folder / PAGE, page.encode())


def cases_of(records: Sequence[Mapping[str, Any]]) -> Cases:
    """The worst, the best and the mistaken questions of a run."""
    asked = [record for record in records if record.get("questions")]
    ious = iter(Questions.of(asked).iou.tolist())
    return choose_cases(
        Case(record["index"], record["key"], record["image"], number, question, next(ious))
        for record in asked
        for number, question in enumerate(record["questions"])
    )


def render_markdown(header: Mapping[str, Any], summary: Mapping[str, Any], cases: Cases) -> str:
    """The report as Markdown: the page's tables, and its cases by name."""
    parts = [f"# {_escaped(header.get('dataset', 'evaluation'))}", headline(header, summary), "## Results"]
    overall = overall_table(summary)
    parts += _table(overall) if overall else ["No question was answered, so there is nothing to measure."]
    for heading, table in (
        ("## Beside the paper", published_table(header, summary)),
        *((f"## {t.title}", t) for t in (group_table(g, summary) for g in summary["groups"]) if t),
        ("## Worst cases", _case_table(cases.worst)),
        ("## Best cases", _case_table(cases.best)),
        (f"## Hallucinated: {number(cases.hallucinated_count)}", _case_table(cases.hallucinated)),
        (f"## Missed: {number(cases.missed_count)}", _case_table(cases.missed)),
        ("## Pictures that could not be read", skipped_table(summary)),
        ("## Settings", settings_table(header)),
    ):
        if table:
            parts += [heading, *_table(table)]
    return "\n\n".join(parts) + "\n"


def _case_table(cases: Sequence[Case]) -> Table | None:
    rows = [(shown(c.image or c.key), shown(c.question["phrase"]), percent(c.iou)) for c in cases]
    return Table(("picture", "asked for", "IoU"), rows, words=True) if rows else None


def _table(table: Table) -> list[str]:
    """As Markdown, its notes after it."""

    def line(cells: Sequence[str]) -> str:
        return f"| {' | '.join(_cell(cell) for cell in cells)} |"

    rule = "|".join(" --- " if table.words or not place else " ---: " for place in range(len(table.columns)))
    return [
        "\n".join([line(table.columns), f"|{rule}|", *map(line, table.rows)]),
        *map(_escaped, table.notes),
    ]


def _cell(text: str) -> str:
    """One line; an interval in brackets behind its value."""
    value, _, bounds = text.partition("\n")
    return _escaped(f"{value} ({bounds})" if bounds else value)


def _escaped(text: Any) -> str:
    """Nothing in it is taken for markup, and no line break ends a row."""
    text = " ".join(shown(text).split())
    return "".join("\\" + c if c in "\\`*_{}[]<>#|~$" else c for c in text)
