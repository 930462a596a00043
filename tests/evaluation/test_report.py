"""The report: what it says, that it is safe to open, and that it is always written."""

from __future__ import annotations

import base64
import io
import json
import re
from html.parser import HTMLParser

import numpy as np
import pytest
from PIL import Image

from read_jax.errors import ImageError
from read_jax.evaluation import page
from read_jax.evaluation.report import cases_of, render_markdown, write_report
from read_jax.evaluation.summary import summarize
from read_jax.evaluation.tables import terminal_text
from tests.evaluation.records import (
    HEIGHT,
    NOTHING,
    WIDTH,
    box,
    failed,
    header,
    item,
    question,
    random_records,
    record,
)

EVIL = "<script>alert(1)</script> \"a\" & 'b' | *c* \x1b[31m\u202e"


class Page(HTMLParser):
    """What a browser would see; fails on tags that are not closed in order."""

    VOID = ("meta", "img")

    def __init__(self, text: str):
        super().__init__()
        self.tags: list[str] = []
        self.images: list[dict[str, str | None]] = []
        self.links: list[str] = []
        self.ids: set[str | None] = set()
        self.text = ""
        self._open: list[str] = []
        self.feed(text)
        self.close()
        assert self._open == []

    def handle_starttag(self, tag, attrs):
        values = dict(attrs)
        self.tags.append(tag)
        self.ids.add(values.get("id"))
        if tag == "img":
            self.images.append(values)
        self.links += [
            value for name, value in attrs if name in ("src", "href", "srcset", "action") and value
        ]
        if tag not in self.VOID:
            self._open.append(tag)

    def handle_startendtag(self, tag, attrs):
        self.tags.append(tag)

    def handle_endtag(self, tag):
        assert self._open.pop() == tag

    def handle_data(self, data):
        if self._open[-1:] != ["style"]:
            self.text += data


def boxes(records):
    """Items for random records: the targets' places do not matter."""
    return lambda index: item(records[index], [box(3, 3, 20, 20)] * 9)


def written(folder, head, records, load_item=None):
    summary = summarize(head, records, resamples=20)
    write_report(folder, head, records, summary, load_item or boxes(records))
    return summary, (folder / "report.md").read_text("utf-8"), (folder / "report.html").read_text("utf-8")


def test_the_three_files_are_written_and_nothing_else(tmp_path):
    summary, _, _ = written(tmp_path, header(), random_records(1, 5))
    assert sorted(p.name for p in tmp_path.iterdir()) == ["report.html", "report.md", "summary.json"]
    assert json.loads((tmp_path / "summary.json").read_text()) == summary


def test_an_earlier_report_is_replaced(tmp_path):
    for name in ("report.html", "report.md", "summary.json"):
        (tmp_path / name).write_text("earlier")
    _, markdown, html = written(tmp_path, header(), random_records(1, 5))
    assert "earlier" not in markdown + html + (tmp_path / "summary.json").read_text()


@pytest.mark.parametrize(
    "records",
    [
        [],
        [failed(0), failed(1)],
        [record(0)],
        random_records(2, 1),
        random_records(3, 6),
        random_records(4, 6, forced=True),
        [record(0, question(NOTHING, NOTHING))],
    ],
    ids=["empty", "errors", "no questions", "one", "generated", "forced", "absent"],
)
def test_any_records_make_a_page_of_well_formed_html(tmp_path, records):
    _, markdown, html = written(tmp_path, header(), records)
    seen = Page(html)
    assert {link[1:] for link in seen.links if link.startswith("#")} <= seen.ids
    assert not re.search(r"\b(nan|none|inf)\b", seen.text.lower().replace("none where", ""))
    assert not re.search(r"\bnan\b", markdown.lower())


def test_the_page_fetches_nothing(tmp_path):
    seen = Page(written(tmp_path, header(), random_records(5, 8))[2])
    assert "script" not in seen.tags and "link" not in seen.tags and "iframe" not in seen.tags
    assert seen.images and all(link.startswith(("#", "data:image/jpeg;base64,")) for link in seen.links)
    assert "url(" not in page.STYLE and "@import" not in page.STYLE


def test_texts_of_others_are_escaped_everywhere(tmp_path):
    asked = question(box(0, 0, 9, 9), box(0, 0, 9, 5), phrase=EVIL, question=EVIL, text=EVIL, kind=EVIL)
    other = question(box(0, 0, 9, 9), NOTHING, phrase=EVIL, text=EVIL, kind="plain", tags=[EVIL])
    records = [record(0, asked, other, image=EVIL), failed(1, EVIL)]
    head = header(dataset=EVIL, note=EVIL, **{EVIL: EVIL})
    _, markdown, html = written(tmp_path, head, records)
    seen = Page(html)
    assert "script" not in seen.tags and "<script>" in seen.text
    assert "\x1b" not in html + markdown
    assert "<script>" not in markdown.replace("\\<script\\>", "")
    widths = {line.count("|") - line.count("\\|") for line in markdown.splitlines() if line[:1] == "|"}
    assert max(widths) < 20  # no cell was cut in two
    table = markdown.split("could not be read\n\n")[1].split("\n\n")[0].splitlines()
    assert len(table) == 3 and len({len(re.findall(r"(?<!\\)\|", row)) for row in table}) == 1


