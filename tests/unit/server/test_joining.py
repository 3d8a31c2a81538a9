"""Provision: exact answers, exact refusals, and the resulting state of the device and the store."""

import contextlib
import gc
import sys
import uuid
from dataclasses import replace
from ipaddress import IPv6Interface, IPv6Network

import anyio
import pytest
from grpclib import GRPCError, Status
from hypothesis import example, given
from hypothesis import strategies as st

from siderolink.common.addressing import VIRTUAL_PREFIX, overlay_prefix, parse_peer_addr_port
from siderolink.common.errors import DeviceError
from siderolink.common.keys import PublicKey
from siderolink.common.pb.sidero.link import ProvisionRequest
from siderolink.server import Allow, Deny, JoinRefusal, JoinRefused, JoinRequest, MachineJoined, MachineLimits
from tests.support.manager import TOKEN, FakeMachine, Manager, new_key
from tests.support.stores import opened

pytestmark = pytest.mark.anyio

ANOTHER = "another machine has joined with this UUID"
LIVING = "a machine with this UUID has a living link"


async def test_an_answer_has_every_field_and_the_peer_is_on_the_device_before_it() -> None:
    manager, machine = Manager(), FakeMachine()
    answer = await manager.join(machine)
    address = IPv6Interface(answer.node_address_prefix)
    assert answer.server_endpoint == ["192.0.2.1:3", "192.0.2.1:2", "192.0.2.1:1"]
    assert answer.server_public_key == manager.device.public_key.encode()
    assert address.network == overlay_prefix() == IPv6Network("fdae:41e4:649b:9303::/64")
    assert answer.server_address == "fdae:41e4:649b:9303::1"
    assert answer.grpc_peer_addr_port == ""
    config = manager.device.configs[machine.key]
    assert (config.allowed_ips, config.persistent_keepalive) == ((IPv6Network(address.ip),), 25)
    row = await manager.row(machine)
    assert (row.overlay_address, row.talos_version, row.tunnel) == (address.ip, "v1.13.0", False)
    assert await manager.events() == [MachineJoined(machine=row, is_new=True)]


@pytest.mark.parametrize(("asks", "forced", "allow"), [(True, False, False), (False, True, False), (False, False, True)])
async def test_a_tunnel_answer_names_an_admitted_virtual_address(asks: bool, forced: bool, allow: bool) -> None:
    async def authorize(request: JoinRequest) -> Allow | Deny:
        return Allow(force_tunnel=allow)

    manager, machine = Manager(force_tunnel=forced, authorize=authorize), FakeMachine(tunnel=asks)
    answer = await manager.join(machine)
    assert answer.server_endpoint == [answer.grpc_peer_addr_port]
    address, port = parse_peer_addr_port(answer.grpc_peer_addr_port)
    assert port == 50888
    assert address in VIRTUAL_PREFIX
    assert manager.link(answer).machine.public_key == machine.key


async def test_two_calls_at_once_get_one_answer() -> None:
    manager, machine = Manager(), FakeMachine(tunnel=True)
    answers = []

    async def call() -> None:
        answers.append(await manager.join(machine))

    async with anyio.create_task_group() as tasks:
        for _ in range(5):
            tasks.start_soon(call)
    assert all(answer == answers[0] for answer in answers)
    assert len(await manager.events()) == 1
    assert manager.device.calls == [("set", machine.key)]


async def test_a_call_repeated_in_a_living_link_gets_the_same_answer_and_ends_nothing() -> None:
    manager, machine = Manager(), FakeMachine(tunnel=True)
    answer = await manager.join(machine)
    await manager.handshake(machine)
    for _ in range(10):
        await manager.pass_time(100)
        manager.device.hear(machine.key)
        assert await manager.join(machine) == answer


async def test_a_dead_link_gets_one_fresh_virtual_address_and_keeps_its_overlay_address() -> None:
    manager, machine = Manager(), FakeMachine(tunnel=True)
    first = await manager.join(machine)
    await manager.handshake(machine)
    await manager.pass_time(179)
    assert await manager.join(machine) == first
    await manager.pass_time(1)
    second = await manager.join(machine)
    assert second.grpc_peer_addr_port != first.grpc_peer_addr_port
    assert second.node_address_prefix == first.node_address_prefix
    assert await manager.join(machine) == second
    await manager.pass_time(19)
    assert await manager.join(machine) == second
    await manager.pass_time(1)
    assert (await manager.join(machine)).grpc_peer_addr_port != second.grpc_peer_addr_port


