"""Join token or unique token: the table of verdicts, in the order and the words of other servers; signed tokens."""

import base64
import hashlib
import hmac
import json
import uuid
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from dataclasses import replace

import anyio
import pytest
from grpclib import Status
from hypothesis import given
from hypothesis import strategies as st

from siderolink.common.goodbye import Goodbye
from siderolink.server import AdmissionChanged, MachineAdmission
from siderolink.server.admission.json_errors import unique_token_error
from siderolink.server.admission.policy import JoinTokensMode, supports_unique_tokens
from siderolink.server.admission.tokens import JoinTokenCheck, JoinTokenState
from siderolink.server.fleet import enrolment
from siderolink.server.fleet.goodbyes import Goodbyes
from siderolink.server.store import Machine, Transaction
from tests.support.manager import TOKEN, FakeMachine, Manager, new_key

pytestmark = pytest.mark.anyio

LEGACY, ALLOWED, STRICT = JoinTokensMode.LEGACY, JoinTokensMode.LEGACY_ALLOWED, JoinTokensMode.STRICT
OWN = '{"Fingerprint":"aa","Token":"own"}'
SAME_HARDWARE = '{"Fingerprint":"aa","Token":"other"}'
OTHER = '{"Fingerprint":"bb","Token":"other"}'
MALFORMED = "v1:%%%"
DENIED = Status.PERMISSION_DENIED

# mode, is a token stored, join token, unique token, version -> "accepted", "pending", "conflict" or status and text
ACCEPTED, PENDING, CONFLICT = "accepted", "pending", "conflict"
UNAUTHORIZED = (DENIED, "unauthorized")
OLD = (
    Status.FAILED_PRECONDITION,
    "Talos version v1.5.9 is not supported on this Omni instance as '--join-tokens-mode' is set to 'strict'",
)
TABLE: list[tuple[JoinTokensMode | None, bool, str, str | None, str | None, object]] = [
    # a malformed join token is refused first, even beside the right unique token
    (ALLOWED, True, MALFORMED, OWN, "v1.13.0", (DENIED, "invalid join token")),
    (STRICT, True, MALFORMED, OWN, "v1.5.9", (DENIED, "invalid join token")),
    (LEGACY, False, MALFORMED, None, "v1.13.0", (DENIED, "invalid join token")),
    # then a unique token that is no JSON
    (ALLOWED, False, TOKEN, "text", "v1.13.0", (DENIED, "invalid character 'e' in literal true (expecting 'r')")),
    (STRICT, False, TOKEN, "a token", "v1.5.9", (DENIED, "invalid character 'a' looking for beginning of value")),
    # strict adds only the version
    (STRICT, False, TOKEN, None, "v1.5.9", OLD),
    (STRICT, True, "wrong", OWN, "v1.5.9", OLD),
    (STRICT, False, "wrong", None, "v1.5.9", OLD),
    # legacy, and old versions: the join token, and nothing else
    (LEGACY, False, TOKEN, None, "v1.13.0", ACCEPTED),
    (LEGACY, False, "wrong", None, "v1.13.0", UNAUTHORIZED),
    (LEGACY, True, "wrong", OWN, "v1.13.0", UNAUTHORIZED),
    (LEGACY, True, TOKEN, OWN, "v1.13.0", ACCEPTED),
    (ALLOWED, False, TOKEN, None, "v1.5.9", ACCEPTED),
    (ALLOWED, False, TOKEN, None, None, ACCEPTED),
    (ALLOWED, False, TOKEN, None, "", ACCEPTED),
    (ALLOWED, False, TOKEN, None, "v1.6.0-beta.1", ACCEPTED),
    (ALLOWED, True, TOKEN, OWN, "v1.5.9", UNAUTHORIZED),
    # otherwise either token
    (ALLOWED, False, "wrong", None, "v1.13.0", UNAUTHORIZED),
    (ALLOWED, True, "wrong", OTHER, "v1.13.0", UNAUTHORIZED),
    (ALLOWED, True, "wrong", OWN, "v1.13.0", ACCEPTED),
    (STRICT, True, "", OWN, "v1.6.0", ACCEPTED),
    (ALLOWED, False, TOKEN, None, "v1.6.0", PENDING),
    (STRICT, False, TOKEN, "", "v1.13.0", PENDING),
    (ALLOWED, False, TOKEN, OWN, "v1.13.0", ACCEPTED),
    (ALLOWED, True, TOKEN, OWN, "v1.13.0", ACCEPTED),
    # another token for the UUID
    (ALLOWED, True, TOKEN, SAME_HARDWARE, "v1.13.0", UNAUTHORIZED),
    (ALLOWED, True, TOKEN, OTHER, "v1.13.0", CONFLICT),
    (ALLOWED, True, TOKEN, None, "v1.13.0", CONFLICT),
    # without a mode: either token, nobody is pending
    (None, False, TOKEN, None, "v1.13.0", ACCEPTED),
    (None, True, "wrong", OWN, "v1.5.9", ACCEPTED),
    (None, True, MALFORMED, OWN, None, ACCEPTED),
    (None, True, "wrong", OTHER, "v1.13.0", (DENIED, "invalid join token")),
    (None, True, TOKEN, OTHER, "v1.13.0", (DENIED, "another machine has joined with this UUID")),
]


