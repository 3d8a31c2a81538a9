"""The steps of a host's echo through a device, counted and therefore independent of the machine."""

import sys
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass, field
from ipaddress import IPv4Address, ip_interface, ip_network
from types import FrameType

import anyio
import pytest

from siderolink.common.keys import PrivateKey
from siderolink.common.wireguard import userspace
from siderolink.common.wireguard.device import DeviceConfig, PeerConfig
from siderolink.common.wireguard.packet_device import open_packet_device
from siderolink.common.wireguard.tun_device import TunDevice
from tests.support.netns import Namespace
from tests.support.packets import checksum
from tests.support.rows import IMPLEMENTATIONS, implementation

HOST, PEER = "fd00::1", "fd00::2"
ECHOES = 20
READERS = {"compiled": "UdpSocket._receive_mixed", "matrices": "UdpSocket._receive_batches"}
SYSTEM_CALLS = {
    "compiled": ["receive_many", "write_many", "read_many", "send_many"],
    "matrices": ["recvmsg_into", "writev", "readv", "sendmsg"],
}
"""Functions each of which makes one system call for one packet: the first receives and the second writes."""
MOST_CALLS = {"compiled": 20, "matrices": 67}
"""Python functions of one echo, in and out."""


@dataclass
class Steps:
    """What one turn of the loop for a readable UDP socket does."""

    functions: int = 0
    system_calls: Counter[str] = field(default_factory=Counter)


class StepCounter:
    """Counts while the reader of a UDP socket runs."""

    def __init__(self, reader: str, system_calls: Sequence[str]) -> None:
        self._reader_name = reader
        self._system_calls = system_calls
        self.turns: list[Steps] = []
        self._reader: FrameType | None = None

    def note(self, frame: FrameType, kind: str, argument: object) -> None:
        """For sys.setprofile."""
        if kind == "call" and self._reader is None and frame.f_code.co_qualname == self._reader_name:
            self._reader = frame
            self.turns.append(Steps())
        elif kind == "return" and frame is self._reader:
            self._reader = None
        elif self._reader is not None and kind == "call":
            self.turns[-1].functions += 1
        elif (
            self._reader is not None and kind == "c_call" and (name := getattr(argument, "__name__", "")) in self._system_calls
        ):
            self.turns[-1].system_calls[name] += 1


def echo_request(number: int) -> bytes:
    """ICMPv6, from the peer to the host."""
    source, destination = (ip_interface(address).ip.packed for address in (PEER, HOST))
    body = bytes((128, 0, 0, 0, 0, 1, 0, number)) + bytes(56)
    pseudo = source + destination + len(body).to_bytes(4) + bytes((0, 0, 0, 58))
    body = body[:2] + checksum(pseudo + body).to_bytes(2) + body[4:]
    return bytes((0x60, 0, 0, 0)) + len(body).to_bytes(2) + bytes((58, 64)) + source + destination + body


async def answer(name: str, patch: pytest.MonkeyPatch) -> list[Steps]:
    """The turns in which the host's device passed an echo request on, after its handshake."""
    rows, system_calls = implementation(name), SYSTEM_CALLS[name]
    patch.setattr(userspace, "row_functions", lambda: rows)
    keys = PrivateKey.generate(), PrivateKey.generate()
    sent, received = anyio.create_memory_object_stream[bytes](100)
    configs = [
        DeviceConfig(name=name, private_key=key, addresses=(ip_interface(f"{address}/64"),), mtu=1280)
        for name, key, address in zip(("sltest0", "peer"), keys, (HOST, PEER), strict=True)
    ]
    counter = StepCounter(READERS[name], system_calls)
    with sent, received:
        async with (
            TunDevice.open(configs[0], lambda event: None) as device,
            open_packet_device(configs[1], sent.send_nowait) as peer,
        ):
            await device.set_peer(PeerConfig(public_key=peer.public_key, allowed_ips=(ip_network(f"{PEER}/128"),)))
            endpoint = (IPv4Address("127.0.0.1"), device.listen_port or 0)
            await peer.set_peer(PeerConfig(public_key=device.public_key, allowed_ips=(ip_network("::/0"),), endpoint=endpoint))
            with anyio.fail_after(60):
                for number in range(ECHOES + 2):  # the first ones make a session, and its path
                    await anyio.sleep(0.01)  # longer than a packet counts as one of a batch
                    if number == 2:
                        sys.setprofile(counter.note)
                    peer.send(echo_request(number))
                    while not (packet := await received.receive()).startswith(b"\x60") or packet[40] != 129:
                        pass
                sys.setprofile(None)
    return [steps for steps in counter.turns if steps.system_calls[system_calls[1]]]


@pytest.mark.parametrize("name", IMPLEMENTATIONS)
def test_an_echo_of_the_host_is_one_turn_with_four_system_calls(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """One receive, one write, one read and one send: nothing waits between the request and the host's answer."""
    with Namespace("echo") as namespace, namespace.portal() as portal:
        namespace.run(["ip", "link", "set", "lo", "up"])
        turns = portal.call(answer, name, monkeypatch)
    whole = [steps for steps in turns if steps.system_calls == dict.fromkeys(SYSTEM_CALLS[name], 1)]
    # the host's own packets, such as MLD, may come in between
    assert len(whole) >= ECHOES * 3 // 4
    assert min(steps.functions for steps in whole) <= MOST_CALLS[name]
