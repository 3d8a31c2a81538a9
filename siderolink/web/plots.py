"""Plots as SVG, drawn here: lines over time, without a style attribute or a script."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Final

from markupsafe import Markup

from siderolink.web.templating import timestamp

WIDTH, HEIGHT = 640, 180
_LEFT, _RIGHT, _TOP, _BOTTOM = 70, 8, 10, 24
_STEPS: Final = (1.0, 2.0, 5.0, 10.0)


@dataclass(frozen=True, slots=True)
class Line:
    """One line of a plot; `values` are beside the plot's times, None where nothing is known."""

    name: str
    values: Sequence[float | None]


def _ceiling(value: float) -> float:
    """The next round number."""
    if value <= 0:
        return 1.0
    power = 1.0
    while power * 10 <= value:
        power *= 10
    while power > value:
        power /= 10
    return next(step * power for step in _STEPS if step * power >= value)


def plot(name: str, title: str, times: Sequence[float], lines: Sequence[Line], write: Callable[[float], str]) -> Markup:
    """Lines over time, named by a legend; `write` gives a value's text. `name` is unique on its page."""
    if len(times) < 2:
        return Markup('<p class="none">{}: nothing to draw yet.</p>').format(title)
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
    ends = Markup('<text x="{}" y="{}">{}</text><text x="{}" y="{}" text-anchor="end">{}</text>').format(
        _LEFT, HEIGHT - 6, timestamp(times[0])[11:19], WIDTH - _RIGHT, HEIGHT - 6, timestamp(times[-1])[11:19]
    )
    return Markup(
        '<figure class="plot"><svg viewBox="0 0 {} {}" role="img" aria-labelledby="{}-title">'
        '<title id="{}-title">{}</title>{}{}{}</svg><figcaption>{}<ul>{}</ul></figcaption></figure>'
    ).format(WIDTH, HEIGHT, name, name, title, grid, ends, drawn, title, _legend(lines, write))


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
