"""Machines that are given unique tokens may answer with anything."""

import logging
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager

import anyio
import pytest

from siderolink.common.grpc import GrpcChannel, Limits, open_channel, serve
from siderolink.common.pb.google.protobuf import Empty
from siderolink.common.pb.storage import Disk, Disks, DisksResponse, StorageServiceBase
from siderolink.server.admission.policy import JoinTokensMode
from siderolink.server.fleet import enrolment
from tests.support.manager import FakeMachine, Manager

pytestmark = pytest.mark.anyio


class ManyDisks(StorageServiceBase):
    def __init__(self, count: int) -> None:
        self._count = count

    async def disks(self, message: Empty) -> DisksResponse:
        return DisksResponse(messages=[Disks(disks=[Disk()] * self._count)])


@pytest.mark.parametrize(
    ("disks", "says"),
    [
        (1000, "yet: this server does not have the method"),
        (5000, "yet: the server's answer is no DisksResponse"),  # they would take long to decode
    ],
)
async def test_an_answer_with_very_many_fields_is_refused_before_it_is_decoded(
    disks: int, says: str, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level(logging.INFO)
    manager, machine = Manager(mode=JoinTokensMode.LEGACY_ALLOWED), FakeMachine()
    await manager.join(machine)
    await manager.handshake(machine)
    async with serve([ManyDisks(disks)], host="127.0.0.1") as server:

        @asynccontextmanager
        async def channel(host: str, port: int, tls: object, *, limits: Limits, **_: object) -> AsyncIterator[GrpcChannel]:
            async with open_channel("127.0.0.1", server.port, direct=True, limits=limits) as channel:
                yield channel

        monkeypatch.setattr(enrolment, "open_channel", channel)
        async with anyio.create_task_group() as tasks:
            tasks.start_soon(manager.fleet.enrolment.run, None)
            with anyio.fail_after(60):
                while "could not be given its unique token yet" not in caplog.text:
                    await anyio.sleep(0.01)
            tasks.cancel_scope.cancel()
    assert says in caplog.text
