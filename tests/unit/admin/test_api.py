"""The admin API from the callers' side: roles, keys, statuses; changes are audited."""

import json
import os
from collections.abc import AsyncIterator
from pathlib import Path

import anyio
import pytest

from siderolink.common.grpc import GRPCError, Status
from siderolink.common.pb.siderolink.admin import v1 as pb
from siderolink.server.fleet.limit_watch import QUIET_SECONDS
from siderolink.server.store import AuditQuery, Role
from tests.support.admin_server import AdminServer, open_admin_server
from tests.support.manager import FakeMachine
from tests.support.stores import KINDS, opened

pytestmark = pytest.mark.anyio


@pytest.fixture(params=KINDS)
async def admin_server(request: pytest.FixtureRequest, tmp_path: Path) -> AsyncIterator[AdminServer]:
    async with opened(request.param) as store, open_admin_server(tmp_path, store) as admin_server:
        yield admin_server


def bearer(secret: str) -> dict[str, str]:
    return {"authorization": f"Bearer {secret}"}


async def status_of(call: object) -> Status:
    try:
        await call  # type: ignore[misc]
    except GRPCError as error:
        return error.status
    return Status.OK


async def test_the_first_key_is_made_on_the_local_socket_and_works_until_it_is_revoked(admin_server: AdminServer) -> None:
    async with admin_server.local() as local, admin_server.remote() as remote:
        made = await pb.ApiKeyServiceStub(local).create_api_key(pb.CreateApiKeyRequest(name="CI", role="viewer"))
        assert made.key is not None
        assert (made.key.name, made.key.role, made.key.state) == ("ci", "viewer", "active")
        assert made.secret.startswith("slk_")
        told = await pb.ServerServiceStub(remote).get_version(pb.GetVersionRequest(), metadata=bearer(made.secret))
        assert (told.actor, told.role) == ("ci", "viewer")
        listed = await pb.ApiKeyServiceStub(local).list_api_keys(pb.ListApiKeysRequest())
        assert listed.keys[0].last_source == "127.0.0.1"
        assert listed.keys[0].last_used_at is not None
        await pb.ApiKeyServiceStub(local).revoke_api_key(pb.ApiKeyRequest(name="ci"))
        call = pb.ServerServiceStub(remote).get_version(pb.GetVersionRequest(), metadata=bearer(made.secret))
        assert await status_of(call) is Status.UNAUTHENTICATED
    entries = await admin_server.administration.audit.page()
    assert [entry.action for entry in entries.items] == ["login.failed", "apikey.revoke", "apikey.create"]
    assert made.secret not in repr(entries) + "".join(entry.to_json() for entry in entries.items)


async def test_a_stream_ends_with_its_key(admin_server: AdminServer) -> None:
    _, secret = await admin_server.administration.api_keys.create("ops", Role.VIEWER)
    async with admin_server.remote() as remote:
        with pytest.raises(GRPCError) as caught:
            async for change in pb.MachineServiceStub(remote).watch_machines(
                pb.WatchMachinesRequest(follow=True), metadata=bearer(secret)
            ):
                assert change.kind == "synced"
                await admin_server.administration.api_keys.delete("ops")
        assert caught.value.status is Status.UNAUTHENTICATED


async def test_a_watch_reports_when_a_limit_takes_effect_and_when_it_ends(admin_server: AdminServer) -> None:
    machine = FakeMachine()
    await admin_server.manager.join(machine)
    row, limits = await admin_server.manager.row(machine), admin_server.administration.limits
    told: list[tuple[str, list[str]]] = []
    async with admin_server.local() as local:
        request = pb.WatchMachinesRequest(follow=True)
        with anyio.fail_after(20):
            async for change in pb.MachineServiceStub(local).watch_machines(request):
                if change.kind == "synced":
                    admin_server.manager.device.beyond_limits[machine.key] = (7, 0)
                    await limits.poll()
                elif change.kind == "changed" and change.machine is not None and change.machine.id == row.id:
                    told.append((change.machine.id, change.machine.limits_biting))
                    if len(told) == 2:
                        break
                    admin_server.manager.time.advance(QUIET_SECONDS)
                    await limits.poll()
    assert told == [(row.id, ["bandwidth_in"]), (row.id, [])]