async def known(mode: JoinTokensMode | None, *, trust_fingerprints: bool = False) -> tuple[Manager, FakeMachine]:
    """A server that knows a machine with a bound unique token."""
    before, machine = Manager(), FakeMachine(unique_token=OWN)
    await before.join(machine)
    await before.handshake(machine)
    after = Manager(store=before.store, time=before.time, mode=mode, trust_fingerprints=trust_fingerprints)
    await after.reconciler.load()
    return after, replace(machine, key=new_key())


@pytest.mark.parametrize(("mode", "is_stored", "join_token", "unique_token", "version", "verdict"), TABLE)
async def test_how_join_tokens_and_unique_tokens_decide(
    mode: JoinTokensMode | None,
    is_stored: bool,
    join_token: str,
    unique_token: str | None,
    version: str | None,
    verdict: object,
) -> None:
    manager, machine = await known(mode) if is_stored else (Manager(mode=mode), FakeMachine())
    machine = replace(machine, unique_token=unique_token)
    changes: dict[str, object] = {"join_token": join_token, "talos_version": version}
    if isinstance(verdict, tuple):
        status, text = await manager.refuses(machine, **changes)
        assert (status, text[: len(verdict[1])]) == verdict
        return
    await manager.join(machine, **changes)
    await manager.handshake(machine)
    link = manager.links.by_key(machine.key)
    assert link is not None
    row = link.machine
    assert row.admission is (MachineAdmission.ACCEPTED if verdict == ACCEPTED else MachineAdmission.PENDING)
    assert row.has_uuid_conflict is (verdict == CONFLICT)
    if verdict == CONFLICT:
        original = await manager.row(machine)
        assert original.overlay_address != row.overlay_address, "a clone never has the original's address"
        assert original.public_key in manager.device.configs


async def test_the_same_hardware_may_replace_its_token_where_that_is_trusted() -> None:
    manager, machine = await known(ALLOWED, trust_fingerprints=True)
    machine = replace(machine, unique_token=SAME_HARDWARE)
    await manager.join(machine)
    await manager.handshake(machine)
    assert (await manager.row(machine)).public_key == machine.key
    assert (await manager.refuses(replace(machine, unique_token=OWN, key=new_key()), join_token="wrong"))[0] is DENIED


@pytest.mark.parametrize(
    ("version", "is_new_enough"),
    [
        ("v1.6.0", True),
        ("1.6.0", True),
        ("v1.13.0-beta.1", True),
        ("v2.0.0", True),
        ("v1.6.0+x", True),
        ("v1.6.0-beta.0", False),
        ("v1.5.9", False),
        ("", False),
        ("talos", False),
        ("v1.6", False),
        (None, False),
    ],
)
def test_which_talos_releases_have_unique_tokens(version: str | None, is_new_enough: bool) -> None:
    assert supports_unique_tokens(version) is is_new_enough


