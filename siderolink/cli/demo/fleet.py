"""The demo of several servers: three over one Postgres, with machines at each; one server is killed, one is drained."""

import importlib.util
import os
import secrets
import uuid
from collections import Counter
from collections.abc import Awaitable, Callable, Sequence
from contextlib import AsyncExitStack
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any, Final

import anyio

from siderolink.cli.demo.host import DemoError, DemoHost
from siderolink.cli.demo.programs import postgres_program
from siderolink.cli.demo.report import Report
from siderolink.cli.demo.stepping import Steps
from siderolink.common.errors import SideroLinkError

Fields = dict[str, Any]

SERVERS: Final = 3
MACHINES: Final = 6
API_PORT, WIREGUARD_PORT, PEER_PORT, BALANCER_PORT = 4000, 51820, 8094, 8090
_POLL_SECONDS: Final = 0.1
_BEFORE_SECONDS: Final = 0.5
"""Duration of pinging before and after an action."""


def check_needs() -> None:
    """Raises SideroLinkError if this host lacks something."""
    if os.geteuid() != 0:
        raise SideroLinkError("this demo needs root, to run Postgres as another user: run it with sudo")
    missing = [name for name in ("initdb", "postgres", "pg_isready") if postgres_program(name) is None]
    if missing:
        raise SideroLinkError(
            f"this demo needs Postgres, and cannot find {', '.join(missing)}: on Debian, apt-get install postgresql"
        )
    if importlib.util.find_spec("psycopg") is None:
        raise SideroLinkError("this demo needs psycopg: install siderolink[postgres]")


async def _until(is_so: Callable[[], Awaitable[bool]]) -> None:
    while not await is_so():  # noqa: ASYNC110  # a server is asked
        await anyio.sleep(_POLL_SECONDS)


@dataclass(slots=True)
class _Server:
    host: DemoHost
    address: str
    environment: dict[str, str]
    arguments: list[str]

    @property
    def endpoint(self) -> str:
        return f"{self.address}:{WIREGUARD_PORT}"

    async def siderolink(self, *arguments: str) -> str:
        """The output of a command on this host."""
        output: str = (await self.host.ask("siderolink", arguments=list(arguments), environment=self.environment))["output"]
        return output

    async def fleet(self) -> Fields:
        """The servers known to this one, and the server of each machine that is up."""
        return await self.host.ask("fleet", runtime=self.environment["SIDEROLINK_RUNTIME_DIR"])

    async def start(self) -> None:
        await self.host.ask("start", arguments=self.arguments, environment=self.environment, until="serving")


@dataclass(slots=True)
class _Machine:
    host: DemoHost
    kind: str
    gateway: str
    node_uuid: str
    address: str = ""
    server_address: str = ""

    @property
    def name(self) -> str:
        return f"{self.host.name} ({self.kind})"


async def _is_answered(machine: _Machine, at: float) -> bool:
    """Whether the machine has received a reply to an echo request sent after a time."""
    answered: bool = (await machine.host.ask("answered_since", at=at))["is"]
    return answered


