"""Enrolment: assigns unique tokens to machines without one, and UUIDs to machines whose UUID is taken, by their own API.

Both values are chosen and stored before they are sent, so that each attempt sends the same ones. They are accepted once the
machine presents them. META key 16 is the unique token, META key 15 the UUID.
"""

import logging
import ssl
import uuid
from collections.abc import AsyncIterator
from contextlib import AbstractAsyncContextManager, asynccontextmanager
from dataclasses import replace

import anyio
from anyio.lowlevel import checkpoint
from grpclib import GRPCError, Status

from siderolink.common.backoff import Backoff
from siderolink.common.errors import SideroLinkError
from siderolink.common.grpc import GrpcChannel, Limits, decode_answer, open_channel, translate_errors
from siderolink.common.pb.cosi.resource import ListOptions, ListRequest, StateStub
from siderolink.common.pb.google.protobuf import Empty
from siderolink.common.pb.machine import MachineServiceStub, MetaWriteRequest
from siderolink.common.pb.storage import StorageServiceStub
from siderolink.common.pb.talos.resource.definitions.network import LinkStatusSpec
from siderolink.common.text import one_line
from siderolink.common.unique_token import hardware_fingerprint, new_unique_token
from siderolink.server.admission.policy import JoinPolicy, supports_unique_tokens
from siderolink.server.admission.tokens import unique_token_digest
from siderolink.server.fleet.directory import Directory, LinkState, MachineLink
from siderolink.server.fleet.reconciler import Reconciler
from siderolink.server.fleet.sessions import Sessions
from siderolink.server.store import Machine, Store, Transaction
from siderolink.server.store.sealing import place_of_assigned

log = logging.getLogger(__name__)

MACHINE_API_PORT = 50000
ANSWER_BYTES = 4 * 1024 * 1024
"""The message limit of other clients of this API."""
META_UUID, META_UNIQUE_TOKEN = 15, 16
FIRST_SECONDS = 3.0
"""Time limit of all calls of a machine's first attempt; short, so that machines without an answer delay few others."""
CALL_SECONDS = 10.0
"""The same for each later attempt."""
FIRST_AT_ONCE = 64
LATER_AT_ONCE = 32
"""Later attempts wait for each other, but never delay a first one."""
_OWN_ANSWER_BYTES = 1024 * 1024
"""Message limit of this server's own calls: all messages are far shorter, and a machine may be hostile."""
OWN_ANSWER_FIELDS = 8192
"""The same for protobuf fields, each of which costs time: enough for 700 disks."""
_MAX_LINKS = 1024
_ETHER = 1
_MAX_ADDRESS_BYTES = 32
"""The kernel's maximum length of hardware addresses."""


@asynccontextmanager
async def open_machine_api(
    machine: Machine,
    *,
    port: int = MACHINE_API_PORT,
    namespace: str | None = None,
    answer_bytes: int = ANSWER_BYTES,
    answer_fields: int | None = None,
) -> AsyncIterator[GrpcChannel]:
    """A channel to the machine's API, for stubs such as ``siderolink.common.pb.machine.MachineServiceStub``.

    `namespace` is that of the server's interface, if it differs from the caller's; `answer_bytes` and `answer_fields`
    limit each message of an answer. Certificates are not verified: WireGuard has authenticated the machine at its overlay
    address. Calls raise what `siderolink.common.grpc.translate_errors` translates.
    """
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_CLIENT)
    context.check_hostname = False
    context.verify_mode = ssl.CERT_NONE
    context.minimum_version = ssl.TLSVersion.TLSv1_3
    limits = Limits.for_answers(answer_bytes, answer_fields)
    host = str(machine.overlay_address)
    async with open_channel(host, port, context, direct=True, limits=limits, namespace=namespace) as channel:
        yield channel


def open_for_own_calls(machine: Machine, *, namespace: str | None = None) -> AbstractAsyncContextManager[GrpcChannel]:
    """A channel for this server's own calls of the machine's API, whose answers are limited further."""
    return open_machine_api(machine, namespace=namespace, answer_bytes=_OWN_ANSWER_BYTES, answer_fields=OWN_ANSWER_FIELDS)


