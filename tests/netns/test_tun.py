"""A real TUN interface in a namespace of its own: the kernel at one side, the packet matrices at the other."""

import errno
import os
import socket
import threading
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from ipaddress import IPv4Interface, IPv6Interface, ip_interface
from pathlib import Path
from types import SimpleNamespace

import anyio
import pytest
from anyio.from_thread import BlockingPortal
from cryptography.hazmat.primitives.ciphers.aead import ChaCha20Poly1305

from siderolink.common.degraded import warn_once
from siderolink.common.errors import ConfigurationError, DeviceError, DeviceUnavailableError, InterfaceInUseError
from siderolink.common.wireguard.noise.output import Drop
from siderolink.common.wireguard.noise.routing import InnerFilter
from siderolink.common.wireguard.packets import Gatherer, Merger, Opener, Sealer, Splitter
from siderolink.common.wireguard.tun import Tun, fitting_gso_max_size
from tests.support.netns import Namespace
from tests.support.packets import UDP, Packet, batch, collected, pad, seal

NAME = "sltest0"
LOCAL_ROUTE = 0x80000000  # RTF_LOCAL


@contextmanager
def inside() -> Iterator[tuple[Namespace, BlockingPortal]]:
    with Namespace("tun") as namespace, namespace.portal() as portal:
        yield namespace, portal


@pytest.mark.parametrize(
    "name",
    ["", "a" * 16, "a/b", "a:b", "a b", ".", "..", "all", "default", "tun%d", "tün", "a\0b", "a\n", "x" * 5000],
    ids=lambda name: repr(name[:20]),
)
def test_impossible_names_are_refused(name: str) -> None:
    with pytest.raises(ConfigurationError, match="cannot name an interface"):
        Tun.open(name, 1280)


@pytest.mark.parametrize("mtu", [0, -1, 67, 65536])
def test_impossible_mtus_are_refused(mtu: int) -> None:
    with pytest.raises(ConfigurationError, match=str(mtu)):
        Tun.open(NAME, mtu)


def test_used_names_are_refused() -> None:
    with Namespace("tun") as namespace:
        namespace.run(["ip", "tuntap", "add", "persistent0", "mode", "tun", "vnet_hdr"])
        namespace.run(["ip", "link", "add", "dummy0", "type", "veth", "peer", "name", "dummy1"])
        with namespace.call(Tun.open, NAME, 1280) as tun:
            for name in (NAME, "persistent0", "dummy0", "lo"):
                with pytest.raises(InterfaceInUseError, match=name):
                    namespace.call(Tun.open, name, 1280)
            assert tun.descriptor >= 0
        assert namespace.interfaces() == {"lo", "persistent0", "dummy0", "dummy1"}
        tun.close()
        assert tun.descriptor == -1


def test_without_the_right_to_make_interfaces() -> None:
    pid = os.fork()
    if not pid:  # a process of its own, because it gives up its rights for good
        os.setuid(65534)
        try:
            Tun.open(NAME, 1280)
        except DeviceUnavailableError as error:
            os._exit(0 if "CAP_NET_ADMIN" in str(error) else 1)
        os._exit(2)
    assert os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1]) == 0


def test_configure() -> None:
    with inside() as (namespace, portal):
        with namespace.call(Tun.open, NAME, 1280) as tun:
            addresses = (ip_interface("fd00::1/64"), ip_interface("10.1.2.3/24"))
            portal.call(tun.configure, addresses, 1280)
            assert {"fd00::1/64", "10.1.2.3/24"} <= namespace.addresses(NAME)
            shown = namespace.run(["ip", "-d", "address", "show", "dev", NAME])
            assert "mtu 1280" in shown
            assert f"gso_max_size {fitting_gso_max_size(1280)} " in shown
            assert "tentative" not in shown
            assert "UP" in shown
            with pytest.raises(DeviceError, match=NAME):
                portal.call(tun.configure, addresses, 1280)
        assert namespace.interfaces() == {"lo"}


