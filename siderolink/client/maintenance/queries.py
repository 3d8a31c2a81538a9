"""Selects resources by label queries and by a pattern of their ids.

Patterns come from untrusted callers and use RE2 syntax, as clients of the resource API do. RE2 matches in time linear in the
text. The package is an extra.
"""

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Final

from grpclib import GRPCError, Status

from siderolink.client.maintenance.resources.store import Change, ChangeKind, Resource
from siderolink.common.pb.cosi import resource as pb
from siderolink.common.text import one_line

MAX_TERMS = 128
"""Label terms of all queries of one call together."""
LONGEST_PATTERN: Final = 1024
_MEMORY: Final = 1 << 18
"""Memory limit of a compiled pattern, in bytes."""
_NUMBER = re.compile(r"[-+]?[0-9]{1,18}\Z")
_Operation = pb.LabelTermOperation


class PatternError(ValueError):
    """Raised when a pattern is malformed, too long, or needs too much memory."""


class NoPatternsError(Exception):
    """Raised when google-re2 is not installed."""


class Pattern:
    """A pattern that may occur anywhere in a text."""

    def __init__(self, text: str) -> None:
        """Raises PatternError or NoPatternsError."""
        try:
            import re2
        except ImportError:
            raise NoPatternsError("ID patterns need a package: pip install 'siderolink[patterns]'") from None
        if len(text) > LONGEST_PATTERN:
            raise PatternError(f"a pattern has at most {LONGEST_PATTERN} characters")
        options = re2.Options()
        options.max_mem, options.log_errors = _MEMORY, False
        try:
            self._compiled: Any = re2.compile(text, options)
        except (re2.error, UnicodeEncodeError) as error:
            raise PatternError(_reason(error)) from None

    def matches(self, text: str) -> bool:
        """Whether the pattern occurs in the text."""
        return self._compiled.search(text) is not None


def _reason(error: Exception) -> str:
    """The library's error text, which it gives as bytes."""
    reason = error.args[0] if error.args else ""
    return reason.decode(errors="replace") if isinstance(reason, bytes) else str(reason)


@dataclass(frozen=True, slots=True)
class Term:
    """One condition on a label. A missing label fails it, and passes it if inverted."""

    key: str
    operation: pb.LabelTermOperation
    values: tuple[str, ...]
    is_inverted: bool

    def holds(self, labels: Mapping[str, str]) -> bool:
        found = self._compare(labels.get(self.key))
        return found is not None and found != self.is_inverted

    def _compare(self, value: str | None) -> bool | None:
        """None for a numeric comparison without numbers: it fails, inverted or not."""
        if value is None:
            return False
        if self.operation is _Operation.EXISTS:
            return True
        if not self.values:
            return False
        first = self.values[0]
        match self.operation:
            case _Operation.EQUAL:
                return value == first
            case _Operation.IN:
                return value in self.values
            case _Operation.LT:
                return value < first
            case _Operation.LTE:
                return value <= first
            case _Operation.LT_NUMERIC | _Operation.LTE_NUMERIC:
                if not _NUMBER.match(value) or not _NUMBER.match(first):
                    return None
                left, right = int(value), int(first)
                return left < right or (left == right and self.operation is _Operation.LTE_NUMERIC)
        return False


@dataclass(frozen=True, slots=True)
class Selection:
    """Matches resources whose labels meet all terms of any query and whose id contains the pattern."""

    queries: tuple[tuple[Term, ...], ...] = ()
    pattern: Pattern | None = None

    def holds(self, resource: Resource) -> bool:
        if self.pattern is not None and not self.pattern.matches(resource.id):
            return False
        return not self.queries or any(all(term.holds(resource.labels) for term in terms) for terms in self.queries)

    def kind_of(self, change: Change) -> ChangeKind | None:
        """The kind of a change as seen by a watcher of this selection, or None if it does not concern the watcher."""
        is_in = self.holds(change.resource)
        was_in = change.old is not None and self.holds(change.old)
        if change.kind is not ChangeKind.UPDATED or (is_in and was_in):
            return change.kind if is_in else None
        if is_in:
            return ChangeKind.CREATED
        return ChangeKind.DESTROYED if was_in else None


def read_selection(labels: Sequence[pb.LabelQuery], ids: pb.IdQuery | None) -> Selection:
    """Read the queries of a call. Raises GRPCError."""
    if sum(len(query.terms) for query in labels) > MAX_TERMS or len(labels) > MAX_TERMS:
        raise GRPCError(Status.INVALID_ARGUMENT, f"a call has at most {MAX_TERMS} label terms")
    queries = tuple(tuple(map(_term, query.terms)) for query in labels)
    if ids is None or not ids.regexp:
        return Selection(queries)
    try:
        return Selection(queries, Pattern(ids.regexp))
    except PatternError as error:
        raise GRPCError(Status.INVALID_ARGUMENT, one_line(f"failed to compile regexp: {error}")) from None
    except NoPatternsError as error:
        raise GRPCError(Status.UNIMPLEMENTED, str(error)) from None


def _term(term: pb.LabelTerm) -> Term:
    if term.op not in tuple(_Operation):
        raise GRPCError(Status.UNIMPLEMENTED, f"unsupported label query operator: {int(term.op)}")
    if term.op is _Operation.NOT_EXISTS:
        return Term(term.key, _Operation.EXISTS, (), True)
    return Term(term.key, _Operation(term.op), tuple(term.value), term.invert)
