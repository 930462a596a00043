"""The report as one HTML page that needs nothing else: styles, charts and pictures are inside it."""

from __future__ import annotations

import base64
from collections.abc import Callable, Mapping, Sequence
from html import escape
from typing import Any

from read_jax.evaluation import charts
from read_jax.evaluation.cases import Case, Cases, Figure
from read_jax.evaluation.metrics import THRESHOLDS
from read_jax.evaluation.style import STYLE
from read_jax.evaluation.tables import (
    Table,
    absent_note,
    group_table,
    headline,
    intervals_in_words,
    published_table,
    settings_table,
    skipped_table,
)
from read_jax.evaluation.wording import (
    METRIC_MEANINGS,
    METRIC_NAMES,
    interval,
    model_name,
    number,
    percent,
    plural,
    shown,
)

MAX_PICTURE_BYTES = 6_000_000
"""Of all encoded pictures together; further cases are described without one."""
_LONGEST = 600  # characters of a question or answer that are shown

Picture = Callable[[Case], Sequence[Figure] | str]
"""The pictures of a case, or in words why there are none."""


def render_page(header: Mapping[str, Any], summary: Mapping[str, Any], cases: Cases, picture: Picture) -> str:
    """The whole page. Every text from the data or the model is escaped."""
    gallery = _Gallery(picture)
    title = f"{shown(header.get('dataset', 'evaluation'))} · {model_name(header)}".strip(" ·")
    sections = [
        _section("results", "Results", _results(summary)),
        _section("published", "Beside the paper", _tables(published_table(header, summary))),
        _section("distribution", "How good the masks are", _charts(summary)),
        _section("groups", "By group", _groups(summary)),
        _section("worst", "Worst cases", _worst(cases, gallery)),
        _section("best", "Best cases", _best(cases, gallery)),
        _section("premises", "False premises and missed targets", _mistakes(header, summary, cases, gallery)),
        _section("skipped", "Pictures that could not be read", _tables(skipped_table(summary))),
        _section("settings", "Settings", _tables(settings_table(header))),
    ]
    found = [(name, heading, body) for name, heading, body in sections if body]
    links = "".join(f'<a href="#{name}">{heading}</a>' for name, heading, _ in found)
    body = "".join(
        f'<section id="{name}" aria-labelledby="{name}-h"><h2 id="{name}-h">{heading}</h2>{content}</section>'
        for name, heading, content in found
    )
    return (
        '<!DOCTYPE html>\n<html lang="en"><head><meta charset="utf-8">'
        '<meta name="viewport" content="width=device-width, initial-scale=1">'
        '<meta http-equiv="Content-Security-Policy" '
        "content=\"default-src 'none'; img-src data:; style-src 'unsafe-inline'\">"
        f"<title>{escape(title)}</title><style>{STYLE}</style></head>\n<body><header><h1>{_text(title)}</h1>"
        f'<p>{escape(headline(header, summary))}</p><nav aria-label="Sections">{links}</nav></header>\n'
        f"<main>{body}</main></body></html>\n"
    )


def _section(name: str, heading: str, body: str) -> tuple[str, str, str]:
    return name, heading, body


def _results(summary: Mapping[str, Any]) -> str:
    found = {key: entry for key, entry in summary["overall"].items() if entry["value"] is not None}
    if not found:
        return "<p>No question was answered, so there is nothing to measure.</p>"
    precision = [key for key in found if key.startswith("precision@")]
    main = "".join(_card(key, entry) for key, entry in found.items() if key not in precision)
    rest = "".join(_card(key, found[key]) for key in precision)
    parts = [f'<dl class="cards">{main}</dl>', f'<dl class="cards small">{rest}</dl>' if rest else ""]
    absent = absent_note(summary["header"], summary)
    notes = [*([absent] if absent else []), intervals_in_words(summary)]
    return "".join(parts) + "".join(f'<p class="note">{escape(note)}</p>' for note in notes)


def _card(key: str, entry: Mapping[str, Any]) -> str:
    """A headline number."""
    meaning = f"<small>{escape(METRIC_MEANINGS[key])}</small>" if key in METRIC_MEANINGS else ""
    return (
        f'<div class="card"><dt>{METRIC_NAMES[key]}</dt><dd><strong>{percent(entry["value"])}</strong>'
        f'<span class="interval">{interval(entry) or "no interval"}</span>{charts.whisker(entry)}{meaning}'
        "</dd></div>"
    )


def _charts(summary: Mapping[str, Any]) -> str:
    bars, curve = summary["iou"]["histogram"], summary["iou"]["curve"]
    if not any(bars["counts"]):
        return ""
    marks = [(t, summary["overall"][f"precision@{t}"]) for t in THRESHOLDS]
    total = sum(bars["counts"])
    steps = list(zip(bars["edges"], bars["edges"][1:], bars["counts"], curve["shares"], strict=False))
    values = Table(
        rows=[[f"{a:.2f} to {b:.2f}", number(n), percent(share)] for a, b, n, share in steps],
        columns=["IoU", "questions", "% reaching the lower bound"],
    )
    return (
        f'<div class="charts"><figure>'
        f"{charts.histogram(bars['edges'], bars['counts'], f'Histogram of the IoU of {total} questions')}"
        f"<figcaption>IoU of the {plural(total, 'question')} whose target exists.</figcaption></figure>"
        f"<figure>"
        f"{charts.curve(curve['thresholds'], curve['shares'], marks, 'Precision by IoU threshold')}"
        "<figcaption>Share of them that reach an IoU. Dots with intervals: precision at .5 to .9."
        "</figcaption>"
        f"</figure></div><details><summary>The same as a table</summary>{_table(values)}</details>"
    )


