"""Whether UDP passes again, asked while the link uses the tunnel in its stead.

A second WireGuard with the link's own key, without an interface, tries a handshake by UDP. Where it succeeds, the server
answers by UDP from then on: so the link has to go back at once.
"""

from collections.abc import Callable, Sequence
from ipaddress import IPv6Network
from typing import TYPE_CHECKING

import anyio

from siderolink.common.backoff import Backoff
from siderolink.common.hostport import HostPort
from siderolink.common.keys import PrivateKey, PublicKey
from siderolink.common.nudge import Nudge
from siderolink.common.wireguard.device import DeviceConfig, DeviceEvent, HandshakeCompleted, PeerConfig

if TYPE_CHECKING:
    from siderolink.common.wireguard.noise import Timestamps

_TIMEOUT = 6.0
"""Seconds a try takes: two initiations."""


async def until_udp_passes(
    key: PrivateKey,
    server_key: Callable[[], PublicKey],
    endpoints: Sequence[HostPort],
    timestamps: "Timestamps",
    backoff: Backoff,
    nudge: Nudge,
) -> None:
    """Try now and then, and at once after a nudge, until a handshake succeeds with the key that the server has then."""
    while True:
        await nudge.sleep(backoff.next())
        for endpoint in endpoints:
            if await _try(key, server_key(), endpoint, timestamps):
                return


async def _try(key: PrivateKey, server_key: PublicKey, endpoint: HostPort, timestamps: "Timestamps") -> bool:
    # Only here, because it needs the data plane, which a kernel device does without.
    from siderolink.common.wireguard.packet_device import open_packet_device

    done = anyio.Event()

    def on_event(event: DeviceEvent) -> None:
        if isinstance(event, HandshakeCompleted):
            done.set()

    config = DeviceConfig(name="UDP probe", private_key=key, listen_port=0, timestamps=timestamps)
    with anyio.move_on_after(_TIMEOUT):
        try:
            address = (await endpoint.resolve())[0]
        except OSError:
            return False
        async with open_packet_device(config, lambda packet: None, on_event) as device:
            await device.set_peer(
                PeerConfig(
                    public_key=server_key,
                    allowed_ips=(IPv6Network("::/0"),),
                    endpoint=address,
                    persistent_keepalive=25,
                )
            )
            await done.wait()
    return done.is_set()
