"""One host of the demo of several servers: the operations of `node`, and programs."""

import time
from ipaddress import IPv6Address
from pathlib import Path
from typing import Any

import anyio

from siderolink.cli.admin.connection import DEFAULT_INTERFACE, Target, connect
from siderolink.cli.demo import namespace
from siderolink.cli.demo.balancer import Balancer
from siderolink.cli.demo.node import Node, run_node, send
from siderolink.cli.demo.probe import EchoCount, keep_pinging
from siderolink.cli.demo.programs import Service, postgres, run_siderolink
from siderolink.common.admin_channel import ServerAddress
from siderolink.common.errors import SideroLinkError
from siderolink.common.hostport import HostPort
from siderolink.common.pb.siderolink.admin.v1 import (
    ListMachinesRequest,
    ListServersRequest,
    MachineServiceStub,
    ServerServiceStub,
)

Fields = dict[str, Any]


class FleetNode(Node):
    """The operations of a host of any kind."""

    _service: Service | None = None
    _echoes: EchoCount | None = None
    _stop_echoes: anyio.Event | None = None

    async def do_gateway(self, address: str) -> Fields:
        await namespace.add_gateway(address)
        return {}

    async def do_forward_ipv4(self) -> Fields:
        namespace.forward_ipv4()
        return {}

    async def do_postgres(self) -> Fields:
        return {"folder": str(await self.hold(postgres()))}

    async def do_balance(self, servers: list[str], port: int) -> Fields:
        await self.hold(Balancer([HostPort.parse(server) for server in servers]).run(port))
        return {}

    async def do_start(self, arguments: list[str], environment: dict[str, str], until: str) -> Fields:
        """Start a long-running `siderolink` and wait until its log contains a text."""
        self._service = Service(arguments, environment, _report_line)
        await self.hold(self._service.running(until))
        return {}

    async def do_kill(self) -> Fields:
        """Kill it with SIGKILL."""
        if self._service is None:
            raise SideroLinkError("nothing runs here")
        await self._service.kill()
        return {"at": time.monotonic()}

    async def do_siderolink(self, arguments: list[str], environment: dict[str, str]) -> Fields:
        return {"output": await run_siderolink(arguments, environment)}

    async def do_fleet(self, runtime: str) -> Fields:
        """Query the local server's admin API: all servers by id, and the server of each machine that is up, by UUID."""
        async with connect(Target(address=ServerAddress(path=Path(runtime) / f"{DEFAULT_INTERFACE}.sock"))) as connection:
            servers = await connection.stub(ServerServiceStub).list_servers(ListServersRequest())
            machines = await connection.stub(MachineServiceStub).list_machines(ListMachinesRequest())
        return {
            "servers": {one.id: {"endpoint": one.wireguard_endpoints[0], "state": one.state} for one in servers.servers},
            "machines": {one.node_uuid: one.server for one in machines.machines if one.link == "up"},
        }

    async def do_keep_pinging(self, address: str) -> Fields:
        self._echoes, self._stop_echoes = EchoCount(), anyio.Event()
        self._tasks.start_soon(keep_pinging, IPv6Address(address), self._echoes, self._stop_echoes)
        return {}

    async def do_answered_since(self, at: float) -> Fields:
        """Whether a request sent after a time was answered."""
        return {"is": any(self._need_echoes.sent_at[sequence] > at for sequence in reversed(self._need_echoes.answered_at))}

    async def do_stop_pinging(self) -> Fields:
        """Returns the number of requests sent and lost, and the longest time without an answer in seconds."""
        echoes = self._need_echoes
        if self._stop_echoes is not None:
            self._stop_echoes.set()
        await echoes.ended.wait()
        return {"sent": len(echoes.sent_at), "lost": len(echoes.lost), "gap": echoes.longest_gap}

    @property
    def _need_echoes(self) -> EchoCount:
        if self._echoes is None:
            raise SideroLinkError("no echo requests are sent")
        return self._echoes


def _report_line(line: str) -> None:
    """Report the relevant lines of a server's log: that it serves, and warnings."""
    text, _, fields = line.partition("Z ")[2].partition(" level=")
    if fields.startswith("warning") or text.startswith("serving"):
        kind, _, what = text.partition(": ")
        send({"event": kind, "text": what})


if __name__ == "__main__":
    run_node(FleetNode)