def test_a_text_that_is_no_unicode_does_not_break_the_report(tmp_path):
    asked = question(box(0, 0, 9, 9), box(0, 0, 9, 5), phrase="caf\udce9", text="\x00")
    _, markdown, html = written(tmp_path, header(), [record(0, asked, image="caf\udce9.jpg")])
    assert "caf\ufffd" in html and "caf\ufffd" in markdown


def test_every_picture_has_words(tmp_path):
    asked = question(box(0, 0, 9, 9), box(0, 0, 9, 5), phrase='the "red" ball')
    seen = Page(written(tmp_path, header(), [record(0, asked)])[2])
    assert seen.images and all('the "red" ball' in (image["alt"] or "") for image in seen.images)


def test_the_picture_shows_the_answer_and_the_outline_of_the_target(tmp_path):
    target, answer = box(5, 5, 40, 30), box(15, 50, 40, 30)
    made = record(0, question(target, answer))
    html = written(tmp_path, header(), [made], lambda _: item(made, [target]))[2]
    data = Page(html).images[0]["src"] or ""
    drawn = np.asarray(Image.open(io.BytesIO(base64.b64decode(data.partition(",")[2])))).astype(int)
    assert drawn.shape == (HEIGHT, WIDTH, 3)
    inside_answer, inside_target, outside = drawn[35, 65], drawn[25, 20], drawn[55, 5]
    assert inside_answer[0] - inside_answer[2] > 40  # reddish
    assert np.abs(inside_target - 128).max() < 20 and np.abs(outside - 128).max() < 20
    edge = drawn[20:30, 2:8].reshape(-1, 3)
    assert (edge[:, 2] - edge[:, 0]).max() > 60  # a cyan line


def test_a_small_target_is_shown_close_up_too(tmp_path):
    small, large = box(30, 40, 6, 6), box(5, 5, 50, 80)
    for target, pictures in ((small, 2), (large, 1)):
        made = record(0, question(target, target))
        html = written(tmp_path, header(), [made], lambda _, m=made, t=target: item(m, [t]))[2]
        assert len(Page(html).images) == pictures


def test_huge_pictures_are_shrunk(tmp_path):
    target = np.zeros((3000, 4000), np.uint8)
    target[100:2500, 200:3500] = 1
    made = record(0, question(target, target), height=3000, width=4000)
    html = written(tmp_path, header(), [made], lambda _: item(made, [target]))[2]
    (image,) = Page(html).images
    assert max(int(image["width"] or 0), int(image["height"] or 0)) <= 600 and len(html) < 200_000


def test_pictures_stop_when_the_page_has_enough(tmp_path, monkeypatch):
    records = random_records(6, 12)
    full = len(Page(written(tmp_path, header(), records)[2]).images)
    monkeypatch.setattr(page, "MAX_PICTURE_BYTES", 3000)
    html = written(tmp_path, header(), records)[2]
    assert 0 < len(Page(html).images) < full and "pictures enough" in html


@pytest.mark.parametrize(
    "error",
    [FileNotFoundError(2, "No such file", "images/0.jpg"), ImageError("it ends early"), IndexError(0)],
)
def test_pictures_that_are_gone_leave_a_note(tmp_path, error):
    def gone(_):
        raise error

    _, _, html = written(tmp_path, header(), random_records(7, 4), gone)
    assert not Page(html).images and "No picture:" in html


def test_a_picture_that_has_changed_leaves_a_note(tmp_path):
    made = record(0, question(box(0, 0, 9, 9), box(0, 0, 9, 5)))
    other_size = {**made, "height": HEIGHT + 1}
    other_key = {**made, "key": "val/9"}
    for now in (other_size, other_key):
        target = np.ones((now["height"], WIDTH), np.uint8)
        _, _, html = written(tmp_path, header(), [made], lambda _, n=now, t=target: item(n, [t]))
        assert not Page(html).images and "has changed" in html


def test_worst_and_best_are_ordered_and_apart():
    target = box(0, 0, 20, 20)
    records = [record(i, question(target, box(0, 0, 20, 1 + i))) for i in range(19)]
    cases = cases_of(records)
    assert [c.index for c in cases.worst] == list(range(9))
    assert [c.index for c in cases.best] == list(range(18, 9, -1))


def test_one_picture_gives_one_of_the_worst():
    target, miss = box(0, 0, 20, 20), box(40, 40, 9, 9)
    records = [record(0, *[question(target, miss)] * 5), *(record(i, question(target, miss)) for i in (1, 2))]
    assert [c.index for c in cases_of(records).worst] == [0, 1]
    assert [c.index for c in cases_of(records).best] == [2]


