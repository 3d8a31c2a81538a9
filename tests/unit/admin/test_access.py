"""Authentication: keys, TLS, delayed refusals; and that no secret is revealed."""

import errno
import io
import json
import logging
import ssl
from collections.abc import AsyncIterator, Mapping
from dataclasses import replace
from pathlib import Path

import anyio
import pytest

from siderolink.common.admin_channel import SOURCE_METADATA
from siderolink.common.errors import ConfigurationError, HostError, UnauthenticatedError
from siderolink.common.grpc import GRPCError, Status
from siderolink.common.pb.siderolink.admin import v1 as pb
from siderolink.server import AdminOptions
from siderolink.server.admin.services.access import Penalties, translated_errors
from siderolink.server.store import AuditQuery, Principal, Role
from tests.support.admin_server import AdminServer, open_admin_server
from tests.support.stores import KINDS, opened

pytestmark = pytest.mark.anyio


@pytest.fixture(params=KINDS)
async def admin_server(request: pytest.FixtureRequest, tmp_path: Path) -> AsyncIterator[AdminServer]:
    async with opened(request.param) as store, open_admin_server(tmp_path, store) as admin_server:
        yield admin_server


@pytest.mark.parametrize(
    "value", ["", "Bearer", "Basic YWRtaW46", "Bearer slk_wrong", "bearer " + "x" * 8000, "slk_", "Bearer a b"]
)
async def test_an_invalid_key_is_refused_without_saying_why(admin_server: AdminServer, value: str) -> None:
    async with admin_server.remote() as remote:
        with pytest.raises(GRPCError) as caught:
            metadata = {"authorization": value} if value else {}
            await pb.ServerServiceStub(remote).get_version(pb.GetVersionRequest(), metadata=metadata)
    assert caught.value.status is Status.UNAUTHENTICATED
    message = caught.value.message or ""
    assert message in ("the API key is not valid", "give an API key as the metadata `authorization: Bearer KEY`")


async def test_on_the_local_socket_a_given_key_overrides_the_users_rights(admin_server: AdminServer) -> None:
    _, secret = await admin_server.administration.api_keys.create("look", Role.VIEWER)
    async with admin_server.local() as local:
        stub = pb.ServerServiceStub(local)
        assert (await stub.get_version(pb.GetVersionRequest())).role == "admin"
        metadata = {"authorization": f"Bearer {secret}", SOURCE_METADATA: "192.0.2.7"}
        told = await stub.get_version(pb.GetVersionRequest(), metadata=metadata)
        assert (told.actor, told.role) == ("look", "viewer")
        with pytest.raises(GRPCError) as denied:
            await pb.AuditServiceStub(local).list_audit(pb.ListAuditRequest(), metadata=metadata)
        assert denied.value.status is Status.PERMISSION_DENIED
        for wrong in ("Bearer slk_wrong", "Bearer", "Basic x"):
            with pytest.raises(GRPCError) as caught:
                await stub.get_version(pb.GetVersionRequest(), metadata=metadata | {"authorization": wrong})
            assert caught.value.status is Status.UNAUTHENTICATED
        (entry,) = (await admin_server.administration.audit.page(AuditQuery(action="login."))).items
        assert entry.actor.source == "192.0.2.7"
        await admin_server.administration.api_keys.revoke("look")
        with pytest.raises(GRPCError):
            await stub.get_version(pb.GetVersionRequest(), metadata=metadata)


async def test_failed_logins_are_sampled_and_never_lock_a_key(admin_server: AdminServer) -> None:
    _, secret = await admin_server.administration.api_keys.create("ops", Role.OPERATOR)
    async with admin_server.remote() as remote:
        stub = pb.ServerServiceStub(remote)
        for _ in range(30):
            with pytest.raises(GRPCError):
                await stub.get_version(pb.GetVersionRequest(), metadata={"authorization": "Bearer slk_guess"})
        told = await stub.get_version(pb.GetVersionRequest(), metadata={"authorization": f"Bearer {secret}"})
        assert told.role == "operator"
    entries = (await admin_server.administration.audit.page(AuditQuery(action="login."))).items
    assert len(entries) == 1, "thirty attempts within a minute are one entry"
    assert entries[0].actor.source == "127.0.0.1"
    assert "guess" not in entries[0].to_json()


