"""The administration of join tokens: lists, names, refusals, the audit, and hidden secrets."""

import logging

import pytest
from grpclib import Status

from siderolink.common.errors import AlreadyExistsError, ConfigurationError, NotFoundError, SideroLinkError, StoreError
from siderolink.server.admission.policy import JoinTokensMode
from siderolink.server.admission.signed_tokens import PROVIDER, sign
from siderolink.server.store import (
    Actor,
    AuditQuery,
    MemoryStore,
    Role,
    Store,
    TokenKind,
    TokenState,
    Transaction,
)
from tests.support.manager import TOKEN, FakeMachine, Manager, managed, tokens_of
from tests.support.stores import KINDS, opened

pytestmark = pytest.mark.anyio

DENIED = Status.PERMISSION_DENIED
ALLOWED = JoinTokensMode.LEGACY_ALLOWED
ADMIN = Actor(name="ada", role=Role.ADMIN, source="192.0.2.9")


# --- the administration


async def test_tokens_are_listed_in_pages_with_the_given_one_among_them() -> None:
    manager, tokens = managed()
    for name in ("a", "f", "h", "z"):
        await tokens.create(name)
    await tokens.revoke("h")
    assert [one.token.name for one in await tokens.list()] == ["a", "f", "given", "h", "z"]
    assert [one.token.name for one in await tokens.list(limit=2)] == ["a", "f"]
    assert [one.token.name for one in await tokens.list(after="f", limit=2)] == ["given", "h"]
    assert [one.token.name for one in await tokens.list(after="given", limit=2)] == ["h", "z"]
    assert [one.token.name for one in await tokens.list(states=[TokenState.REVOKED])] == ["h"]
    given = await tokens.get("given")
    assert given.is_given
    assert given.token.is_default
    await tokens.make_default("a")
    assert not (await tokens.get("given")).token.is_default
    await manager.join(FakeMachine())
    assert (await tokens.get("given")).uses == 1
    assert await tokens.show("given") == TOKEN
    for change in (tokens.revoke, tokens.delete, tokens.renew, tokens.make_default):
        with pytest.raises(SideroLinkError, match="only be changed at the server"):
            await change("given")


@pytest.mark.parametrize(
    ("made", "error"),
    [
        ({"name": ""}, "name cannot be empty"),
        ({"name": "x" * 65}, "cannot be longer"),
        ({"name": "a\tb"}, "must not contain control characters"),
        ({"name": "n", "expires_in": 0}, "expires_in"),
        ({"name": "n", "expires_at": 1.0}, "in the future"),
        ({"name": "n", "expires_at": 9e9, "expires_in": 5.0}, "not both"),
        ({"name": "n", "max_uses": 0}, "max_uses must be 1"),
        ({"name": "n", "max_uses": 10**6}, "max_uses must be 1"),
        ({"name": "n", "max_uses": 2, "one_time": True}, "one-time"),
        ({"name": "n", "bound_uuid": "x"}, "UUID"),
        ({"name": "n", "token": "v1:x"}, "signed"),
        ({"name": "n", "token": ""}, "1 to 4096"),
        ({"name": "n", "token": "a b"}, "blanks"),
        ({"name": "n", "provider": "p"}, "kinds v1 and v2"),
        ({"name": "n", "kind": "v2"}, "needs a provider"),
        ({"name": "n", "note": "\x1b[2J"}, "control characters"),
    ],
)
async def test_invalid_tokens_are_refused_with_the_reason(made: dict[str, object], error: str) -> None:
    _, tokens = managed()
    with pytest.raises(ConfigurationError, match=error):
        await tokens.create(**made)  # type: ignore[arg-type]
    assert [one.is_given for one in await tokens.list()] == [True]


