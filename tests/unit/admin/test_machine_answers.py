"""Queries of a machine's own API: a complete machine, a minimal one, and a hostile one."""

from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from ipaddress import IPv6Address
from pathlib import Path

import pytest

from siderolink.common.errors import InvalidAnswerError, JoinError, SideroLinkError
from siderolink.common.grpc import GrpcChannel, Limits, Servable, open_channel, serve
from siderolink.common.pb.common import NetIpPrefix
from siderolink.common.pb.cosi.resource import GetRequest, GetResponse, Resource, Spec, StateBase
from siderolink.common.pb.google.protobuf import Empty
from siderolink.common.pb.machine import MachineServiceBase, PlatformInfo, Version, VersionInfo, VersionResponse
from siderolink.common.pb.storage import Disk, Disks, DisksResponse, StorageServiceBase
from siderolink.common.pb.talos.resource.definitions.network import HostnameStatusSpec, NodeAddressSpec
from siderolink.common.pb.talos.resource.definitions.runtime import MachineStatusSpec, MachineStatusStatus, UnmetCondition
from siderolink.server.admin.machine_answers import MachineDisk, query_machine
from siderolink.server.fleet import enrolment
from siderolink.server.fleet.enrolment import OWN_ANSWER_FIELDS, open_for_own_calls
from siderolink.server.store import Machine
from tests.support.admin_server import open_admin_server
from tests.support.manager import FakeMachine

pytestmark = pytest.mark.anyio
MACHINE = Machine(
    id="m-1", node_uuid="u-1", name="a", public_key=None, overlay_address=IPv6Address("fdae::1"), created_at=0.0, joined_at=0.0
)
HOSTILE = "<script>\x1b[31m\N{RIGHT-TO-LEFT OVERRIDE}" + "x" * 10_000


class MachineFace(MachineServiceBase):
    def __init__(self, text: str) -> None:
        self._text = text

    async def version(self, message: Empty) -> VersionResponse:
        found = Version(version=VersionInfo(tag=self._text), platform=PlatformInfo(name="metal"))
        return VersionResponse(messages=[found])


class StateFace(StateBase):
    def __init__(self, text: str) -> None:
        self._specs = {
            "machine": MachineStatusSpec(
                stage=4, status=MachineStatusStatus(ready=False, unmet_conditions=[UnmetCondition(name="time", reason=text)])
            ),
            "hostname": HostnameStatusSpec(hostname=text, domainname="example"),
            "current": NodeAddressSpec(
                addresses=[NetIpPrefix(ip=bytes([192, 0, 2, 7]), prefix_length=24), NetIpPrefix(ip=b"?", prefix_length=99)]
                * 100
            ),
        }

    async def get(self, message: GetRequest) -> GetResponse:
        return GetResponse(resource=Resource(spec=Spec(proto_spec=bytes(self._specs[message.id]))))


class StorageFace(StorageServiceBase):
    def __init__(self, text: str) -> None:
        self._text = text

    async def disks(self, message: Empty) -> DisksResponse:
        disk = Disk(device_name="/dev/sda", size=10**9, model=self._text, system_disk=True)
        return DisksResponse(messages=[Disks(disks=[disk] * 80)])


@asynccontextmanager
async def machine_api(*services: Servable) -> AsyncIterator[GrpcChannel]:
    async with serve(list(services), host="127.0.0.1") as server:
        async with open_channel("127.0.0.1", server.port, direct=True, limits=Limits.for_answers(1 << 20)) as channel:
            yield channel


async def test_a_machine_reports_its_version_and_resources() -> None:
    async with machine_api(MachineFace("v1.13.0"), StateFace("no sync"), StorageFace("a disk")) as channel:
        found = await query_machine(channel)
    assert (found.version, found.platform, found.stage, found.is_ready) == ("v1.13.0", "metal", "running", False)
    assert (found.unmet, found.hostname, found.refused) == (["time: no sync"], "no sync.example", [])
    assert found.disks[0] == MachineDisk(device="/dev/sda", size=10**9, model="a disk", is_system=True)
    assert (set(found.addresses), len(found.disks)) == ({"192.0.2.7/24"}, 64)


async def test_answers_of_a_hostile_machine_are_cut_and_made_printable() -> None:
    async with machine_api(MachineFace(HOSTILE), StateFace(HOSTILE), StorageFace(HOSTILE)) as channel:
        found = await query_machine(channel)
    for text in (found.version, found.hostname, found.unmet[0], found.disks[0].model):
        assert text.isprintable()
        assert len(text) <= 128


@pytest.mark.parametrize("spec", [b"\x08\x05", b"\x0a\x02\xff\xff"])
async def test_a_malformed_resource_is_an_invalid_answer(spec: bytes) -> None:
    class OddState(StateBase):
        async def get(self, message: GetRequest) -> GetResponse:
            return GetResponse(resource=Resource(spec=Spec(proto_spec=spec if message.id == "hostname" else b"")))

    async with machine_api(OddState()) as channel:
        with pytest.raises(InvalidAnswerError):
            await query_machine(channel)


async def test_a_resource_of_too_many_fields_is_not_decoded() -> None:
    many = bytes(NodeAddressSpec(addresses=[NetIpPrefix(ip=bytes(4))] * OWN_ANSWER_FIELDS))

    class WideState(StateBase):
        async def get(self, message: GetRequest) -> GetResponse:
            return GetResponse(resource=Resource(spec=Spec(proto_spec=many if message.id == "current" else b"")))

    async with machine_api(WideState()) as channel:
        with pytest.raises(InvalidAnswerError, match=f"more than {OWN_ANSWER_FIELDS} fields"):
            await query_machine(channel)


async def test_answers_to_the_servers_own_calls_are_bounded_in_fields(monkeypatch: pytest.MonkeyPatch) -> None:
    many = DisksResponse(messages=[Disks(disks=[Disk(device_name="/dev/sda")] * OWN_ANSWER_FIELDS)])

    class ManyDisks(StorageServiceBase):
        async def disks(self, message: Empty) -> DisksResponse:
            return many

    async with serve([MachineFace("v1.13.0"), ManyDisks()], host="127.0.0.1") as server:

        @asynccontextmanager
        async def channel(host: str, port: int, tls: object, *, limits: Limits, **_: object) -> AsyncIterator[GrpcChannel]:
            async with open_channel("127.0.0.1", server.port, direct=True, limits=limits) as channel:
                yield channel

        monkeypatch.setattr(enrolment, "open_channel", channel)
        async with open_for_own_calls(MACHINE) as own:
            with pytest.raises(InvalidAnswerError, match=f"more than {OWN_ANSWER_FIELDS} fields"):
                await query_machine(own)


async def test_unanswered_queries_are_listed() -> None:
    async with machine_api(StorageFace("a disk")) as channel:
        found = await query_machine(channel)
    assert found.refused == [f"{name}: UNIMPLEMENTED" for name in ("version", "stage", "hostname", "addresses")]
    assert found.disks[0].model == "a disk"


async def test_a_too_long_answer_ends_the_query() -> None:
    async with machine_api(MachineFace("x" * (2 << 20))) as channel:
        try:
            found = await query_machine(channel)
        except JoinError:
            return
        assert found.refused[0] == "version: RESOURCE_EXHAUSTED"


async def test_a_machine_without_a_link_is_not_queried(tmp_path: Path) -> None:
    async with open_admin_server(tmp_path) as admin_server:
        machine = FakeMachine()
        await admin_server.manager.join(machine)
        with pytest.raises(SideroLinkError, match="link is not up"):
            await admin_server.administration.answers.query(machine.node_uuid)
