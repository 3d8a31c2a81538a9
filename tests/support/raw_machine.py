"""Machines that make the protocol's calls without the package's client, so that a test can violate the protocol."""

from collections.abc import AsyncIterator, Sequence
from contextlib import asynccontextmanager
from dataclasses import dataclass, field
from ipaddress import IPv6Address, IPv6Interface, IPv6Network

import anyio

from siderolink.common.grpc import ByteStream, open_byte_stream, open_channel
from siderolink.common.hostport import HostPort
from siderolink.common.keys import PrivateKey, PublicKey
from siderolink.common.pb.sidero.link import ProvisionRequest, ProvisionResponse, ProvisionServiceStub
from siderolink.common.transport.tunnel import ADDRESS_METADATA, TunnelPath, carry
from siderolink.common.wireguard.device import Device, DeviceConfig, PeerConfig, PeerHandshake
from siderolink.common.wireguard.opening import open_device

METHOD = "/sidero.link.WireGuardOverGRPCService/CreateStream"
EVERYTHING = (IPv6Network("::/0"),)


@dataclass(kw_only=True)
class RawMachine:
    """A machine's identity and its server's API."""

    api: HostPort
    node_uuid: str
    join_token: str | None
    unique_token: str | None = None
    tunnel: bool = False
    key: PrivateKey = field(default_factory=PrivateKey.generate)

    async def provision(self) -> ProvisionResponse:
        async with open_channel(self.api.host, self.api.port, None) as channel:
            return await ProvisionServiceStub(channel).provision(
                ProvisionRequest(
                    node_uuid=self.node_uuid,
                    node_public_key=self.key.public_key().encode(),
                    join_token=self.join_token,
                    node_unique_token=self.unique_token,
                    wireguard_over_grpc=self.tunnel or None,
                )
            )

    @asynccontextmanager
    async def stream(self, address: str | None) -> AsyncIterator[ByteStream]:
        """A tunnel stream that claims `address`, or nothing."""
        metadata = {} if address is None else {ADDRESS_METADATA: address}
        async with (
            open_channel(self.api.host, self.api.port, None) as channel,
            open_byte_stream(channel, path=METHOD, metadata=metadata) as stream,
        ):
            yield stream

    @asynccontextmanager
    async def device(
        self,
        interface: str,
        answer: ProvisionResponse,
        *,
        allowed_ips: Sequence[IPv6Network] = EVERYTHING,
        addresses: Sequence[str] = (),
    ) -> AsyncIterator["RawLink"]:
        """A WireGuard device of this machine, with more addresses and allowed IPs than a machine should have."""
        connected = anyio.Event()
        config = DeviceConfig(
            name=interface,
            private_key=self.key,
            addresses=(IPv6Interface(answer.node_address_prefix), *map(IPv6Interface, addresses)),
            listen_port=None if self.tunnel else 0,
        )
        server_key = PublicKey.parse(answer.server_public_key)
        endpoint = HostPort.parse(answer.server_endpoint[-1])
        peer = PeerConfig(
            public_key=server_key,
            allowed_ips=tuple(allowed_ips),
            endpoint=None if self.tunnel else (await endpoint.resolve())[0],
            persistent_keepalive=25,
        )

        def heard(event: object) -> None:
            if isinstance(event, PeerHandshake):
                connected.set()

        async with open_device("userspace", config, heard) as device:
            await device.set_peer(peer)
            yield RawLink(device, server_key, answer, connected)


@dataclass(frozen=True, slots=True)
class RawLink:
    """A device that may or may not be connected."""

    device: Device
    server_key: PublicKey
    answer: ProvisionResponse
    connected: anyio.Event

    @property
    def address(self) -> IPv6Address:
        return IPv6Interface(self.answer.node_address_prefix).ip

    async def carry(self, stream: ByteStream) -> None:
        """Carry the tunnel over this stream until it ends, and raise the server's status."""
        path = TunnelPath(stream, self.answer.grpc_peer_addr_port)
        self.device.offer_path(self.server_key, path)
        await carry(stream, path, self.device.deliver)
