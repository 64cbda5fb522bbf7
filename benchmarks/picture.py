"""Draws the figures of comparisons side by side, as an SVG. Called by report.py; it measures nothing."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from html import escape

WIDTH, LEFT, BAR, GAP = 760, 250, 11, 15
OURS_COLOR, THEIRS_COLOR, TEXT_COLOR = "#2266aa", "#b8bec6", "#222222"


@dataclass(frozen=True)
class Bars:
    """Tokens per second of this library and of llama.cpp, and the median ratio of pairs that took turns."""

    name: str
    ours: float
    theirs: float
    ratio: float


def draw(title: str, rows: Sequence[Bars]) -> str:
    """An SVG in which a row has two bars: llama.cpp's, all of one length, and ours, longer by the ratio."""
    unit = (WIDTH - LEFT - 150) / max(row.ratio for row in rows)
    parts = [f'<text x="12" y="24" font-size="15" font-weight="bold">{escape(title)}</text>']
    top = 46
    for row in rows:
        parts += [
            f'<text x="{LEFT - 10}" y="{top + BAR + 4}" text-anchor="end">{escape(row.name)}</text>',
            _bar(top, unit * row.ratio, OURS_COLOR, f"{row.ours:g} tok/s, {row.ratio:.2f} times"),
            _bar(top + BAR + 1, unit, THEIRS_COLOR, f"{row.theirs:g}"),
        ]
        top += 2 * BAR + GAP
    parts += [_key(LEFT, top, OURS_COLOR, "smallthinker_edge"), _key(LEFT + 170, top, THEIRS_COLOR, "llama.cpp")]
    return (
        f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {WIDTH} {top + 24}" font-family="sans-serif" '
        f'font-size="12" fill="{TEXT_COLOR}" role="img" aria-label="{escape(title)}">\n'
        f'<rect width="100%" height="100%" fill="white"/>\n' + "\n".join(parts) + "\n</svg>\n"
    )


def _bar(top: float, length: float, color: str, label: str) -> str:
    return (
        f'<rect x="{LEFT}" y="{top}" width="{length:.1f}" height="{BAR}" fill="{color}"/>'
        f'<text x="{LEFT + length + 6:.1f}" y="{top + BAR - 1}">{escape(label)}</text>'
    )


def _key(left: float, top: float, color: str, label: str) -> str:
    return (
        f'<rect x="{left}" y="{top}" width="{BAR}" height="{BAR}" fill="{color}"/>'
        f'<text x="{left + BAR + 5}" y="{top + BAR - 1}">{escape(label)}</text>'
    )
