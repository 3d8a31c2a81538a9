"""The values reported by machines, and the options of the receivers."""

import json
import sys
from collections.abc import Mapping
from dataclasses import dataclass
from enum import StrEnum
from pathlib import Path

from siderolink.common.errors import ConfigurationError
from siderolink.common.machine_events import MachineEventPayload, event_type, summarize_event, unpack_event
from siderolink.common.pb.google.protobuf import Any
from siderolink.server.store import Machine

SMALLEST_LINE_CAP = 4096


@dataclass(frozen=True, slots=True, kw_only=True)
class KeepOptions:
    """Storage of machines' reports in files, which outlive the server."""

    folder: Path
    """Created with mode 0700 if missing. Only one server at a time can use it."""
    max_age: float = 7 * 86_400.0
    """Seconds."""
    machine_bytes: int = 8 * 1024 * 1024
    """Limit for the lines and events of one machine; the oldest are removed first. At least 65,536."""
    total_bytes: int = 1024 * 1024 * 1024
    """Limit for all machines; those of the longest silent are removed first. At least machine_bytes."""
    write_after: float = 1.0
    """Seconds until a received report is written."""

    def __post_init__(self) -> None:
        if not 65_536 <= self.machine_bytes <= self.total_bytes:
            raise ConfigurationError("machine_bytes must be at least 65,536, and at most total_bytes")
        if self.max_age <= 0:
            raise ConfigurationError("reports must be kept for more than 0 seconds")


@dataclass(frozen=True, slots=True, kw_only=True)
class ReportOptions:
    """Ports on the server's overlay address, and limits per machine. Port 0 selects a free one."""

    event_sink_port: int | None = None
    """Where machines deliver events; None disables it. Common ports are 8080 and 8091."""
    log_port: int | None = None
    """Where machines deliver kernel log lines, by TCP and by UDP; None disables it. Common ports are 4001 and 8092."""
    recent_events: int = 256
    """Events kept in memory per machine. An event repeated while it is kept is not published again."""
    recent_lines: int = 1000
    """Log lines kept in memory per machine."""
    recent_bytes: int = 1024 * 1024
    """Memory for the events of one machine, and for its lines, each."""
    total_recent_bytes: int = 128 * 1024 * 1024
    """The same for all machines together; the reports of the longest silent machines are removed first."""
    max_line_bytes: int = 64 * 1024
    """Maximum length of a log line; longer ones are dropped and counted. At least 4,096."""
    line_bytes_per_second: int = 256 * 1024
    """Average rate of log bytes per machine; lines beyond it are dropped and counted. 0 disables the limit."""
    line_burst_bytes: int = 4 * 1024 * 1024
    """Burst of bytes: a booting machine sends its whole log."""
    lines_per_second: int = 2000
    """Average rate of log lines per machine; lines beyond it are dropped and counted. 0 disables the limit."""
    line_burst: int = 20_000
    """Burst of lines."""
    events_per_second: int = 100
    """Average rate of events per machine; events beyond it are refused, and repeated by the machine. 0 disables the limit."""
    event_burst: int = 2000
    """Burst of events; existing machines start with up to 990."""
    event_bytes_per_second: int = 256 * 1024
    """Average rate of event bytes per machine; events beyond it are refused. 0 disables the limit."""
    event_burst_bytes: int = 4 * 1024 * 1024
    """Burst of bytes of events."""
    max_event_bytes: int = 256 * 1024
    """Maximum size of an event."""
    max_connections_per_machine: int = 4
    """Maximum concurrent connections of one machine, to the event sink and to the log listener each."""
    reader_limit: int = 4096
    """Events or lines that wait for one slow subscriber before the oldest are dropped."""
    reader_bytes: int = 16 * 1024 * 1024
    """The same in bytes."""
    keep: KeepOptions | None = None
    """Storage in files; None keeps only recent reports, in memory."""

    def __post_init__(self) -> None:
        for port in (self.event_sink_port, self.log_port):
            if port is not None and not 0 <= port <= 65535:
                raise ConfigurationError(f"a port must be a number from 0 to 65535, not {port}")
        if self.max_line_bytes < SMALLEST_LINE_CAP:
            raise ConfigurationError(f"max_line_bytes must be at least {SMALLEST_LINE_CAP}, not {self.max_line_bytes}")


