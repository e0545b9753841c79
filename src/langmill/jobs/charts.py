"""Charts as inline SVG: lines over steps, and bars with intervals. No script, no font, no file beside the page.

Colours, weights and dashes are classes (`s0`, `s1`, ...) that the page's style sheet defines once for light, dark
and print. Each chart carries a title and a description for those who do not see it; the page beside it holds the
same numbers as a table.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from html import escape

WIDTH, HEIGHT = 720, 300
LEFT, RIGHT, TOP, BOTTOM = 56, 16, 14, 44
MOST_POINTS = 400


@dataclass(frozen=True)
class Series:
    """One line: `style` is its class in the style sheet, so that a model keeps its colour from chart to chart."""

    name: str
    points: Sequence[tuple[float, float]]
    style: str = "s0"


@dataclass(frozen=True)
class Bar:
    """One horizontal bar, with a 95 % interval where there is one."""

    name: str
    value: float
    interval: tuple[float, float] | None = None
    style: str = "s0"


def ticks(low: float, high: float, about: int = 5) -> list[float]:
    """Round numbers (1, 2 or 5 times a power of ten) that cover [low, high] with about `about` steps."""
    scale = max(abs(low), abs(high))
    scale = scale if scale > 1e-100 else 1.0
    if not high - low > 1e-9 * scale:  # a flat line, or one that floats cannot tell from it
        low, high = low - scale / 2, high + scale / 2
    raw = (high - low) / max(1, about)
    power = 10.0 ** math.floor(math.log10(raw))
    step = next(m * power for m in (1, 2, 5, 10) if raw <= m * power * (1 + 1e-9))
    first, last = math.floor(low / step + 1e-9), math.ceil(high / step - 1e-9)
    return [float(f"{i * step:.12g}") for i in range(first, last + 1)]


def number(value: float) -> str:
    """A number for an axis: 1500 → 1.5k, 2000000 → 2M, 0.25 → 0.25."""
    for unit, suffix in ((1e9, "G"), (1e6, "M"), (1e3, "k")):
        if abs(value) >= unit:
            return f"{value / unit:.4g}{suffix}"
    return f"{value:.4g}"


def line_chart(title: str, lines: Iterable[Series], x_label: str, y_label: str, zero: bool = False) -> str:
    """Lines over a shared x axis. Points that are not finite are left out; `zero` makes y start at 0.

    Returns one `<figure>`, or a sentence where no line has a point.
    """
    kept = [
        Series(s.name, _thin([p for p in s.points if all(map(math.isfinite, p))]), s.style) for s in lines
    ]
    kept = [s for s in kept if s.points]
    if not kept:
        return f"<p>{escape(title)}: nothing was measured.</p>"
    x_ticks, y_ticks = _axes([p for s in kept for p in s.points], zero)
    x_low, x_high = min(p[0] for s in kept for p in s.points), max(p[0] for s in kept for p in s.points)
    x_high = x_high if x_high - x_low > 1e-9 * abs(x_high) else x_low + 1 + abs(x_low)

    def x_of(x: float) -> float:
        return LEFT + (x - x_low) / (x_high - x_low) * (WIDTH - LEFT - RIGHT)

    def y_of(y: float) -> float:
        return HEIGHT - BOTTOM - (y - y_ticks[0]) / (y_ticks[-1] - y_ticks[0]) * (HEIGHT - TOP - BOTTOM)

    parts = [_horizontal(y_of(t), number(t)) for t in y_ticks]
    parts += [
        f'<text class="tick" x="{x_of(t):.1f}" y="{HEIGHT - BOTTOM + 18}" text-anchor="middle">{number(t)}</text>'
        for t in x_ticks
        if x_low <= t <= x_high
    ]
    parts.append(_axis_names(x_label, y_label))
    parts += [_line(s, [(x_of(x), y_of(y)) for x, y in s.points]) for s in kept]
    ends = "; ".join(f"{s.name} from {s.points[0][1]:.4g} to {s.points[-1][1]:.4g}" for s in kept)
    return _figure(title, f"{y_label} over {x_label}: {ends}.", HEIGHT, "".join(parts), kept)


def bar_chart(title: str, bars: Sequence[Bar], x_label: str) -> str:
    """Horizontal bars from zero, each with its value and, where known, its interval as a whisker."""
    bars = [b for b in bars if math.isfinite(b.value)]
    if not bars:
        return f"<p>{escape(title)}: nothing was measured.</p>"
    row, left, right = 38, 180, 70
    height = TOP + row * len(bars) + BOTTOM
    x_ticks = ticks(0, max(max(b.value, b.interval[1] if b.interval else 0) for b in bars))
    scale = (WIDTH - left - right) / (x_ticks[-1] or 1)
    parts = []
    for t in x_ticks:
        x = left + t * scale
        parts.append(f'<line class="grid" x1="{x:.1f}" x2="{x:.1f}" y1="{TOP}" y2="{height - BOTTOM}"/>')
        parts.append(
            f'<text class="tick" x="{x:.1f}" y="{height - BOTTOM + 18}" text-anchor="middle">{number(t)}</text>'
        )
    for i, b in enumerate(bars):
        parts.append(_bar(b, TOP + row * i + 7, left, scale))
    middle = left + (WIDTH - left - right) / 2
    parts.append(
        f'<text class="axis" x="{middle:.0f}" y="{height - 6}" text-anchor="middle">{escape(x_label)}</text>'
    )
    said = "; ".join(f"{b.name} {b.value:.3f}" for b in bars)
    return _figure(title, f"{x_label}: {said}.", height, "".join(parts), [])


def _thin(points: Sequence[tuple[float, float]]) -> list[tuple[float, float]]:
    """At most MOST_POINTS points: means of equal runs, first and last kept, so that a long run makes no long page."""
    if len(points) <= MOST_POINTS:
        return list(points)
    size = math.ceil((len(points) - 2) / (MOST_POINTS - 2))
    inner = [points[i : i + size] for i in range(1, len(points) - 1, size)]
    means = [(sum(x for x, _ in run) / len(run), sum(y for _, y in run) / len(run)) for run in inner]
    return [points[0], *means, points[-1]]


def _axes(points: Sequence[tuple[float, float]], zero: bool) -> tuple[list[float], list[float]]:
    xs, ys = [p[0] for p in points], [p[1] for p in points]
    return ticks(min(xs), max(xs), 6), ticks(0 if zero else min(ys), max(ys))


def _horizontal(y: float, label: str) -> str:
    return (
        f'<line class="grid" x1="{LEFT}" x2="{WIDTH - RIGHT}" y1="{y:.1f}" y2="{y:.1f}"/>'
        f'<text class="tick" x="{LEFT - 8}" y="{y + 4:.1f}" text-anchor="end">{label}</text>'
    )


def _axis_names(x_label: str, y_label: str) -> str:
    middle = (TOP + HEIGHT - BOTTOM) / 2
    return (
        f'<text class="axis" x="{(LEFT + WIDTH - RIGHT) / 2:.0f}" y="{HEIGHT - 6}" text-anchor="middle">'
        f"{escape(x_label)}</text>"
        f'<text class="axis" transform="translate(13 {middle:.0f}) rotate(-90)" text-anchor="middle">'
        f"{escape(y_label)}</text>"
    )


def _line(series: Series, at: Sequence[tuple[float, float]]) -> str:
    name = escape(series.name)
    if len(at) == 1:
        x, y = at[0]
        dot = f'<circle class="dot {series.style}" cx="{x:.1f}" cy="{y:.1f}" r="3.5">'
        return f"{dot}<title>{name}</title></circle>"
    path = " ".join(f"{x:.1f},{y:.1f}" for x, y in at)
    return f'<polyline class="line {series.style}" points="{path}"><title>{name}</title></polyline>'


def _bar(bar: Bar, y: float, left: float, scale: float) -> str:
    end = left + bar.value * scale
    parts = [
        f'<text class="name" x="{left - 10:.0f}" y="{y + 16:.0f}" text-anchor="end">{escape(bar.name)}</text>',
        f'<rect class="bar {bar.style}" x="{left}" y="{y}" width="{max(1.0, end - left):.1f}" height="24" rx="3"/>',
    ]
    beyond = end
    if bar.interval:
        low, beyond = (left + v * scale for v in bar.interval)
        parts.append(
            f'<path class="whisker" d="M{low:.1f} {y + 7}v10M{beyond:.1f} {y + 7}v10M{low:.1f} {y + 12}H{beyond:.1f}"/>'
        )
    parts.append(f'<text class="value" x="{max(end, beyond) + 8:.1f}" y="{y + 16}">{bar.value:.3f}</text>')
    return "".join(parts)


def _figure(title: str, said: str, height: int, inner: str, lines: Sequence[Series]) -> str:
    keys = "".join(
        f'<li><svg class="key" viewBox="0 0 28 10" aria-hidden="true"><line class="line {s.style}" x1="1" x2="27" '
        f'y1="5" y2="5"/></svg>{escape(s.name)}</li>'
        for s in lines
    )
    legend = f'<ul class="legend">{keys}</ul>' if keys else ""
    return (
        f'<figure><figcaption>{escape(title)}</figcaption>{legend}<svg class="chart" role="img" '
        f'viewBox="0 0 {WIDTH} {height}" aria-label="{escape(title)}. {escape(said)}"><title>{escape(title)}</title>'
        f"<desc>{escape(said)}</desc>{inner}</svg></figure>"
    )
