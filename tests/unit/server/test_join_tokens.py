"""Join tokens from the administration to the decision: a table of rules, limits under a crowd, refusals without a query."""

import itertools
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager, suppress
from dataclasses import replace
from typing import Any

import anyio
import pytest
from grpclib import GRPCError, Status
from hypothesis import given, settings
from hypothesis import strategies as st

from siderolink.common.errors import ConfigurationError
from siderolink.server import JoinPolicy, Server
from siderolink.server.admin.tokens import Tokens
from siderolink.server.admission.policy import JoinTokensMode
from siderolink.server.admission.signed_tokens import PROVIDER, sign
from siderolink.server.admission.tokens import JoinTokenCheck
from siderolink.server.store import (
    Actor,
    MemoryStore,
    Role,
    Store,
    TokenKind,
    TokenState,
    TunnelSetting,
)
from siderolink.server.store.sql.postgres import PostgresStore
from tests.support.manager import TOKEN, FakeMachine, Manager, following, managed, new_key, tokens_of
from tests.support.postgres import STATE_KEY, cluster
from tests.support.stores import KINDS, opened

pytestmark = pytest.mark.anyio

DENIED = Status.PERMISSION_DENIED
ALLOWED = JoinTokensMode.LEGACY_ALLOWED
ADMIN = Actor(name="ada", role=Role.ADMIN, source="192.0.2.9")


# --- the table: how a token is made and what becomes of it -> what a new machine that presents it hears

ADMITTED, INVALID, GONE = "admitted", (DENIED, "invalid join token"), Status.NOT_FOUND

PLAIN_RULES = [
    ({}, [], ADMITTED),
    ({"expires_in": 60.0}, [], ADMITTED),
    ({"expires_in": 60.0}, ["pass 60"], INVALID),
    ({"expires_in": 60.0}, ["pass 59"], ADMITTED),
    ({}, ["revoke"], INVALID),
    ({}, ["revoke", "reinstate"], ADMITTED),
    ({}, ["revoke", "renew"], INVALID),  # renewing lifts no revocation
    ({"expires_in": 60.0}, ["pass 61", "renew"], ADMITTED),
    ({"expires_in": 60.0}, ["pass 61", "reinstate"], INVALID),  # and reinstating no expiry
    ({"expires_in": 60.0}, ["revoke", "pass 61", "renew", "reinstate"], ADMITTED),
    ({}, ["delete"], INVALID),
    ({}, ["default"], ADMITTED),
    ({}, ["default", "revoke"], INVALID),  # revoking the default one is allowed
    ({}, ["revoke", "default", "reinstate"], ADMITTED),  # so is making a revoked one the default
    ({"one_time": True}, [], ADMITTED),
    ({"one_time": True}, ["use"], INVALID),
    ({"max_uses": 2}, ["use"], ADMITTED),
    ({"max_uses": 2}, ["use", "use"], INVALID),
    ({"bound_uuid": "OWN"}, [], ADMITTED),
    ({"bound_uuid": "9ad4bdb0-0000-4000-8000-000000000009"}, [], INVALID),
    ({"kind": TokenKind.V2, "provider": "p"}, [], INVALID),  # a provider's token signs; nobody joins by itself
]


async def follow(manager: Manager, tokens: Tokens, text: str, steps: list[str]) -> None:
    for step in steps:
        match step.split():
            case ["pass", seconds]:
                manager.time.advance(float(seconds))
            case ["revoke"]:
                await tokens.revoke("one")
            case ["reinstate"]:
                await tokens.reinstate("one")
            case ["renew"]:
                await tokens.renew("one", expires_in=600)
            case ["delete"]:
                await tokens.delete("one")
            case ["default"]:
                await tokens.make_default("one")
            case ["use"]:
                other = FakeMachine()
                await manager.join(other, join_token=text)
                await manager.handshake(other)


