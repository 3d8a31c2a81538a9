"""The demo: two machines join one server, communicate with it, and cannot reach each other."""

import secrets
import statistics
import uuid
from contextlib import AsyncExitStack
from dataclasses import dataclass, field
from functools import partial
from typing import Any

import anyio

from siderolink.cli.demo.host import DemoError, DemoHost
from siderolink.cli.demo.report import Report
from siderolink.cli.demo.stepping import Steps

Fields = dict[str, Any]

API_PORT, WIREGUARD_PORT = 4000, 51820
_LATE_ECHO = 10.0
"""Seconds until an echo that must come counts as lost: a busy host stalls a program for one or two."""
_CABLES = (("192.0.2.1", "192.0.2.2"), ("198.51.100.1", "198.51.100.2"))
"""Server's and machine's address on each cable (RFC 5737), each in a /30."""


@dataclass
class _Machine:
    host: DemoHost
    cable: int
    link: str
    """Name of the machine's link in the summary."""
    address: str = ""
    result: Fields = field(default_factory=dict)


class Demo:
    """One run of the demo. `seconds` is the duration of each of the four bulk transfers."""

    def __init__(self, report: Report, *, device: str = "auto", seconds: float = 2.0) -> None:
        self._report = report
        self._device = device
        self._seconds = seconds
        self._steps = Steps(report)
        self._token = secrets.token_urlsafe(24)
        self._server_address = ""

    async def run(self) -> Fields:
        """Run all steps; returns the summary. Raises StepFailed. Nothing is left behind, whatever happens."""
        async with AsyncExitStack() as stack:
            self._report.begin("network namespaces")
            hosts = await self._steps.start_hosts(stack, ("server", "machine 1", "machine 2"))
            await self._run_steps(*hosts)
        await self._steps.run("nothing is left", partial(self._steps.nothing_left, hosts))
        return self._steps.summary(links={machine.link: machine.result for machine in self._machines})

    async def _run_steps(self, server: DemoHost, one: DemoHost, two: DemoHost) -> None:
        self._server = server
        self._machines = [_Machine(one, 0, "udp"), _Machine(two, 1, "tunnel")]
        first, second = self._machines
        step = self._steps.run
        await step("network namespaces", self._lay_cables, begun=True)
        await step("machine 2 drops all UDP", self._drop_udp)
        await step("the server listens", self._serve)
        await step("machine 1 joins by UDP", partial(self._join, first, tunnel=False))
        await step("machine 2 joins by the gRPC tunnel", partial(self._join, second, tunnel=True))
        await step("ping over the overlay", self._ping)
        await step("HTTP over the overlay", self._web)
        for machine in self._machines:
            await step(f"throughput by {machine.link}", partial(self._transfer, machine))
        await step("both machines turn hostile", self._turn_hostile)
        await step("the machines cannot reach each other", self._isolated)
        await step("without the filter the same packets pass", self._not_isolated)
        await step("with the filter back they do not", self._isolated)
        await step("everyone leaves", partial(self._steps.leave, (one, two, server)))

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
        return "nftables: a datagram that passed before is now dropped", {}

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
            raise DemoError(f"the link uses {joined['transport']}, not {machine.link}")
        return f"{joined['interface']} {joined['address']} to {joined['server_address']} by {joined['transport']}", joined

    async def _ping(self) -> tuple[str, Fields]:
        for machine in self._machines:
            trips: list[float] = []
            for source, target in ((machine.host, self._server_address), (self._server, machine.address)):
                got = (await source.ask("ping", address=target, count=10, timeout=_LATE_ECHO))["milliseconds"]
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
        return "each allows and routes the other's address; the server host has routes to both", {}

    async def _ping_across(self, timeout: float) -> list[int]:
        answered: list[int] = []

        async def ping(*machines: _Machine) -> None:
            machine, other = machines
            got = await machine.host.ask("ping", address=other.address, count=3, timeout=timeout)
            answered.append(len(got["milliseconds"]))
            self._report.note(machine.host.name, "ping", f"{other.address}: {answered[-1]} of 3")

        async with anyio.create_task_group() as tasks:
            tasks.start_soon(ping, *self._machines)
            tasks.start_soon(ping, *self._machines[::-1])
        return answered

    async def _isolated(self) -> tuple[str, Fields]:
        await self._server.ask("isolate", on=True)
        before = (await self._server.ask("drops"))["drops"]
        if any(await self._ping_across(0.5)):
            raise DemoError("a machine reached the other one")
        reasons: dict[str, int] = {}
        with anyio.move_on_after(_LATE_ECHO):
            while sum(reasons.values()) < 6:
                await anyio.sleep(0.02)
                after = (await self._server.ask("drops"))["drops"]
                reasons = {name: count - before.get(name, 0) for name, count in after.items() if count > before.get(name, 0)}
        if sum(reasons.values()) < 6:
            raise DemoError(f"the server did not see and drop all 6 packets: {reasons}")
        return "dropped at the server: " + ", ".join(f"{count} {name}" for name, count in reasons.items()), {"drops": reasons}

    async def _not_isolated(self) -> tuple[str, Fields]:
        await self._server.ask("isolate", on=False)
        answered = await self._ping_across(_LATE_ECHO)
        if answered != [3, 3]:
            raise DemoError(f"only {answered} of 3 packets passed, so the earlier loss proves nothing")
        return "so it was the filter that stopped them", {}
