"""The values that machines report, and the options of the receivers."""

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
    """Where and how much of what machines report is kept in files, which outlive the server."""

    folder: Path
    """Made with mode 0700 if it is not there. One server at a time uses it."""
    max_age: float = 7 * 86_400.0
    """Seconds."""
    machine_bytes: int = 8 * 1024 * 1024
    """Lines and events of one machine; the oldest go first. At least 65,536."""
    total_bytes: int = 1024 * 1024 * 1024
    """Of all; those of the machines that have been silent longest go first. At least as many."""
    write_after: float = 1.0
    """Seconds until what was received is written."""

    def __post_init__(self) -> None:
        if not 65_536 <= self.machine_bytes <= self.total_bytes:
            raise ConfigurationError("what is kept of one machine is at least 65,536 bytes, and at most what is kept of all")
        if self.max_age <= 0:
            raise ConfigurationError("reports are kept for more than 0 seconds")


@dataclass(frozen=True, slots=True, kw_only=True)
class ReportOptions:
    """Ports on the server's overlay address, and how much one machine may send and leave behind. Port 0 takes a free one."""

    event_sink_port: int | None = None
    """Where machines deliver events; None disables it. Usual ports are 8080 and 8091."""
    log_port: int | None = None
    """Where machines deliver kernel log lines, by TCP and by UDP; None disables it. Usual ports are 4001 and 8092."""
    recent_events: int = 256
    """How many events of each machine are kept; one that is sent again while it is kept is not handed out again."""
    recent_lines: int = 1000
    """How many log lines of each machine are kept."""
    recent_bytes: int = 1024 * 1024
    """How much memory the kept events of one machine take, and how much its lines."""
    total_recent_bytes: int = 128 * 1024 * 1024
    """The same for all machines; beyond it, the reports of the machines that have been silent longest go first."""
    max_line_bytes: int = 64 * 1024
    """The longest log line; longer ones are dropped and counted. At least 4,096."""
    line_bytes_per_second: int = 256 * 1024
    """How many bytes of log lines one machine may send on average; more is dropped and counted. 0 disables the limit."""
    line_burst_bytes: int = 4 * 1024 * 1024
    """Burst of bytes: a booting machine sends its whole log."""
    lines_per_second: int = 2000
    """How many log lines one machine may send on average; more is dropped and counted. 0 disables the limit."""
    line_burst: int = 20_000
    """Burst of lines."""
    events_per_second: int = 100
    """How many events one machine may send on average; one too many is refused, and comes again. 0 disables the limit."""
    event_burst: int = 2000
    """Burst of events; existing machines start with up to 990."""
    event_bytes_per_second: int = 256 * 1024
    """How many bytes of events one machine may send on average; beyond it events are refused. 0 disables the limit."""
    event_burst_bytes: int = 4 * 1024 * 1024
    """Burst of bytes of events."""
    max_event_bytes: int = 256 * 1024
    """The longest event."""
    max_connections_per_machine: int = 4
    """Connections of one machine at a time: to the event sink, and to the log listener."""
    reader_limit: int = 4096
    """Events or lines that wait for one slow reader before the oldest are dropped."""
    reader_bytes: int = 16 * 1024 * 1024
    """How many bytes of them."""
    keep: KeepOptions | None = None
    """Where they are kept in files; None keeps only the recent ones, in memory."""

    def __post_init__(self) -> None:
        for port in (self.event_sink_port, self.log_port):
            if port is not None and not 0 <= port <= 65535:
                raise ConfigurationError(f"a port is a number from 0 to 65535, not {port}")
        if self.max_line_bytes < SMALLEST_LINE_CAP:
            raise ConfigurationError(f"max_line_bytes is at least {SMALLEST_LINE_CAP}, not {self.max_line_bytes}")


class ReportDrop(StrEnum):
    """Why a report was not accepted."""

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
    """An event without content, with an overlong id or type, or with more fields than an event has."""
    EVENT_REPEATED = "event repeated"
    """An event that the machine sent again though it had been accepted; answered OK."""


@dataclass(frozen=True, slots=True, kw_only=True)
class ReportedEvent:
    """An event as a machine sent it, stored undecoded; readers decode it."""

    received_at: float
    """Unix time in seconds."""
    id: str
    actor_id: str
    """Groups the events of one action."""
    type_url: str
    data: bytes
    """The event's message as it came."""

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
        """Bytes of memory that its own parts take."""
        return sum(map(sys.getsizeof, (self.id, self.actor_id, self.type_url, self.data)))


@dataclass(frozen=True, slots=True, kw_only=True)
class MachineEvent(ReportedEvent):
    """An event, and the machine that sent it."""

    machine: Machine


@dataclass(frozen=True, slots=True, kw_only=True)
class KernelLine:
    """One line of a kernel log, as a machine sent it."""

    received_at: float
    """Unix time in seconds."""
    raw: bytes
    """The line as it came, without its end."""

    def fields(self) -> Mapping[str, object]:
        """The line's JSON object: msg, talos-time, talos-level, facility, seq, clock, priority; empty if it is not JSON."""
        try:
            found = json.loads(self.raw)
        except (ValueError, RecursionError):
            return {}
        return found if isinstance(found, dict) else {}

    def text(self, field: str) -> str:
        """A field of the line's JSON object; empty if it is not there, or no text. It can be encoded as UTF-8."""
        found = self.fields().get(field)
        # JSON can escape half of a surrogate pair
        return found.encode(errors="replace").decode() if isinstance(found, str) else ""

    @property
    def message(self) -> str:
        """The message: the field ``msg``, or the whole line without one. It can be encoded as UTF-8."""
        found = self.fields().get("msg")
        if isinstance(found, str):
            return found.encode(errors="replace").decode()
        return self.raw.decode(errors="replace")

    @property
    def size(self) -> int:
        """Bytes of memory that its own parts take."""
        return sys.getsizeof(self.raw)


@dataclass(frozen=True, slots=True, kw_only=True)
class LogLine(KernelLine):
    """One line of a machine's kernel log, and the machine."""

    machine: Machine


@dataclass(frozen=True, slots=True, kw_only=True)
class LinesDropped:
    """Lines of a machine that were dropped since its last one that was accepted."""

    machine: Machine
    reason: ReportDrop
    count: int


@dataclass(frozen=True, slots=True, kw_only=True)
class ReportsLost:
    """This reader was too slow; the oldest `count` reports were dropped."""

    count: int
