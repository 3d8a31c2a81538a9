"""Long requests at the socket for `wg`: they are carried out and answered in parts, so that packets pass in between."""

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import anyio
import pytest

from siderolink.common.wireguard import configure
from siderolink.common.wireguard.configure import STEP, Configurator
from siderolink.common.wireguard.device import DeviceChange, DeviceConfig
from siderolink.common.wireguard.noise import Engine, Peer
from siderolink.common.wireguard.packet_device import open_packet_device
from siderolink.common.wireguard.uapi.protocol import PeerReport, parse_set
from siderolink.common.wireguard.uapi.server import PEERS_AT_ONCE, serve_uapi
from tests.support.iterations import Iterations
from tests.support.virtual import pair
from tests.unit.uapi.test_server import PRIVATE, Client

pytestmark = pytest.mark.anyio

PEERS = 10 * STEP


def peers(first: int = 1) -> Iterator[str]:
    for number in range(first, first + PEERS):
        yield f"public_key={number:064x}\nreplace_allowed_ips=true\n"
        yield f"allowed_ip=fd00::{number:x}/128\nallowed_ip=fd01::{number:x}/128\n"


@pytest.fixture
def iterations(monkeypatch: pytest.MonkeyPatch) -> Iterations:
    """Counts changes of peers and of allowed IPs, and peers that are described."""
    found = Iterations()
    add, remove = Engine.add_peer, Engine.remove_peer

    def counting_add(self: Engine, public_key: bytes, *, even_useless: bool = False) -> Peer:
        found.note()
        return add(self, public_key, even_useless=even_useless)

    def counting_remove(self: Engine, public_key: bytes) -> None:
        found.note()
        remove(self, public_key)

    def counting_report(**fields: Any) -> PeerReport:
        found.note()
        return PeerReport(**fields)

    monkeypatch.setattr(Engine, "add_peer", counting_add)
    monkeypatch.setattr(Engine, "remove_peer", counting_remove)
    monkeypatch.setattr(configure, "PeerReport", counting_report)
    return found


async def test_a_long_configuration_is_applied_and_shown_in_parts(tmp_path: Path, iterations: Iterations) -> None:
    config = DeviceConfig(name="wg0", private_key=PRIVATE)
    async with (
        open_packet_device(config, lambda packet: None) as device,
        serve_uapi("wg0", device.report, device.apply, folder=tmp_path) as path,
        await anyio.connect_unix(path) as stream,
    ):
        client = Client(stream)
        with iterations:
            assert await client.ask(f"set=1\n{''.join(peers())}\n") == "errno=0\n\n"
            assert iterations.total == PEERS
            assert iterations.most <= STEP
            answer = await client.ask("get=1\n\n")
            assert answer.count("public_key=") == PEERS
            assert answer.count("allowed_ip=") == 2 * PEERS
            assert iterations.most <= PEERS_AT_ONCE
            iterations.counts.clear()
            assert await client.ask("set=1\nreplace_peers=true\n\n") == "errno=0\n\n"
            assert iterations.total == PEERS
            assert iterations.most <= STEP
        assert await device.peers() == []


async def test_two_long_changes_are_applied_one_after_the_other() -> None:
    def change(first: int) -> DeviceChange:
        return parse_set(f"replace_peers=true\n{''.join(peers(first))}".splitlines())

    async with open_packet_device(DeviceConfig(name="wg0", private_key=PRIVATE), lambda packet: None) as device:
        async with anyio.create_task_group() as tasks:
            tasks.start_soon(device.apply, change(1))
            tasks.start_soon(device.apply, change(PEERS + 1))
        keys = sorted(int(bytes(peer.public_key).hex(), 16) for peer in await device.peers())
    assert keys == list(range(PEERS + 1, 2 * PEERS + 1))


def test_a_peer_removed_between_two_steps_is_not_kept_alive() -> None:
    _, node, _ = pair()
    addresses = "".join(f"allowed_ip=fd00::{number:x}/128\n" for number in range(1, STEP))
    text = f"public_key={1:064x}\npersistent_keepalive_interval=25\n{addresses}"
    steps = Configurator(node.engine, PRIVATE, None).apply(parse_set(text.splitlines()), 0.0)
    next(steps)
    (key,) = node.engine.peers
    node.engine.remove_peer(key)
    assert list(steps) == []
    assert node.engine.next_deadline() == float("inf")
