"""`siderolink machine`: the machines of a running `serve`, on its local socket; both ends of it."""

import json
from collections.abc import AsyncIterator, Iterator
from contextlib import asynccontextmanager, contextmanager
from datetime import UTC, datetime

import anyio
from grpclib import GRPCError, Status

from siderolink.cli.control import directory
from siderolink.cli.serving import Serving
from siderolink.common.errors import SideroLinkError
from siderolink.common.grpc import Limits, open_channel, translate_errors
from siderolink.common.pb.siderolink.control import (
    AcceptRequest,
    BanEntry,
    BanRequest,
    BanResponse,
    ListMachinesRequest,
    Machine,
    MachineRequest,
    MachinesBase,
    MachinesStub,
)
from siderolink.common.text import one_line
from siderolink.server import BanKind, MachineStatus, Server
from siderolink.server import Machine as Row

_ANSWER_BYTES = 64 * 1024 * 1024
_DIGEST_DIGITS = 12


# --- the server's end


class MachinesService(MachinesBase):
    """Answers for one `serve`."""

    def __init__(self, serving: Serving) -> None:
        self._serving = serving

    async def list(self, message: ListMachinesRequest) -> AsyncIterator[Machine]:
        server = self._serving.server
        for status in await _all(server):
            yield _message(server, status)

    async def show(self, message: MachineRequest) -> Machine:
        with _told():
            server, status = await self._named(message.name)
            return _message(server, status)

    async def forget(self, message: MachineRequest) -> Machine:
        with _told():
            server, status = await self._named(message.name)
            await server.remove(status.machine.id)
            return _message(server, status)

    async def accept(self, message: AcceptRequest) -> Machine:
        with _told():
            server, status = await self._named(message.name)
            await server.accept(status.machine.id, forget_token=message.forget_token)
            return await self.show(MachineRequest(name=status.machine.id))

    async def deny(self, message: MachineRequest) -> Machine:
        with _told():
            server, status = await self._named(message.name)
            await server.deny(status.machine.id)
            return await self.show(MachineRequest(name=status.machine.id))

    async def ban(self, message: BanRequest) -> BanResponse:
        with _told():
            server = self._serving.server
            row = await server.find(message.name)
            status = None if row is None else await _status(server, row)
            machine = None if status is None else _message(server, status)
            before = set(await server.bans())
            await server.ban(message.name, kind=_kind(message.kind))
            made = [ban for ban in await server.bans() if ban not in before]
            ban = BanEntry(kind=str(made[0].kind), value=made[0].value) if made else None
            return BanResponse(ban=ban, machine=machine)

    async def unban(self, message: BanRequest) -> BanResponse:
        with _told():
            kind = _kind(message.kind) or BanKind.UUID
            await self._serving.server.unban(message.name, kind=kind)
            return BanResponse(ban=BanEntry(kind=str(kind), value=message.name))

    async def bans(self, message: ListMachinesRequest) -> AsyncIterator[BanEntry]:
        for ban in await self._serving.server.bans():
            yield BanEntry(kind=str(ban.kind), value=ban.value)

    async def _named(self, name: str) -> tuple[Server, MachineStatus]:
        """Raises SideroLinkError where there is no such machine."""
        server = self._serving.server
        row = await server.find(name)
        status = None if row is None else await _status(server, row)
        if status is None:
            raise GRPCError(Status.NOT_FOUND, f"no machine has the id, UUID or public key {one_line(name, limit=64)}")
        return server, status


async def _all(server: Server) -> list[MachineStatus]:
    return [*await server.machines(), *await server.unaccepted_machines()]


async def _status(server: Server, row: Row) -> MachineStatus | None:
    return next((status for status in await _all(server) if status.machine.id == row.id), None)


def _kind(text: str) -> BanKind | None:
    try:
        return BanKind(text) if text else None
    except ValueError:
        raise SideroLinkError(
            f"the kind of a ban is uuid, key or unique (a unique token), not {one_line(text, limit=32)}"
        ) from None


def _message(server: Server, status: MachineStatus) -> Machine:
    row = status.machine
    admits = server.still_admits(row)
    heard = None if status.peer is None else status.peer.last_received
    return Machine(
        id=row.id,
        node_uuid=row.node_uuid,
        public_key="" if row.public_key is None else row.public_key.encode(),
        overlay_address=str(row.overlay_address),
        admission=str(row.admission),
        link=str(status.state),
        talos_version=row.talos_version,
        tunnel=row.tunnel,
        has_unique_token=row.bound_digest is not None,
        fingerprint=row.unique_fingerprint,
        last_source=row.last_source or "",
        created_at=row.created_at,
        joined_at=row.joined_at,
        last_seen=max(filter(None, (heard, row.seen_at)), default=None),
        has_uuid_conflict=row.has_uuid_conflict,
        join_token="" if row.join_token_digest is None else row.join_token_digest.hex()[:_DIGEST_DIGITS],
        join_token_admits="" if admits is None else "yes" if admits else "no",
        assigned_uuid=row.assigned_uuid or "",
    )


