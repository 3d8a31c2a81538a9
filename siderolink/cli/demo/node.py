"""One host of the demo: a process in its own network namespace, controlled by lines of JSON.

A request ``{"id": n, "do": name, …}`` is answered by ``{"id": n, "ok": {…}}`` or ``{"id": n, "error": text}``; in between there
are events ``{"event": name, …}``. The process, and with it the namespace, ends with its standard input.
"""

import json
import socket
import sys
from contextlib import AbstractAsyncContextManager, AsyncExitStack
from dataclasses import replace
from ipaddress import IPv4Interface, IPv6Address, IPv6Network
from typing import TYPE_CHECKING, Any, TypeVar

import anyio
import anyio.to_thread
from anyio.abc import Process, TaskGroup, TaskStatus

from siderolink.cli.demo import namespace, probe
from siderolink.cli.describe import link_event
from siderolink.cli.running import loop_options
from siderolink.common.errors import SideroLinkError
from siderolink.common.nft_matches import protocol
from siderolink.common.nftables import Chain, Hook, Rule, firewall
from siderolink.common.tasks import background_tasks

if TYPE_CHECKING:
    from collections.abc import Awaitable, Callable

    from siderolink.client import Link
    from siderolink.client.link.events import LinkEvent
    from siderolink.common.wireguard.device import Device
    from siderolink.server import Server

Fields = dict[str, Any]
T = TypeVar("T")


def send(fields: Fields) -> None:
    print(json.dumps(fields), flush=True)