async def assign(manager: Manager, machine: FakeMachine, *, uuid: str | None, token: str) -> Machine:
    """What enrolment stores before it writes to the machine."""
    link = manager.links.by_key(machine.key)
    assert link is not None
    row = replace(link.machine, assigned_uuid=uuid, assigned_token=token)

    async def work(transaction: Transaction) -> Machine:
        return await transaction.update(row)

    stored = await manager.store.transact(work)
    await manager.reconciler.apply_change(stored)
    return stored


async def test_a_pending_machine_is_accepted_with_its_assigned_token_and_keeps_its_address() -> None:
    manager, machine = Manager(mode=ALLOWED), FakeMachine()
    first = await manager.join(machine)
    await manager.handshake(machine)
    assert await manager.machines.find(machine.node_uuid) is None
    await assign(manager, machine, uuid=None, token=OWN)
    assert (await manager.join(replace(machine, unique_token=OTHER))).node_address_prefix == first.node_address_prefix
    assert await manager.machines.find(machine.node_uuid) is None, "a token that it was not given admits nobody"
    second = await manager.join(replace(machine, unique_token=OWN), join_token="wrong")
    assert second == first
    row = await manager.row(machine)
    assert (row.admission, row.public_key, row.assigned_token) == (MachineAdmission.ACCEPTED, machine.key, None)
    assert row.bound_digest is not None
    reborn = replace(machine, unique_token=OWN, key=new_key())
    await manager.join(reborn)
    await manager.handshake(reborn)
    assert (await manager.row(machine)).public_key == reborn.key


async def test_a_clone_is_accepted_once_it_has_its_assigned_uuid_and_token() -> None:
    manager, original = await known(ALLOWED)
    original_row = await manager.row(original)
    clone = FakeMachine(node_uuid=original.node_uuid)
    first = await manager.join(clone)
    await manager.handshake(clone)
    new_uuid = "11111111-2222-4333-8444-555555555555"
    await assign(manager, clone, uuid=new_uuid, token=OTHER)
    assert await manager.join(replace(clone, unique_token=OTHER)) == first
    assert (await manager.row(original)) == original_row, "the original keeps its row"
    renamed = replace(clone, node_uuid=new_uuid, unique_token=OTHER)
    assert await manager.join(renamed) == first
    row = await manager.row(renamed)
    assert (row.admission, row.public_key) == (MachineAdmission.ACCEPTED, clone.key)
    assert original_row.overlay_address != row.overlay_address


async def test_a_linked_machine_without_a_token_is_bound_to_its_assigned_one() -> None:
    manager, machine = Manager(mode=ALLOWED), FakeMachine()
    await manager.join(machine, talos_version="v1.5.9")
    await manager.handshake(machine)
    await assign(manager, machine, uuid=None, token=OWN)
    await manager.join(replace(machine, unique_token=OTHER))
    assert (await manager.row(machine)).bound_digest is None
    await manager.join(replace(machine, unique_token=OWN))
    assert (await manager.row(machine)).bound_digest is not None


@pytest.mark.parametrize(
    ("text", "error"),
    [
        ('{"Fingerprint":"","Token":"x"}', ""),
        ("null", ""),
        ('{"token":null,"other":[1,2]}', ""),
        (" ", "unexpected end of JSON input"),
        ("nul", "invalid character ' ' in literal null (expecting 'l')"),
        ("1.x", "invalid character 'x' after decimal point in numeric literal"),
        ("1e", "invalid character ' ' in exponent of numeric literal"),
        ('"\\', "invalid character ' ' in string escape code"),
        ('{"Token":"x', "unexpected end of JSON input"),
        ("{", "unexpected end of JSON input"),
        ("c0ffee00-1111-4222-8333-444444444444", "invalid character 'c' looking for beginning of value"),
        ("NaN", "invalid character 'N' looking for beginning of value"),
        ("11111111-2222", "invalid character '-' after top-level value"),
        ("fax", "invalid character 'x' in literal false (expecting 'l')"),
        ("-x", "invalid character 'x' in numeric literal"),
        ("é", "invalid character 'Ã' looking for beginning of value"),
        ("'", "invalid character '\\'' looking for beginning of value"),
        ("{}}", "invalid character '}' after top-level value"),
        ("{1}", "invalid character '1' looking for beginning of object key string"),
        ('{"Token":"x",}', "invalid character '}' looking for beginning of object key string"),
        ('{"Token" "x"}', "invalid character '\"' after object key"),
        ('{"Token":"x" "y"}', "invalid character '\"' after object key:value pair"),
        ('{"Token":["a" "b"]}', "invalid character '\"' after array element"),
        ('{"Token":"a\nb"}', "invalid character '\\n' in string literal"),
        ('{"Token":"\\q"}', "invalid character 'q' in string escape code"),
        ('{"Token":"\\u12g4"}', "invalid character 'g' in \\u hexadecimal character escape"),
        ('"text"', "json: cannot unmarshal string into Go value of type jointoken.NodeUniqueToken"),
        ("[1]", "json: cannot unmarshal array into Go value of type jointoken.NodeUniqueToken"),
        ('{"Token":5}', "json: cannot unmarshal number into Go struct field NodeUniqueToken.Token of type string"),
        ('{"fingerprint":true}', "json: cannot unmarshal bool into Go struct field NodeUniqueToken.Fingerprint of type string"),
        ("[" * 1000, "unexpected end of JSON input"),
    ],
)
def test_an_unreadable_unique_token_is_refused_in_the_parsers_words(text: str, error: str) -> None:
    assert unique_token_error(text) == error