@pytest.mark.parametrize(("made", "steps", "verdict"), PLAIN_RULES)
async def test_which_join_tokens_admit(made: dict[str, object], steps: list[str], verdict: object) -> None:
    manager, tokens = managed()
    machine = FakeMachine(unique_token='{"Fingerprint":"aa","Token":"own"}')
    made = {key: machine.node_uuid if value == "OWN" else value for key, value in made.items()}
    text = (await tokens.create("one", **made)).secret  # type: ignore[arg-type]
    await follow(manager, tokens, text, steps)
    if verdict == ADMITTED:
        await manager.join(machine, join_token=text)
        assert (await manager.row(machine)).token_id == (await tokens.get("one")).token.id
    else:
        status, said = await manager.refuses(machine, join_token=text)
        assert (status, said[:18]) == verdict
        assert text not in said


# what is stored: default token and provider p's; the version, signer and provider in the signed token -> the verdict
DEFAULT, OWN, NOBODY = "default", "the provider's own", "nobody"
SIGNED_RULES = [
    ("v1", DEFAULT, None, ADMITTED),
    ("v1", DEFAULT, "p1", ADMITTED),  # v1, with a provider or without: the default token
    ("v1", DEFAULT, "p2", ADMITTED),
    ("v1", OWN, "p2", INVALID),
    ("v1", DEFAULT, "unknown", GONE),
    ("v1", NOBODY, None, INVALID),
    ("v2", DEFAULT, None, ADMITTED),
    ("v2", OWN, None, INVALID),
    ("v2", OWN, "p2", ADMITTED),
    ("v2", DEFAULT, "p2", INVALID),
    ("v2", DEFAULT, "unknown", INVALID),  # an unknown provider does not make the token malformed
    ("v2", OWN, "p1", INVALID),  # p1's machines join by the default token
]


@pytest.mark.parametrize("is_stored", [True, False], ids=["a stored default", "the given one is the default"])
@pytest.mark.parametrize("mode", [None, ALLOWED])
@pytest.mark.parametrize(("version", "signer", "provider", "verdict"), SIGNED_RULES)
async def test_which_signatures_are_accepted(
    version: str, signer: str, provider: str | None, verdict: object, mode: JoinTokensMode | None, is_stored: bool
) -> None:
    manager, tokens = managed(mode)
    await tokens.create("p1", kind=TokenKind.V1, provider="p1")
    secrets = {OWN: (await tokens.create("p2", kind=TokenKind.V2, provider="p2")).secret, DEFAULT: TOKEN, NOBODY: "nobody's"}
    if is_stored:
        secrets[DEFAULT] = (await tokens.create("d", make_default=True)).secret
    text = sign(version, secrets[signer], {"rack": "7"} | ({} if provider is None else {PROVIDER: provider}))
    machine = FakeMachine(unique_token='{"Fingerprint":"aa","Token":"own"}')
    if verdict == ADMITTED:
        await manager.join(machine, join_token=text)
        assert (await manager.row(machine)).labels == {"rack": "7"} | ({} if provider is None else {PROVIDER: provider})
    elif verdict is GONE:
        said = "the infra provider is being deleted or doesn't exist"
        assert await manager.refuses(machine, join_token=text) == (Status.NOT_FOUND, said)
    else:
        refused = await manager.refuses(machine, join_token=text)
        assert refused == ((DENIED, "unauthorized") if mode else (DENIED, "invalid join token"))


@pytest.mark.parametrize("step", ["revoke", "pass 61"])
async def test_an_inactive_default_token_invalidates_what_it_signed(step: str) -> None:
    manager, tokens = managed()
    secret = (await tokens.create("one", expires_in=60, make_default=True)).secret
    own = (await tokens.create("p", kind=TokenKind.V2, provider="p")).secret
    await follow(manager, tokens, secret, [step])
    for version in ("v1", "v2"):
        assert (await manager.refuses(FakeMachine(), join_token=sign(version, secret, {"a": "b"})))[0] is DENIED
    await manager.join(FakeMachine(), join_token=sign("v2", own, {PROVIDER: "p"}))
    await tokens.revoke("p")
    assert (await manager.refuses(FakeMachine(), join_token=sign("v2", own, {PROVIDER: "p"})))[0] is DENIED