class Node:
    """The operations of a demo host, built on the public API."""

    def __init__(self, stack: AsyncExitStack, tasks: TaskGroup) -> None:
        self._stack = stack
        self._tasks = tasks
        self._leave = anyio.Event()
        self._left: list[anyio.Event] = []
        self._server: Server | None = None
        self._link: Link | None = None
        self._sink: Process | None = None

    async def do_cable(self, interface: str, peer_interface: str, peer_pid: int, address: str) -> Fields:
        await namespace.add_cable(interface, peer_interface, peer_pid, IPv4Interface(address))
        return {}

    async def do_configure(self, interface: str, address: str) -> Fields:
        await namespace.configure(interface, IPv4Interface(address))
        return {}

    async def do_forward(self) -> Fields:
        namespace.forward_ipv6()
        return {}

    async def do_drop_udp(self) -> Fields:
        """Drop all incoming, outgoing and forwarded UDP."""
        rule = Rule([protocol(socket.IPPROTO_UDP)], "drop")
        hooks: tuple[Hook, ...] = ("input", "output", "forward")
        await self._stack.enter_async_context(firewall("siderolink_demo", [Chain(hook, [rule]) for hook in hooks]))
        return {}

    async def do_try_udp(self, address: str, port: int) -> Fields:
        """Whether a UDP datagram leaves this host."""
        with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as sock:
            try:
                sock.sendto(b"demo", (address, port))
            except PermissionError:
                return {"left": False}
        return {"left": True}

    async def do_serve(self, api_listen: str, endpoint: str, join_token: str, device: str) -> Fields:
        from siderolink.server import Server

        server = Server(
            api_listen=api_listen,
            wireguard_endpoints=(endpoint,),
            join_token=join_token,
            device=device,  # type: ignore[arg-type]  # checked by Server
        )
        self._server = await self.hold(server)
        return {"address": str(server.address), "public_key": str(server.public_key), "device": server.device.kind}

    async def do_join(self, url: str, uuid: str, device: str) -> Fields:
        from siderolink.client import connect

        def report(event: "LinkEvent") -> None:
            name, text = link_event(event)
            send({"event": name, "text": text})

        context = connect(url, uuid=uuid, device=device, on_event=report)  # type: ignore[arg-type]  # checked by connect
        self._link = link = await self.hold(context)
        return {
            "address": str(link.address),
            "server_address": str(link.server_address),
            "transport": link.transport,
            "interface": link.interface,
        }

    async def do_leave(self) -> Fields:
        """Stop the server or the link; returns the remaining interfaces."""
        self._leave.set()
        for left in self._left:
            await left.wait()
        return {"interfaces": await namespace.interfaces()}

    async def do_ping(self, address: str, count: int = 5, timeout: float = 1.0) -> Fields:
        return {"sent": count, "milliseconds": await probe.ping(IPv6Address(address), count=count, timeout=timeout)}

    async def do_web_server(self, address: str, text: str) -> Fields:
        return {"port": await self._stack.enter_async_context(probe.web_server(IPv6Address(address), text))}

    async def do_web_get(self, address: str, port: int) -> Fields:
        status, body = await probe.web_get(IPv6Address(address), port)
        return {"status": status, "body": body}

    async def do_sink(self, address: str) -> Fields:
        self._sink = await self._stack.enter_async_context(await probe.transfer_sink(IPv6Address(address)))
        return {"port": int(await _line(self._sink))}

    async def do_sink_result(self) -> Fields:
        if self._sink is None:
            raise SideroLinkError("there is no transfer")
        taken, seconds = (await _line(self._sink)).split()
        return {"bytes": int(taken), "seconds": float(seconds)}

    async def do_source(self, address: str, port: int, seconds: float) -> Fields:
        async with await probe.transfer_source(IPv6Address(address), port, seconds) as process:
            status = await process.wait()
        if status:
            raise SideroLinkError(f"the transfer failed with exit status {status}")
        return {}

    async def do_route(self, address: str) -> Fields:
        await namespace.add_route(IPv6Address(address), self._device.name)
        return {}

    async def do_widen(self, address: str) -> Fields:
        """Act as a hostile machine: let the tunnel to the server carry another machine's address, too."""
        status = await self._device.peer(self._need_link.server_key)
        if status is None:
            raise SideroLinkError("the device has lost its server")
        from siderolink.common.wireguard.device import PeerConfig

        allowed_ips = tuple(dict.fromkeys((*status.allowed_ips, IPv6Network(address))))
        peer = PeerConfig(public_key=status.public_key, allowed_ips=allowed_ips)
        await self._device.set_peer(replace(peer, persistent_keepalive=status.persistent_keepalive))
        return {}

    async def do_isolate(self, on: bool) -> Fields:
        await self._device.set_isolate(on)
        return {}

    async def do_drops(self) -> Fields:
        return {"drops": self._device.drops()}

    @property
    def _device(self) -> "Device":
        return self._server.device if self._server is not None else self._need_link.device

    @property
    def _need_link(self) -> "Link":
        if self._link is None:
            raise SideroLinkError("this host has no link")
        return self._link

    async def hold(self, context: AbstractAsyncContextManager[T]) -> T:
        """Enter a context in a separate task, which leaves it later."""

        async def hold(*, task_status: TaskStatus[T]) -> None:
            async with context as value:
                left = anyio.Event()
                self._left.append(left)
                task_status.started(value)
                await self._leave.wait()
            left.set()

        value: T = await self._tasks.start(hold)
        return value

    async def answer(self, request: Fields) -> None:
        """Run one request and send its result."""
        number = request.pop("id", None)
        method: Callable[..., Awaitable[Fields]] | None = getattr(self, f"do_{request.pop('do', None)}", None)
        try:
            if method is None:
                raise SideroLinkError("no such request")
            send({"id": number, "ok": await method(**request)})
        except (SideroLinkError, OSError) as error:
            send({"id": number, "error": str(error) or type(error).__name__})


async def _line(process: Process) -> str:
    if process.stdout is None:
        raise SideroLinkError("the transfer has no output")
    line = b""
    while not line.endswith(b"\n"):
        try:
            line += await process.stdout.receive()
        except anyio.EndOfStream:
            raise SideroLinkError("the transfer ended early") from None
    return line.decode()


async def _main(kind: type[Node]) -> None:
    await namespace.bring_up_loopback()
    send({"event": "ready", "text": ""})
    async with AsyncExitStack() as stack, background_tasks() as tasks:
        node = kind(stack, tasks)
        while line := await anyio.to_thread.run_sync(sys.stdin.readline, abandon_on_cancel=True):
            tasks.start_soon(node.answer, json.loads(line))
        await node.do_leave()


def run_node(kind: type[Node]) -> None:
    """Run one host until its standard input ends."""
    namespace.enter_network_namespace()
    anyio.run(_main, kind, backend_options=loop_options())


if __name__ == "__main__":
    run_node(Node)