def test_packets_to_its_addresses_are_received_once_it_is_configured() -> None:
    """The kernel adds an address's local route later than the address; without it, answers to the first packets are lost."""

    def local_routes() -> list[str]:
        entries = (line.split() for line in Path("/proc/thread-self/net/ipv6_route").read_text().splitlines())
        return [entry[0] for entry in entries if int(entry[8], 16) & LOCAL_ROUTE]

    async def configured(number: int) -> list[str]:
        with Tun.open(f"{NAME}{number}", 1280) as tun:
            await tun.configure([IPv6Interface(f"fd00::{number:x}/64")], 1280)
            return local_routes()

    with inside() as (_, portal):
        for number in range(1, 41):
            assert f"fd00{number:028x}" in portal.call(configured, number)


def test_a_deleted_interface_is_reported() -> None:
    with inside() as (namespace, portal), namespace.call(Tun.open, NAME, 1280) as tun:
        portal.call(tun.configure, (ip_interface("fd00::1/64"),), 1280)
        namespace.run(["ip", "link", "delete", NAME])
        with pytest.raises(DeviceError, match="deleted by another program"):
            portal.call(_read_until_error, tun)
        assert not tun.write([bytes(10), bytes(40)])
        assert tun.write_errors == 1
        with pytest.raises(DeviceError, match="deleted by another program"):
            portal.call(tun.configure, (), 1280)


async def _read_until_error(tun: Tun) -> None:
    with anyio.fail_after(30):
        while True:
            while tun.read() is not None:
                pass
            await anyio.wait_readable(tun.descriptor)


def test_frames_that_the_interface_refuses_are_counted() -> None:
    with inside() as (namespace, portal), namespace.call(Tun.open, NAME, 1280) as tun:
        packet = bytes([0x60]) + bytes(39)
        assert not tun.write([bytes(10), packet])  # it is down
        portal.call(tun.configure, (ip_interface("fd00::1/64"),), 1280)
        assert tun.write([bytes(10), packet])
        assert not tun.write([b"\x01\x63" + bytes(8), packet])  # there is no such GSO type
        assert not tun.write([b"\0"])
        assert tun.write_errors == 3


def test_the_longest_runs_of_udp_are_accepted() -> None:
    aead, opener, drops = ChaCha20Poly1305(bytes(32)), Opener(), Counter[Drop]()
    packet = Packet(protocol=UDP, payload=bytes(range(64)) * 300)
    rows = [seal(aead, pad(segment.encode()), 1, index) for index, segment in enumerate(packet.segments(64))]
    opened = opener.open(batch(rows), 0, len(rows), aead)
    inner_filter = InnerFilter(lambda *_: None, lambda reason, count: drops.update({reason: count}))
    with inside() as (namespace, portal), namespace.call(Tun.open, NAME, 1280) as tun:
        portal.call(tun.configure, (ip_interface("fd00::2/64"),), 1280)
        for buffers in Merger(uso=tun.uso).merge(opened, inner_filter):
            assert tun.write(buffers)
        assert not drops


class Tunnel:
    """Two TUN interfaces joined by a thread that splits, seals, opens and merges all that passes."""

    def __init__(self, one: Tun, other: Tun) -> None:
        self.rows: Counter[int] = Counter()
        self.merged = 0
        self.drops: Counter[Drop] = Counter()
        self.tuns = (one, other)
        self._aead = ChaCha20Poly1305(bytes(32))
        self._stop_read, self._stop_write = os.pipe()
        self._thread = threading.Thread(target=lambda: anyio.run(self._run))

    def __enter__(self) -> "Tunnel":
        self._thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        os.close(self._stop_write)
        self._thread.join()
        os.close(self._stop_read)

    async def _run(self) -> None:
        async with anyio.create_task_group() as tasks:
            one, other = self.tuns
            tasks.start_soon(self._carry, one, other)
            tasks.start_soon(self._carry, other, one)
            await anyio.wait_readable(self._stop_read)
            tasks.cancel_scope.cancel()

    async def _carry(self, source: Tun, target: Tun) -> None:
        splitter, gatherer, sealer, opener, counter = Splitter(1280), Gatherer(1280), Sealer(), Opener(), 0
        merger = Merger(tso=target.tso, uso=target.uso)
        while True:
            await anyio.wait_readable(source.descriptor)
            while (frame := source.read()) is not None:
                collector = splitter if frame[1] else gatherer
                packets = collected(collector, frame)
                self.rows[packets.count] += 1
                datagrams = sealer.seal(packets, self._aead, 1, counter)
                opened = opener.open(datagrams, 0, datagrams.count, self._aead)
                counter += packets.count
                for buffers in merger.merge(opened, InnerFilter(lambda *_: None, self._drop)):
                    self.merged += len(buffers) > 2
                    assert target.write(buffers)

    def _drop(self, reason: Drop, count: int) -> None:
        self.drops[reason] += count


