"""Plots as SVG: lines over time, without style attributes or scripts."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Final

from markupsafe import Markup

from siderolink.common.text import timestamp

WIDTH, HEIGHT = 420, 160
_LEFT, _RIGHT, _TOP, _BOTTOM = 66, 8, 10, 24
_STEPS: Final = (2.0, 4.0, 10.0, 20.0)
"""Even numbers, so that half of a count is a whole number."""


@dataclass(frozen=True, slots=True)
class Line:
    """One line of a plot; `values` correspond to the plot's times, None for unknown ones."""

    name: str
    values: Sequence[float | None]


def _ceiling(value: float) -> float:
    """The next round number, at least 2."""
    if value <= 2:
        return 2.0
    power = 1.0
    while power * 10 <= value:
        power *= 10
    return next(step * power for step in _STEPS if step * power >= value)


def plot(name: str, title: str, times: Sequence[float], lines: Sequence[Line], write: Callable[[float], str]) -> Markup:
    """Lines over time with a legend; `write` formats a value. `name` must be unique on its page."""
    if len(times) < 2:
        wait = Markup('<text class="empty-text" x="{}" y="{}" text-anchor="middle">{}</text>').format(
            WIDTH / 2, HEIGHT / 2, "The first figures arrive in a few seconds."
        )
        return _figure(name, title, wait, Markup(""))
    top = _ceiling(max((value for line in lines for value in line.values if value is not None), default=0.0))
    first, span = times[0], max(times[-1] - times[0], 1e-9)

    def x(at: float) -> float:
        return _LEFT + (at - first) / span * (WIDTH - _LEFT - _RIGHT)

    def y(value: float) -> float:
        return HEIGHT - _BOTTOM - max(value, 0.0) / top * (HEIGHT - _TOP - _BOTTOM)

    drawn = Markup("").join(
        Markup('<path class="line line-{}" d="{}"/>').format(index, _path(times, line.values, x, y))
        for index, line in enumerate(lines)
    )
    grid = Markup("").join(
        Markup(
            '<line class="grid" x1="{}" x2="{}" y1="{:.1f}" y2="{:.1f}"/><text x="{}" y="{:.1f}" text-anchor="end">{}</text>'
        ).format(_LEFT, WIDTH - _RIGHT, y(value), y(value), _LEFT - 6, y(value) + 4, write(value))
        for value in (0.0, top / 2, top)
    )
    middle = first + span / 2
    ends = Markup("").join(
        Markup('<text x="{}" y="{}" text-anchor="{}">{}</text>').format(place, HEIGHT - 6, anchor, text)
        for place, anchor, text in (
            (_LEFT, "start", timestamp(times[0])[11:19]),
            ((_LEFT + WIDTH - _RIGHT) / 2, "middle", timestamp(middle)[11:19]),
            (WIDTH - _RIGHT, "end", f"{timestamp(times[-1])[11:19]} UTC"),
        )
    )
    return _figure(name, title, grid + ends + drawn, _legend(lines, write))


def _figure(name: str, title: str, drawn: Markup, legend: Markup) -> Markup:
    """Always the same size, so that nothing moves when data arrives."""
    return Markup(
        '<figure class="plot"><figcaption>{}</figcaption><svg viewBox="0 0 {} {}" role="img" aria-labelledby="{}-title">'
        '<title id="{}-title">{}</title>{}</svg><ul>{}</ul></figure>'
    ).format(title, WIDTH, HEIGHT, name, name, title, drawn, legend)


def _path(
    times: Sequence[float], values: Sequence[float | None], x: Callable[[float], float], y: Callable[[float], float]
) -> str:
    parts: list[str] = []
    pen = "M"
    for at, value in zip(times, values, strict=True):
        if value is None:
            pen = "M"
            continue
        parts.append(f"{pen}{x(at):.1f} {y(value):.1f}")
        pen = "L"
    return " ".join(parts)


def _legend(lines: Sequence[Line], write: Callable[[float], str]) -> Markup:
    """Each line's name and last value, which screen readers read instead of the picture."""
    found = Markup("")
    for index, line in enumerate(lines):
        last = next((value for value in reversed(line.values) if value is not None), None)
        shown = "" if last is None else write(last)
        found += Markup('<li><span class="key line-{}" aria-hidden="true"></span>{} <b>{}</b></li>').format(
            index, line.name, shown
        )
    return found
