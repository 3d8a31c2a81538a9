"""Live events of a network namespace's links, addresses and routes, from a real kernel."""

import socket
import threading
from collections.abc import Callable
from ipaddress import ip_address, ip_network

import anyio
import pytest

from siderolink.common.errors import ConfigurationError
from siderolink.common.netlink import (
    Address,
    HostNetwork,
    InterfaceMonitor,
    NetworkChange,
    NetworkLink,
    NetworkUpdate,
    NetworkWatch,
    Route,
    follow_network,
    open_events,
    read_network,
    route_to,
)
from siderolink.common.netlink.follow import LINKS
from siderolink.common.tasks import background_tasks
from tests.support.netns import Namespace

PATIENCE = 10.0


class Follower:
    """Keeps the last picture, and waits for one that fulfils a condition."""

    def __init__(self) -> None:
        self.updates: list[NetworkUpdate] = []
        self._news = anyio.Event()

    def __call__(self, update: NetworkUpdate) -> None:
        self.updates.append(update)
        self._news.set()

    async def until(self, condition: Callable[[HostNetwork], bool]) -> HostNetwork:
        with anyio.fail_after(PATIENCE):
            while not self.updates or not condition(self.updates[-1].network):
                self._news = anyio.Event()
                await self._news.wait()
        return self.updates[-1].network


def names(network: HostNetwork) -> set[str]:
    return {link.name for link in network.links.values()}


def destinations(network: HostNetwork) -> set[str]:
    return {str(route.destination) for route in network.routes if route.table == 254}


@pytest.mark.parametrize("inside", [True, False], ids=["inside", "named"])
def test_links_addresses_and_routes_are_followed(inside: bool) -> None:
    with Namespace("follow") as namespace, Namespace("elsewhere") as elsewhere:
        ip = namespace.run

        async def work() -> None:
            heard = Follower()
            async with background_tasks() as tasks:
                tasks.start_soon(follow_network, heard, None if inside else namespace.name)
                first = await heard.until(lambda network: names(network) == {"lo"})
                assert first.is_complete
                assert heard.updates[0].added >= set(first.links.values())
                assert not heard.updates[0].removed

                ip(["ip", "link", "add", "one", "mtu", "1400", "type", "veth", "peer", "name", "two"])
                ip(["ip", "link", "set", "two", "up"])
                ip(["ip", "link", "set", "one", "alias", "a name"])
                ip(["ip", "address", "add", "192.0.2.1/24", "brd", "+", "dev", "one"])
                ip(["ip", "address", "add", "2001:db8::1/64", "dev", "one", "nodad"])
                ip(["ip", "link", "set", "one", "up"])
                ip(["ip", "route", "add", "198.51.100.0/24", "via", "192.0.2.9", "dev", "one", "metric", "77", "mtu", "1300"])
                network = await heard.until(lambda now: {"198.51.100.0/24", "2001:db8::/64"} <= destinations(now))
                [link] = [link for link in network.links.values() if link.name == "one"]
                assert (link.kind, link.alias, link.mtu, link.is_up, len(link.hardware_address)) == (
                    "veth",
                    "a name",
                    1400,
                    True,
                    6,
                )
                addresses = {str(found.address): found for found in network.addresses if found.interface == link.index}
                assert addresses["192.0.2.1"].prefix_length == 24
                assert addresses["192.0.2.1"].local == ip_address("192.0.2.1")
                assert addresses["192.0.2.1"].broadcast == ip_address("192.0.2.255")
                assert addresses["2001:db8::1"].prefix_length == 64
                [route] = [route for route in network.routes if route.destination == ip_network("198.51.100.0/24")]
                assert (route.gateway, route.interface) == (ip_address("192.0.2.9"), link.index)
                assert (route.priority, route.mtu, route.table, route.family) == (77, 1300, 254, socket.AF_INET)

                # the kernel removes the IPv4 routes without an event for each
                ip(["ip", "link", "set", "one", "down"])
                await heard.until(lambda now: "198.51.100.0/24" not in destinations(now))
                assert route in {gone for update in heard.updates for gone in update.removed}
                ip(["ip", "link", "del", "one"])
                await heard.until(lambda now: names(now) == {"lo"})
                assert link.index not in {found.interface for found in heard.updates[-1].network.addresses}
                kinds = {type(item) for update in heard.updates for item in update.removed}
                assert kinds == {NetworkLink, Address, Route}

        with (namespace if inside else elsewhere).portal() as portal:
            portal.call(work)


def test_many_routes_are_read_in_parts_and_no_more_than_the_most(monkeypatch: pytest.MonkeyPatch) -> None:
    with Namespace("many") as namespace:
        lines = "".join(f"route add 10.{n >> 8}.{n & 255}.0/24 dev lo table 7\n" for n in range(1000))
        namespace.run(["ip", "-batch", "-"], input=lines)

        async def count() -> tuple[int, bool]:
            network = await read_network(namespace.name)
            return len([route for route in network.routes if route.table == 7]), network.is_complete

        assert anyio.run(count) == (1000, True)
        monkeypatch.setattr("siderolink.common.netlink.rtnl.MAX_ITEMS", 100)

        async def count_all() -> tuple[int, bool]:
            network = await read_network(namespace.name)
            return len(network.routes), network.is_complete

        assert anyio.run(count_all) == (100, False)