class ReportDrop(StrEnum):
    """Why a report was not accepted."""

    UNKNOWN_SOURCE = "unknown source"
    """A connection, datagram or call from an address that belongs to no machine."""
    TOO_MANY_CONNECTIONS = "too many connections"
    """A log connection beyond the machine's limit."""
    LINE_TOO_LONG = "line too long"
    """A log line longer than the maximum."""
    LINE_RATE_LIMITED = "line rate limited"
    """A log line beyond the machine's rate limit."""
    LINE_INCOMPLETE = "line incomplete"
    """The connection ended within a log line."""
    EVENT_RATE_LIMITED = "event rate limited"
    """An event beyond the machine's rate limit; the machine sends it again."""
    EVENT_MALFORMED = "event malformed"
    """An event without content, with an id or type that is too long, or with too many fields."""
    EVENT_REPEATED = "event repeated"
    """An event that was already accepted; answered OK."""


@dataclass(frozen=True, slots=True, kw_only=True)
class ReportedEvent:
    """An event as sent by a machine; decoded only by readers."""

    received_at: float
    """Unix time in seconds."""
    id: str
    actor_id: str
    """Groups the events of one action."""
    type_url: str
    data: bytes
    """The encoded message."""

    @property
    def payload(self) -> MachineEventPayload | None:
        """The first 256 fields of the message, decoded on each access. None for an unknown type or malformed data."""
        return unpack_event(Any(type_url=self.type_url, value=self.data))

    @property
    def kind(self) -> str:
        """The type's short name, such as ``SequenceEvent``."""
        return event_type(Any(type_url=self.type_url))

    @property
    def summary(self) -> str:
        """A one-line printable summary of the event."""
        return summarize_event(Any(type_url=self.type_url, value=self.data))

    @property
    def size(self) -> int:
        """Memory used by its own fields, in bytes."""
        return sum(map(sys.getsizeof, (self.id, self.actor_id, self.type_url, self.data)))


@dataclass(frozen=True, slots=True, kw_only=True)
class MachineEvent(ReportedEvent):
    """An event, and the machine that sent it."""

    machine: Machine


@dataclass(frozen=True, slots=True, kw_only=True)
class KernelLine:
    """One kernel log line as sent by a machine."""

    received_at: float
    """Unix time in seconds."""
    raw: bytes
    """The line without its end."""

    def fields(self) -> Mapping[str, object]:
        """The line's JSON object: msg, talos-time, talos-level, facility, seq, clock, priority; empty if it is not JSON."""
        try:
            found = json.loads(self.raw)
        except (ValueError, RecursionError):
            return {}
        return found if isinstance(found, dict) else {}

    def text(self, field: str) -> str:
        """A text field of the line's JSON object; empty if missing or not text. Always encodable as UTF-8."""
        found = self.fields().get(field)
        # JSON can contain unpaired surrogates
        return found.encode(errors="replace").decode() if isinstance(found, str) else ""

    @property
    def message(self) -> str:
        """The field ``msg``, or the whole line without one. Always encodable as UTF-8."""
        found = self.fields().get("msg")
        if isinstance(found, str):
            return found.encode(errors="replace").decode()
        return self.raw.decode(errors="replace")

    @property
    def size(self) -> int:
        """Memory used by its own fields, in bytes."""
        return sys.getsizeof(self.raw)


@dataclass(frozen=True, slots=True, kw_only=True)
class LogLine(KernelLine):
    """One line of a machine's kernel log, and the machine."""

    machine: Machine


@dataclass(frozen=True, slots=True, kw_only=True)
class LinesDropped:
    """Lines of a machine dropped since its last accepted one."""

    machine: Machine
    reason: ReportDrop
    count: int


@dataclass(frozen=True, slots=True, kw_only=True)
class ReportsLost:
    """This subscriber was too slow; the oldest `count` reports were dropped."""

    count: int