@pytest.mark.parametrize("mode", [None, ALLOWED])
@pytest.mark.parametrize("step", ["revoke", "delete", "pass 61"])
async def test_a_machine_with_a_bound_unique_token_no_longer_needs_its_join_token(
    step: str, mode: JoinTokensMode | None
) -> None:
    manager, tokens = managed(mode)
    text = (await tokens.create("one", expires_in=60)).secret
    machine = FakeMachine(unique_token='{"Fingerprint":"aa","Token":"own"}')
    await manager.join(machine, join_token=text)
    await manager.handshake(machine)
    other = FakeMachine()
    await manager.join(other, join_token=text, talos_version="v1.5.0")
    await manager.handshake(other)
    await follow(manager, tokens, text, [step])
    assert machine.key in manager.device.configs, "living links are not cut"
    again = replace(machine, key=new_key())
    await manager.join(again, join_token=text)
    assert (await manager.refuses(replace(other, key=new_key()), join_token=text, talos_version="v1.5.0"))[0] is DENIED


# --- uses


async def test_a_use_is_reserved_with_the_call_and_spent_by_its_handshake() -> None:
    manager, tokens = managed()
    text = (await tokens.create("one", one_time=True)).secret
    machine, other = FakeMachine(), FakeMachine()
    await manager.join(machine, join_token=text)
    await manager.join(machine, join_token=text)  # existing machines call Provision twice
    assert (await tokens.get("one")).state is TokenState.USED_UP
    assert (await manager.refuses(other, join_token=text))[0] is DENIED
    await manager.pass_time(601)  # without a handshake the row is removed, and its use with it
    assert (await tokens.get("one")).uses == 0
    await manager.join(other, join_token=text)
    await manager.handshake(other)
    await manager.pass_time(400)
    again = replace(other, key=new_key())
    await manager.join(again, join_token=text)  # a new key after a restart: the same row may present it again
    await manager.handshake(again)
    assert (await manager.refuses(machine, join_token=text))[0] is DENIED
    row = await manager.row(again)
    assert not row.has_reserved_use
    await manager.machines.remove(row.id)
    assert (await manager.refuses(machine, join_token=text))[0] is DENIED, "spent is spent"


async def test_a_claim_reserves_a_use_until_it_expires() -> None:
    manager, tokens = managed()
    machine = FakeMachine()
    await manager.join(machine)
    await manager.handshake(machine)
    text = (await tokens.create("one", one_time=True)).secret
    await manager.pass_time(300)
    await manager.join(replace(machine, key=new_key()), join_token=text)
    assert (await tokens.get("one")).uses == 1
    other = FakeMachine()
    assert (await manager.refuses(other, join_token=text))[0] is DENIED
    await manager.pass_time(61)
    assert (await tokens.get("one")).uses == 0
    await manager.join(other, join_token=text)
    proved = replace(machine, key=new_key())
    await manager.join(proved, join_token=TOKEN)
    await manager.handshake(proved)
    assert (await manager.row(proved)).token_id == "given"
    assert (await tokens.get("one")).uses == 1


@pytest.mark.parametrize("step", ["revoke", "delete"])
async def test_a_claim_whose_token_is_revoked_before_its_handshake_proves_nothing(step: str) -> None:
    manager, tokens = managed()
    text = (await tokens.create("one")).secret
    machine = FakeMachine()
    await manager.join(machine)
    await manager.handshake(machine)
    await manager.pass_time(300)
    again = replace(machine, key=new_key())
    await manager.join(again, join_token=text)
    await follow(manager, tokens, text, [step])
    await manager.handshake(again)
    assert (await manager.row(machine)).public_key == machine.key


