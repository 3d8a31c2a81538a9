"""Formatting of values in templates: times, sizes, rates, and foreign text, which is never markup."""

from typing import Any, Final

import jinja2
from markupsafe import Markup, escape

from siderolink.common.text import one_line, printable, timestamp

LONGEST: Final = 4096
_SHORT: Final = 160
_SIZES: Final = ("B", "KiB", "MiB", "GiB", "TiB", "PiB")


def moment(at: float | None) -> Markup:
    """A time; the script shows it as an age."""
    text = timestamp(at)
    if not text:
        return Markup('<span class="none">never</span>')
    return Markup('<time datetime="{0}" data-at="{1}">{0}</time>').format(text, f"{at:.0f}")


def size(count: float) -> str:
    """``1.2 MiB``."""
    unit = _SIZES[0]
    for unit in _SIZES:
        if count < 1024 or unit == _SIZES[-1]:
            break
        count /= 1024
    return f"{count:.0f} {unit}" if unit == "B" or count >= 100 else f"{count:.1f} {unit}"


def rate(count: float) -> str:
    return f"{size(count)}/s"


def bit_rate(bits: float) -> str:
    """``20 Mbit/s``."""
    for unit in ("", "k", "M", "G"):
        if bits < 1000 or unit == "G":
            break
        bits /= 1000
    return f"{bits:,.4g} {unit}bit/s"


def number(count: float) -> str:
    """``12,345``."""
    return f"{count:,.0f}"


def seconds(passed: float) -> str:
    """``12 s``, ``3 min``, ``5 h``."""
    for unit, length in (("h", 3600), ("min", 60)):
        if passed >= 2 * length:
            return f"{passed / length:.0f} {unit}"
    return f"{max(0.0, passed):.0f} s"


def labels(found: dict[str, str]) -> str:
    """``a=b, c``, sorted."""
    return ", ".join(f"{key}={value}" if value else key for key, value in sorted(found.items()))


def short(text: str) -> str:
    """Text shortened for a row of a list."""
    return text if len(text) <= _SHORT else f"{text[: _SHORT - 1]}…"


def block(text: str) -> Markup:
    """Text of several lines."""
    return Markup(escape(printable(text)))


def _finalize(value: Any) -> Any:
    """Replaces control characters and marks that change the writing direction by spaces."""
    if value is None:
        return ""
    return one_line(value, limit=LONGEST) if isinstance(value, str) and not isinstance(value, Markup) else value


def make_environment() -> jinja2.Environment:
    """The template environment, which escapes everything."""
    environment = jinja2.Environment(
        loader=jinja2.PackageLoader("siderolink.web", "templates"),
        autoescape=True,
        undefined=jinja2.StrictUndefined,
        finalize=_finalize,
        trim_blocks=True,
        lstrip_blocks=True,
        auto_reload=False,
    )
    for given in (moment, timestamp, size, rate, bit_rate, number, seconds, labels, short, block):
        environment.filters[given.__name__] = given
    return environment
