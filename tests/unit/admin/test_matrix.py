"""Roles by calls: every call of the proto as every role, on the local socket and with API keys, by a foreign client: grpcio."""

import asyncio
import grp
import os
import tempfile
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from pathlib import Path

import betterproto2
import grpc.aio
import pytest

from siderolink.common.pb.siderolink.admin import v1 as pb
from siderolink.server.admin.services import admin_services
from siderolink.server.store import Role
from tests.support.admin_server import AdminServer, open_admin_server
from tests.support.relay import relayed
from tests.support.stores import KINDS, opened

pytestmark = pytest.mark.anyio

GROUP = "daemon"
VIEWER, OPERATOR, ADMIN = Role

ROWS: dict[str, tuple[Role, betterproto2.Message]] = {
    "TokenService/CreateToken": (OPERATOR, pb.CreateTokenRequest(name="x")),
    "TokenService/ListTokens": (VIEWER, pb.ListTokensRequest()),
    "TokenService/GetToken": (VIEWER, pb.TokenRequest(name="x")),
    "TokenService/ShowTokenSecret": (OPERATOR, pb.TokenRequest(name="x")),
    "TokenService/UpdateToken": (OPERATOR, pb.UpdateTokenRequest(name="x", note="n")),
    "TokenService/RevokeToken": (OPERATOR, pb.TokenRequest(name="x")),
    "TokenService/ReinstateToken": (OPERATOR, pb.TokenRequest(name="x")),
    "TokenService/RenewToken": (OPERATOR, pb.RenewTokenRequest(name="x", ttl=9.0)),
    "TokenService/DeleteToken": (OPERATOR, pb.TokenRequest(name="x")),
    "TokenService/SetDefaultToken": (OPERATOR, pb.TokenRequest(name="x")),
    "TokenService/ListTokenUsers": (VIEWER, pb.ListTokenUsersRequest(name="x")),
    "MachineService/ListMachines": (VIEWER, pb.ListMachinesRequest()),
    "MachineService/WatchMachines": (VIEWER, pb.WatchMachinesRequest()),
    "MachineService/FollowMachines": (VIEWER, pb.FollowMachinesRequest()),
    "MachineService/GetMachine": (VIEWER, pb.MachineRequest(name="x")),
    "MachineService/AskMachine": (VIEWER, pb.MachineRequest(name="x")),
    "MachineService/RenameMachine": (OPERATOR, pb.RenameMachineRequest(name="x", new_name="y")),
    "MachineService/LabelMachine": (OPERATOR, pb.LabelMachineRequest(name="x", set={"a": "b"})),
    "MachineService/NoteMachine": (OPERATOR, pb.NoteMachineRequest(name="x", note="n")),
    "MachineService/SetMachineTunnel": (OPERATOR, pb.SetMachineTunnelRequest(name="x", tunnel="force")),
    "MachineService/SetMachineRates": (OPERATOR, pb.SetMachineRatesRequest(name="x", rx=1_000_000)),
    "MachineService/RemoveMachine": (OPERATOR, pb.MachineRequest(name="x")),
    "MachineService/AcceptMachine": (OPERATOR, pb.MachineRequest(name="x")),
    "MachineService/DenyMachine": (OPERATOR, pb.MachineRequest(name="x")),
    "MachineService/ForgetUniqueToken": (OPERATOR, pb.MachineRequest(name="x")),
    "BanService/Ban": (OPERATOR, pb.BanRequest(name="3e1d4b52-0f8b-4d4d-9a34-1d4e3b7c6a51")),
    "BanService/Unban": (OPERATOR, pb.UnbanRequest(value="3e1d4b52-0f8b-4d4d-9a34-1d4e3b7c6a51")),
    "BanService/ListBans": (VIEWER, pb.ListBansRequest()),
    "ApiKeyService/CreateApiKey": (ADMIN, pb.CreateApiKeyRequest(name="x", role="viewer")),
    "ApiKeyService/ListApiKeys": (ADMIN, pb.ListApiKeysRequest()),
    "ApiKeyService/DeleteApiKey": (ADMIN, pb.ApiKeyRequest(name="x")),
    "ApiKeyService/RevokeApiKey": (ADMIN, pb.ApiKeyRequest(name="x")),
    "AuditService/ListAudit": (ADMIN, pb.ListAuditRequest()),
    "AuditService/FollowAudit": (ADMIN, pb.FollowAuditRequest(after_seq=0)),
    "AuditService/ExportAudit": (ADMIN, pb.ExportAuditRequest()),
    "EventService/FollowEvents": (VIEWER, pb.FollowEventsRequest()),
    "HistoryService/ListHistory": (VIEWER, pb.ListHistoryRequest()),
    "HistoryService/MachineLogs": (VIEWER, pb.MachineLogsRequest(machine="x")),
    "HistoryService/MachineEvents": (VIEWER, pb.MachineEventsRequest(machine="x")),
    "HistoryService/DeleteHistory": (OPERATOR, pb.DeleteHistoryRequest(machine="x")),
    "ForwardService/CheckForward": (ADMIN, pb.ForwardRequest(machine="x", port=22)),
    "ForwardService/Forward": (ADMIN, pb.ForwardRequest(machine="x", port=22)),
    "HistoryService/GetRetention": (VIEWER, pb.GetRetentionRequest()),
    "ServerService/GetVersion": (VIEWER, pb.GetVersionRequest()),
    "ServerService/GetInfo": (VIEWER, pb.GetInfoRequest()),
    "ServerService/GetStatus": (VIEWER, pb.GetStatusRequest()),
    "ServerService/ListServers": (VIEWER, pb.ListServersRequest()),
    "ServerService/Drain": (ADMIN, pb.DrainRequest()),
    "ServerService/UndoDrain": (ADMIN, pb.UndoDrainRequest()),
}
PREFIX = "/siderolink.admin.v1."
REFUSED = (grpc.StatusCode.PERMISSION_DENIED, grpc.StatusCode.UNAUTHENTICATED)
"""Of these, no call of a sufficient role ends with one."""
BROKEN = (
    grpc.StatusCode.INTERNAL,
    grpc.StatusCode.UNKNOWN,
    grpc.StatusCode.UNIMPLEMENTED,
    grpc.StatusCode.DEADLINE_EXCEEDED,
)