class FleetDemo:
    """One run of the demo."""

    def __init__(self, report: Report, *, device: str = "auto") -> None:
        self._device = device
        self._steps = Steps(report)
        self._report = report
        self._token = secrets.token_urlsafe(24)
        self._result: dict[str, Fields] = {}
        self._servers: list[_Server] = []
        self._machines: list[_Machine] = []
        self._folder = Path()

    async def run(self) -> Fields:
        """Run all steps; returns the summary. Raises StepFailed."""
        hosts: list[DemoHost] = []
        async with AsyncExitStack() as stack:
            self._report.begin("network namespaces")
            names = [
                "router",
                *(f"server {number + 1}" for number in range(SERVERS)),
                *(f"machine {number + 1}" for number in range(MACHINES)),
            ]
            hosts += await self._steps.start_hosts(stack, names, "siderolink.cli.demo.fleet_node")
            await self._run_steps(hosts[0], hosts[1 : 1 + SERVERS], hosts[1 + SERVERS :])
            machines = [machine.host for machine in self._machines]
            await self._steps.run("everyone leaves", partial(self._leave, machines, hosts[0]))
        await self._steps.run("nothing is left", partial(self._nothing_left, hosts))
        return self._steps.summary(machines=self._result)

    async def _run_steps(self, router: DemoHost, servers: Sequence[DemoHost], machines: Sequence[DemoHost]) -> None:
        step = self._steps.run
        self._router = router
        await step("network namespaces", partial(self._lay_cables, servers, machines), begun=True)
        await step("Postgres starts", partial(self._start_postgres, servers), timeout=90)
        await step("three servers start over one database", self._serve, timeout=120)
        await step("a load balancer is placed before their APIs", self._balance)
        await step("six machines join", self._join, timeout=120)
        await step("every server knows every machine", self._check_machines)
        await step("server 1 is killed with -9", self._kill, timeout=120)
        await step("the other servers detect it", self._check_survivors)
        await step("server 1 comes back", self._return, timeout=90)
        await step("server 2 is drained, by a command at server 3", self._drain, timeout=120)

    async def _lay_cables(self, servers: Sequence[DemoHost], machines: Sequence[DemoHost]) -> tuple[str, Fields]:
        for number, host in enumerate(servers):
            await self._wire(host, f"server{number + 1}", f"192.0.2.{4 * number + 1}", f"192.0.2.{4 * number + 2}")
        for number, host in enumerate(machines):
            gateway = f"198.51.100.{4 * number + 1}"
            await self._wire(host, f"machine{number + 1}", gateway, f"198.51.100.{4 * number + 2}")
            kind = "udp" if number < SERVERS else "tunnel"
            self._machines.append(_Machine(host, kind, gateway, str(uuid.uuid4())))
        await self._router.ask("forward_ipv4")
        return f"a router with cables to {len(servers)} servers and {len(machines)} machines", {}

    async def _wire(self, host: DemoHost, interface: str, gateway: str, address: str) -> None:
        await self._router.ask("cable", interface=interface, peer_interface="eth0", peer_pid=host.pid, address=f"{gateway}/30")
        await host.ask("configure", interface="eth0", address=f"{address}/30")
        await host.ask("gateway", address=gateway)

    async def _start_postgres(self, servers: Sequence[DemoHost]) -> tuple[str, Fields]:
        folder = (await self._router.ask("postgres"))["folder"]
        for number, host in enumerate(servers):
            address = f"192.0.2.{4 * number + 2}"
            arguments = [
                *("serve", "--store", f"postgresql://siderolink@/postgres?host={folder}"),
                *("--state-key-file", f"{folder}/state-key"),
                *("--api-listen", f"0.0.0.0:{API_PORT}"),
                *("--wireguard-endpoint", f"{address}:{WIREGUARD_PORT}"),
                *("--peer-listen", f"{address}:{PEER_PORT}"),
                *("--device", self._device),
            ]
            environment = {
                "SIDEROLINK_JOIN_TOKEN": self._token,
                "SIDEROLINK_RUNTIME_DIR": f"{folder}/run{number + 1}",
            }
            self._servers.append(_Server(host, address, environment, arguments))
        return f"on a Unix socket in {folder}, as the user nobody", {}

    async def _serve(self) -> tuple[str, Fields]:
        first, *others = self._servers
        self._report.note(first.host.name, "$", "siderolink " + " ".join(first.arguments))
        await first.start()  # creates the tables and the key
        async with anyio.create_task_group() as tasks:
            for server in others:
                tasks.start_soon(server.start)
        await _until(partial(self._are_alive, first, *self._servers))
        return "with one WireGuard key: " + ", ".join(server.endpoint for server in self._servers), {}

    async def _are_alive(self, asked: _Server, *servers: _Server) -> bool:
        """Whether `servers`, and no others, are alive as seen by one of them."""
        found = (await asked.fleet())["servers"].values()
        return {one["endpoint"] for one in found if one["state"] != "silent"} == {server.endpoint for server in servers}

    async def _balance(self) -> tuple[str, Fields]:
        addresses = [f"{server.address}:{API_PORT}" for server in self._servers]
        await self._router.ask("balance", servers=addresses, port=BALANCER_PORT)
        return f"on port {BALANCER_PORT}; checks their health, and keeps each machine at one server while healthy", {}

    async def _join(self) -> tuple[str, Fields]:
        for machine in self._machines:
            query = ("grpc_tunnel=true&" if machine.kind == "tunnel" else "") + f"jointoken={self._token}"
            url = f"grpc://{machine.gateway}:{BALANCER_PORT}?{query}"
            joined = await machine.host.ask("join", url=url, uuid=machine.node_uuid, device=self._device)
            machine.address, machine.server_address = joined["address"], joined["server_address"]
            if joined["transport"] != machine.kind:
                raise DemoError(f"{machine.name} is linked by {joined['transport']}")
        at = await self._owners(self._servers[0], MACHINES)
        counts = Counter(at.values())
        return ", ".join(f"{counts[server.endpoint]} at {server.host.name}" for server in self._servers), {}

    async def _owners(self, asked: _Server, count: int) -> dict[str, str]:
        """The endpoint of each machine's server, by the machine's UUID, once `count` machines are up."""
        found: dict[str, str] = {}

        async def are_up() -> bool:
            fleet = await asked.fleet()
            for node_uuid, server_id in fleet["machines"].items():
                found[node_uuid] = fleet["servers"].get(server_id, {}).get("endpoint", "")
            return len(found) >= count

        await _until(are_up)
        return found

    async def _check_machines(self) -> tuple[str, Fields]:
        for server in self._servers:
            await self._owners(server, MACHINES)
        last = self._servers[-1]
        for line in (await last.siderolink("machine", "list")).splitlines():
            self._report.note(last.host.name, "machine list", line)
        return "each of the three lists all six as up", {}

    async def _kill(self) -> tuple[str, Fields]:
        victim, witness = self._servers[0], self._servers[1]
        before = await self._owners(witness, MACHINES)
        hit = [machine for machine in self._machines if before[machine.node_uuid] == victim.endpoint]
        if not hit:
            raise DemoError("no machine is at server 1")
        await self._ping_all()
        killed_at = (await victim.host.ask("kill"))["at"]
        for machine in self._machines:
            await _until(partial(_is_answered, machine, killed_at))
        told = await self._stop_pinging()
        gaps = {machine.name: round(told[machine.node_uuid]["gap"], 1) for machine in hit}
        for machine in hit:
            self._result.setdefault(machine.host.name, {"link": machine.kind})["back_after"] = gaps[machine.name]
        back = ", ".join(f"{name} after {gap:.1f} s" for name, gap in gaps.items())
        lost = sum(told[machine.node_uuid]["lost"] for machine in self._machines if machine not in hit)
        return f"back at another server: {back}; machines at the other servers lost {lost} echoes", {"lost_by_others": lost}

    async def _ping_all(self) -> None:
        """Start an echo request from every machine to its server every 10 ms."""
        async with anyio.create_task_group() as tasks:
            for machine in self._machines:
                tasks.start_soon(partial(machine.host.ask, "keep_pinging", address=machine.server_address))
        await anyio.sleep(_BEFORE_SECONDS)

    async def _stop_pinging(self) -> dict[str, Fields]:
        """Stop pinging; returns the results by the machines' UUIDs."""
        await anyio.sleep(_BEFORE_SECONDS)
        told: dict[str, Fields] = {}

        async def stop(machine: _Machine) -> None:
            told[machine.node_uuid] = found = await machine.host.ask("stop_pinging")
            text = f"{found['sent']} echo requests, {found['lost']} lost, longest silence {found['gap']:.2f} s"
            self._report.note(machine.host.name, "ping", text)

        async with anyio.create_task_group() as tasks:
            for machine in self._machines:
                tasks.start_soon(stop, machine)
        return told

    async def _check_survivors(self) -> tuple[str, Fields]:
        witness = self._servers[1]
        await _until(partial(self._are_alive, witness, *self._servers[1:]))
        for line in (await witness.siderolink("servers")).splitlines():
            self._report.note(witness.host.name, "servers", line)
        counts = Counter((await self._owners(witness, MACHINES)).values())
        return f"they consider server 1 dead, and it has none of the {sum(counts.values())} machines that are up", {}

    async def _return(self) -> tuple[str, Fields]:
        returned, witness = self._servers[0], self._servers[1]
        before = await self._owners(witness, MACHINES)
        await returned.start()
        await _until(partial(self._are_alive, witness, *self._servers))
        if await self._owners(returned, MACHINES) != before:
            raise DemoError("machines moved to another server")
        return "it takes no machine from another server", {}

    async def _drain(self) -> tuple[str, Fields]:
        drained, asked = self._servers[1], self._servers[2]
        before = await self._owners(asked, MACHINES)
        moved = [machine for machine in self._machines if before[machine.node_uuid] == drained.endpoint]
        await self._ping_all()
        for line in (await asked.siderolink("drain", drained.endpoint)).splitlines():
            self._report.note(asked.host.name, "drain", line)
        told = await self._stop_pinging()
        if drained.endpoint in (await self._owners(asked, MACHINES)).values():
            raise DemoError("machines remain at server 2")
        for machine in moved:
            lost = told[machine.node_uuid]["lost"]
            self._result.setdefault(machine.host.name, {"link": machine.kind})["lost_in_drain"] = lost
        text = ", ".join(f"{machine.name} lost {told[machine.node_uuid]['lost']} echoes" for machine in moved)
        return f"{len(moved)} machines moved: {text}", {"moved": len(moved)}

    async def _leave(self, machines: Sequence[DemoHost], router: DemoHost) -> tuple[str, Fields]:
        told = await self._steps.leave([*machines, *(server.host for server in self._servers)])
        await router.ask("leave")
        return told

    async def _nothing_left(self, hosts: Sequence[DemoHost]) -> tuple[str, Fields]:
        told = await self._steps.nothing_left(hosts)
        if self._servers and (folder := Path(self._servers[0].environment["SIDEROLINK_RUNTIME_DIR"]).parent).exists():
            raise DemoError(f"{folder} still exists")
        return told
