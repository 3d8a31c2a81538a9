"""The result of a check."""

from collections.abc import AsyncIterator, Callable
from dataclasses import dataclass

__all__ = ["Check", "Finding", "bad", "good", "note"]


@dataclass(frozen=True, slots=True, kw_only=True)
class Finding:
    """One line of the report."""

    check: str
    is_good: bool | None
    """None if the finding is neither good nor bad."""
    text: str
    remedy: str = ""


Check = Callable[[], AsyncIterator[Finding]]


def good(check: str, text: str) -> Finding:
    return Finding(check=check, is_good=True, text=text)


def note(check: str, text: str, remedy: str = "") -> Finding:
    return Finding(check=check, is_good=None, text=text, remedy=remedy)


def bad(check: str, text: str, remedy: str) -> Finding:
    return Finding(check=check, is_good=False, text=text, remedy=remedy)