def test_many_links_and_routes_are_compared_beside_the_loop(monkeypatch: pytest.MonkeyPatch) -> None:
    """Each hash of one takes microseconds, and WireGuard may run on the loop."""
    hashed = set[threading.Thread]()
    hash_of = Route.__hash__

    def note(self: Route) -> int:
        hashed.add(threading.current_thread())
        return hash_of(self)

    async def work() -> None:
        heard = Follower()
        async with background_tasks() as tasks:
            tasks.start_soon(follow_network, heard)
            await heard.until(lambda network: names(network) == {"lo"})
            namespace.run(["ip", "link", "set", "lo", "up"])
            await heard.until(lambda network: any(link.is_up for link in network.links.values()))
        found.append(threading.current_thread() in hashed)

    found: list[bool] = []
    with Namespace("compare") as namespace, namespace.portal() as portal:
        with monkeypatch.context() as patched:
            patched.setattr(Route, "__hash__", note)
            portal.call(work)
    assert found == [False]
    assert hashed


def test_a_missing_namespace_is_refused() -> None:
    async def work() -> None:
        await follow_network(lambda update: None, "nowhere-at-all")

    with pytest.raises(ConfigurationError, match="nowhere-at-all"):
        anyio.run(work)


def test_a_watch_names_the_interfaces_and_those_with_a_new_carrier() -> None:
    with Namespace("watch") as namespace, namespace.portal() as portal:
        namespace.run(["ip", "link", "add", "one", "type", "veth", "peer", "name", "two"])
        namespace.run(["ip", "link", "set", "one", "up"])
        index = namespace.call(socket.if_nametoindex, "one")

        async def work() -> None:
            heard: list[NetworkChange] = []
            watch = NetworkWatch(heard.append)
            with anyio.fail_after(PATIENCE):
                namespace.run(["ip", "address", "add", "192.0.2.1/24", "dev", "one"])
                while not any(index in change.interfaces for change in heard):
                    await anyio.sleep(0.01)
                assert not any(change.carriers for change in heard)
                for state in ("up", "down", "up"):  # a carrier that was never lost causes no event
                    namespace.run(["ip", "link", "set", "two", state])
                while not any(index in change.carriers for change in heard):
                    await anyio.sleep(0.01)
            assert not any(change.lost for change in heard)
            watch.close()
            watch.close()
            route = route_to("192.0.2.7")
            assert route is not None
            assert (route.interface, route.source) == (index, ip_address("192.0.2.1").packed)
            assert route_to("198.51.100.1") is None
            assert route_to("no address") is None

        portal.call(work)


def test_lost_events_are_reported_after_the_queued_ones() -> None:
    with Namespace("overrun") as namespace, namespace.portal() as portal:

        async def work() -> None:
            heard: list[NetworkChange] = []
            watch = NetworkWatch(heard.append)
            lines = "".join(
                f"address {verb} 10.0.{n >> 8}.{n & 255}/32 dev lo\n" for n in range(1000) for verb in ("add", "del")
            )
            namespace.run(["ip", "-batch", "-"], input=lines)  # blocks this loop: nothing is read meanwhile
            with anyio.fail_after(PATIENCE):
                while not any(change.lost for change in heard):
                    await anyio.sleep(0.01)
            watch.close()

        portal.call(work)


def test_a_monitored_interface_is_lost_once_also_when_the_events_were_lost() -> None:
    with Namespace("monitor") as namespace, namespace.portal() as portal:
        namespace.run(["ip", "link", "add", "one", "type", "veth", "peer", "name", "two"])
        index = namespace.call(socket.if_nametoindex, "one")

        async def work() -> None:
            seen: list[tuple[bool, int]] = []
            gone: list[bool] = []
            monitor = InterfaceMonitor(
                open_events(LINKS), index, lambda link: seen.append((link.is_up, link.mtu)), lambda: gone.append(True)
            )
            namespace.run(["ip", "link", "set", "one", "up", "mtu", "1300"])
            with anyio.fail_after(PATIENCE):
                while (True, 1300) not in seen:
                    await anyio.sleep(0.01)
            # 1,000 changes of another interface overrun the queue before the end of this one
            flips = "".join(f"link set lo mtu {2000 + n}\n" for n in range(1000))
            namespace.run(["ip", "-batch", "-"], input=flips + "link del one\n")
            with anyio.fail_after(PATIENCE):
                while not gone:
                    await anyio.sleep(0.01)
            await anyio.sleep(0.05)
            assert gone == [True]
            monitor.close()

        portal.call(work)