async def test_a_unique_token_that_admits_takes_no_use() -> None:
    manager, tokens = managed()
    machine = FakeMachine(unique_token='{"Fingerprint":"aa","Token":"own"}')
    await manager.join(machine)
    await manager.handshake(machine)
    text = (await tokens.create("one", one_time=True)).secret
    again = replace(machine, key=new_key())
    await manager.join(again, join_token=text)
    await manager.handshake(again)
    await manager.join(FakeMachine(), join_token=text)


async def test_a_machine_that_changes_its_token_returns_the_use_of_the_first_one() -> None:
    manager, tokens = managed()
    texts = [(await tokens.create(name, one_time=True)).secret for name in ("one", "two")]
    machine = FakeMachine()
    for text in texts:
        await manager.join(machine, join_token=text)
    assert [(await tokens.get(name)).uses for name in ("one", "two")] == [0, 1]
    await manager.handshake(machine)
    await manager.join(FakeMachine(), join_token=texts[0])
    assert (await manager.refuses(FakeMachine(), join_token=texts[1]))[0] is DENIED


@asynccontextmanager
async def managers(kind: str, count: int) -> AsyncIterator[list[Manager]]:
    """Servers that share a store, as far as its kind allows."""
    async with opened(kind) as store:
        shared: list[Manager] = []
        for _ in range(1 if kind == "sql" else count):
            manager = Manager(store=store)
            await manager.reconciler.load()
            shared.append(manager)
        yield shared


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize(("limit", "crowd"), [(1, 100), (7, 40)])
async def test_concurrent_joins_with_a_limited_token_do_not_exceed_its_limit(kind: str, limit: int, crowd: int) -> None:
    async with managers(kind, 2) as shared:
        tokens = tokens_of(shared[0])
        text = (await tokens.create("one", max_uses=limit)).secret
        for manager in shared:
            await manager.links.known.load_tokens(manager.store)
        admitted, refused = list[FakeMachine](), list[Status]()

        async def join(machine: FakeMachine, manager: Manager) -> None:
            try:
                await manager.join(machine, join_token=text)
                admitted.append(machine)
            except GRPCError as error:
                refused.append(error.status)

        async with anyio.create_task_group() as tasks:
            for machine, manager in zip((FakeMachine() for _ in range(crowd)), itertools.cycle(shared), strict=False):
                tasks.start_soon(join, machine, manager)
        assert len(admitted) == limit
        assert refused == [DENIED] * (crowd - limit)
        assert len([row async for row in shared[0].store.machines()]) == limit
        assert (await tokens.get("one")).uses == limit


async def test_a_token_without_a_limit_costs_no_write() -> None:
    manager, tokens = managed()
    text = (await tokens.create("many")).secret
    machine = FakeMachine()
    await manager.join(machine, join_token=text)
    before = (await manager.row(machine)).revision
    await manager.join(machine, join_token=text)
    assert (await manager.row(machine)).revision == before == 1
    assert await manager.store.transact(lambda transaction: transaction.tokens.uses("many")) == []
    assert (await tokens.get("many")).uses == 1


class Crowd:
    """Four machines and a token for two of them."""

    def __init__(self) -> None:
        self.manager, self.tokens = managed()
        self.machines = {number: FakeMachine() for number in range(4)}
        self.proved: set[str] = set()
        self.text = ""

    async def take(self, number: int, step: str) -> None:
        machine = self.machines[number]
        row = await self.manager.machines.find(machine.node_uuid)
        if step == "wait":
            await self.manager.pass_time(300)
        elif step == "remove" and row is not None:
            await self.manager.machines.remove(row.id)
        elif step == "prove" and self.manager.links.by_key(machine.key) is not None:
            await self.manager.handshake(machine)
            row = await self.manager.machines.find(machine.node_uuid)
            self.proved |= set() if row is None or row.linked_at is None else {row.id}
        elif step in ("join", "rekey"):
            if step == "rekey":
                machine = self.machines[number] = replace(machine, key=new_key())
            with suppress(GRPCError):
                await self.manager.join(machine, join_token=self.text)


