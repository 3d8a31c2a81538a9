"""Network namespaces for tests, made with pyroute2 and always removed.

    with Namespace("server") as server, Namespace("machine") as machine:
        link(server, machine, addresses=(["192.0.2.1/24"], ["192.0.2.2/24"]))
        machine.run(["ping", "-c1", "192.0.2.1"])            # a program
        machine.call(function, argument)                     # a function, in a thread inside
        with machine.portal() as portal:                     # an event loop of its own inside
            portal.call(async_function)

Sockets and interfaces that a namespace's threads open live in it. UAPI sockets do not: see `Namespace.popen`.
"""

import itertools
import os
import signal
import subprocess
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack, contextmanager
from ipaddress import ip_interface
from types import TracebackType
from typing import Any, Self, TypeVar

from anyio.from_thread import BlockingPortal, start_blocking_portal
from pyroute2 import IPRoute, netns
from pyroute2.netlink.nfnetlink.nfctsocket import NFCTSocket

T = TypeVar("T")

_numbers = itertools.count()
_NO_DUPLICATE_DETECTION = 0x02  # IFA_F_NODAD: the address is usable at once
_UAPI_FOLDER = "/var/run/wireguard"


class Namespace:
    """One network namespace with its loopback up; leaving it ends what runs inside and removes it."""

    def __init__(self, label: str) -> None:
        self.name = f"sl{os.getpid()}-{next(_numbers)}-{label}"
        self._processes: list[subprocess.Popen[str]] = []

    def __enter__(self) -> Self:
        netns.create(self.name)
        try:
            self.set_link("lo", up=True)
            # removing an address must not remove the others of its subnet
            self.sysctl("net.ipv4.conf.all.promote_secondaries", 1)
        except BaseException:
            netns.remove(self.name)
            raise
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None) -> None:
        for process in self._processes:
            stop(process)
        listed = subprocess.run(["ip", "netns", "pids", self.name], capture_output=True, text=True, check=False)
        for pid in map(int, listed.stdout.split()):
            if pid != os.getpid():
                os.kill(pid, signal.SIGKILL)
        netns.remove(self.name)

    def __repr__(self) -> str:
        return f"Namespace({self.name!r})"

    # running things inside

    @contextmanager
    def entered(self) -> Iterator[None]:
        """Moves the calling thread, and threads that it starts, into the namespace. Never await in here: see `portal`."""
        with ExitStack() as stack:
            before = os.open("/proc/thread-self/ns/net", os.O_RDONLY | os.O_CLOEXEC)
            stack.callback(os.close, before)
            inside = os.open(f"/var/run/netns/{self.name}", os.O_RDONLY | os.O_CLOEXEC)
            stack.callback(os.close, inside)
            netns.setns(inside)
            stack.callback(netns.setns, before)
            yield

    def call(self, function: Callable[..., T], *args: Any) -> T:
        """Call a function inside, in a thread of its own, and wait for it."""

        def enter_and_call() -> T:
            with self.entered():
                return function(*args)

        with ThreadPoolExecutor(1) as executor:
            return executor.submit(enter_and_call).result()

    @contextmanager
    def portal(self) -> Iterator[BlockingPortal]:
        """An asyncio event loop that runs inside, in a thread of its own, reached through anyio's portal."""
        with ExitStack() as stack:
            with self.entered():
                portal = stack.enter_context(start_blocking_portal("asyncio"))
            yield portal

    def popen(self, args: Sequence[str], *, own_uapi_folder: bool = False, **options: Any) -> subprocess.Popen[str]:
        """Start a program inside; it is stopped with the namespace at the latest.

        UAPI sockets under /var/run/wireguard are shared with the host unless `own_uapi_folder` is set; then only programs
        started by `run_beside` see them.
        """
        command = ["ip", "netns", "exec", self.name]
        if own_uapi_folder:
            mount = f'mkdir -p {_UAPI_FOLDER} && mount -t tmpfs tmpfs {_UAPI_FOLDER} && exec "$@"'
            command += ["sh", "-c", mount, "sh"]
        options = {"text": True, "stdin": subprocess.DEVNULL} | options
        process: subprocess.Popen[str] = subprocess.Popen([*command, *args], **options)
        self._processes.append(process)
        return process

    def run(self, args: Sequence[str], *, check: bool = True, timeout: float = 60, **options: Any) -> str:
        """Run a program inside to its end and return its output; an error includes it."""
        return _run(["ip", "netns", "exec", self.name, *args], check, timeout, **options)

    # its interfaces, addresses and rules

    def set_link(self, interface: str, *, up: bool | None = None, **attributes: Any) -> None:
        """Set an interface up or down, and any other attribute (``mtu=1400``)."""
        if up is not None:
            attributes["state"] = "up" if up else "down"
        self._route(lambda ipr: ipr.link("set", index=_index(ipr, interface), **attributes))

    def add_address(self, interface: str, address: str) -> None:
        self._change_address("add", interface, address)

    def remove_address(self, interface: str, address: str) -> None:
        self._change_address("del", interface, address)

    def add_route(self, destination: str, gateway: str) -> None:
        """Add a route through a gateway; ``default`` is a valid destination."""
        family = {"family": 10 if ":" in gateway else 2} if destination == "default" else {}
        self._route(lambda ipr: ipr.route("replace", dst=destination, gateway=gateway, **family))

    def interfaces(self) -> set[str]:
        return self._route(lambda ipr: {str(found.get_attr("IFLA_IFNAME")) for found in ipr.get_links()})

    def addresses(self, interface: str) -> set[str]:
        """The interface's addresses, each with its prefix length."""

        def read(ipr: IPRoute) -> set[str]:
            found = ipr.get_addr(index=_index(ipr, interface))
            return {f"{address.get_attr('IFA_ADDRESS')}/{address['prefixlen']}" for address in found}

        return self._route(read)

    def sysctl(self, key: str, value: int | str) -> None:
        """Write a network sysctl, named with dots: ``net.ipv6.conf.all.forwarding``."""

        def write() -> None:
            with open("/proc/sys/" + key.replace(".", "/"), "w") as file:
                file.write(str(value))

        self.call(write)

    def nft(self, rules: str) -> None:
        """Load nftables rules in nft's own syntax."""
        self.run(["nft", "-f", "-"], input=rules)

    def drop_udp(self) -> None:
        """Drop all UDP in both directions except on the loopback, like a strict firewall."""
        self.nft("""
            table inet no_udp {
                chain input { type filter hook input priority 0; iif != "lo" meta l4proto udp drop; }
                chain output { type filter hook output priority 0; oif != "lo" meta l4proto udp drop; }
            }
        """)

    def allow_udp(self) -> None:
        """Undo `drop_udp`."""
        self.nft("delete table inet no_udp")

    def forward(self) -> None:
        """Forward IPv4 and IPv6 between the interfaces."""
        self.sysctl("net.ipv4.ip_forward", 1)
        self.sysctl("net.ipv6.conf.all.forwarding", 1)

    def masquerade(self, interface: str) -> None:
        """Translate the source of packets that leave through the interface to its address and a random port, like a router."""
        self.nft(f"""
            table inet nat_{interface} {{
                chain postrouting {{ type nat hook postrouting priority srcnat; oifname "{interface}" masquerade random; }}
            }}
        """)

    def forget_connections(self) -> None:
        """Delete every mapping of the NAT of `masquerade`, like a restart: each flow gets another port."""

        def flush() -> None:
            with NFCTSocket() as conntrack:
                conntrack.flush()

        self.call(flush)

    def _route(self, function: Callable[[IPRoute], T]) -> T:
        def call() -> T:
            with IPRoute() as ipr:
                return function(ipr)

        return self.call(call)

    def _change_address(self, command: str, interface: str, text: str) -> None:
        address = ip_interface(text)
        flags = {"flags": _NO_DUPLICATE_DETECTION} if address.version == 6 and command == "add" else {}
        self._route(
            lambda ipr: ipr.addr(
                command, index=_index(ipr, interface), address=str(address.ip), prefixlen=address.network.prefixlen, **flags
            )
        )


