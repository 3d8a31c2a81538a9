"""The demo itself, step by step: two machines join one server, talk to it, and cannot talk to each other."""

import secrets
import socket
import statistics
import time
import uuid
from collections.abc import Awaitable, Callable
from contextlib import AsyncExitStack
from dataclasses import dataclass, field
from functools import partial
from typing import Any

import anyio

from siderolink.cli.demo import namespace
from siderolink.cli.demo.host import DemoError, DemoHost, start_host
from siderolink.cli.demo.report import Report
from siderolink.common.errors import SideroLinkError

Fields = dict[str, Any]

STEP_TIMEOUT = 40.0
API_PORT, WIREGUARD_PORT = 4000, 51820
_CABLES = (("192.0.2.1", "192.0.2.2"), ("198.51.100.1", "198.51.100.2"))
"""Server's and machine's address on each cable (RFC 5737), each a /30."""


class StepFailed(DemoError):
    """Raised when a step fails; `step` is its name."""

    def __init__(self, step: str, reason: str) -> None:
        super().__init__(reason)
        self.step = step


@dataclass
class _Machine:
    host: DemoHost
    cable: int
    link: str
    """Name of the machine's link in the summary."""
    address: str = ""
    result: Fields = field(default_factory=dict)


class Demo:
    """Runs once. `seconds` is how long each of the four bulk transfers takes."""

    def __init__(self, report: Report, *, device: str = "auto", seconds: float = 2.0) -> None:
        self._report = report
        self._device = device
        self._seconds = seconds
        self._steps = 0
        self._token = secrets.token_urlsafe(24)
        self._server_address = ""

    async def run(self) -> Fields:
        """Run all steps; returns the summary. Raises StepFailed. Nothing of it is left afterwards, whatever happens."""
        began_at = time.monotonic()
        before = _own_interfaces()
        async with AsyncExitStack() as stack:
            self._report.begin("network namespaces")
            hosts = [
                await stack.enter_async_context(start_host(name, self._report.note))
                for name in ("server", "machine 1", "machine 2")
            ]
            await self._run_steps(*hosts)
        await self._step("nothing is left", partial(self._nothing_left, before, hosts))
        links = {machine.link: machine.result for machine in self._machines}
        return {"ok": True, "steps": self._steps, "seconds": round(time.monotonic() - began_at, 1), "links": links}

    async def _run_steps(self, server: DemoHost, one: DemoHost, two: DemoHost) -> None:
        self._server = server
        self._machines = [_Machine(one, 0, "udp"), _Machine(two, 1, "tunnel")]
        first, second = self._machines
        await self._step("network namespaces", self._lay_cables, begun=True)
        await self._step("machine 2 drops all UDP", self._drop_udp)
        await self._step("the server listens", self._serve)
        await self._step("machine 1 joins by UDP", partial(self._join, first, tunnel=False))
        await self._step("machine 2 joins by the gRPC tunnel", partial(self._join, second, tunnel=True))
        await self._step("ping over the overlay", self._ping)
        await self._step("HTTP over the overlay", self._web)
        for machine in self._machines:
            await self._step(f"throughput by {machine.link}", partial(self._transfer, machine))
        await self._step("both machines turn hostile", self._turn_hostile)
        await self._step("the machines cannot reach each other", self._isolated)
        await self._step("without the filter the same packets pass", self._not_isolated)
        await self._step("with the filter back they do not", self._isolated)
        await self._step("everyone leaves", self._leave)

    async def _step(self, name: str, work: Callable[[], Awaitable[tuple[str, Fields]]], *, begun: bool = False) -> None:
        if not begun:
            self._report.begin(name)
        try:
            with anyio.fail_after(STEP_TIMEOUT):
                text, fields = await work()
        except TimeoutError:
            raise StepFailed(name, f"not done within {STEP_TIMEOUT:.0f} s") from None
        except SideroLinkError as error:
            raise StepFailed(name, str(error)) from error
        self._steps += 1
        self._report.end(name, text, fields)

    async def _lay_cables(self) -> tuple[str, Fields]:
        for number, machine in enumerate(self._machines, start=1):
            ours, theirs = _CABLES[machine.cable]
            await self._server.ask(
                "cable", interface=f"machine{number}", peer_interface="eth0", peer_pid=machine.host.pid, address=f"{ours}/30"
            )
            await machine.host.ask("configure", interface="eth0", address=f"{theirs}/30")
        await self._server.ask("forward")
        return "a server that forwards IPv6, and a cable to each machine", {}

    async def _drop_udp(self) -> tuple[str, Fields]:
        host, target = self._machines[1].host, _CABLES[1][0]
        if not (await host.ask("try_udp", address=target, port=WIREGUARD_PORT))["left"]:
            raise DemoError("UDP did not pass even before the firewall")
        await host.ask("drop_udp")
        if (await host.ask("try_udp", address=target, port=WIREGUARD_PORT))["left"]:
            raise DemoError("a UDP datagram still left machine 2")
        return "nftables: a datagram that left before does not any more", {}

    async def _serve(self) -> tuple[str, Fields]:
        served = await self._server.ask(
            "serve",
            api_listen=f"0.0.0.0:{API_PORT}",
            endpoint=f"{_CABLES[0][0]}:{WIREGUARD_PORT}",
            join_token=self._token,
            device=self._device,
        )
        self._server_address = served["address"]
        return f"API on port {API_PORT}, WireGuard on {WIREGUARD_PORT}, overlay {served['address']}", served

    async def _join(self, machine: _Machine, *, tunnel: bool) -> tuple[str, Fields]:
        query = ("grpc_tunnel=true&" if tunnel else "") + f"jointoken={self._token}"
        url = f"grpc://{_CABLES[machine.cable][0]}:{API_PORT}?{query}"
        joined = await machine.host.ask("join", url=url, uuid=str(uuid.uuid4()), device=self._device)
        machine.address = joined["address"]
        if joined["transport"] != machine.link:
            raise DemoError(f"the link travels by {joined['transport']}, not by {machine.link}")
        return f"{joined['interface']} {joined['address']} to {joined['server_address']} by {joined['transport']}", joined

    async def _ping(self) -> tuple[str, Fields]:
        for machine in self._machines:
            trips: list[float] = []
            for source, target in ((machine.host, self._server_address), (self._server, machine.address)):
                got = (await source.ask("ping", address=target, count=10))["milliseconds"]
                if len(got) != 10:
                    raise DemoError(f"{len(got)} of 10 echo requests from {source.name} to {target} were answered")
                trips += got
                self._report.note(source.name, "ping", f"{target}: 10 of 10, median {statistics.median(got):.2f} ms")
            machine.result["ping_ms"] = round(statistics.median(trips), 3)
        return "both directions, both links", {}

    async def _web(self) -> tuple[str, Fields]:
        hosts = [(self._server, self._server_address), *((machine.host, machine.address) for machine in self._machines)]
        ports = {}
        for host, address in hosts:
            ports[host] = (await host.ask("web_server", address=address, text=f"this is {host.name}"))["port"]
        for machine in self._machines:
            for source, target, address in (
                (machine.host, self._server, self._server_address),
                (self._server, machine.host, machine.address),
            ):
                got = await source.ask("web_get", address=address, port=ports[target])
                if got != {"status": 200, "body": f"this is {target.name}"}:
                    raise DemoError(f"{source.name} asked {target.name} and got {got}")
                self._report.note(source.name, "GET", f"http://[{address}]:{ports[target]}/ 200 {got['body']!r}")
        return "both directions, both links", {}

    async def _transfer(self, machine: _Machine) -> tuple[str, Fields]:
        ways = (("up", machine.host, self._server, self._server_address), ("down", self._server, machine.host, machine.address))
        for way, source, target, address in ways:
            port = (await target.ask("sink", address=address))["port"]
            await source.ask("source", address=address, port=port, seconds=self._seconds)
            got = await target.ask("sink_result")
            machine.result[f"{way}_mbit"] = round(got["bytes"] * 8 / got["seconds"] / 1e6, 1)
        up, down = machine.result["up_mbit"], machine.result["down_mbit"]
        return f"TCP, one flow: {up:.0f} Mbit/s up, {down:.0f} Mbit/s down", {"up_mbit": up, "down_mbit": down}

    async def _turn_hostile(self) -> tuple[str, Fields]:
        for machine, other in (self._machines, self._machines[::-1]):
            await machine.host.ask("widen", address=other.address)
            await machine.host.ask("route", address=other.address)
            await self._server.ask("route", address=machine.address)
        return "each takes the other's address for allowed and routes to it; the server host has routes to both", {}

    async def _ping_across(self) -> list[int]:
        answered: list[int] = []

        async def ping(*machines: _Machine) -> None:
            machine, other = machines
            got = await machine.host.ask("ping", address=other.address, count=3, timeout=0.5)
            answered.append(len(got["milliseconds"]))
            self._report.note(machine.host.name, "ping", f"{other.address}: {answered[-1]} of 3")

        async with anyio.create_task_group() as tasks:
            tasks.start_soon(ping, *self._machines)
            tasks.start_soon(ping, *self._machines[::-1])
        return answered

    async def _isolated(self) -> tuple[str, Fields]:
        await self._server.ask("isolate", on=True)
        before = (await self._server.ask("drops"))["drops"]
        if any(await self._ping_across()):
            raise DemoError("a machine reached the other one")
        after = (await self._server.ask("drops"))["drops"]
        reasons = {name: count - before.get(name, 0) for name, count in after.items() if count > before.get(name, 0)}
        if sum(reasons.values()) < 6:
            raise DemoError(f"the server did not see and drop all 6 packets: {reasons}")
        return "dropped at the server: " + ", ".join(f"{count} {name}" for name, count in reasons.items()), {"drops": reasons}

    async def _not_isolated(self) -> tuple[str, Fields]:
        await self._server.ask("isolate", on=False)
        answered = await self._ping_across()
        if answered != [3, 3]:
            raise DemoError(f"only {answered} of 3 packets passed, so the earlier loss proves nothing")
        return "so it was the filter that stopped them", {}

    async def _leave(self) -> tuple[str, Fields]:
        for host in (*(machine.host for machine in self._machines), self._server):
            left = [name for name in (await host.ask("leave"))["interfaces"] if name.startswith("siderolink")]
            if left:
                raise DemoError(f"{host.name} still has {', '.join(left)}")
        return "no overlay interface is left in any namespace", {}

    async def _nothing_left(self, before: set[str], hosts: list[DemoHost]) -> tuple[str, Fields]:
        processes = [host.name for host in hosts if host.is_running]
        namespaces = [host.name for host in hosts if namespace.is_in_use(host.namespace)]
        interfaces = sorted(_own_interfaces() - before)
        if processes or namespaces or interfaces:
            raise DemoError(f"processes {processes}, namespaces {namespaces} and interfaces {interfaces} are left")
        return "no process, namespace or interface", {}


def _own_interfaces() -> set[str]:
    """Interfaces of the host itself that have the demo's names."""
    return {name for _, name in socket.if_nameindex() if name.startswith(("siderolink", "machine"))}