@given(st.lists(st.tuples(st.integers(0, 3), st.sampled_from(["join", "prove", "rekey", "remove", "wait"])), max_size=25))
@settings(max_examples=60, deadline=None)
def test_a_limit_holds_whatever_happens(steps: list[tuple[int, str]]) -> None:
    """No more rows than the limit ever prove a key with it, and no more hold a use at a time."""

    async def run() -> None:
        crowd = Crowd()
        crowd.text = (await crowd.tokens.create("two", max_uses=2)).secret
        for number, step in steps:
            await crowd.take(number, step)
            assert len(crowd.proved) <= 2
            assert (await crowd.tokens.get("two")).uses <= 2

    anyio.run(run)


# --- what a token gives to its machines


async def test_labels_and_the_tunnel_of_a_token_are_its_machines() -> None:
    manager, tokens = managed()
    force = await tokens.create("force", labels={"site": "a", "rack": "1"}, tunnel=TunnelSetting.FORCE)
    forbid = await tokens.create("forbid", labels={"site": "b"}, tunnel=TunnelSetting.FORBID)
    machine = FakeMachine()
    assert (await manager.join(machine, join_token=force.secret)).grpc_peer_addr_port
    row = await manager.row(machine)
    assert (row.labels, row.tunnel) == ({"site": "a", "rack": "1"}, True)
    await manager.handshake(machine)
    await manager.store.transact(lambda transaction: transaction.update(replace(row, labels={"rack": "9"}, linked_at=1.0)))
    await manager.reconciler.load()
    await manager.join(machine, join_token=force.secret)
    assert (await manager.row(machine)).labels == {"rack": "9"}, "what an administrator changed is not brought back"
    await manager.pass_time(300)
    other = replace(machine, key=new_key(), tunnel=True)
    assert not (await manager.join(other, join_token=forbid.secret)).grpc_peer_addr_port
    await manager.handshake(other)
    assert (await manager.row(other)).labels == {"rack": "9", "site": "b"}


async def test_a_machines_own_setting_overrides_its_tokens() -> None:
    manager, tokens = managed()
    text = (await tokens.create("force", tunnel=TunnelSetting.FORCE)).secret
    machine = FakeMachine()
    await manager.join(machine, join_token=text)
    row = await manager.row(machine)
    changed = replace(row, tunnel_setting=TunnelSetting.FORBID)
    await manager.store.transact(lambda transaction: transaction.update(changed))
    assert not (await manager.join(machine, join_token=text)).grpc_peer_addr_port


# --- cheap refusals


class Counting(MemoryStore):
    asked = 0

    async def transact(self, work):  # type: ignore[no-untyped-def]
        self.asked += 1
        return await super().transact(work)


async def test_unknown_tokens_are_refused_without_a_query() -> None:
    store = Counting()
    manager = Manager(store=store)
    store.time = manager.time.clock.time  # type: ignore[method-assign]
    tokens = tokens_of(manager)
    for name in ("revoked", "expired"):
        await tokens.create(name, token=f"{name}-token", expires_in=60)
    await tokens.revoke("revoked")
    manager.time.advance(61)
    store.asked = 0
    for text in ("wrong", "revoked-token", "expired-token", sign("v2", "x", {PROVIDER: "p"}), "v1:%%%", ""):
        for unique in ("", "stranger", '{"Fingerprint":"aa","Token":"x"}'):
            assert (await manager.refuses(FakeMachine(unique_token=unique), join_token=text))[0] is DENIED
    assert store.asked == 0