def test_repeated_refusals_of_one_source_are_delayed_more_each_time() -> None:
    now = 0.0
    penalties = Penalties(lambda: now)
    delays = [penalties.next_delay("192.0.2.1") for _ in range(12)]
    assert delays == sorted(delays)
    assert delays[0] == 0.25
    assert delays[-1] == 30.0, "no longer"
    assert penalties.next_delay("192.0.2.2") == 0.25
    now = 1000.0
    assert penalties.next_delay("192.0.2.1") == 0.25, "forgiven"


async def test_an_expired_key_is_refused(admin_server: AdminServer) -> None:
    keys = admin_server.administration.api_keys
    made, secret = await keys.create("short", Role.VIEWER, ttl=1e6)
    assert keys.authenticate(secret, "x")[0].role is Role.VIEWER
    admin_server.manager.time.advance(1e6)
    with pytest.raises(UnauthenticatedError, match="has expired"):
        keys.authenticate(secret, "x")
    for ttl in (-1.0, 0.0, float("nan"), float("inf"), 1e300):
        with pytest.raises(ConfigurationError):
            await keys.create("other", Role.VIEWER, ttl=ttl)
    assert made.expires_at is not None


async def test_a_key_made_at_another_server_works_here_until_it_is_revoked_there(admin_server: AdminServer) -> None:
    """Another server with the same store creates and deletes the key."""
    keys = admin_server.administration.api_keys
    _, secret = await keys.create("one", Role.VIEWER)
    (stored,) = await admin_server.manager.store.transact(lambda transaction: transaction.principals())
    await admin_server.manager.store.transact(lambda transaction: transaction.delete_principal(stored.id))
    await _until(lambda: _is_refused(admin_server, secret))
    again = replace(stored, id="f" * 16)
    await admin_server.manager.store.transact(lambda transaction: transaction.put_principal(again))
    await _until(lambda: not _is_refused(admin_server, secret))


def _is_refused(admin_server: AdminServer, secret: str) -> bool:
    try:
        admin_server.administration.api_keys.authenticate(secret, "x")
    except UnauthenticatedError:
        return True
    return False


async def _until(condition: object) -> None:
    with anyio.fail_after(30):
        while not condition():  # type: ignore[operator]
            await anyio.sleep(0.01)


async def test_a_key_stays_valid_while_keys_are_reloaded(admin_server: AdminServer) -> None:
    """A regression: while any key was created or revoked, all keys were refused for a moment."""
    keys = admin_server.administration.api_keys
    _, secret = await keys.create("ci", Role.VIEWER)
    is_read = anyio.Event()

    async def refresh() -> None:
        await keys.refresh()
        is_read.set()

    async with anyio.create_task_group() as tasks:
        tasks.start_soon(refresh)
        while not is_read.is_set():
            assert not _is_refused(admin_server, secret)
            await anyio.lowlevel.checkpoint()


async def test_uses_of_keys_are_stored_in_batches(admin_server: AdminServer, monkeypatch: pytest.MonkeyPatch) -> None:
    keys, store, written = admin_server.administration.api_keys, admin_server.manager.store, list[int]()
    note = store.note_principals

    async def count(used: Mapping[str, tuple[float, str]]) -> None:
        written.append(len(used))
        await note(used)

    monkeypatch.setattr(store, "note_principals", count)
    _, secret = await keys.create("ci", Role.VIEWER)

    async def stored() -> Principal:
        (found,) = await admin_server.manager.store.transact(lambda transaction: transaction.principals())
        return found

    for _ in range(100):
        keys.authenticate(secret, "192.0.2.9")
    assert written == []
    await keys.write_uses()
    assert written == [1]
    assert (await stored()).last_source == "192.0.2.9"