@pytest.mark.parametrize("node_uuid", ["03000200-0400-0500-0006-000700080009", "ffffffff-ffff-ffff-ffff-ffffffffffff"])
async def test_a_placeholder_is_no_identity(node_uuid: str) -> None:
    status, text = await Manager().refuses(FakeMachine(node_uuid=node_uuid))
    assert (status, "placeholder" in text) == (Status.INVALID_ARGUMENT, True)
    manager = Manager(mode=ALLOWED)
    one, two = FakeMachine(node_uuid=node_uuid, unique_token=OWN), FakeMachine(node_uuid=node_uuid, unique_token=OTHER)
    assert (await manager.join(one)).node_address_prefix != (await manager.join(two)).node_address_prefix
    for machine in (one, two):
        link = manager.links.by_key(machine.key)
        assert link is not None
        assert (link.machine.admission, link.machine.has_uuid_conflict) == (MachineAdmission.PENDING, True)


async def test_a_denied_machine_is_refused_until_it_is_accepted() -> None:
    manager, machine = Manager(), FakeMachine()
    await manager.join(machine)
    await manager.handshake(machine)
    row = await manager.row(machine)
    await manager.admin.deny(row.id)
    assert machine.key not in manager.device.configs
    assert await manager.refuses(machine) == (DENIED, "this machine was denied by an administrator")
    assert manager.links.machine_at(row.overlay_address) is None
    await manager.admin.accept(row.id)
    assert machine.key in manager.device.configs
    await manager.join(machine)
    changed = [event.machine.admission for event in await manager.events() if isinstance(event, AdmissionChanged)]
    assert changed == [MachineAdmission.DENIED, MachineAdmission.ACCEPTED]


@pytest.mark.parametrize("unique_token", [None, OWN])
async def test_a_denied_machine_stays_denied_with_a_new_key(unique_token: str | None) -> None:
    manager, machine = Manager(), FakeMachine(unique_token=unique_token)
    await manager.join(machine)
    await manager.handshake(machine)
    row = await manager.admin.deny((await manager.row(machine)).id)
    restarted = replace(machine, key=new_key())
    assert await manager.refuses(restarted) == (DENIED, "this machine was denied by an administrator")
    renamed = replace(restarted, node_uuid=str(uuid.uuid4()))
    if unique_token is not None:
        assert (await manager.refuses(renamed))[0] is DENIED, "its unique token is known"
    again = Manager(store=manager.store, time=manager.time)
    await again.reconciler.load()
    assert (await again.refuses(restarted))[0] is DENIED, "also after a restart of the server"
    await manager.admin.accept(row.id)
    await manager.pass_time(61)
    await manager.join(restarted)
    await manager.admin.deny(row.id)
    await manager.machines.remove(row.id)
    await manager.join(replace(restarted, key=new_key()))