def paths() -> list[str]:
    def never() -> object:
        raise AssertionError

    services = admin_services(never, never)  # type: ignore[arg-type]
    return [path for service in services for path in service.__mapping__()]


def test_every_call_has_a_row() -> None:
    assert sorted(paths()) == sorted(PREFIX + name for name in ROWS)


@asynccontextmanager
async def served(kind: str) -> AsyncIterator[AdminServer]:
    with tempfile.TemporaryDirectory() as folder:
        os.chmod(folder, 0o755)
        async with opened(kind) as store, open_admin_server(Path(folder), store, group=GROUP) as admin_server:
            yield admin_server


async def outcome(channel: grpc.aio.Channel, name: str, metadata: list[tuple[str, str]]) -> grpc.StatusCode:
    """The status of a call; of one that goes on, OK once it has sent its headers."""
    _, request = ROWS[name]
    call = channel.unary_stream(PREFIX + name)(bytes(request), metadata=metadata, timeout=20)
    try:
        if name.rpartition("/")[2].startswith("Follow"):
            await _begin(call)
            return grpc.StatusCode.OK
        async for _ in call:
            pass
    except grpc.aio.AioRpcError as error:
        found: grpc.StatusCode = error.code()
        return found
    finally:
        call.cancel()
    return grpc.StatusCode.OK


async def _begin(call: grpc.aio.UnaryStreamCall) -> None:
    """Wait for a first message or a refusal, in several short waits: on a stalled host a single long one may end too soon."""
    reading = asyncio.ensure_future(call.read())
    for _ in range(30):
        await asyncio.wait([reading], timeout=0.01)
    if reading.done():
        await reading
    else:
        reading.cancel()
        await asyncio.wait([reading])


async def check(
    channel: grpc.aio.Channel, role: Role | None, metadata: list[tuple[str, str]], refusal: grpc.StatusCode
) -> None:
    wrong = []
    for name, (least, _) in ROWS.items():
        code = await outcome(channel, name, metadata)
        may = role is not None and role.includes(least)
        if (code in REFUSED) == may or (not may and code is not refusal) or code in BROKEN:
            wrong.append((name, str(role), code))
    assert wrong == []


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("role", [*Role, None])
async def test_each_role_remotely(role: Role | None, kind: str) -> None:
    async with served(kind) as admin_server, grpc.aio.insecure_channel(f"127.0.0.1:{admin_server.port}") as channel:
        metadata: list[tuple[str, str]] = []
        refusal = grpc.StatusCode.UNAUTHENTICATED
        if role is not None:
            _, secret = await admin_server.administration.api_keys.create("me", role)
            metadata.append(("authorization", f"Bearer {secret}"))
            refusal = grpc.StatusCode.PERMISSION_DENIED
        await check(channel, role, metadata, refusal)


@pytest.mark.skipif(os.geteuid() != 0, reason="only root can be another user")
@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("role", [ADMIN, VIEWER, None])
async def test_each_role_on_the_local_socket(role: Role | None, kind: str) -> None:
    async with served(kind) as admin_server:
        path = admin_server.path
        if role is ADMIN:
            async with grpc.aio.insecure_channel(f"unix:{path}") as channel:
                await check(channel, role, [], grpc.StatusCode.PERMISSION_DENIED)
            return
        os.chmod(path, 0o666)  # credentials decide in every mode
        groups = [] if role is None else [grp.getgrnam(GROUP).gr_gid]
        async with (
            relayed(path, path.parent / "elsewhere", groups=groups) as relay,
            grpc.aio.insecure_channel(f"unix:{relay}") as channel,
        ):
            await check(channel, role, [], grpc.StatusCode.PERMISSION_DENIED)
