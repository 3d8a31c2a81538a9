"""Machines that are given unique tokens may answer with anything."""

import logging
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager

import anyio
import pytest
from grpclib.const import Status
from grpclib.exceptions import GRPCError

from siderolink.common.grpc import GrpcChannel, Limits, open_channel, serve
from siderolink.common.pb.google.protobuf import Empty
from siderolink.common.pb.storage import Disk, Disks, DisksResponse, StorageServiceBase
from siderolink.server.admission.policy import JoinTokensMode
from siderolink.server.fleet import enrolment
from tests.support.manager import FakeMachine, Manager

pytestmark = pytest.mark.anyio


class Storage(StorageServiceBase):
    def __init__(self, answer: DisksResponse | GRPCError) -> None:
        self._answer = answer

    async def disks(self, message: Empty) -> DisksResponse:
        if isinstance(self._answer, GRPCError):
            raise self._answer
        return self._answer


def disks(count: int) -> DisksResponse:
    return DisksResponse(messages=[Disks(disks=[Disk()] * count)])


@pytest.mark.parametrize(
    ("answer", "says"),
    [
        (disks(1000), "yet: this server does not have the method"),
        (disks(10_000), "yet: the answer has more than 8192 fields"),  # they would take long to decode
        (GRPCError(Status.INTERNAL, "no\nforged"), "yet: no forged"),
        (GRPCError(Status.INTERNAL), "yet: INTERNAL"),
    ],
)
async def test_why_a_machine_has_no_token_yet_is_one_line(
    answer: DisksResponse | GRPCError, says: str, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level(logging.INFO, "siderolink")
    manager, machine = Manager(mode=JoinTokensMode.LEGACY_ALLOWED), FakeMachine()
    await manager.join(machine)
    await manager.handshake(machine)
    async with serve([Storage(answer)], host="127.0.0.1") as server:

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
    assert any(record.getMessage().endswith(says) for record in caplog.records)