ENDS = [("fd00::1", "fd00::2", 64), ("10.9.0.1", "10.9.0.2", 24)]


@contextmanager
def joined(*, offloads: bool) -> Iterator[tuple[Namespace, Namespace, Tunnel]]:
    with ExitStack() as stack:
        namespaces = [stack.enter_context(Namespace(label)) for label in ("one", "other")]
        tuns = []
        for index, namespace in enumerate(namespaces):
            tun = stack.enter_context(namespace.call(_open, offloads))
            with namespace.portal() as portal:
                addresses = [ip_interface(f"{pair[index]}/{pair[2]}") for pair in ENDS]
                portal.call(_configure, tun, addresses)
            tuns.append(tun)
        yield namespaces[0], namespaces[1], stack.enter_context(Tunnel(*tuns))


def _open(offloads: bool) -> Tun:
    return Tun.open(NAME, 1280, offloads=offloads)


async def _configure(tun: Tun, addresses: list[IPv4Interface | IPv6Interface]) -> None:
    await tun.configure(addresses, 1280)


def _socket(family: int, kind: int) -> Callable[[], socket.socket]:
    def make() -> socket.socket:
        sock = socket.socket(family, kind)
        sock.settimeout(30)
        return sock

    return make


@pytest.mark.parametrize("offloads", [True, False])
@pytest.mark.parametrize(("client", "server", "_"), ENDS)
def test_tcp_passes_whole(offloads: bool, client: str, server: str, _: int) -> None:
    data = os.urandom(1 << 16) * 80
    family = socket.AF_INET6 if ":" in server else socket.AF_INET
    with joined(offloads=offloads) as (one, other, tunnel):
        received = transfer(one, other, client, server, data)
        assert received == data
        assert not tunnel.drops
        assert (tunnel.merged > 0) == (max(tunnel.rows) > 1) == offloads
        if offloads and family == socket.AF_INET6:
            # Full super-packets fill a UDP send and no more.
            assert max(tunnel.rows) == 65_507 // 1312


class Refusing:
    """A kernel that took the offloads and refuses super-packets, while `is_refusing`."""

    def __init__(self) -> None:
        self.is_refusing = True
        self.refused = 0
        self._writev = os.writev

    def writev(self, fd: int, buffers: Sequence[bytes]) -> int:
        if self.is_refusing and buffers[0][1]:
            self.refused += 1
            raise OSError(errno.EINVAL, os.strerror(errno.EINVAL))
        return self._writev(fd, buffers)


def transfer(one: Namespace, other: Namespace, client: str, server: str, data: bytes) -> bytes:
    """What arrives of the data over TCP."""
    family = socket.AF_INET6 if ":" in server else socket.AF_INET
    with other.call(_socket(family, socket.SOCK_STREAM)) as listener, one.call(_socket(family, socket.SOCK_STREAM)) as sender:
        listener.bind((server, 0))
        listener.listen()
        sender.connect(listener.getsockname())
        accepted, _address = listener.accept()
        thread = threading.Thread(target=sender.sendall, args=(data,))
        thread.start()
        received = bytearray()
        with accepted:
            accepted.settimeout(30)
            while len(received) < len(data):
                received += accepted.recv(1 << 20)
        thread.join()
    return bytes(received)


