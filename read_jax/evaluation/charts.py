"""Small charts as inline SVG: no script, colours from the page's own variables, words for who cannot see."""

from __future__ import annotations

import itertools
from collections.abc import Mapping, Sequence
from html import escape
from typing import Any

_WIDTH, _HEIGHT = 460, 240
_LEFT, _RIGHT, _TOP, _BOTTOM = 46, 12, 14, 40


def histogram(edges: Sequence[float], counts: Sequence[int], label: str) -> str:
    """Bars over [0, 1]; `label` says for screen readers what is shown."""
    most = max(1, *counts)
    step = _nice_step(most)
    ticks = list(range(0, most + 1, step))
    parts = [_grid(step_y / most, f"{step_y:,}") for step_y in ticks]
    for low, high, count in zip(edges, edges[1:], counts, strict=False):
        x, width = _x(low) + 1, _x(high) - _x(low) - 2
        y = _y(count / most)
        parts.append(
            f'<rect class="bar" x="{x:.1f}" y="{y:.1f}" width="{width:.1f}" height="{_y(0) - y:.1f}">'
            f"<title>IoU {low:.2f} to {high:.2f}: {count}</title></rect>"
        )
    return _chart([*parts, *_axis("IoU"), _upright("questions")], label)


def curve(
    thresholds: Sequence[float],
    shares: Sequence[float],
    marks: Sequence[tuple[float, Mapping[str, Any]]],
    label: str,
) -> str:
    """Share of questions that reach an IoU, with intervals ({value, low, high}) at the marked thresholds."""
    parts = [_grid(i / 5, f"{20 * i}") for i in range(6)]
    line = " ".join(f"{_x(t):.1f},{_y(s):.1f}" for t, s in zip(thresholds, shares, strict=True))
    parts.append(f'<polyline class="line" points="{line}"/>')
    for threshold, entry in marks:
        if entry["value"] is None:
            continue
        x = _x(threshold)
        if entry["low"] is not None:
            parts.append(
                f'<line class="whisker" x1="{x:.1f}" x2="{x:.1f}" y1="{_y(entry["low"]):.1f}" '
                f'y2="{_y(entry["high"]):.1f}"/>'
            )
        parts.append(
            f'<circle class="dot" cx="{x:.1f}" cy="{_y(entry["value"]):.1f}" r="4">'
            f"<title>P@{threshold}: {100 * entry['value']:.2f}</title></circle>"
        )
    return _chart([*parts, *_axis("IoU of at least"), _upright("% of questions")], label)


def whisker(entry: Mapping[str, Any]) -> str:
    """A value and its interval on a line from 0 to 1, for a cell of a table; hidden from screen readers."""
    width, height = 120, 16
    if entry["value"] is None:
        return ""
    parts = [f'<line class="grid" x1="2" x2="{width - 2}" y1="8" y2="8"/>']

    def x(value: float) -> float:
        return 4 + (width - 8) * min(1.0, max(0.0, value))

    if entry["low"] is not None:
        parts.append(
            f'<line class="whisker" x1="{x(entry["low"]):.1f}" x2="{x(entry["high"]):.1f}" y1="8" y2="8"/>'
        )
    parts.append(f'<circle class="dot" cx="{x(entry["value"]):.1f}" cy="8" r="4"/>')
    return (
        f'<svg class="whiskers" viewBox="0 0 {width} {height}" width="{width}" height="{height}" '
        f'aria-hidden="true">{"".join(parts)}</svg>'
    )


def _x(value: float) -> float:
    return _LEFT + (_WIDTH - _LEFT - _RIGHT) * value


def _y(value: float) -> float:
    return _HEIGHT - _BOTTOM - (_HEIGHT - _TOP - _BOTTOM) * value


def _grid(share: float, text: str) -> str:
    y = _y(share)
    return (
        f'<line class="grid" x1="{_LEFT}" x2="{_WIDTH - _RIGHT}" y1="{y:.1f}" y2="{y:.1f}"/>'
        f'<text x="{_LEFT - 6}" y="{y + 4:.1f}" text-anchor="end">{text}</text>'
    )


def _axis(title: str) -> list[str]:
    ticks = [
        f'<text x="{_x(i / 5):.1f}" y="{_HEIGHT - _BOTTOM + 16}" text-anchor="middle">{i / 5:.1f}</text>'
        for i in range(6)
    ]
    middle = (_x(0) + _x(1)) / 2
    return [*ticks, f'<text x="{middle:.1f}" y="{_HEIGHT - 6}" text-anchor="middle">{title}</text>']


def _upright(title: str) -> str:
    middle = (_y(0) + _y(1)) / 2
    return (
        f'<text x="11" y="{middle:.1f}" text-anchor="middle" transform="rotate(-90 11 {middle:.1f})">'
        f"{title}</text>"
    )


def _nice_step(most: int) -> int:
    """1, 2 or 5 times a power of ten, for at most six lines."""
    return next(
        f * 10**power for power in itertools.count() for f in (1, 2, 5) if most / (f * 10**power) <= 5
    )


def _chart(parts: Sequence[str], label: str) -> str:
    return (
        f'<svg class="chart" viewBox="0 0 {_WIDTH} {_HEIGHT}" role="img" aria-label="{escape(label)}">'
        f"{''.join(parts)}</svg>"
    )