async def test_a_denied_clone_does_not_exclude_the_original() -> None:
    manager, original = await known(ALLOWED)
    clone = replace(original, unique_token=OTHER)
    await manager.join(clone)
    await manager.handshake(clone)
    link = manager.links.by_key(clone.key)
    assert link is not None
    await manager.admin.deny(link.machine.id)
    assert (await manager.refuses(replace(clone, key=new_key())))[0] is DENIED
    await manager.join(replace(original, key=new_key()))


async def test_a_row_of_an_earlier_version_under_a_placeholder_lives_as_long_as_its_link() -> None:
    before, machine = Manager(), FakeMachine()
    await before.join(machine)
    await before.handshake(machine)
    row = replace(await before.row(machine), node_uuid="ffffffff-ffff-ffff-ffff-ffffffffffff")
    await before.store.transact(lambda transaction: transaction.update(row))
    manager, machine = Manager(store=before.store, time=before.time), replace(machine, node_uuid=row.node_uuid)
    await manager.reconciler.load()
    answer = await manager.join(machine)
    assert answer.node_address_prefix.startswith(str(row.overlay_address)), "its key tells it apart"
    assert (await manager.refuses(replace(machine, key=new_key())))[0] is Status.INVALID_ARGUMENT
    await manager.handshake(machine)
    await manager.pass_time(200)
    assert manager.links.get(row.id) is not None
    await manager.pass_time(400)
    await manager.pass_time(400)
    assert manager.links.get(row.id) is None, "no machine can come back to it"


async def test_a_machine_that_lost_its_token_is_freed_and_keeps_its_address() -> None:
    manager, machine = await known(None)
    await manager.pass_time(61)
    lost = replace(machine, unique_token=OTHER)
    assert (await manager.refuses(lost))[0] is DENIED
    row = await manager.row(machine)
    await manager.admin.accept(row.id, forget_token=True)
    answer = await manager.join(lost)
    await manager.handshake(lost)
    assert answer.node_address_prefix == f"{row.overlay_address}/64"
    assert (await manager.refuses(replace(machine, key=new_key())))[0] is DENIED, "the new token is bound now"


# --- signed join tokens


def signed(extra: object, *, version: str = "v1:", key: str = TOKEN, text: str | None = None) -> str:
    data = json.dumps(extra, separators=(",", ":"), sort_keys=True) if text is None else text
    signature = base64.b64encode(hmac.digest(key.encode(), data.encode(), "sha256")).decode()
    return version + base64.b64encode(json.dumps({"extra_data": extra, "signature": signature}).encode()).decode()


@pytest.mark.parametrize(
    ("token", "state"),
    [
        (signed({"a": "b", "c": "d"}), JoinTokenState.VALID),
        (signed({"a": "b"}, version="v2:"), JoinTokenState.VALID),
        (signed({}), JoinTokenState.VALID),
        (signed(None), JoinTokenState.VALID),
        (signed({"é<&>": "\u2028"}, text='{"é\\u003c\\u0026\\u003e":"\\u2028"}'), JoinTokenState.VALID),
        (signed({"a": "b"}, key="another"), JoinTokenState.WRONG),
        (signed({"omni.sidero.dev/infra-provider-id": "x"}, version="v2:"), JoinTokenState.WRONG),
        (signed({"a": 1}), JoinTokenState.MALFORMED),
        ("v1:", JoinTokenState.MALFORMED),
        ("v1:!", JoinTokenState.MALFORMED),
        ("v2:" + base64.b64encode(b"[]").decode(), JoinTokenState.MALFORMED),
        ("v2:" + base64.b64encode(b'{"signature":"?"}').decode(), JoinTokenState.MALFORMED),
        ("v3:x", JoinTokenState.WRONG),
        ("", JoinTokenState.WRONG),
    ],
)
def test_signed_tokens(token: str, state: JoinTokenState) -> None:
    assert JoinTokenCheck(TOKEN).check(token).state is state


def test_signed_documents_have_the_expected_bytes() -> None:
    """A token that another implementation signed."""
    digest = hmac.new(b"key", b'{"a":"\\u003cb\\u003e","z":"\\t"}', hashlib.sha256).digest()
    document = {"extra_data": {"z": "\t", "a": "<b>"}, "signature": base64.b64encode(digest).decode()}
    assert JoinTokenCheck("key").check("v1:" + base64.b64encode(json.dumps(document).encode()).decode()).is_valid