@pytest.mark.parametrize(("client", "server", "_"), ENDS)
def test_super_packets_are_split_for_a_kernel_that_refuses_them(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture, client: str, server: str, _: int
) -> None:
    warn_once.cache_clear()
    refusing = Refusing()
    monkeypatch.setattr("siderolink.common.wireguard.tun.os.writev", refusing.writev)
    data = os.urandom(1 << 16) * 40
    with joined(offloads=True) as (one, other, tunnel):
        assert transfer(one, other, client, server, data) == data
        assert tunnel.merged > 0
        counts = [tun.refused_super_packets for tun in tunnel.tuns]
        # every one was delivered, with few futile attempts
        assert sum(counts) == refusing.refused
        assert 0 < refusing.refused < tunnel.merged / 4
        assert not any(tun.write_errors for tun in tunnel.tuns)
        assert [record.message for record in caplog.records if "super-packets" in record.message] == [
            "the data plane runs at reduced speed: "
            "the TUN interface refuses super-packets (EINVAL); their packets are written one by one"
        ]


def test_refused_super_packets_are_retried_later(monkeypatch: pytest.MonkeyPatch) -> None:
    refusing = Refusing()
    now = [100.0]
    monkeypatch.setattr("siderolink.common.wireguard.tun.os.writev", refusing.writev)
    # the loops must keep their clock
    monkeypatch.setattr("siderolink.common.wireguard.tun.time", SimpleNamespace(monotonic=lambda: now[0]))
    with inside() as (namespace, portal), namespace.call(Tun.open, NAME, 1280) as tun:
        portal.call(tun.configure, (ip_interface("fd00::1/64"),), 1280)
        frame = [Packet(payload=bytes(5000)).frame(1000)]

        def tries() -> int:
            before = refusing.refused
            assert tun.write(frame)
            return refusing.refused - before

        assert (tries(), tries()) == (1, 0)
        now[0] += 1.0
        assert (tries(), tries()) == (1, 0)
        now[0] += 1.0  # twice as long now
        assert tries() == 0
        now[0] += 1.0
        refusing.is_refusing = False
        assert tun.write(frame)
        refusing.is_refusing = True
        assert (tries(), tries()) == (1, 0)  # it had worked: the first pause again
        now[0] += 1.0
        assert tries() == 1
        assert tun.refused_super_packets == 4
        assert tun.write_errors == 0


@pytest.mark.parametrize("offloads", [True, False])
@pytest.mark.parametrize(("client", "server", "_"), ENDS)
def test_udp_passes_whole(offloads: bool, client: str, server: str, _: int) -> None:
    family = socket.AF_INET6 if ":" in server else socket.AF_INET
    size = 1111
    with joined(offloads=offloads) as (one, other, tunnel):
        with other.call(_socket(family, socket.SOCK_DGRAM)) as receiver, one.call(_socket(family, socket.SOCK_DGRAM)) as sender:
            receiver.bind((server, 0))
            sender.connect(receiver.getsockname())
            receiver.settimeout(2)
            data = os.urandom(size * 20 + 5)
            wanted = [data[at : at + size] for at in range(0, len(data), size)]
            received, bursts = list[bytes](), 0
            # The kernel's receive queue of a processor is shared by all namespaces and overflows beside busy neighbours.
            while len(received) < len(wanted) and bursts < 10:
                sender.sendmsg([data], [(17, 103, size.to_bytes(2, "little"))])  # UDP_SEGMENT
                received, bursts = _receive(receiver, len(wanted)), bursts + 1
        assert received == wanted
        assert not tunnel.drops
        if offloads:
            assert tunnel.rows[21] == bursts
            assert tunnel.merged == bursts


def _receive(receiver: socket.socket, count: int) -> list[bytes]:
    """Receive so many datagrams, or those that come before the socket's timeout."""
    received: list[bytes] = []
    try:
        while len(received) < count:
            received.append(receiver.recv(2000))
    except TimeoutError:
        pass
    return received