def test_missed_and_hallucinated_are_kept_apart_from_the_worst():
    target = box(0, 0, 20, 20)
    missed, hallucinated = question(target, NOTHING), question(NOTHING, target)
    cases = cases_of([record(0, missed, question(target, target)), record(1, hallucinated)])
    assert [(c.index, c.number) for c in cases.missed] == [(0, 0)]
    assert [(c.index, c.number) for c in cases.hallucinated] == [(1, 0)]
    assert [(c.index, c.number) for c in cases.worst] == [(0, 1)] and not cases.best


def test_forced_mode_counts_an_empty_mask_among_the_worst():
    cases = cases_of([record(0, question(box(0, 0, 9, 9), NOTHING, forced=True))])
    assert len(cases.worst) == 1 and not cases.missed


@pytest.mark.parametrize(
    "settings, said",
    [
        ({"dataset": "ReasonSeg|val", "mode": "forced"}, ["59.8", "67.6", "62.3", "70.7"]),
        ({"dataset": "ReasonSeg|test", "mode": "forced"}, ["58.5", "58.6", "62.2", "62.8"]),
        ({"dataset": "refcoco|val", "mode": "forced"}, ["78.1"]),
        ({"dataset": "refcoco+|val", "mode": "forced"}, ["68.4"]),
        ({"dataset": "refcocog|val", "mode": "forced"}, ["70.1"]),
        ({"dataset": "fprefcoco|val", "mode": "generate"}, ["61.5", "82.87"]),
        ({"dataset": "fprefcoco+|val", "mode": "generate"}, ["54.54"]),
        ({"dataset": "fprefcocog|val", "mode": "generate"}, ["56.12"]),
    ],
)
def test_the_papers_numbers_stand_beside_ours(tmp_path, settings, said):
    _, markdown, html = written(tmp_path, header(**settings), random_records(8, 3))
    part = markdown.split("## Beside the paper")[1].split("##")[0]
    assert part.count("paper: READ") >= 1 and "this run: tiny" in part
    assert all(value in part and value in html for value in said)


@pytest.mark.parametrize(
    "settings",
    [
        {"dataset": "ReasonSeg|val", "mode": "generate"},
        {"dataset": "refcoco|testA", "mode": "forced"},
        {"dataset": "mine.jsonl", "mode": "forced"},
    ],
)
def test_other_modes_and_splits_have_no_paper_beside_them(tmp_path, settings):
    _, markdown, html = written(tmp_path, header(**settings), random_records(8, 3))
    assert "paper: READ" not in markdown and "paper: READ" not in html


def test_the_report_says_what_keeps_it_from_the_papers_settings(tmp_path):
    head = header(dataset="refcoco|val", mode="forced", source_length=100)
    markdown = written(tmp_path, head, random_records(9, 3))[1]
    assert "3 of the split's 100 pictures" in markdown and "compat is off" in markdown
    head |= {"source_length": 3, "compat": "read"}
    markdown = written(tmp_path, head, random_records(9, 3))[1]
    assert "Same dataset, mode and arithmetic" in markdown


@pytest.mark.parametrize("compat, words", [(None, "no defect"), ("read", "defects are reproduced")])
def test_compat_is_explained(tmp_path, compat, words):
    _, markdown, html = written(tmp_path, header(compat=compat), random_records(9, 3))
    assert words in markdown and words in html


def test_markdown_shows_values_with_their_intervals():
    records = random_records(10, 20)
    summary = summarize(header(), records, resamples=50)
    markdown = render_markdown(header(), summary, cases_of(records))
    entry = summary["overall"]["giou"]
    line = next(line for line in markdown.splitlines() if line.startswith("| gIoU"))
    assert f"{100 * entry['value']:.2f}" in line
    assert f"{100 * entry['low']:.1f}–{100 * entry['high']:.1f}" in line


def test_skipped_pictures_are_in_the_report_with_their_errors(tmp_path):
    _, markdown, html = written(tmp_path, header(), [*random_records(11, 2), failed(2, "it ends early")])
    for text in (markdown, html):
        assert "images/2.jpg" in text.replace("\\", "") and "it ends early" in text


def test_a_failure_without_a_name_is_listed_by_number(tmp_path):
    lost = {"index": 4, "key": None, "image": None, "error": "record 4 is damaged"}
    assert "number 4" in written(tmp_path, header(), [lost])[1]


def test_the_terminal_shows_every_value_there_is():
    text = terminal_text(summarize(header(), random_records(12, 10), resamples=20))
    assert all(name in text for name in ("gIoU", "cIoU", "See", "N-acc", "T-acc", "P@.5", "P@.9"))
    assert "See" not in terminal_text(summarize(header(), random_records(12, 5, forced=True), resamples=20))


def test_the_terminal_gets_no_control_characters():
    text = terminal_text(summarize(header(dataset="a\x1b[2J\nb"), [failed(0)], resamples=20))
    assert "\x1b" not in text and "\n" not in text