@given(st.text(max_size=64) | st.binary(max_size=48).map(lambda data: "v1:" + base64.b64encode(data).decode()))
def test_any_text_is_judged_as_valid_wrong_or_malformed(token: str) -> None:
    assert JoinTokenCheck(TOKEN).check(token).state in tuple(JoinTokenState)


async def test_of_two_pending_machines_with_one_uuid_the_second_gets_a_uuid_of_its_own() -> None:
    manager, one = Manager(mode=ALLOWED), FakeMachine()
    two = FakeMachine(node_uuid=one.node_uuid)
    for machine, token in ((one, OWN), (two, OTHER)):
        await manager.join(machine)
        await manager.handshake(machine)
        await assign(manager, machine, uuid=None, token=token)
    told: list[Machine] = []
    with manager.fleet.sessions.watching(lambda link: told.append(link.machine)):
        await manager.join(replace(one, unique_token=OWN))
        await manager.join(replace(two, unique_token=OTHER))
    link = manager.links.by_key(two.key)
    assert link is not None
    assert (link.machine.admission, link.machine.has_uuid_conflict) == (MachineAdmission.PENDING, True)
    assert link.machine in told, "so that it is given a UUID now"
    new_uuid = "11111111-2222-4333-8444-555555555555"
    await assign(manager, two, uuid=new_uuid, token=OTHER)
    await manager.join(replace(two, unique_token=OTHER, node_uuid=new_uuid))
    assert {row.public_key for row in (await manager.row(one), await manager.row(FakeMachine(node_uuid=new_uuid)))} == {
        one.key,
        two.key,
    }


@pytest.mark.parametrize("ending", ["goodbye", "restart of the server"])
async def test_a_pending_machine_that_is_gone_is_forgotten(ending: str) -> None:
    manager, machine = Manager(mode=ALLOWED), FakeMachine()
    await manager.join(machine)
    await manager.handshake(machine)
    link = manager.links.by_key(machine.key)
    assert link is not None
    if ending == "goodbye":
        goodbyes = Goodbyes(manager.links, manager.monitor, manager.machines.remove)
        assert goodbyes.receive(Goodbye(public_key=machine.key).encode(), link.machine.overlay_address) is not None
    else:
        manager = Manager(mode=ALLOWED, store=manager.store, time=manager.time)
        await manager.reconciler.load()
    await manager.pass_time(200)
    assert len(manager.links) == 1
    await manager.pass_time(100)
    await manager.pass_time(300)
    assert len(manager.links) == 0
    assert manager.device.configs == {}


async def test_a_denied_machine_stays_denied_however_long_it_is_gone() -> None:
    manager, machine = Manager(mode=ALLOWED), FakeMachine()
    await manager.join(machine)
    await manager.handshake(machine)
    link = manager.links.by_key(machine.key)
    assert link is not None
    await manager.admin.deny(link.machine.id)
    for _ in range(3):
        await manager.pass_time(300)
    assert (await manager.refuses(machine))[0] is DENIED


async def test_machines_with_a_hanging_api_do_not_delay_the_enrolment_of_others(monkeypatch: pytest.MonkeyPatch) -> None:
    manager, tried, enrolled = Manager(mode=ALLOWED), list[str](), anyio.Event()
    machines = [FakeMachine() for _ in range(300)]
    for machine in machines:
        await manager.join(machine)
        await manager.handshake(machine)
    honest = machines[-1]

    @asynccontextmanager
    async def api(machine: Machine, **options: object) -> AsyncIterator[None]:
        tried.append(machine.node_uuid)
        if machine.node_uuid == honest.node_uuid:
            enrolled.set()
        await anyio.sleep_forever()
        yield

    monkeypatch.setattr(enrolment, "open_machine_api", api)
    monkeypatch.setattr(enrolment, "FIRST_SECONDS", 0.02)
    async with anyio.create_task_group() as tasks:
        tasks.start_soon(manager.fleet.enrolment.run, None)
        with anyio.fail_after(30):
            await enrolled.wait()
        tasks.cancel_scope.cancel()
    assert len(tried) - len(set(tried)) <= enrolment.LATER_AT_ONCE, "later tries have places of their own"
    assert len(set(tried)) == len(machines)