async def test_a_machine_whose_first_stream_got_stuck_gets_a_fresh_virtual_address_with_its_next_call() -> None:
    """Existing machines look every 30 s for a handshake; at their start they call twice within milliseconds."""
    manager, machine = Manager(), FakeMachine(tunnel=True)
    first = await manager.join(machine)
    await manager.pass_time(1)
    assert await manager.join(machine) == first
    await manager.pass_time(29)
    second = await manager.join(machine)
    assert second.grpc_peer_addr_port != first.grpc_peer_addr_port
    assert second.node_address_prefix == first.node_address_prefix
    await manager.handshake(machine)
    await manager.pass_time(30)
    assert await manager.join(machine) == second


async def test_a_new_key_with_the_same_unique_token_replaces_the_peer_with_its_first_handshake() -> None:
    manager, machine = Manager(), FakeMachine(unique_token="u", tunnel=True)
    first = await manager.join(machine)
    await manager.handshake(machine)
    reborn = replace(machine, key=new_key())
    second = await manager.join(reborn)
    assert second.node_address_prefix == first.node_address_prefix
    assert second.grpc_peer_addr_port != first.grpc_peer_addr_port
    joined = (await manager.events())[-1]
    assert isinstance(joined, MachineJoined)
    assert not joined.is_new
    assert (await manager.row(machine)).public_key == machine.key
    assert manager.device.configs[reborn.key].allowed_ips == ()
    await manager.handshake(reborn)
    assert set(manager.device.configs) == {reborn.key}
    assert manager.device.configs[reborn.key].allowed_ips == (IPv6Network(IPv6Interface(second.node_address_prefix).ip),)


async def test_another_unique_token_is_always_refused() -> None:
    manager, machine = Manager(), FakeMachine(unique_token="one")
    await manager.join(machine)
    await manager.handshake(machine)
    for token in ("two", "", None):
        clone = replace(machine, unique_token=token)
        assert await manager.refuses(clone) == (Status.PERMISSION_DENIED, ANOTHER)
        assert await manager.refuses(replace(clone, key=new_key())) == (Status.PERMISSION_DENIED, ANOTHER)
    await manager.handshake(machine)
    await manager.pass_time(100_000)
    assert await manager.refuses(replace(machine, unique_token="two")) == (Status.PERMISSION_DENIED, ANOTHER)


async def test_only_the_token_part_of_a_unique_token_counts() -> None:
    manager, machine = Manager(), FakeMachine(unique_token='{"Fingerprint":"aa","Token":"t"}')
    await manager.join(machine)
    await manager.handshake(machine)
    for same in ('{"Token":"t","Fingerprint":"bb"}', '{"token":"t"}', '{"token":"x","Token":"t"}', '{"TOKEN":"t","Other":[1]}'):
        await manager.join(replace(machine, unique_token=same, key=new_key()))
    for other in ('{"Fingerprint":"aa","Token":"x"}', "t", '{"Token":1}', "[" * 1024):
        assert await manager.refuses(replace(machine, unique_token=other)) == (Status.PERMISSION_DENIED, ANOTHER)


@pytest.mark.parametrize("fingerprint", ["\\ud800", "a\\u0000b", "\\u202e", "\\u001b[31m"])
async def test_an_unreadable_fingerprint_counts_as_none(fingerprint: str) -> None:
    async with opened("sql") as store:
        manager, machine = Manager(store=store), FakeMachine(unique_token=f'{{"Fingerprint":"{fingerprint}","Token":"t"}}')
        await manager.join(machine)
        await manager.handshake(machine)
        row = await manager.row(machine)
        assert (row.unique_fingerprint, row.unique_token_digest is None) == ("", False)


async def test_without_a_unique_token_a_living_link_keeps_its_address() -> None:
    manager, machine = Manager(), FakeMachine()
    await manager.join(machine)
    await manager.handshake(machine)
    thief = replace(machine, key=new_key())
    await manager.pass_time(59)
    assert await manager.refuses(thief) == (Status.ALREADY_EXISTS, LIVING)
    assert await manager.refuses(replace(thief, unique_token="mine")) == (Status.ALREADY_EXISTS, LIVING)
    assert set(manager.device.configs) == {machine.key}
    await manager.pass_time(1)
    await manager.join(thief)
    assert manager.device.configs[thief.key].allowed_ips == ()
    await manager.handshake(thief)
    assert set(manager.device.configs) == {thief.key}