async def test_queries_that_end_in_refusals_are_limited_per_source() -> None:
    store = Counting()
    manager = Manager(store=store)
    text = (await tokens_of(manager).create("one", one_time=True)).secret
    machine = FakeMachine()
    await manager.join(machine, join_token=text)
    store.asked = 0
    statuses = [(await manager.refuses(FakeMachine(source="203.0.113.9"), join_token=text))[0] for _ in range(300)]
    assert store.asked <= 110
    assert set(statuses) == {DENIED, Status.RESOURCE_EXHAUSTED}
    assert (await manager.refuses(FakeMachine(source="203.0.113.10"), join_token=text))[0] is DENIED
    await manager.join(replace(machine, source="203.0.113.10"), join_token=text)
    await manager.join(FakeMachine(source="203.0.113.9"))
    manager.time.advance(60)
    assert (await manager.refuses(FakeMachine(source="203.0.113.9"), join_token=text))[0] is DENIED


@asynccontextmanager
async def two_stores(kind: str) -> AsyncIterator[tuple[Store, Store]]:
    """The tables of two servers, with the same rows."""
    if kind == "memory":
        store = MemoryStore()
        yield store, store
        return
    with cluster().database() as database:
        url = cluster().url(database)
        async with PostgresStore.open(url, key=STATE_KEY) as one, PostgresStore.open(url, key=STATE_KEY) as other:
            yield one, other


@pytest.mark.parametrize("kind", ["memory", "postgres"])
async def test_tokens_of_another_server_are_known_by_the_feed(kind: str) -> None:
    async with two_stores(kind) as (one, other):
        tokens = tokens_of(Manager(store=one))
        async with following(Manager(store=other)) as here:
            made = await tokens.create("one")
            digest = made.status.token.digest
            for is_active in (True, False):
                with anyio.fail_after(30):
                    while here.links.known.has_join_token(digest) != is_active:
                        await anyio.sleep(0.01)
                if is_active:
                    await here.join(FakeMachine(), join_token=made.secret)
                    await tokens.revoke("one")
            assert (await here.refuses(FakeMachine(), join_token=made.secret))[0] is DENIED


async def test_without_a_given_token_a_call_without_a_token_is_refused() -> None:
    """Until a token is created, neither an empty token nor any other one admits."""
    check = JoinTokenCheck(None, admits_any=False)
    for text in (None, "", "x", TOKEN, sign("v1", "", {}), sign("v2", "None", None)):
        assert not check.check(text).is_valid
    manager = Manager(join_token=check)
    assert (await manager.refuses(FakeMachine()))[0] is DENIED
    made = await tokens_of(manager).create("one", make_default=True)
    await manager.join(FakeMachine(), join_token=made.secret)
    await manager.join(FakeMachine(), join_token=sign("v1", made.secret, {}))


@pytest.mark.parametrize("other", [{"join_token": "x"}, {"allow_any_token": True}])
def test_without_a_given_token_only_stored_tokens_admit(other: dict[str, Any]) -> None:
    policy = JoinPolicy(stored_tokens_only=True)
    Server(api_listen="127.0.0.1:0", force_tunnel=True, policy=policy)
    with pytest.raises(ConfigurationError, match="stored_tokens_only=True admits stored tokens only"):
        Server(api_listen="127.0.0.1:0", force_tunnel=True, policy=policy, **other)


@pytest.mark.parametrize("version", ["v1", "v2"])
async def test_a_signed_token_that_names_an_unreadable_provider_is_refused_as_any_other(version: str) -> None:
    """It is refused and does not count as an outage of the database."""
    async with opened("postgres") as store:
        manager = Manager(store=store)
        own = (await tokens_of(manager).create("default", make_default=True)).secret
        for signer in ("a stranger's", own):
            text = sign(version, signer, {PROVIDER: "a\0b"})
            status, _ = await manager.refuses(FakeMachine(), join_token=text)
            assert status in (DENIED, GONE)
