"""Plots as SVG, drawn here: lines over time, without a style attribute or a script."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Final

from markupsafe import Markup

from siderolink.web.templating import timestamp

WIDTH, HEIGHT = 420, 160
_LEFT, _RIGHT, _TOP, _BOTTOM = 66, 8, 10, 24
_STEPS: Final = (2.0, 4.0, 10.0, 20.0)
"""Even ones, so that half of a count is one."""


@dataclass(frozen=True, slots=True)
class Line:
    """One line of a plot; `values` are beside the plot's times, None where nothing is known."""

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
    """Lines over time, named by a legend; `write` gives a value's text. `name` is unique on its page."""
    if len(times) < 2:
        wait = Markup('<text class="empty-text" x="{}" y="{}" text-anchor="middle">{}</text>').format(
            WIDTH / 2, HEIGHT / 2, "The first figures come in some seconds."
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
    """The same room whatever is in it, so that nothing moves when there is something to draw."""
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
    """Each line's name and its last value, which a screen reader reads in the place of the picture."""
    found = Markup("")
    for index, line in enumerate(lines):
        last = next((value for value in reversed(line.values) if value is not None), None)
        shown = "" if last is None else write(last)
        found += Markup('<li><span class="key line-{}" aria-hidden="true"></span>{} <b>{}</b></li>').format(
            index, line.name, shown
        )
    return found