@pytest.mark.parametrize("listen", ["0.0.0.0:1", "[::]:1", "192.0.2.1:1", "example.com:1"])
def test_keys_are_sent_only_by_tls_or_on_the_loopback(listen: str) -> None:
    with pytest.raises(ConfigurationError, match="TLS"):
        AdminOptions(listen=listen)
    AdminOptions(listen=listen, tls=ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER))


@pytest.mark.parametrize("listen", ["127.0.0.1:0", "[::1]:0", "localhost:1"])
def test_the_loopback_needs_no_tls(listen: str) -> None:
    assert AdminOptions(listen=listen).address is not None


async def test_secrets_are_returned_only_when_requested(admin_server: AdminServer) -> None:
    log = io.StringIO()
    handler = logging.StreamHandler(log)
    ours = logging.getLogger("siderolink")
    ours.addHandler(handler)
    level = ours.level
    ours.setLevel(logging.DEBUG)
    told: list[str] = []
    try:
        async with admin_server.local() as local, admin_server.remote() as remote:
            keys, tokens = pb.ApiKeyServiceStub(local), pb.TokenServiceStub(local)
            key = (await keys.create_api_key(pb.CreateApiKeyRequest(name="k", role="admin"))).secret
            random = (await tokens.create_token(pb.CreateTokenRequest(name="t"))).secret
            given = "a-token-that-was-given-1234567890"
            await tokens.create_token(pb.CreateTokenRequest(name="u", secret=given))
            bearer = {"authorization": f"Bearer {key}"}
            for wrong in (f"{key}x", key[:-1]):
                with pytest.raises(GRPCError) as caught:
                    await pb.ServerServiceStub(remote).get_version(
                        pb.GetVersionRequest(), metadata={"authorization": f"Bearer {wrong}"}
                    )
                told.append(repr(caught.value))
            with pytest.raises(GRPCError) as caught:
                await tokens.create_token(pb.CreateTokenRequest(name="v", secret=given))
            told.append(repr(caught.value))
            told.append(repr(await pb.TokenServiceStub(remote).list_tokens(pb.ListTokensRequest(), metadata=bearer)))
            told.append(repr(await pb.ApiKeyServiceStub(remote).list_api_keys(pb.ListApiKeysRequest(), metadata=bearer)))
            told.append(repr(await pb.AuditServiceStub(remote).list_audit(pb.ListAuditRequest(), metadata=bearer)))
            async for chunk in pb.AuditServiceStub(remote).export_audit(pb.ExportAuditRequest(), metadata=bearer):
                told += map(json.dumps, map(json.loads, chunk.data.decode().splitlines()))
            assert (await tokens.show_token_secret(pb.TokenRequest(name="u"))).secret == given
        told.append(repr(admin_server.administration.api_keys.__dict__))
        told.append(repr(await admin_server.manager.store.transact(lambda transaction: transaction.principals())))
        told.append(repr(await admin_server.administration.tokens.list()))
    finally:
        ours.removeHandler(handler)
        ours.setLevel(level)
    told.append(log.getvalue())
    for secret in (key, key[4:], random, given):
        assert all(secret not in text for text in told)


@pytest.mark.parametrize(
    "error",
    [RuntimeError("can't start new thread"), OSError(errno.EMFILE, "?"), MemoryError(), HostError("the disk is full")],
    ids=["thread", "file", "memory", "disk"],
)
async def test_what_the_host_lacks_is_told_to_the_caller(error: Exception) -> None:
    with pytest.raises(GRPCError) as caught, translated_errors():
        raise error
    assert caught.value.status is Status.UNAVAILABLE
    assert caught.value.message
    for other in (TimeoutError(), ConnectionResetError(), RuntimeError("other")):
        with pytest.raises(type(other)) as passed, translated_errors():
            raise other
        assert passed.value is other