def link(
    one: Namespace,
    other: Namespace,
    *,
    names: tuple[str, str] = ("eth0", "eth0"),
    addresses: tuple[Sequence[str], Sequence[str]] = ((), ()),
) -> None:
    """Connect two namespaces by a veth pair that is up and has these addresses; it is removed with either namespace."""

    def add() -> None:
        with IPRoute() as ipr:
            ipr.link("add", ifname=names[0], kind="veth", peer={"ifname": names[1], "net_ns_fd": other.name})

    one.call(add)
    for namespace, name, own in zip((one, other), names, addresses, strict=True):
        for address in own:
            namespace.add_address(name, address)
        namespace.set_link(name, up=True)


def run_beside(
    process: subprocess.Popen[str], args: Sequence[str], *, check: bool = True, timeout: float = 60, **options: Any
) -> str:
    """Run a program in the network and mount namespaces of a running one, so that it sees the same UAPI sockets."""
    return _run(["nsenter", "--net", "--mount", "--target", str(process.pid), *args], check, timeout, **options)


def stop(process: subprocess.Popen[str], timeout: float = 5) -> int:
    """Stop a program with SIGTERM, then with SIGKILL. Returns its exit status."""
    if process.poll() is None:
        process.terminate()
        try:
            process.wait(timeout)
        except subprocess.TimeoutExpired:
            process.kill()
    status = process.wait()
    for stream in (process.stdout, process.stderr, process.stdin):
        if stream is not None:
            stream.close()
    return status


def _run(command: Sequence[str], check: bool, timeout: float, **options: Any) -> str:
    if options.get("input") is None:
        options = options | {"input": ""}
    done = subprocess.run(
        command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, timeout=timeout, check=False, **options
    )
    if check and done.returncode:
        raise AssertionError(f"{' '.join(command)} gave {done.returncode}:\n{done.stdout}")
    return str(done.stdout)


def _index(ipr: IPRoute, interface: str) -> int:
    found = ipr.link_lookup(ifname=interface)
    if not found:
        raise LookupError(f"no interface {interface}")
    return int(found[0])
