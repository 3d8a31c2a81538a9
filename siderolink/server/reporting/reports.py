"""The event sink and the log listener on the server's overlay address, and the embedder's interface to them."""

import math
import socket
from collections.abc import AsyncGenerator, AsyncIterator, Iterator
from contextlib import AsyncExitStack, asynccontextmanager
from ipaddress import IPv6Address

import anyio
from anyio.lowlevel import checkpoint

from siderolink.common.grpc import GrpcServer, Limits, Turns, serve
from siderolink.common.overlay_socket import bind_overlay
from siderolink.common.tasks import background_tasks, in_parts, in_thread
from siderolink.server.events import EventsLost, EventStream, MachineLeft
from siderolink.server.reporting.archive import Archive
from siderolink.server.reporting.event_sink import EventSink
from siderolink.server.reporting.ingest import MachineAt, ReportIngest, ReportStream
from siderolink.server.reporting.log_listener import listen_for_lines
from siderolink.server.reporting.model import (
    KeepOptions,
    KernelLine,
    LinesDropped,
    LogLine,
    MachineEvent,
    ReportedEvent,
    ReportOptions,
)
from siderolink.server.reporting.search import EVERYTHING, ReportQuery, ReportSearch

_SINK_WINDOW_BYTES = 1024 * 1024
_AT_ONCE = 100
TURN_SHARE = 0.5
"""The machines' share of a turn of the event loop, for events and lines together: half of the share of strangers."""


class Reports:
    """Machines' reports: live streams, recent ones in memory, and stored ones in files."""

    def __init__(self, ingest: ReportIngest, archive: Archive | None = None) -> None:
        self._ingest = ingest
        self._archive = archive
        self._search = ReportSearch(ingest, archive)
        self._sink: GrpcServer | None = None
        self._log_port: int | None = None

    @property
    def event_sink_port(self) -> int | None:
        """The event sink's TCP port on the overlay address; None if disabled."""
        return None if self._sink is None else self._sink.port

    @property
    def log_port(self) -> int | None:
        """The TCP and UDP port of the log listener on the overlay address; None if disabled."""
        return self._log_port

    def events(self) -> ReportStream[MachineEvent]:
        """Subscribe to machines' events from now on. A slow subscriber loses its oldest ones and receives ReportsLost."""
        return self._ingest.events.subscribe()

    def lines(self) -> ReportStream[LogLine | LinesDropped]:
        """Subscribe to machines' log lines from now on. A slow subscriber loses its oldest ones and receives ReportsLost."""
        return self._ingest.lines.subscribe()

    def recent_events(self, machine_id: str) -> list[MachineEvent]:
        """One machine's recent events, oldest first."""
        return self._ingest.recent_events.of(machine_id)

    def recent_lines(self, machine_id: str) -> list[LogLine]:
        """One machine's recent log lines, oldest first."""
        return self._ingest.recent_lines.of(machine_id)

    def find_lines(
        self, machine: str, query: ReportQuery = EVERYTHING, *, follow: bool = False
    ) -> AsyncGenerator[KernelLine, None]:
        """A machine's log lines, oldest first: from the files, or recent ones without `ReportOptions.keep`.

        `machine` is an id or UUID, also of a removed machine. With `follow`, new lines are appended as they arrive.
        """
        return self._search.lines(machine, query, follow=follow)

    def find_events(
        self, machine: str, query: ReportQuery = EVERYTHING, *, follow: bool = False
    ) -> AsyncGenerator[ReportedEvent, None]:
        """A machine's events; like `find_lines`."""
        return self._search.events(machine, query, follow=follow)

    async def delete(self, machine: str | None, *, until: float = math.inf) -> int:
        """Delete lines and events of a machine (by its id or UUID) or of all from before a time; returns the number of bytes.

        Raises StoreError.
        """
        for recent in (self._ingest.recent_events, self._ingest.recent_lines):
            for part in in_parts(recent.machines() if machine is None else [machine], _AT_ONCE):
                for one in part:
                    recent.forget_first(one, lambda report: report.received_at < until)
                await checkpoint()
        return 0 if self._archive is None else await in_thread(self._archive.delete, machine, until)

    @property
    def keep(self) -> KeepOptions | None:
        """The storage options; None without storage in files."""
        return None if self._archive is None else self._archive.options

    @property
    def file_bytes(self) -> int:
        """Total size of the files in bytes."""
        return 0 if self._archive is None else self._archive.size

    def not_kept(self) -> dict[str, int]:
        """Accepted reports that could not be written to files, by reason: "queue full" or "disk"."""
        return {} if self._archive is None else dict(self._archive.lost)

    @property
    def taken_events(self) -> int:
        """Number of accepted events of all machines."""
        return self._ingest.taken_events

    @property
    def taken_lines(self) -> int:
        """Number of accepted log lines of all machines."""
        return self._ingest.taken_lines

    @property
    def kept_bytes(self) -> int:
        """Memory used by recent events and lines of all machines, in bytes."""
        return self._ingest.recent_events.size + self._ingest.recent_lines.size

    def drops(self, machine_id: str | None = None) -> dict[str, int]:
        """Reports not accepted, of one machine or of all, by published reason (docs/drops.md)."""
        if machine_id is not None:
            return self._ingest.drops_of(machine_id)
        return {str(reason): count for reason, count in self._ingest.drops.items()}

    def limit_drops(self) -> Iterator[dict[str, dict[str, int]]]:
        """Reports dropped by machines' own limits, by machine id and `ReportDrop`, in parts; only machines with drops."""
        return self._ingest.limit_drops()

    def refusals(self) -> dict[str, int]:
        """Connections and calls refused by the event sink, by published reason (docs/drops.md)."""
        return {} if self._sink is None else {str(reason): count for reason, count in self._sink.refusals.items()}

    @asynccontextmanager
    async def serve(self, address: IPv6Address, interface: str, namespace: str | None = None) -> AsyncIterator[None]:
        """Listen at the overlay address, only on `interface`."""
        options = self._ingest.options
        turns = Turns(share=TURN_SHARE)
        async with AsyncExitStack() as stack:
            if options.event_sink_port is not None:
                sock = await bind_overlay(address, options.event_sink_port, interface, namespace=namespace)
                sink = serve([EventSink(self._ingest)], listening=[sock], limits=_limits(options), turns=turns)
                self._sink = await stack.enter_async_context(sink)
            if options.log_port is not None:
                tcp, udp = await _bind_both(address, options.log_port, interface, namespace)
                self._log_port = tcp.getsockname()[1]
                await stack.enter_async_context(listen_for_lines(self._ingest, tcp, udp, turns))
            yield


