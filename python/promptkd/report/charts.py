"""Charts as inline SVG that follows the page's colours; nothing else is needed to draw them."""

from __future__ import annotations

import math
from collections.abc import Sequence
from html import escape

COLOURS = 4
"""Series colours that the page's style defines, --c0 to --c3; more series start again."""

_WIDTH, _HEIGHT = 360, 230
_LEFT, _RIGHT, _TOP, _BOTTOM = 46, 12, 28, 40

Point = tuple[float, float]


def line_chart(
    title: str,
    x_label: str,
    series: Sequence[tuple[str, Sequence[Point]]],
    *,
    y_range: tuple[float, float] | None = None,
) -> str:
    """Lines with a legend; a series of one point is a dot. Nothing to draw gives an empty string."""
    drawn = [(name, [p for p in pts if all(map(math.isfinite, p))]) for name, pts in series]
    drawn = [(name, points) for name, points in drawn if points]
    if not drawn:
        return ""
    xs = [x for _, points in drawn for x, _ in points]
    ys = [y for _, points in drawn for _, y in points]
    whole = all(x == round(x) for x in xs)  # steps and epochs
    x_ticks = nice_ticks(min(xs), max(xs), whole=whole)
    y_ticks = nice_ticks(*(y_range or (min(ys), max(ys))))
    frame = _Frame(x_ticks, y_ticks)
    body = [frame.axes(x_label)]
    for number, (name, points) in enumerate(drawn):
        colour = f"c{number % COLOURS}"
        path = " ".join(f"{frame.x(x):.1f},{frame.y(y):.1f}" for x, y in points)
        body.append(f'<polyline class="line {colour}" points="{path}"/>')
        if len(points) <= 25:
            body += [
                f'<circle class="dot {colour}" cx="{frame.x(x):.1f}" cy="{frame.y(y):.1f}" r="2.5">'
                f"<title>{escape(name)}: {y:.4g} at {x:g}</title></circle>"
                for x, y in points
            ]
    legend = "".join(
        f'<span class="key"><i class="swatch c{n % COLOURS}"></i>{escape(name)}</span>'
        for n, (name, _) in enumerate(drawn)
    )
    return _figure(title, "".join(body), legend)


def reliability_chart(
    title: str, bins: Sequence[tuple[float, int, float, float]], error: float
) -> str:
    """Accuracy against confidence, in percent: one bar a bin, as solid as its share of pictures.

    Args:
        title: above the chart.
        bins: (lower bound, pictures, mean confidence, accuracy) of every bin with pictures.
        error: expected calibration error, told in the title.
    """
    if not bins:
        return ""
    ticks = [0.0, 20.0, 40.0, 60.0, 80.0, 100.0]
    frame = _Frame(ticks, ticks)
    most = max(count for _, count, _, _ in bins)
    body = [frame.axes("confidence %")]
    for lower, count, confidence, accuracy in bins:
        left, right = frame.x(lower), frame.x(min(lower + 100 / 15, 100.0))
        top = frame.y(accuracy)
        opacity = 0.25 + 0.75 * count / most
        body.append(
            f'<rect class="bar c0" x="{left + 0.5:.1f}" y="{top:.1f}" width="{right - left - 1:.1f}" '
            f'height="{frame.y(0) - top:.1f}" fill-opacity="{opacity:.2f}"><title>{count} pictures, '
            f"confidence {confidence:.1f} %, accuracy {accuracy:.1f} %</title></rect>"
        )
        body.append(
            f'<circle class="dot c1" cx="{frame.x(confidence):.1f}" cy="{top:.1f}" r="2.5"/>'
        )
    body.append(
        f'<line class="ideal" x1="{frame.x(0)}" y1="{frame.y(0)}" x2="{frame.x(100)}" '
        f'y2="{frame.y(100)}"/>'
    )
    legend = (
        '<span class="key"><i class="swatch c0"></i>accuracy (paler: fewer pictures)</span>'
        '<span class="key"><i class="swatch c1"></i>at mean confidence</span>'
        '<span class="key">dashed: perfectly calibrated</span>'
    )
    return _figure(f"{title} (ECE {error:.1f} %)", "".join(body), legend)


def nice_ticks(low: float, high: float, *, whole: bool = False) -> list[float]:
    """Four to eight round numbers that enclose the range; fewer where they must be whole."""
    if high <= low:
        pad = abs(low) * 0.1 or 1.0
        low, high = low - pad, high + pad
    raw = (high - low) / 5
    power = 10.0 ** math.floor(math.log10(raw))
    step = next(m * power for m in (1, 2, 2.5, 5, 10) if m * power >= raw * 0.999)
    if whole:
        step = float(math.ceil(step))
    first, last = math.floor(low / step + 1e-9), math.ceil(high / step - 1e-9)
    return [n * step for n in range(first, last + 1)]


class _Frame:
    """Where values lie in the picture."""

    def __init__(self, x_ticks: Sequence[float], y_ticks: Sequence[float]) -> None:
        self._x_ticks, self._y_ticks = x_ticks, y_ticks

    def x(self, value: float) -> float:
        """Pixels from the left."""
        low, high = self._x_ticks[0], self._x_ticks[-1]
        return _LEFT + (value - low) / (high - low) * (_WIDTH - _LEFT - _RIGHT)

    def y(self, value: float) -> float:
        """Pixels from the top."""
        low, high = self._y_ticks[0], self._y_ticks[-1]
        return _HEIGHT - _BOTTOM - (value - low) / (high - low) * (_HEIGHT - _TOP - _BOTTOM)

    def axes(self, x_label: str) -> str:
        """Grid lines, tick labels and the label of the horizontal axis."""
        parts = []
        for value in self._y_ticks:
            y = self.y(value)
            parts.append(
                f'<line class="grid" x1="{_LEFT}" x2="{_WIDTH - _RIGHT}" y1="{y:.1f}" y2="{y:.1f}"/>'
            )
            parts.append(
                f'<text x="{_LEFT - 6}" y="{y + 4:.1f}" text-anchor="end">{value:.5g}</text>'
            )
        for value in self._x_ticks:
            parts.append(
                f'<text x="{self.x(value):.1f}" y="{_HEIGHT - _BOTTOM + 15}" text-anchor="middle">'
                f"{value:.5g}</text>"
            )
        middle = (_LEFT + _WIDTH - _RIGHT) / 2
        parts.append(
            f'<text x="{middle}" y="{_HEIGHT - 7}" text-anchor="middle">{escape(x_label)}</text>'
        )
        return "".join(parts)


def _figure(title: str, body: str, legend: str) -> str:
    return (
        f'<figure class="chart"><svg viewBox="0 0 {_WIDTH} {_HEIGHT}" role="img" '
        f'aria-label="{escape(title)}"><text class="title" x="{_LEFT}" y="16">{escape(title)}</text>'
        f"{body}</svg><figcaption>{legend}</figcaption></figure>"
    )
