"""Line charts, laid out as numbers for an SVG in a template: no library, and colours follow the page's theme."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

WIDTH, HEIGHT = 440, 230
LEFT, RIGHT, TOP, BOTTOM = 62, 20, 10, 40
DOTS = 60
"""Up to so many rounds, each point has a dot that tells its value."""

Points = Sequence[tuple[float, float]]
"""x, such as a round, and value; where there is no value the point is left out."""


@dataclass(frozen=True)
class Line:
    """One series."""

    label: str
    last: str
    """The last value, in words."""
    path: str
    """`x,y x,y …` of an SVG polyline."""
    dots: tuple[tuple[float, float, str], ...]
    """x, y and what the point says."""


@dataclass(frozen=True)
class Chart:
    """One drawing of WIDTH × HEIGHT units."""

    title: str
    lines: tuple[Line, ...]
    x_ticks: tuple[tuple[float, str], ...]
    y_ticks: tuple[tuple[float, str], ...]
    limit: tuple[float, str] | None
    """Height and label of a line that the series should stay under."""
    axis: str
    """What lies across, such as `round`."""


def chart(
    title: str,
    series: Mapping[str, Points],
    show: Callable[[float], str],
    *,
    tick: Callable[[float], str] = "{:g}".format,
    from_zero: bool = False,
    limit: tuple[float, str] | None = None,
    axis: str = "round",
    whole: bool = True,
) -> Chart | None:
    """Lay out a chart.

    Args:
        title: what is drawn.
        series: points by label; those that are not finite are left out.
        show: a value in words.
        tick: a value in words beside the axis.
        from_zero: start the axis at 0, not at the smallest value.
        limit: a value that the series should stay under, and its label.
        axis: what lies across.
        whole: whether only whole numbers lie there, which also means that the last point is worth telling.

    Returns:
        The chart; None if there is no point to draw.
    """
    found = {label: [(x, y) for x, y in points if math.isfinite(y)] for label, points in series.items()}
    found = {label: points for label, points in found.items() if points}
    if not found:
        return None
    rounds = [x for points in found.values() for x, _ in points]
    values = [y for points in found.values() for _, y in points] + ([limit[0]] if limit else []) + ([0.0] if from_zero else [])
    first, last = min(rounds), max(rounds)
    y_ticks = _ticks(min(values), max(values), 4)
    low, high = y_ticks[0], y_ticks[-1]

    def across(x: float) -> float:
        share = (x - first) / (last - first) if last > first else 0.5
        return round(LEFT + share * (WIDTH - LEFT - RIGHT), 1)

    def down(y: float) -> float:
        return round(HEIGHT - BOTTOM - (y - low) / (high - low) * (HEIGHT - TOP - BOTTOM), 1)

    def line(label: str, points: Points) -> Line:
        told = [(across(x), down(y), f"{axis} {x:g}: {label} {show(y)}") for x, y in points]
        path = " ".join(f"{x},{y}" for x, y, _ in told)
        return Line(label, show(points[-1][1]) if whole else "", path, tuple(told) if len(told) <= DOTS else ())

    marks = [x for x in _ticks(first, last, 6) if first <= round(x, 9) <= last and (not whole or x == int(x))]
    return Chart(
        title,
        tuple(line(label, points) for label, points in found.items()),
        tuple((across(x), f"{x:,.10g}") for x in marks or [first]),
        tuple((down(y), tick(y)) for y in y_ticks),
        (down(limit[0]), limit[1]) if limit else None,
        axis,
    )


def _ticks(low: float, high: float, about: int) -> list[float]:
    """Multiples of 1, 2 or 5 times a power of ten that cover ``low`` to ``high``: at least two, so that they span an axis."""
    # values that hardly differ get an axis too, which does not blow up the difference
    span = max(high - low, 0.02 * max(abs(low), abs(high)), 1e-9)
    power = 10.0 ** math.floor(math.log10(span / about))
    step = next(factor * power for factor in (1, 2, 5, 10) if factor * power * about >= span * 0.999)
    begin = math.floor(low / step + 1e-9)
    end = max(math.ceil(high / step - 1e-9), begin + 1)
    return [index * step for index in range(begin, end + 1)]