async def test_a_unique_token_is_not_bound_while_the_link_lives() -> None:
    manager, machine = Manager(), FakeMachine()
    await manager.join(machine)
    await manager.handshake(machine)
    await manager.join(replace(machine, unique_token="a stranger's"))
    assert (await manager.row(machine)).unique_token_digest is None
    await manager.pass_time(60)
    await manager.join(replace(machine, unique_token="who only knows the key"))
    await manager.handshake(machine)
    assert (await manager.row(machine)).unique_token_digest is None
    await manager.pass_time(60)
    reborn = replace(machine, unique_token="my own", key=new_key())
    await manager.join(reborn)
    assert (await manager.row(machine)).unique_token_digest is None
    await manager.handshake(reborn)
    assert (await manager.row(machine)).unique_token_digest is not None


async def test_no_unique_token_is_bound_before_a_restarted_server_can_have_heard_the_link() -> None:
    before, machine = Manager(), FakeMachine()
    await before.join(machine)
    await before.handshake(machine)
    after = Manager(store=before.store, time=before.time)
    await after.reconciler.load()
    await after.pass_time(59)
    stranger = replace(machine, unique_token="a stranger's", key=new_key(), source="203.0.113.1")
    assert await after.refuses(stranger) == (Status.ALREADY_EXISTS, LIVING)
    await after.join(replace(machine, unique_token="a stranger's"))
    assert (await after.row(machine)).unique_token_digest is None
    await after.pass_time(1)
    reborn = replace(machine, unique_token="my own", key=new_key())
    await after.join(reborn)
    await after.handshake(reborn)
    assert (await after.row(machine)).unique_token_digest is not None


async def test_a_key_goes_to_another_uuid_only_with_its_token_or_before_it_is_proved() -> None:
    manager, machine = Manager(), FakeMachine(unique_token="u", tunnel=True)
    answer = await manager.join(machine)
    await manager.handshake(machine)
    thief = FakeMachine(key=machine.key, unique_token="other")
    await manager.join(thief)
    assert (await manager.row(machine)).public_key == machine.key, "the thief answers no echo inside the key's session"
    assert await manager.machines.find(thief.node_uuid) is None
    renamed = FakeMachine(key=machine.key, unique_token="u")
    moved = await manager.join(renamed)
    # the old address stays for answers in flight; test_moves.py tests its removal
    assert manager.device.configs[machine.key].allowed_ips == tuple(
        IPv6Network(IPv6Interface(found.node_address_prefix).ip) for found in (moved, answer)
    )
    assert ("remove", machine.key) not in manager.device.calls
    assert (await manager.row(machine)).public_key is None
    assert manager.link(answer).machine.public_key is None
    await manager.handshake(renamed)
    await manager.pass_time(100_000)
    await manager.join(FakeMachine(key=machine.key))
    assert (await manager.row(renamed)).public_key == machine.key


async def test_an_address_in_use_is_drawn_again() -> None:
    one, two = bytes(7) + b"\x05", bytes(7) + b"\x06"
    manager = Manager(entropy=[one, one, one, one, two, two], force_tunnel=True)
    first, second = await manager.join(FakeMachine()), await manager.join(FakeMachine())
    assert (first.node_address_prefix, first.grpc_peer_addr_port) == (
        "fdae:41e4:649b:9303::5/64",
        "[fdae:41e4:649b:9304::5]:50888",
    )
    assert (second.node_address_prefix, second.grpc_peer_addr_port) == (
        "fdae:41e4:649b:9303::6/64",
        "[fdae:41e4:649b:9304::6]:50888",
    )


KEY_TEXTS = [
    "",
    "x" * 44,
    "x" * 100_000,
    "\0" * 44,
    PublicKey(bytes(32)).encode(),
    PublicKey(b"\1" + bytes(31)).encode(),
    PublicKey(b"\xee" + b"\xff" * 31).encode(),
    PublicKey(bytes.fromhex("e0eb7a7c3b41b8ae1656e3faf19fc46ada098deb9c32b1fd866205165f49b800")).encode(),
    PublicKey(bytes.fromhex("5f9c95bca3508c24b1d0b1559c83ef5b04445cc4581c8e86d8224eddd09f1157")).encode(),
]