class Enrolment:
    """Writes META to the machines that need it, with one task per machine."""

    def __init__(
        self, store: Store, directory: Directory, sessions: Sessions, reconciler: Reconciler, policy: JoinPolicy
    ) -> None:
        self._store = store
        self._directory = directory
        self._sessions = sessions
        self._reconciler = reconciler
        self._policy = policy
        self._namespace: str | None = None
        self._busy: set[str] = set()
        self._first = anyio.CapacityLimiter(FIRST_AT_ONCE)
        self._later = anyio.CapacityLimiter(LATER_AT_ONCE)

    async def run(self, namespace: str | None) -> None:
        """Enrol every machine whose link comes up, until cancelled. `namespace` is that of the server's interface."""
        self._namespace = namespace
        async with anyio.create_task_group() as tasks:

            def changed(link: MachineLink) -> None:
                if self._needs(link) and link.machine.id not in self._busy:
                    self._busy.add(link.machine.id)
                    tasks.start_soon(self._enrol, link.machine.id)

            with self._sessions.watching(changed):
                for links in self._directory.parts():
                    for link in links:
                        changed(link)
                    await checkpoint()
                await anyio.sleep_forever()

    def _needs(self, link: MachineLink) -> bool:
        machine = link.machine
        if link.claim is not None or link.state is not LinkState.UP or not self._policy.has_pending:
            return False
        if not supports_unique_tokens(machine.talos_version):
            return False
        return _needs_uuid(machine) or machine.bound_digest is None

    async def _enrol(self, machine_id: str) -> None:
        """Retry until the machine has what it needs, or its link is down."""
        backoff = Backoff(first=0.5, cap=60.0, factor=1.5, floor=0.25)
        limit, seconds = self._first, FIRST_SECONDS
        try:
            while (link := self._directory.get(machine_id)) is not None and self._needs(link):
                uuid, fields = link.machine.node_uuid, link.machine.log_fields
                try:
                    async with limit:
                        with anyio.fail_after(seconds):
                            await self._write(link.machine)
                    if not self._lacks_something(machine_id):
                        return
                except (SideroLinkError, GRPCError, TimeoutError) as error:
                    reason = _reason(error)
                    log.info("machine %s could not be given its unique token yet: %s", uuid, reason, extra=fields)
                except Exception:
                    log.exception("machine %s could not be given its unique token yet", uuid, extra=fields)
                limit, seconds = self._later, CALL_SECONDS
                await anyio.sleep(backoff.next())
        finally:
            self._busy.discard(machine_id)

    def _lacks_something(self, machine_id: str) -> bool:
        """Whether a value is not chosen yet: the machine may have joined again, with a conflict, before its write returned."""
        link = self._directory.get(machine_id)
        if link is None or not self._needs(link):
            return False
        machine = link.machine
        needs_token = machine.bound_digest is None and machine.assigned_token is None
        return needs_token or (_needs_uuid(machine) and machine.assigned_uuid is None)

    async def _write(self, machine: Machine) -> None:
        with translate_errors():
            async with open_for_own_calls(machine, namespace=self._namespace) as channel:
                is_installed = await _is_installed(channel)
                fingerprint = await _fingerprint(channel) if machine.bound_digest is None else ""
                machine = await self._choose(machine.id, fingerprint, is_installed)
                service = MachineServiceStub(channel)
                if machine.assigned_uuid is not None:
                    await service.meta_write(MetaWriteRequest(key=META_UUID, value=machine.assigned_uuid.encode()))
                if machine.assigned_token is not None:
                    token = self._store.sealer.open_text(machine.assigned_token, place_of_assigned(machine.id))
                    await service.meta_write(MetaWriteRequest(key=META_UNIQUE_TOKEN, value=token.encode()))

    async def _choose(self, machine_id: str, fingerprint: str, is_installed: bool) -> Machine:
        """Choose and store the values for the machine, for all attempts."""
        new_uuid, new_token = str(uuid.uuid4()), new_unique_token(fingerprint)
        sealed = self._store.sealer.seal_text(new_token, place_of_assigned(machine_id))

        async def work(transaction: Transaction) -> Machine:
            machine = await transaction.machine(machine_id)
            if machine is None:
                raise SideroLinkError("the machine is no longer known")
            wanted = replace(machine, is_installed=machine.is_installed or is_installed)
            if _needs_uuid(machine) and machine.assigned_uuid is None:
                wanted = replace(wanted, assigned_uuid=new_uuid)
            if machine.bound_digest is None and machine.assigned_token is None:
                wanted = replace(wanted, assigned_token=sealed, assigned_digest=unique_token_digest(new_token))
            return machine if wanted == machine else await transaction.update(wanted)

        machine = await self._store.transact(work)
        await self._reconciler.apply_change(machine)
        return machine


def _needs_uuid(machine: Machine) -> bool:
    return machine.has_uuid_conflict and not machine.is_accepted


def _reason(error: Exception) -> str:
    """Why the machine has no token yet, in one line: a status is the machine's own text."""
    if isinstance(error, GRPCError):
        return one_line(error.message or error.status.name)
    return str(error) or "no answer in time"


async def _is_installed(channel: GrpcChannel) -> bool:
    try:
        answer = await StorageServiceStub(channel).disks(Empty())
    except GRPCError as error:
        if error.status is Status.UNIMPLEMENTED:
            return False
        raise
    return any(disk.system_disk for message in answer.messages for disk in message.disks)


async def _fingerprint(channel: GrpcChannel) -> str:
    """The fingerprint of the machine, by its own account."""
    request = ListRequest(namespace="network", type="LinkStatuses.net.talos.dev", options=ListOptions())
    addresses: list[bytes] = []
    async for answer in StateStub(channel).list(request):
        if answer.resource is None or answer.resource.spec is None:
            continue
        spec = decode_answer(answer.resource.spec.proto_spec, LinkStatusSpec, OWN_ANSWER_FIELDS)
        if spec.type == _ETHER and not spec.kind:
            addresses.append((spec.permanent_addr or spec.hardware_addr)[:_MAX_ADDRESS_BYTES])
        if len(addresses) > _MAX_LINKS:
            raise SideroLinkError("the machine has too many links")
    return hardware_fingerprint(addresses)