@contextmanager
def _told() -> Iterator[None]:
    """Tell the caller, who is this host's administrator, what went wrong."""
    try:
        yield
    except SideroLinkError as error:
        raise GRPCError(Status.FAILED_PRECONDITION, one_line(str(error))) from None


# --- the command's end


@asynccontextmanager
async def _machines(interface: str) -> AsyncIterator[MachinesStub]:
    path = directory() / f"{interface}.sock"
    try:
        with translate_errors(f"`siderolink serve` at {path}"):
            async with open_channel(path=str(path), limits=Limits.for_answers(_ANSWER_BYTES)) as channel:
                yield MachinesStub(channel)
    except GRPCError as error:
        raise SideroLinkError(one_line(error.message or error.status.name.lower())) from None


def run_list(interface: str, *, as_json: bool) -> None:
    """Print all machines. Raises SideroLinkError."""

    async def work() -> list[Machine]:
        async with _machines(interface) as stub:
            return [machine async for machine in stub.list(ListMachinesRequest())]

    found = sorted(anyio.run(work), key=lambda machine: (machine.admission, machine.node_uuid))
    if as_json:
        print(json.dumps([_fields(machine) for machine in found], indent=1))
        return
    for machine in found:
        token = "unique token" if machine.has_unique_token else "no unique token"
        print(f"{machine.id}  {machine.node_uuid}  {machine.admission}, {machine.link}  {machine.overlay_address}  {token}")


def run_show(interface: str, name: str, *, as_json: bool) -> None:
    """Print one machine. Raises SideroLinkError."""

    async def work() -> Machine:
        async with _machines(interface) as stub:
            return await stub.show(MachineRequest(name=name))

    _print(anyio.run(work), as_json)


def run_forget(interface: str, name: str) -> None:
    """Forget a machine. Raises SideroLinkError."""

    async def work() -> Machine:
        async with _machines(interface) as stub:
            return await stub.forget(MachineRequest(name=name))

    machine = anyio.run(work)
    print(f"{machine.node_uuid} is forgotten; it will join again as a new machine{_token(machine)}")


def run_accept(interface: str, name: str, *, forget_token: bool) -> None:
    """Accept a machine. Raises SideroLinkError."""

    async def work() -> Machine:
        async with _machines(interface) as stub:
            return await stub.accept(AcceptRequest(name=name, forget_token=forget_token))

    machine = anyio.run(work)
    freed = "; the next unique token that it brings with a new key is bound" if forget_token else ""
    print(f"{machine.node_uuid} is accepted{freed}")


def run_deny(interface: str, name: str) -> None:
    """Deny a machine. Raises SideroLinkError."""

    async def work() -> Machine:
        async with _machines(interface) as stub:
            return await stub.deny(MachineRequest(name=name))

    machine = anyio.run(work)
    print(f"{machine.node_uuid} is denied; joins with its key {machine.public_key} are refused{_token(machine)}")


def run_ban(interface: str, name: str, kind: str, *, lift: bool) -> None:
    """Ban a machine, or lift a ban. Raises SideroLinkError."""

    async def work() -> BanResponse:
        async with _machines(interface) as stub:
            request = BanRequest(name=name, kind=kind)
            return await (stub.unban(request) if lift else stub.ban(request))

    done = anyio.run(work)
    what = "it was banned already" if done.ban is None else f"{done.ban.kind} {done.ban.value}"
    print(f"{'welcome again' if lift else 'banned'}: {what}")
    if done.machine is not None:
        print(f"the machine is forgotten{_token(done.machine)}")
        if done.ban is not None and done.ban.kind == "uuid":
            print("a machine can change its UUID; ban it with --kind key or --kind unique to make evasion harder")


def run_bans(interface: str, *, as_json: bool) -> None:
    """Print all bans. Raises SideroLinkError."""

    async def work() -> list[BanEntry]:
        async with _machines(interface) as stub:
            return [ban async for ban in stub.bans(ListMachinesRequest())]

    found = sorted(anyio.run(work), key=lambda ban: (ban.kind, ban.value))
    if as_json:
        print(json.dumps([{"kind": ban.kind, "value": ban.value} for ban in found], indent=1))
        return
    for ban in found:
        print(f"{ban.kind}  {ban.value}")


def _token(machine: Machine) -> str:
    """By which token the machine came, and whether that still lets it in."""
    if not machine.join_token:
        return ""
    admits = {"yes": "still admits", "no": "does not admit any more"}.get(machine.join_token_admits, "may still admit")
    return f"; it came by the join token {machine.join_token}…, which {admits} machines"


def _fields(machine: Machine) -> dict[str, object]:
    return {
        name: getattr(machine, name)
        for name in Machine.__dataclass_fields__
        if not name.startswith("_") and getattr(machine, name) is not None
    }


def _print(machine: Machine, as_json: bool) -> None:
    if as_json:
        print(json.dumps(_fields(machine), indent=1))
        return
    for name, value in _fields(machine).items():
        if isinstance(value, float):
            value = datetime.fromtimestamp(value, UTC).isoformat(timespec="seconds")
        if value not in ("", False):
            print(f"{name.replace('_', ' '):18} {value}")