async def test_names_and_tokens_stay_unique_and_a_default_token_remains() -> None:
    _, tokens = managed()
    await tokens.create("one", token="some-text", make_default=True)
    with pytest.raises(AlreadyExistsError, match="this name"):
        await tokens.create("one")
    with pytest.raises(AlreadyExistsError, match="this text"):
        await tokens.create("two", token="some-text")
    with pytest.raises(AlreadyExistsError):
        await tokens.create("given")
    with pytest.raises(SideroLinkError, match="deleting default join token is not possible"):
        await tokens.delete("one")
    with pytest.raises(NotFoundError, match='no token with id "x" exists'):
        await tokens.make_default("x")
    await tokens.create("two", make_default=True)
    assert not (await tokens.get("one")).token.is_default
    await tokens.delete("one")
    await tokens.update("two", new_name="one", note="n", labels={"a": "b"}, bound_uuid="9AD4BDB0-0000-4000-8000-000000000009")
    changed = (await tokens.get("one")).token
    assert (changed.note, changed.labels, changed.bound_uuid) == ("n", {"a": "b"}, "9ad4bdb0-0000-4000-8000-000000000009")
    assert (await tokens.update("one", bound_uuid="")).token.bound_uuid is None


# --- secrets


@pytest.mark.parametrize("kind", KINDS)
async def test_secrets_are_returned_only_on_request(kind: str, caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level(logging.DEBUG)
    seen: list[str] = []
    async with opened(kind) as store:
        await _use_everything(store, seen)
    secrets = seen[:3]
    assert all(len(secret) >= 10 for secret in secrets)
    for text in (*seen[3:], caplog.text, *(repr(record.__dict__) for record in caplog.records)):
        assert not any(secret in text for secret in secrets)


async def _use_everything(store: Store, seen: list[str]) -> None:
    """Collects the secrets first, then everything that is shown."""
    manager = Manager(store=store)
    tokens = tokens_of(manager)
    made = await tokens.create("one", one_time=True, actor=ADMIN)
    own = await tokens.create("two", token="a-given-secret-text", kind=TokenKind.V2, provider="p", actor=ADMIN)
    signed = sign("v2", own.secret, {PROVIDER: "p"})
    seen += [made.secret, own.secret, signed]
    machine = FakeMachine()
    async with store.changes() as changes:
        await manager.join(machine, join_token=made.secret)
        await manager.join(FakeMachine(), join_token=signed)
        seen.append(repr(await anext(changes)))
    for text in (made.secret, signed[:-1], own.secret):
        seen.append(str(await manager.refuses(FakeMachine(), join_token=text)))
    assert await tokens.show("one", actor=ADMIN) == made.secret
    for name in ("one", "two"):
        await tokens.update(name, note="noted", actor=ADMIN)
        await tokens.revoke(name, actor=ADMIN)
    with pytest.raises(SideroLinkError) as caught:
        await tokens.create("three", token=own.secret)
    entries = await store.audit_entries(AuditQuery(limit=100))
    assert {entry.action for entry in entries} >= {"token.create", "token.show", "token.update", "token.revoke"}
    assert {entry.actor for entry in entries} == {ADMIN}
    seen += [entry.to_json() for entry in entries] + [repr(entry) for entry in entries]
    seen += [repr(made), repr(await tokens.list()), str(caught.value), repr(caught.value), repr(await store.tokens())]
    seen += [repr([row async for row in store.machines()]), repr(manager.store.sealer), repr(await manager.events())]
    seen.append(repr(await store.transact(_everything)))


async def _everything(transaction: Transaction) -> object:
    return await transaction.server()


async def test_a_failed_audit_undoes_the_change() -> None:
    class Broken(MemoryStore):
        async def transact(self, work):  # type: ignore[no-untyped-def]
            async def fails(transaction: Transaction) -> object:
                await work(transaction)
                raise StoreError("the disk is full")

            return await super().transact(fails)

    manager = Manager(store=Broken())
    with pytest.raises(StoreError):
        await tokens_of(manager).create("one")
    assert not len(manager.links.known)
    assert await manager.store.tokens() == []
