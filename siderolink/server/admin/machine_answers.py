"""Queries a machine's own API with a fixed list of read calls, bounded in number, bytes, fields and time."""

from collections.abc import Awaitable, Callable, Iterator, Sequence
from contextlib import AbstractAsyncContextManager
from dataclasses import dataclass, field
from ipaddress import ip_address
from typing import Final, TypeVar

import anyio

from siderolink.common.errors import ServerUnreachableError, SideroLinkError
from siderolink.common.grpc import GrpcChannel, GRPCError, Status, decode_answer, translate_errors
from siderolink.common.pb.common import NetIpPrefix
from siderolink.common.pb.cosi.resource import GetOptions, GetRequest, StateStub
from siderolink.common.pb.google.protobuf import Empty
from siderolink.common.pb.machine import MachineServiceStub, MachineStatusEventMachineStage
from siderolink.common.pb.storage import StorageServiceStub
from siderolink.common.pb.talos.resource.definitions.network import HostnameStatusSpec, NodeAddressSpec
from siderolink.common.pb.talos.resource.definitions.runtime import MachineStatusSpec
from siderolink.common.text import one_line
from siderolink.server.admin.machines import MachineAdministration
from siderolink.server.fleet.directory import LinkState
from siderolink.server.fleet.enrolment import OWN_ANSWER_FIELDS
from siderolink.server.store import Machine

OpenApi = Callable[[Machine], AbstractAsyncContextManager[GrpcChannel]]
"""Opens a channel to a machine's API over the overlay."""
S = TypeVar("S", HostnameStatusSpec, NodeAddressSpec, MachineStatusSpec)

SECONDS: Final = 8.0
AT_ONCE: Final = 16
_MOST: Final = 64
"""Maximum addresses, disks and conditions of one machine."""
_LONGEST: Final = 128


@dataclass(frozen=True, slots=True, kw_only=True)
class MachineDisk:
    device: str
    size: int
    """Bytes."""
    model: str
    is_system: bool


@dataclass(slots=True, kw_only=True)
class MachineAnswer:
    """The answers of one machine. Texts are made printable and shortened; empty if the machine did not answer."""

    version: str = ""
    platform: str = ""
    stage: str = ""
    """Such as "running"."""
    is_ready: bool = False
    unmet: list[str] = field(default_factory=list)
    """The reasons why it is not ready."""
    hostname: str = ""
    addresses: list[str] = field(default_factory=list)
    disks: list[MachineDisk] = field(default_factory=list)
    refused: list[str] = field(default_factory=list)
    """Calls that failed, each with its status."""


def _text(text: str) -> str:
    return one_line(text, limit=_LONGEST)


class MachineAnswers:
    """Queries machines whose link is up."""

    def __init__(self, machines: MachineAdministration, open_api: OpenApi | None) -> None:
        self._machines = machines
        self._open_api = open_api
        self._limiter = anyio.CapacityLimiter(AT_ONCE)

    async def query(self, name: str) -> MachineAnswer:
        """Raises NotFoundError, SideroLinkError if the link is not up, and ServerUnreachableError if there is no answer."""
        status = await self._machines.get(name)
        if self._open_api is None or status.state is not LinkState.UP:
            raise SideroLinkError("cannot query the machine's API: its link is not up")
        try:
            with anyio.fail_after(SECONDS):
                async with self._limiter, self._open_api(status.machine) as channel:
                    return await query_machine(channel)
        except TimeoutError:
            raise ServerUnreachableError(f"the machine's API did not answer within {SECONDS:g} s") from None


async def query_machine(channel: GrpcChannel) -> MachineAnswer:
    """Make all calls; failures of single calls are noted. Raises ServerUnreachableError or InvalidAnswerError."""
    answer = MachineAnswer()
    calls: Sequence[tuple[str, Callable[[GrpcChannel, MachineAnswer], Awaitable[None]]]] = (
        ("version", _query_version),
        ("stage", _query_stage),
        ("hostname", _query_hostname),
        ("addresses", _query_addresses),
        ("disks", _query_disks),
    )
    for name, ask in calls:
        try:
            with translate_errors("the machine"):
                await ask(channel, answer)
        except GRPCError as error:
            answer.refused.append(f"{name}: {error.status.name}")
    return answer


async def _query_version(channel: GrpcChannel, answer: MachineAnswer) -> None:
    found = await MachineServiceStub(channel).version(Empty())
    for message in found.messages[:1]:
        answer.version = _text("" if message.version is None else message.version.tag)
        answer.platform = _text("" if message.platform is None else message.platform.name)


async def _resource(channel: GrpcChannel, namespace: str, kind: str, name: str, into: type[S]) -> S:
    """The content of one resource."""
    request = GetRequest(namespace=namespace, type=kind, id=name, options=GetOptions())
    found = await StateStub(channel).get(request)
    if found.resource is None or found.resource.spec is None:
        raise GRPCError(Status.NOT_FOUND)
    return decode_answer(found.resource.spec.proto_spec, into, OWN_ANSWER_FIELDS)


async def _query_stage(channel: GrpcChannel, answer: MachineAnswer) -> None:
    found = await _resource(channel, "runtime", "MachineStatuses.runtime.talos.dev", "machine", MachineStatusSpec)
    try:
        answer.stage = (MachineStatusEventMachineStage(found.stage).name or "").lower().replace("_", " ")
    except ValueError:
        answer.stage = str(found.stage)
    if found.status is not None:
        answer.is_ready = found.status.ready
        answer.unmet = [_text(f"{one.name}: {one.reason}") for one in found.status.unmet_conditions[:_MOST]]


async def _query_hostname(channel: GrpcChannel, answer: MachineAnswer) -> None:
    found = await _resource(channel, "network", "HostnameStatuses.net.talos.dev", "hostname", HostnameStatusSpec)
    answer.hostname = _text(f"{found.hostname}.{found.domainname}" if found.domainname else found.hostname)


async def _query_addresses(channel: GrpcChannel, answer: MachineAnswer) -> None:
    found = await _resource(channel, "network", "NodeAddresses.net.talos.dev", "current", NodeAddressSpec)
    answer.addresses = list(_addresses(found.addresses[:_MOST]))


def _addresses(prefixes: Sequence[NetIpPrefix]) -> Iterator[str]:
    for prefix in prefixes:
        if len(prefix.ip) in (4, 16):
            yield f"{ip_address(prefix.ip)}/{prefix.prefix_length}"


async def _query_disks(channel: GrpcChannel, answer: MachineAnswer) -> None:
    found = await StorageServiceStub(channel).disks(Empty())
    disks = [disk for message in found.messages for disk in message.disks]
    answer.disks = [
        MachineDisk(device=_text(one.device_name), size=one.size, model=_text(one.model), is_system=one.system_disk)
        for one in disks[:_MOST]
    ]
