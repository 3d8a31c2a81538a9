"""The bytes of a goodbye, and placeholder UUIDs."""

import socket
import uuid
from contextlib import suppress
from functools import partial
from ipaddress import IPv6Address

import anyio
import pytest
from hypothesis import given
from hypothesis import strategies as st

from siderolink.common.errors import ConfigurationError
from siderolink.common.goodbye import GOODBYE_BYTES, MOVE_SECONDS, Goodbye, MoveAway, receive_move_requests
from siderolink.common.keys import PublicKey
from siderolink.common.node_uuid import is_placeholder, parse_uuid
from siderolink.common.tasks import background_tasks
from siderolink.server.events import LeaveReason
from siderolink.server.fleet.goodbyes import Goodbyes
from tests.support.manager import FakeMachine, Manager
from tests.support.postgres import free_port

KEY = PublicKey(bytes(range(32)))


@pytest.mark.parametrize("forget", [False, True])
def test_a_goodbye_is_read_as_it_was_written(forget: bool) -> None:
    goodbye = Goodbye(public_key=KEY, forget=forget)
    assert goodbye.encode() == b"SLby\x01" + bytes([forget]) + bytes(KEY)
    assert Goodbye.parse(goodbye.encode()) == goodbye


@given(st.binary(max_size=2 * GOODBYE_BYTES))
def test_other_bytes_are_not_read_as_goodbye(data: bytes) -> None:
    found = Goodbye.parse(data)
    assert found is None or (data.startswith(b"SLby\x01") and len(data) == GOODBYE_BYTES)


def test_a_move_is_read_as_it_was_written_and_is_no_goodbye() -> None:
    data = MoveAway(public_key=KEY).encode()
    assert data == b"SLmv\x01\0" + bytes(KEY)
    assert MoveAway.parse(data) == MoveAway(public_key=KEY)
    assert Goodbye.parse(data) is None
    assert MoveAway.parse(Goodbye(public_key=KEY).encode()) is None
    assert MoveAway.parse(data + b"\0") is None


def test_unknown_flags_are_ignored_and_unknown_versions_are_not_read() -> None:
    data = bytearray(Goodbye(public_key=KEY).encode())
    data[5] = 0xFE
    assert Goodbye.parse(bytes(data)) == Goodbye(public_key=KEY)
    data[4] = 2
    assert Goodbye.parse(bytes(data)) is None


@pytest.mark.parametrize(
    "text",
    [
        "ffffffff-ffff-ffff-ffff-ffffffffffff",
        "00000000-0000-0000-0000-000000000000",
        "00020003-0004-0005-0006-000700080009",
        "03000200-0400-0500-0006-000700080009",
        "12345678-1234-5678-90ab-cddeefaabbcc",
        "FEFEFEFE-FEFE-FEFE-FEFE-FEFEFEFEFEFE",
    ],
)
def test_a_vendors_placeholder_is_known_in_either_byte_order(text: str) -> None:
    value = uuid.UUID(text)
    assert is_placeholder(parse_uuid(text))
    assert is_placeholder(str(uuid.UUID(bytes=value.bytes_le)))
    assert is_placeholder(str(uuid.UUID(bytes=value.bytes[::-1])))


def test_a_random_uuid_is_no_placeholder() -> None:
    assert not is_placeholder(str(uuid.uuid4()))


@pytest.mark.parametrize("text", ["", "1234", "g" * 36, "{00020003-0004-0005-0006-000700080009}", "0" * 32])
def test_a_malformed_uuid_is_refused_without_repeating_it(text: str) -> None:
    with pytest.raises(ConfigurationError) as caught:
        parse_uuid(text)
    assert not text or text not in str(caught.value)


@pytest.mark.anyio
async def test_concurrent_moves_are_merged(monkeypatch: pytest.MonkeyPatch) -> None:
    """Each of them may cost a call of the API."""
    port, here = free_port(), IPv6Address("::1")
    monkeypatch.setattr("siderolink.common.goodbye.GOODBYE_PORT", port)
    heard: list[PublicKey] = []
    hearing = partial(receive_move_requests, heard.append, address=here, server=here, interface="lo", namespace=None)
    with socket.socket(socket.AF_INET6, socket.SOCK_DGRAM) as sender:
        sender.bind(("::1", 0))
        sender.connect(("::1", port))
        async with background_tasks() as tasks:
            began = anyio.current_time()
            tasks.start_soon(hearing)
            with anyio.fail_after(20):
                while len(heard) < 2:
                    with suppress(ConnectionRefusedError):
                        for _ in range(100):
                            sender.send(MoveAway(public_key=KEY).encode())
                    await anyio.sleep(0.01)
            assert anyio.current_time() - began >= MOVE_SECONDS
    assert heard == [KEY, KEY]


@pytest.mark.anyio
async def test_a_machine_that_asks_often_to_be_forgotten_is_removed_once() -> None:
    manager, machine, removed = Manager(), FakeMachine(), list[str]()
    await manager.join(machine)
    await manager.handshake(machine)

    async def remove(machine_id: str, reason: LeaveReason) -> bool:
        removed.append(machine_id)
        await anyio.sleep(0.01)  # a database takes a moment
        return await manager.machines.remove(machine_id, reason)

    goodbyes = Goodbyes(manager.links, manager.monitor, remove)
    goodbye = Goodbye(public_key=machine.key, forget=True)
    async with anyio.create_task_group() as tasks:
        for _ in range(100):
            tasks.start_soon(goodbyes.forget, goodbye)
    assert len(removed) == 1
    assert await manager.machines.find(machine.node_uuid) is None
