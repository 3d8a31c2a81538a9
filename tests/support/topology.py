"""The nets that tests run in, each removed with all that runs inside."""

from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass

from tests.support.netns import Namespace, link

SERVER_V4 = "192.0.2.1"
SERVER_V6 = "2001:db8::1"


@dataclass(frozen=True, slots=True)
class Net:
    """One server and its machines; `router` stands between them, where there is one."""

    server: Namespace
    machines: tuple[Namespace, ...]
    router: Namespace | None = None

    @property
    def machine(self) -> Namespace:
        return self.machines[0]


@contextmanager
def direct() -> Iterator[Net]:
    """A server (192.0.2.1, 2001:db8::1) and a machine (192.0.2.2, 2001:db8::2) on one wire, ``eth0`` at both ends."""
    with Namespace("server") as server, Namespace("machine") as machine:
        link(
            server,
            machine,
            addresses=([f"{SERVER_V4}/24", f"{SERVER_V6}/64"], ["192.0.2.2/24", "2001:db8::2/64"]),
        )
        yield Net(server, (machine,))


@contextmanager
def routed(machines: int = 1, *, nat: bool = False) -> Iterator[Net]:
    """A server (192.0.2.1) and machines (198.51.100.2, 198.51.101.2, …) with a router between, each on a wire of its own.

    With `nat` the router hides the machines behind 192.0.2.254. The router's interface towards the server is ``up``.
    """
    with Namespace("server") as server, Namespace("router") as router:
        router.forward()
        link(server, router, names=("eth0", "up"), addresses=([f"{SERVER_V4}/24"], ["192.0.2.254/24"]))
        server.add_route("default", "192.0.2.254")
        if nat:
            router.masquerade("up")
        yield from _with_machines(server, router, machines, ())


def _with_machines(server: Namespace, router: Namespace, count: int, made: tuple[Namespace, ...]) -> Iterator[Net]:
    if len(made) == count:
        yield Net(server, made, router)
        return
    number = len(made)
    with Namespace(f"machine{number}") as machine:
        here = f"198.51.{100 + number}"
        link(machine, router, names=("eth0", f"down{number}"), addresses=([f"{here}.2/24"], [f"{here}.1/24"]))
        machine.add_route("default", f"{here}.1")
        yield from _with_machines(server, router, count, (*made, machine))


@dataclass(frozen=True, slots=True)
class ServersNet:
    """Several servers and machines around a router, each on a wire of its own."""

    servers: tuple[Namespace, ...]
    machines: tuple[Namespace, ...]
    router: Namespace

    def address(self, number: int) -> str:
        """Of a server."""
        return f"192.0.{2 + number}.1"


@contextmanager
def several(servers: int, machines: int = 1) -> Iterator[ServersNet]:
    """Servers (192.0.2.1, 192.0.3.1, …) and machines (198.51.100.2, 198.51.101.2, …) with a router between them."""
    with ExitStack() as stack:
        router = stack.enter_context(Namespace("router"))
        router.forward()

        def wire(name: str, number: int, network: str, host: int) -> Namespace:
            found = stack.enter_context(Namespace(f"{name}{number}"))
            ours, theirs = f"{network}.{host}", f"{network}.254"
            link(found, router, names=("eth0", f"{name}{number}"), addresses=([f"{ours}/24"], [f"{theirs}/24"]))
            found.add_route("default", theirs)
            return found

        yield ServersNet(
            tuple(wire("server", number, f"192.0.{2 + number}", 1) for number in range(servers)),
            tuple(wire("machine", number, f"198.51.{100 + number}", 2) for number in range(machines)),
            router,
        )