def _groups(summary: Mapping[str, Any]) -> str:
    parts = []
    for group in summary["groups"]:
        table = group_table(group, summary)
        if table:
            plots = [charts.whisker(row["metrics"]["giou"]) for row in group["rows"]]
            parts.append(f"<h3>{escape(table.title)}</h3>{_table(table, plots)}")
    return "".join(parts)


def _worst(cases: Cases, gallery: _Gallery) -> str:
    if not cases.worst:
        return ""
    return (
        '<p class="note">Lowest IoU of the questions that were answered with a mask and whose target exists, '
        f"at most one of a picture.</p>{_LEGEND}{gallery.show(cases.worst)}"
    )


def _best(cases: Cases, gallery: _Gallery) -> str:
    if not cases.best:
        return ""
    return f'<p class="note">Highest IoU of the same.</p>{_LEGEND}{gallery.show(cases.best)}'


def _mistakes(header: Mapping[str, Any], summary: Mapping[str, Any], cases: Cases, gallery: _Gallery) -> str:
    if not summary["counts"]["questions"]:
        return ""
    if header.get("mode") == "forced":
        return '<p class="note">Not tested in forced mode: the answers were given to the model.</p>'
    parts = []
    for heading, several, count, note in (
        ("Hallucinated", cases.hallucinated, cases.hallucinated_count, "a mask for a target that is absent"),
        ("Missed", cases.missed, cases.missed_count, "no mask though the target exists"),
    ):
        of = summary["counts"]["absent" if heading == "Hallucinated" else "existing"]
        more = f", the largest {len(several)} shown" if count > len(several) else ""
        parts.append(
            f'<h3>{heading}</h3><p class="note">{number(count)} of {plural(of, "question")}: '
            f"{note}{more}.</p>"
        )
        if several:
            parts.append(_LEGEND + gallery.show(several))
    return "".join(parts)


_LEGEND = (
    '<ul class="legend"><li><i class="answer"></i>model’s mask</li><li><i class="target"></i>outline of the '
    'target</li><li><i class="ignored"></i>outline of what is not judged</li></ul>'
)


class _Gallery:
    """Cases as cards, with pictures until the page has enough of them."""

    def __init__(self, picture: Picture):
        self._picture = picture
        self._left = MAX_PICTURE_BYTES

    def show(self, cases: Sequence[Case]) -> str:
        return f'<div class="cases">{"".join(map(self._card, cases))}</div>'

    def _card(self, case: Case) -> str:
        question = case.question
        facts = [("IoU", percent(case.iou))]
        if question["target_pixels"]:
            facts.append(("target", f"{number(question['target_pixels'])} px"))
        facts.append(("mask", f"{number(question['pred_pixels'])} px"))
        if question.get("iou_estimate") is not None:
            facts.append(("own estimate", percent(question["iou_estimate"])))
        listed = "".join(f"<div><dt>{name}</dt><dd>{value}</dd></div>" for name, value in facts)
        answer = question["text"]
        said = f'<p class="said"><b>Model</b> {_text(answer)}</p>' if answer else ""
        return (
            f'<article class="case">{self._figures(case)}<p class="asked"><b>Asked</b> '
            f"{_text(question['question'])}</p>{said}<dl>{listed}</dl>"
            f'<p class="where">{_text(case.image or case.key)}</p></article>'
        )

    def _figures(self, case: Case) -> str:
        if self._left <= 0:
            return '<p class="gone">Not pictured: the page has pictures enough.</p>'
        figures = self._picture(case)
        if isinstance(figures, str):
            return f'<p class="gone">No picture: {_text(figures)}</p>'
        parts = []
        for figure in figures:
            self._left -= len(figure.jpeg)
            data = base64.b64encode(figure.jpeg).decode("ascii")
            alt = (
                f"{figure.caption} for “{_short(case.question['phrase'])}”: the model’s mask and the "
                f"target’s outline, IoU {percent(case.iou)}"
            )
            parts.append(
                f'<img src="data:image/jpeg;base64,{data}" width="{figure.width}" height="{figure.height}" '
                f'alt="{escape(alt)}" title="{escape(figure.caption)}">'
            )
        return f'<div class="pictures">{"".join(parts)}</div>'


def _tables(table: Table | None) -> str:
    return _table(table) if table else ""


def _table(table: Table, plots: Sequence[str] = ()) -> str:
    """plots: ready-made SVG for a last column."""
    heads = [f'<th scope="col">{escape(column)}</th>' for column in table.columns]
    if plots:
        heads.append('<th scope="col">gIoU, 0 to 100</th>')
    rows = []
    for place, row in enumerate(table.rows):
        cells = [f'<th scope="row">{_text(row[0])}</th>', *(f"<td>{_cell(value)}</td>" for value in row[1:])]
        if plots:
            cells.append(f"<td>{plots[place]}</td>")
        rows.append(f"<tr>{''.join(cells)}</tr>")
    notes = "".join(f'<p class="note">{_text(note)}</p>' for note in table.notes)
    kind = "words" if table.words else "numbers"
    return (
        f'<div class="scroll"><table class="{kind}"><thead><tr>{"".join(heads)}</tr></thead>'
        f"<tbody>{''.join(rows)}</tbody></table></div>{notes}"
    )


def _cell(value: str) -> str:
    """A value, its interval (after a line break) smaller."""
    first, _, rest = value.partition("\n")
    return _text(first) + (f'<span class="interval">{_text(rest)}</span>' if rest else "")


def _text(text: Any) -> str:
    """Escaped, cut when very long, and kept from turning the direction of what surrounds it."""
    return f"<bdi>{escape(_short(text))}</bdi>"


def _short(text: Any) -> str:
    text = shown(text)
    return text if len(text) <= _LONGEST else text[:_LONGEST] + " …"