@pytest.mark.parametrize("text", KEY_TEXTS, ids=range(len(KEY_TEXTS)))
async def test_a_malformed_key_is_refused_with_the_expected_message(text: str) -> None:
    manager = Manager()
    status, message = await manager.refuses(FakeMachine(), node_public_key=text)
    assert status is Status.INVALID_ARGUMENT
    assert message.startswith("error parsing Wireguard key: ")
    assert len(message) < 200
    assert manager.service.refusals == {JoinRefusal.MALFORMED_PUBLIC_KEY: 1}
    assert not manager.device.configs


async def test_the_servers_own_key_is_refused() -> None:
    manager = Manager()
    status, message = await manager.refuses(FakeMachine(key=manager.device.public_key))
    assert (status, message) == (Status.INVALID_ARGUMENT, "error parsing Wireguard key: it is the server's own key")


@pytest.mark.parametrize("token", [None, "", "the-join-toke", "the-join-token ", "x" * 1_000_000, "\ud800"])
async def test_a_wrong_join_token_is_refused_with_the_expected_message(token: str | None) -> None:
    manager = Manager()
    assert await manager.refuses(FakeMachine(), join_token=token) == (Status.PERMISSION_DENIED, "invalid join token")
    assert manager.service.refusals == {JoinRefusal.INVALID_JOIN_TOKEN: 1}


async def test_a_server_without_a_join_token_accepts_any_within_bounds() -> None:
    manager = Manager(join_token=None)
    for token in (None, "", "whatever"):
        await manager.join(FakeMachine(), join_token=token)
    assert await manager.refuses(FakeMachine(), join_token="x" * 5000) == (Status.PERMISSION_DENIED, "invalid join token")


async def test_machines_share_a_version_s_text_and_python_does_not_keep_it_forever() -> None:
    def version() -> str:
        return "-".join(["v1.13.0", "of-two-machines"])

    manager, machines = Manager(), [FakeMachine(), FakeMachine()]
    for machine in machines:
        await manager.join(machine, talos_version=version())
    first, second = [(await manager.row(machine)).talos_version for machine in machines]
    assert first == version()
    assert first is second
    assert sys.intern(unseen := version()) is unseen, "else it was interned: from Python 3.12 on, nothing frees it"


@pytest.mark.parametrize(
    ("changes", "reason"),
    [
        ({"node_uuid": ""}, JoinRefusal.MALFORMED_UUID),
        ({"node_uuid": "x" * 36}, JoinRefusal.MALFORMED_UUID),
        ({"node_uuid": "00000000-0000-0000-0000-00000000000" + "\u0660"}, JoinRefusal.MALFORMED_UUID),
        ({"node_uuid": "00000000-0000-0000-0000-00000000000\n"}, JoinRefusal.MALFORMED_UUID),
        ({"node_uuid": "\u0130" * 36}, JoinRefusal.MALFORMED_UUID),
        ({"node_uuid": "x" * 60_000}, JoinRefusal.MALFORMED_UUID),
        ({"node_unique_token": "x" * 1025}, JoinRefusal.MALFORMED_UNIQUE_TOKEN),
        ({"talos_version": "v" * 65}, JoinRefusal.MALFORMED_VERSION),
        ({"talos_version": "v1\x1b[31m"}, JoinRefusal.MALFORMED_VERSION),
    ],
)
async def test_malformed_fields_are_refused_by_name(changes: dict[str, object], reason: JoinRefusal) -> None:
    manager, neighbour = Manager(), FakeMachine()
    answer = await manager.join(neighbour)
    await manager.events()
    status, message = await manager.refuses(FakeMachine(), **changes)
    assert status is Status.INVALID_ARGUMENT
    assert len(message) < 200
    (refused,) = await manager.events()
    assert isinstance(refused, JoinRefused)
    assert refused.reason is reason
    assert refused.source == "198.51.100.7:1"
    assert await manager.join(neighbour) == answer


def test_any_request_is_answered_with_a_join_or_a_refusal() -> None:
    valid = bytes(FakeMachine(unique_token="u", tunnel=True).request())
    broken = st.tuples(st.integers(0, len(valid)), st.integers(0, 255)).map(
        lambda at: valid[: at[0]] + bytes([at[1]]) + valid[at[0] + 1 :]
    )
    truncated = st.integers(0, len(valid)).map(lambda length: valid[:length])

    @given(broken | truncated | st.binary(max_size=64))
    @example(b"\x0b")
    @example(b"\x08\x01\x10\x01\x18\x01 \x01(\x012\x01x")
    def check(message: bytes) -> None:
        try:
            request = ProvisionRequest.parse(message)
        except Exception:
            return  # the API layer refuses this itself; see its tests

        async def status(manager: Manager) -> Status:
            try:
                await manager.service.provision(request, source="here")
            except GRPCError as error:
                return error.status
            return Status.OK

        for token in (TOKEN, None):
            assert anyio.run(status, Manager(join_token=token)) in (
                Status.OK,
                Status.PERMISSION_DENIED,
                Status.INVALID_ARGUMENT,
            )

    check()


