"""What the receiver of machines' events and kernel logs may be told."""

from dataclasses import dataclass

from siderolink.common.errors import ConfigurationError

SMALLEST_LINE_CAP = 4096


@dataclass(frozen=True, slots=True, kw_only=True)
class ReportOptions:
    """Ports on the server's overlay address, and how much one machine may send and leave behind. Port 0 takes a free one."""

    event_sink_port: int | None = None
    """Where machines deliver events; None for nowhere. Usual ports are 8080 and 8090."""
    log_port: int | None = None
    """Where machines deliver kernel log lines, by TCP and by UDP; None for nowhere. Usual ports are 4001 and 8092."""
    recent_events: int = 256
    """How many events of each machine are kept; one that comes again while it is kept is not handed out again."""
    recent_lines: int = 1000
    """How many log lines of each machine are kept."""
    recent_bytes: int = 1024 * 1024
    """How many bytes of events, and how many of lines, are kept of each machine."""
    total_recent_bytes: int = 256 * 1024 * 1024
    """The same for all machines; beyond it, what the longest silent machines said is forgotten first."""
    max_line_bytes: int = 64 * 1024
    """The longest log line; longer ones are dropped and counted. At least 4,096."""
    line_bytes_per_second: int = 256 * 1024
    """How fast one machine may send log lines on average; what exceeds it is dropped and counted. 0 for no limit."""
    line_burst_bytes: int = 4 * 1024 * 1024
    """How much of it at once: a machine that boots has its whole log to send."""
    events_per_second: int = 100
    """How many events one machine may send on average, 0 for no limit; one too many is refused, and comes again."""
    event_burst: int = 2000
    """How many at once; existing machines begin with up to 990."""
    max_event_bytes: int = 256 * 1024
    """The longest event."""
    max_connections_per_machine: int = 4
    """Connections of one machine at a time: to the event sink, and to the log receiver."""
    reader_limit: int = 4096
    """Events or lines that wait for one slow reader before the oldest are dropped."""
    reader_bytes: int = 16 * 1024 * 1024
    """How many bytes of them."""

    def __post_init__(self) -> None:
        for port in (self.event_sink_port, self.log_port):
            if port is not None and not 0 <= port <= 65535:
                raise ConfigurationError(f"a port is a number from 0 to 65535, not {port}")
        if self.max_line_bytes < SMALLEST_LINE_CAP:
            raise ConfigurationError(f"max_line_bytes is at least {SMALLEST_LINE_CAP}, not {self.max_line_bytes}")
