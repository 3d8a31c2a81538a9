"""Machines that use wireguard-go: joined through the API, each with an interface, in one namespace."""

import asyncio
import os
import socket
import uuid
from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager
from ipaddress import IPv6Interface

import anyio

from siderolink.common.hostport import HostPort
from siderolink.common.keys import PublicKey
from tests.support.netns import Namespace
from tests.support.packet_machine import Answers
from tests.support.raw_machine import RawMachine
from tests.support.wireguard_go import wireguard_go

_ECHO_REQUEST, _ECHO_REPLY = 128, 129
_FIRST_PORT = 42_000


class GoMachine:
    """Pings its server through a raw socket that is bound to its interface."""

    def __init__(self, interface: str, server: str) -> None:
        self.answers = Answers()
        self._interface, self._server = interface, server
        self._socket: socket.socket | None = None
        self._name = os.urandom(2)

    async def run(self) -> None:
        loop = asyncio.get_running_loop()
        with socket.socket(socket.AF_INET6, socket.SOCK_RAW | socket.SOCK_NONBLOCK, socket.IPPROTO_ICMPV6) as self._socket:
            self._socket.setsockopt(socket.SOL_SOCKET, socket.SO_BINDTODEVICE, self._interface.encode())
            loop.add_reader(self._socket, self._read)
            try:
                await anyio.sleep_forever()
            finally:
                loop.remove_reader(self._socket)
                self._socket = None

    def ping(self) -> None:
        if self._socket is not None:
            try:
                self._socket.sendto(bytes((_ECHO_REQUEST, 0, 0, 0)) + self._name + bytes(10), (self._server, 0))
            except OSError:
                pass

    def _read(self) -> None:
        while self._socket is not None:
            try:
                data = self._socket.recv(2048)
            except OSError:
                return
            if data[:1] == bytes((_ECHO_REPLY,)) and data[4:6] == self._name:
                self.answers.came()


@contextmanager
def go_machines(namespace: Namespace, api: str, token: str, count: int) -> Iterator[Sequence[GoMachine]]:
    """`count` machines, each provisioned and configured; their first ping starts the handshake."""
    with ExitStack() as stack:
        portal = stack.enter_context(namespace.portal())
        found = []
        for number in range(count):
            machine = RawMachine(
                api=HostPort.parse(api), node_uuid=str(uuid.uuid4()), join_token=token, unique_token=os.urandom(8).hex()
            )
            answer = portal.call(machine.provision)
            address = str(IPv6Interface(answer.node_address_prefix))
            interface = stack.enter_context(
                wireguard_go(namespace, machine.key, port=_FIRST_PORT + number, addresses=(address,), name=f"go{number}")
            )
            interface.set_peer(
                PublicKey.parse(answer.server_public_key),
                f"{answer.server_address}/128",
                endpoint=answer.server_endpoint[0],
                keepalive=25,
            )
            found.append(GoMachine(interface.name, answer.server_address))
        yield found