@asynccontextmanager
async def receive_reports(
    options: ReportOptions,
    machine_at: MachineAt,
    departures: EventStream,
    *,
    address: IPv6Address,
    interface: str,
    namespace: str | None = None,
) -> AsyncIterator[Reports]:
    """Receive reports at the server's overlay address. Raises AddressInUseError or ConfigurationError."""
    ingest = ReportIngest(options, machine_at)
    try:
        async with _open_archive(options.keep) as archive, background_tasks() as tasks:
            reports = Reports(ingest, archive)
            if archive is not None:
                ingest.keep = archive.add
            tasks.start_soon(_forget_departed, ingest, departures)
            async with reports.serve(address, interface, namespace):
                yield reports
    finally:
        ingest.end()


@asynccontextmanager
async def _open_archive(options: KeepOptions | None) -> AsyncIterator[Archive | None]:
    if options is None:
        yield None
        return
    archive = Archive(options)
    await in_thread(archive.open)
    try:
        yield archive
    finally:
        with anyio.CancelScope(shield=True):
            await in_thread(archive.close)


async def _forget_departed(ingest: ReportIngest, departures: EventStream) -> None:
    async for event in departures:
        if isinstance(event, MachineLeft):
            ingest.forget(event.machine.id)
        elif isinstance(event, EventsLost):
            await ingest.forget_departed()


async def _bind_both(
    address: IPv6Address, port: int, interface: str, namespace: str | None
) -> tuple[socket.socket, socket.socket]:
    tcp = await bind_overlay(address, port, interface, namespace=namespace)
    try:
        return tcp, await bind_overlay(address, tcp.getsockname()[1], interface, udp=True, namespace=namespace)
    except BaseException:
        tcp.close()
        raise


def _limits(options: ReportOptions) -> Limits:
    """Machines share one /64, so each address is counted separately."""
    return Limits(
        max_message_bytes=options.max_event_bytes,
        stream_window_bytes=options.max_event_bytes + 5,
        connection_window_bytes=max(_SINK_WINDOW_BYTES, 2 * options.max_event_bytes + 10),
        max_connections_per_address=options.max_connections_per_machine,
        crowded_from=0,
        ipv6_source_bits=128,
        max_streams=8,
        connection_idle_timeout=3600.0,
    )
