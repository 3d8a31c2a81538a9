"""Patterns that a stranger sends, in the syntax of RE2, which is what clients of the resource API write.

RE2 follows all branches of a pattern at the same time, so none takes longer than the text is long. The package is an extra.
"""

from typing import Any, Final

LONGEST_PATTERN: Final = 1024
_MEMORY: Final = 1 << 18
"""Bytes that a compiled pattern may take, its tables included."""


class PatternError(ValueError):
    """The pattern is malformed, too long, or too large."""


class NoPatternsError(Exception):
    """The package that matches is not installed."""


class Pattern:
    """A pattern that may occur anywhere in a text."""

    def __init__(self, text: str) -> None:
        """Raises PatternError or NoPatternsError."""
        try:
            import re2
        except ImportError:
            raise NoPatternsError("patterns of ids need a package: pip install 'siderolink[patterns]'") from None
        if len(text) > LONGEST_PATTERN:
            raise PatternError(f"a pattern has at most {LONGEST_PATTERN} characters")
        options = re2.Options()
        options.max_mem, options.log_errors = _MEMORY, False
        try:
            self._compiled: Any = re2.compile(text, options)
        except (re2.error, UnicodeEncodeError) as error:
            raise PatternError(_said(error)) from None

    def matches(self, text: str) -> bool:
        """Whether the pattern occurs in the text."""
        return self._compiled.search(text) is not None


def _said(error: Exception) -> str:
    """What is wrong; the library says it in bytes."""
    reason = error.args[0] if error.args else ""
    return reason.decode(errors="replace") if isinstance(reason, bytes) else str(reason)