async def test_uuids_are_compared_without_case() -> None:
    manager, machine = Manager(), FakeMachine()
    answer = await manager.join(machine)
    assert await manager.join(machine, node_uuid=machine.node_uuid.upper()) == answer


async def test_authorize_sees_the_call_and_its_reason_reaches_the_caller() -> None:
    seen: list[JoinRequest] = []

    async def authorize(request: JoinRequest) -> Allow | Deny:
        seen.append(request)
        return Allow() if len(seen) == 1 else Deny("not in\nthe inventory")

    manager, machine = Manager(authorize=authorize), FakeMachine(unique_token="u")
    await manager.join(machine)
    assert await manager.refuses(machine) == (Status.PERMISSION_DENIED, "not in the inventory")
    assert (seen[0].node_uuid, seen[0].public_key, seen[0].machine) == (machine.node_uuid, machine.key, None)
    assert seen[1].machine == await manager.row(machine)
    assert "the-join-token" not in repr(seen[0])
    assert "'u'" not in repr(seen[0])


async def test_a_failing_authorize_is_internal_without_detail(caplog: pytest.LogCaptureFixture) -> None:
    async def authorize(request: JoinRequest) -> Allow | Deny:
        raise RuntimeError("the secret of the house")

    manager = Manager(authorize=authorize)
    assert await manager.refuses(FakeMachine()) == (Status.INTERNAL, "internal server error")
    assert "the secret of the house" in caplog.text
    assert not manager.device.configs


async def test_a_slow_authorize_is_given_up() -> None:
    async def authorize(request: JoinRequest) -> Allow | Deny:
        await anyio.sleep_forever()
        raise AssertionError

    manager = Manager(authorize=authorize, limits=MachineLimits(authorize_timeout=0.01))
    assert await manager.refuses(FakeMachine()) == (Status.INTERNAL, "internal server error")
    assert manager.service.refusals == {JoinRefusal.AUTHORIZE_FAILED: 1}


async def test_a_failing_device_is_internal_and_the_next_call_sets_the_peer() -> None:
    manager, machine = Manager(), FakeMachine()
    manager.device.fails_with = DeviceError("netlink is on fire")
    assert await manager.refuses(machine) == (Status.INTERNAL, "internal server error")
    manager.device.fails_with = None
    await manager.join(machine)
    assert set(manager.device.configs) == {machine.key}


async def test_limits_refuse_new_machines_and_leave_known_ones_alone() -> None:
    manager = Manager(limits=MachineLimits(max_machines=2, max_pending=2))
    one, two = FakeMachine(), FakeMachine()
    await manager.join(one)
    await manager.join(two)
    assert (await manager.refuses(FakeMachine()))[0] is Status.RESOURCE_EXHAUSTED
    await manager.join(one)
    await manager.handshake(one)
    assert await manager.refuses(FakeMachine()) == (
        Status.RESOURCE_EXHAUSTED,
        "the server's limit of known machines is reached",
    )
    await manager.pass_time(300)
    reborn = replace(one, key=new_key())
    await manager.join(reborn)
    newcomer = FakeMachine()
    await manager.join(newcomer)
    assert await manager.machines.find(two.node_uuid) is None, "who has had time for a handshake gives way"
    assert (await manager.refuses(replace(reborn, key=new_key())))[1].startswith("too many machines have joined")


async def test_a_refused_join_leaves_no_reference_cycle() -> None:
    """Otherwise each guessed token would leave some fifty objects, and collecting them would block the event loop."""
    manager = Manager()
    request = ProvisionRequest(node_uuid=str(uuid.uuid4()), node_public_key="A" * 43 + "=", join_token="guess")

    async def guess() -> None:
        with contextlib.suppress(GRPCError):
            await manager.service.provision(request, source="192.0.2.1")

    await guess()
    gc.collect()
    gc.disable()
    try:
        for _ in range(20):
            await guess()
        assert gc.collect() < 20
    finally:
        gc.enable()
    assert manager.service.refusals[JoinRefusal.INVALID_JOIN_TOKEN] == 21