async def test_a_machine_is_renamed_labelled_found_and_removed(admin_server: AdminServer) -> None:
    machine = FakeMachine()
    await admin_server.manager.join(machine)
    row = await admin_server.manager.row(machine)
    async with admin_server.local() as local:
        machines = pb.MachineServiceStub(local)
        renamed = await machines.rename_machine(pb.RenameMachineRequest(name=row.id, new_name="Edge-1"))
        assert (renamed.name, renamed.given_name) == ("edge-1", "edge-1")
        await machines.label_machine(pb.LabelMachineRequest(name="edge-1", set={"rack": "7", "site": "north"}))
        await machines.note_machine(pb.NoteMachineRequest(name="edge-1", note="by the door"))
        changed = await machines.set_machine_tunnel(pb.SetMachineTunnelRequest(name="edge-1", tunnel="force"))
        assert (changed.labels, changed.note, changed.tunnel) == ({"rack": "7", "site": "north"}, "by the door", "force")
        wanted = pb.MachineFilter(selector="rack in (6,7),site!=south", states=["accepted"], text="edge")
        found = await machines.list_machines(pb.ListMachinesRequest(filter=wanted))
        assert [(one.id, one.server) for one in found.machines] == [(row.id, "server-1")]
        assert found.total == 1
        none = await machines.list_machines(pb.ListMachinesRequest(filter=pb.MachineFilter(selector="!rack")))
        assert none.machines == []
        gone = await machines.remove_machine(pb.MachineRequest(name="edge-1"))
        assert gone.id == row.id
        assert await status_of(machines.get_machine(pb.MachineRequest(name="edge-1"))) is Status.NOT_FOUND
    assert admin_server.manager.links.get(row.id) is None
    entries = await admin_server.administration.audit.page(AuditQuery(action="machine.", object=row.id))
    assert [entry.action for entry in entries.items] == [
        "machine.remove",
        "machine.tunnel",
        "machine.note",
        "machine.label",
        "machine.rename",
    ]
    rename = entries.items[-1]
    assert (rename.before, rename.after) == ({"name": None}, {"name": "edge-1"})
    assert (rename.actor.role, rename.actor.source) == (Role.ADMIN, f"uid {os.geteuid()}")
    assert json.loads(rename.to_json())["after"] == {"name": "edge-1"}


async def test_a_token_is_made_listed_shown_and_revoked(admin_server: AdminServer) -> None:
    async with admin_server.local() as local:
        tokens = pb.TokenServiceStub(local)
        made = await tokens.create_token(pb.CreateTokenRequest(name="racks", is_one_time=True, labels={"rack": "7"}, ttl=60.0))
        assert made.token is not None
        assert (made.token.state, made.token.max_uses, made.token.uses) == ("active", 1, 0)
        assert len(made.secret) == 43
        await tokens.create_token(pb.CreateTokenRequest(name="other"))
        found = await tokens.list_tokens(pb.ListTokensRequest(selector="rack=7"))
        assert ([token.name for token in found.tokens], found.total) == (["racks"], 1)
        first = await tokens.list_tokens(pb.ListTokensRequest(page_size=1))
        rest = await tokens.list_tokens(pb.ListTokensRequest(page_token=first.next_page_token))
        names = [token.name for token in (*first.tokens, *rest.tokens)]
        assert names == sorted(names)
        assert {"other", "racks"} < set(names), "and the server's own"
        shown = await tokens.show_token_secret(pb.TokenRequest(name="racks"))
        assert (shown.secret, shown.join_url) == (made.secret, f"grpc://api.example.com:443?jointoken={made.secret}")
        await tokens.create_token(pb.CreateTokenRequest(name="signs", kind="v2", provider="metal"))
        signs = await tokens.show_token_secret(pb.TokenRequest(name="signs"))
        assert (signs.secret != "", signs.join_url) == (True, ""), "no machine presents what signs"
        assert (await tokens.revoke_token(pb.TokenRequest(name="racks"))).state == "revoked"
        assert await status_of(tokens.get_token(pb.TokenRequest(name="none"))) is Status.NOT_FOUND
        assert await status_of(tokens.create_token(pb.CreateTokenRequest(name="racks"))) is Status.ALREADY_EXISTS
    entries = await admin_server.administration.audit.page(AuditQuery(action="token.", object="racks"))
    assert [entry.action for entry in entries.items] == ["token.revoke", "token.show", "token.create"]
    assert made.secret not in "".join(entry.to_json() for entry in entries.items)
