"""What machines report, as values."""

import json
from collections.abc import Mapping
from dataclasses import dataclass
from enum import StrEnum

from siderolink.common.machine_events import MachineEventPayload
from siderolink.server.store import Machine


class ReportDrop(StrEnum):
    """Why something that was to be a report was not taken."""

    UNKNOWN_SOURCE = "unknown source"
    """A connection, datagram or call from an address that is no machine's."""
    TOO_MANY_CONNECTIONS = "too many connections"
    """A log connection beyond those that one machine may have."""
    LINE_TOO_LONG = "line too long"
    """A log line above the cap."""
    LINE_RATE_LIMITED = "line rate limited"
    """A log line beyond what the machine may send."""
    LINE_INCOMPLETE = "line incomplete"
    """The connection ended within a log line."""
    EVENT_RATE_LIMITED = "event rate limited"
    """An event beyond what the machine may send; the machine sends it again."""
    EVENT_MALFORMED = "event malformed"
    """An event without content, or with an overlong id."""
    EVENT_REPEATED = "event repeated"
    """An event that the machine sent again though it had been taken; answered OK."""


@dataclass(frozen=True, slots=True, kw_only=True)
class MachineEvent:
    """Something a machine says it does."""

    machine: Machine
    received_at: float
    """Unix time in seconds."""
    id: str
    actor_id: str
    """What groups the events of one action."""
    type_url: str
    data: bytes
    """The event's message as it came."""
    payload: MachineEventPayload | None
    """The same, decoded; None for an unknown type, and for data that is not of its type."""


@dataclass(frozen=True, slots=True, kw_only=True)
class LogLine:
    """One line of a machine's kernel log."""

    machine: Machine
    received_at: float
    """Unix time in seconds."""
    raw: bytes
    """The line as it came, without its end."""

    def fields(self) -> Mapping[str, object]:
        """The line's JSON object: msg, talos-time, talos-level, facility, seq, clock, priority; empty where it is none."""
        try:
            found = json.loads(self.raw)
        except (ValueError, RecursionError):
            return {}
        return found if isinstance(found, dict) else {}

    @property
    def message(self) -> str:
        """What the line says: its field ``msg``, or the whole line where there is none."""
        found = self.fields().get("msg")
        return found if isinstance(found, str) else self.raw.decode(errors="replace")


@dataclass(frozen=True, slots=True, kw_only=True)
class LinesDropped:
    """Lines of a machine that were dropped since its last one that was taken."""

    machine: Machine
    reason: ReportDrop
    count: int


@dataclass(frozen=True, slots=True, kw_only=True)
class ReportsLost:
    """This reader was too slow; the oldest `count` reports were dropped."""

    count: int
