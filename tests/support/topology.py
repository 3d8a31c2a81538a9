"""The three nets that tests run in, each removed with all that runs inside."""

from collections.abc import Iterator
from contextlib import contextmanager
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
