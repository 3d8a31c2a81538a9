"""The sessions at this server: which links are up, by which path, and their streams.

Nothing here blocks: it is called between packets.
"""

from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import contextmanager

from siderolink.common.errors import ConfigurationError
from siderolink.common.hostport import HostPort
from siderolink.common.wireguard.device import Device, PathChanged
from siderolink.common.wireguard.path import Path
from siderolink.server.admission.rules import source_key
from siderolink.server.clock import Clock
from siderolink.server.fleet.directory import Directory, EndStream, LinkState, MachineLink, Stream
from siderolink.server.refusals import StreamRefusal


def udp_endpoint(path: Path | None) -> str | None:
    """The UDP endpoint of a path, as host:port; None for a tunnel or no path."""
    text = str(path) if path is not None else ""
    try:
        return str(HostPort.parse(text))
    except ConfigurationError:
        return None


def host_of(endpoint: str | None) -> str | None:
    """The host of a host:port; None if it is malformed."""
    try:
        return None if endpoint is None else HostPort.parse(endpoint, port_zero=True).host
    except ConfigurationError:
        return None


class Sessions:
    """The sessions of one device's peers."""

    def __init__(self, device: Device, directory: Directory, *, max_unproven_streams: int, clock: Clock) -> None:
        self._device = device
        self._directory = directory
        self._max_unproven_streams = max_unproven_streams
        self._clock = clock
        self._watchers: list[Callable[[MachineLink], None]] = []

    def set_state(self, link: MachineLink, state: LinkState) -> None:
        self._directory.set_state(link, state)
        self.notify(link)

    def notify(self, link: MachineLink) -> None:
        """Notify watchers that the link changed or was dropped."""
        for watcher in self._watchers:
            watcher(link)

    @contextmanager
    def watching(self, watcher: Callable[[MachineLink], None]) -> Iterator[None]:
        """Call back whenever a link's state was set or a link dropped; must be fast, because it runs between packets."""
        self._watchers.append(watcher)
        try:
            yield
        finally:
            self._watchers.remove(watcher)

    def open_stream(self, link: MachineLink, path: Path, end: EndStream, source: str = "") -> Stream:
        """Register a new stream for the link's virtual address.

        If there are too many unproven streams, the oldest of the source with the most is ended: virtual addresses are not
        secret, and one stranger must not displace the machine's stream.
        """
        unproven = [stream for stream in link.streams if not stream.is_proven]
        if len(unproven) >= self._max_unproven_streams:
            counts = Counter(source_key(one) or one for one in (source, *(stream.source for stream in unproven)))
            gives_way = max(unproven, key=lambda stream: counts[source_key(stream.source) or stream.source])
            gives_way.end(StreamRefusal.CROWDED_OUT)
            self.close_stream(gives_way)
        stream = Stream(link, path, end, source, self._clock.monotonic())
        link.streams = (*link.streams, stream)
        if link.path is None or not link.path.is_open:
            link.path = path
        if link.machine.public_key is not None:
            self._device.offer_path(link.machine.public_key, path)
        return stream

    def close_stream(self, stream: Stream) -> None:
        """Handle the end of a stream; does nothing if it was closed before."""
        link = stream.link
        if stream in link.streams:
            link.streams = tuple(other for other in link.streams if other is not stream)
            self._closed(link, stream)

    def _closed(self, link: MachineLink, stream: Stream) -> None:
        self._directory.sources.remove_stream(stream)
        if stream.is_proven:
            link.cut_at = self._clock.monotonic()

    def end_streams(self, link: MachineLink, refusal: StreamRefusal) -> None:
        streams, link.streams = link.streams, ()
        for stream in streams:
            self._closed(link, stream)
            stream.end(refusal)

    def _prove(self, stream: Stream) -> None:
        stream.is_proven = True
        self._directory.sources.add_stream(stream)

    def path_changed(self, link: MachineLink, event: PathChanged) -> None:
        """Handle a packet on another path: it proves that path and ends the previous stream."""
        link.path, link.endpoint = event.new, udp_endpoint(event.new)
        source = host_of(link.endpoint)
        for stream in link.streams:
            if stream.path is event.new:
                self._prove(stream)
                source = stream.source or None
            elif stream.path is event.old:
                stream.end(StreamRefusal.REPLACED)
                self.close_stream(stream)
        self._directory.set_source(link, source)

    def prove_current_stream(self, link: MachineLink) -> None:
        """Handle an authenticated packet without a PathChanged: it proves the current path."""
        for stream in link.streams:
            if stream.path is link.path:
                self._prove(stream)
                self._directory.set_source(link, stream.source or link.source)

    async def prove_or_end(self, stream: Stream, silence: float | None) -> None:
        """End a stream at its deadline unless an authenticated packet arrived on it; the last was `silence` seconds ago."""
        link = stream.link
        if stream not in link.streams or stream.is_proven:
            return
        heard_since_open = silence is not None and self._clock.monotonic() - silence >= stream.opened_at
        if heard_since_open and link.path is stream.path:
            self._prove(stream)
        else:
            stream.end(StreamRefusal.NEVER_AUTHENTICATED)
            self.close_stream(stream)

    def adopt(self, link: MachineLink, claimed: MachineLink) -> None:
        """Handle a proved claim: the machine's link continues with the claim's session, and its own streams end."""
        self.end_streams(link, StreamRefusal.REPLACED)
        for stream in claimed.streams:
            stream.link = link
        link.streams, claimed.streams = claimed.streams, ()
        link.path, link.endpoint = claimed.path, claimed.endpoint
        self._directory.set_source(link, claimed.source)
        link.goodbye_at = None
