"""Several servers of one store, in virtual time: membership, ownership of links, and decisions about rows."""

from collections.abc import AsyncIterator, Callable
from dataclasses import replace

import pytest
from grpclib import Status

from siderolink.common.addressing import swap_endpoints
from siderolink.server import LinkState, MachineLeft, MemoryStore
from siderolink.server.fleet.membership import DEAD_AFTER, FORGOTTEN_AFTER, HEARTBEAT_SECONDS, Membership
from siderolink.server.fleet.owners import IN_FLIGHT_SECONDS, Owners
from siderolink.server.fleet.reconciler import EVERYTHING
from siderolink.server.store import Machine, Ownership, Transaction
from tests.support.fake_device import FakePath, VirtualClock
from tests.support.manager import FakeMachine, Manager
from tests.support.several import UdpPath, fleet_of, linked, membership, owners, settled

pytestmark = pytest.mark.anyio

BOTH = pytest.mark.parametrize("kind", ["memory", "postgres"])


# --- membership


async def test_servers_see_each_other_come_and_go() -> None:
    async with fleet_of("a", "b") as fleet:
        a, b = membership(fleet["a"]), membership(fleet["b"])
        dead: list[str] = []
        a.on_dead = dead.append
        assert [[one.id for one in of.living()] for of in (a, b)] == [["a", "b"], ["b", "a"]]
        await fleet.pass_time(DEAD_AFTER, "a")
        assert a.is_alive("b")
        await fleet.pass_time(1, "a")
        assert (a.is_alive("b"), dead) == (False, ["b"])
        await fleet.pass_time(2)
        assert (a.is_alive("b"), dead) == (True, ["b"])
        await b.leave()
        await settled(lambda: not a.is_alive("b"))
        assert dead == ["b", "b"]
        await fleet.pass_time(2, "a")
        assert [one.id for one in a.living()] == ["a"]


@pytest.mark.parametrize("phase", [0.1, 0.5, 0.9])
async def test_a_dead_server_is_reported_before_the_next_heartbeat(phase: float) -> None:
    async with fleet_of("a", "b") as fleet:
        a, b = membership(fleet["a"]), membership(fleet["b"])
        dead: list[str] = []
        a.on_dead = dead.append
        assert a.pause == HEARTBEAT_SECONDS
        await b.beat()
        killed_at = fleet.time.clock.time()
        fleet.time.advance(phase)
        beats = 0
        while not dead:
            await a.beat()
            beats += 1
            if not dead:
                fleet.time.advance(a.pause)
        assert DEAD_AFTER < fleet.time.clock.time() - killed_at < DEAD_AFTER + 0.1
        assert beats <= DEAD_AFTER / HEARTBEAT_SECONDS + 2
        assert a.pause == HEARTBEAT_SECONDS  # dead servers do not make it faster


async def test_a_server_that_was_away_declares_no_other_dead() -> None:
    async with fleet_of("a", "b") as fleet:
        a = membership(fleet["a"])
        dead: list[str] = []
        a.on_dead = dead.append
        fleet.time.advance(3600)
        assert a.is_alive("b")
        await a.beat()  # an outage of the database has ended, and the others' heartbeats follow
        assert a.is_alive("b")
        assert a.outage_ended_at == fleet.time.clock.time()
        await fleet.pass_time(DEAD_AFTER + 1, "a")
        assert (a.is_alive("b"), dead) == (False, ["b"])


async def test_a_server_that_starts_again_takes_the_place_of_its_last_run() -> None:
    store, time = MemoryStore(), VirtualClock()
    runs = [Membership(store, time.clock, endpoints=["192.0.2.1:51820"]) for _ in range(2)]
    for run in runs:
        await run.beat()
    found = await store.transact(lambda transaction: transaction.ownership.servers())
    assert [one.id for one in found] == [runs[1].id]
    assert runs[0].id != runs[1].id


async def test_a_server_that_reads_its_rows_for_long_is_not_listed_yet_and_declares_no_outage() -> None:
    async with fleet_of("a") as fleet:
        returned: list[float] = []
        before = Membership(fleet["a"].store, fleet.time.clock, server_id="before", endpoints=["192.0.2.9:51820"])
        new = Membership(fleet["a"].store, fleet.time.clock, server_id="new", endpoints=["192.0.2.9:51820"])

        async def on_return() -> None:
            returned.append(fleet.time.clock.time())

        new.on_return = on_return
        await before.beat()
        await fleet.pass_time(1)
        async with new.joined():
            assert new.is_alive("a")
            await fleet.pass_time(60)
            assert [one.id for one in membership(fleet["a"]).everyone()] == ["a"]  # the previous run's row is gone at once
            assert new.is_alive("a")
            await new.beat()
            await fleet.pass_time(1)
            assert [one.id for one in membership(fleet["a"]).living()] == ["a", "new"]
            assert (new.is_alive("a"), returned) == (True, [])


async def test_answers_list_the_living_servers_this_one_first() -> None:
    async with fleet_of("a", "b", "c") as fleet:

        async def given(name: str, machine: FakeMachine) -> list[str]:
            answer = await fleet[name].join(machine)
            return [endpoint.partition(".")[0] for endpoint in swap_endpoints(answer.server_endpoint)]

        machine, others, seconds = FakeMachine(), {"a", "b", "c"}, set()
        for one in [FakeMachine() for _ in range(12)]:
            first, second, third = (await given("b", one))[::3]
            assert (first, {second, third}) == ("b", {"a", "c"})
            seconds.add(second)
        assert seconds == {"a", "c"}, "the machines of a server that dies do not all go to one"
        assert await given("b", machine) == await given("b", machine)
        assert {*(await given("c", machine))} == others
        of_a = await given("a", machine)
        membership(fleet["a"]).describe(is_draining=True)
        await fleet.pass_time(1)
        assert await given("b", machine) == ["b"] * 3 + ["c"] * 3
        assert await given("a", machine) == of_a[3:] + of_a[:3]  # a machine that calls it goes to another server
        await fleet.pass_time(DEAD_AFTER + 1, "a", "b")
        assert await given("b", machine) == ["b"] * 3


async def test_the_server_after_the_first_in_an_answer_is_the_one_that_would_dial_the_machine() -> None:
    async with fleet_of("a", "b", "c") as fleet:
        machines = [FakeMachine() for _ in range(12)]
        answers = [await fleet["a"].join(machine) for machine in machines]
        await fleet.pass_time(DEAD_AFTER + 1, "b", "c")
        for machine, answer in zip(machines, answers, strict=True):
            row = await fleet["b"].row(machine)
            assert swap_endpoints(answer.server_endpoint)[3].partition(".")[0] == membership(fleet["b"]).heir(row.id)


def failed(manager: Manager) -> list[str]:
    return membership(manager).failures.endpoints(membership(manager).living())


async def test_machines_are_told_which_servers_failed_until_these_are_heard_again() -> None:
    async with fleet_of("a", "b", "c") as fleet:
        of_b = [endpoint for endpoint in membership(fleet["a"]).endpoints() if endpoint.startswith("b.")]
        assert failed(fleet["a"]) == []
        membership(fleet["a"]).suspect("b")
        assert failed(fleet["a"]) == of_b
        await fleet.pass_time(2)
        assert failed(fleet["a"]) == [], "its heartbeats go on"
        await fleet.pass_time(DEAD_AFTER + 1, "a", "c")
        assert failed(fleet["c"]) == of_b
        await fleet.pass_time(2)
        await membership(fleet["b"]).leave()
        await fleet.pass_time(1, "a", "c")
        assert [failed(fleet[name]) for name in "ac"] == [of_b, of_b], "it stopped"
        await fleet.pass_time(FORGOTTEN_AFTER, "a", "c")
        assert [failed(fleet[name]) for name in "ac"] == [[], []], "nobody uses it any more"


# --- conflicts of two servers (each was once a bug)


@BOTH
@pytest.mark.parametrize("is_connected", [True, False])
async def test_a_thief_gets_nothing_at_a_server_that_does_not_hear_the_machine(is_connected: bool, kind: str) -> None:
    """Also if the owner cannot be queried: then its heartbeat counts."""
    async with fleet_of("a", "b", kind=kind) as fleet:
        machine = await linked(fleet, "a")
        fleet.is_connected = is_connected
        await fleet.pass_time(120)
        fleet["a"].device.hear(machine.key)
        thief = FakeMachine(node_uuid=machine.node_uuid, source="203.0.113.9")
        row = await fleet["a"].row(machine)
        for name in ("a", "b"):
            assert (await fleet[name].refuses(thief))[0] is Status.ALREADY_EXISTS
        assert fleet.asked == [("a", row.id)]
        assert (await fleet["a"].row(machine)).public_key == machine.key
        assert thief.key not in fleet["a"].device.configs


@BOTH
async def test_a_machine_that_its_owner_does_not_hear_may_be_replaced_at_another_server(kind: str) -> None:
    async with fleet_of("a", "b", kind=kind) as fleet:
        machine = await linked(fleet, "a")
        await fleet.pass_time(59)
        again = FakeMachine(node_uuid=machine.node_uuid)
        assert (await fleet["b"].refuses(again))[0] is Status.ALREADY_EXISTS
        await fleet.pass_time(2)
        await fleet["b"].join(again)
        await settled(lambda: again.key in fleet["a"].device.configs)
        # it is heard again before the claim's handshake, which therefore proves nothing
        fleet["a"].device.hear(machine.key)
        await fleet["b"].handshake(again)
        assert (await fleet["a"].row(machine)).public_key == machine.key
        await fleet.pass_time(61)
        await fleet["b"].join(again)
        await fleet["b"].handshake(again)
        assert (await fleet["a"].row(machine)).public_key == again.key
        await fleet.is_owned_by(again, "b")


@pytest.mark.parametrize("is_back", [False, True])
async def test_a_goodbye_to_another_server_counts_until_the_machine_is_back_there(is_back: bool) -> None:
    """The machine's return is not stored yet."""
    async with fleet_of("a", "b") as fleet:
        machine = await linked(fleet, "a")
        link = fleet["a"].links.by_key(machine.key)
        assert link is not None
        fleet["a"].monitor.said_goodbye(link)
        await fleet["a"].fleet.last_seen.write()
        await fleet.pass_time(3)
        if is_back:
            fleet["a"].device.hear(machine.key, UdpPath(f"{machine.source}:51820"), handshake=True)
        thief = FakeMachine(node_uuid=machine.node_uuid, source="203.0.113.66")
        if is_back:
            assert (await fleet["b"].refuses(thief))[0] is Status.ALREADY_EXISTS
        else:
            await fleet["b"].join(thief)


async def test_the_silence_of_a_dead_servers_machine_counts_from_its_last_heartbeat() -> None:
    async with fleet_of("a", "b") as fleet:
        machine = await linked(fleet, "a")
        await fleet.pass_time(300)
        again = FakeMachine(node_uuid=machine.node_uuid)
        await fleet.pass_time(55, "b")
        assert (await fleet["b"].refuses(again))[0] is Status.ALREADY_EXISTS
        assert not fleet.asked  # there is no server to query
        await fleet.pass_time(6, "b")
        await fleet["b"].join(again)


@BOTH
async def test_a_stream_at_another_server_right_after_the_answer(kind: str) -> None:
    async with fleet_of("a", "b", kind=kind) as fleet:
        machine = FakeMachine(tunnel=True)
        await fleet["a"].join(machine)
        address = (await fleet["a"].row(machine)).virtual_address
        assert address is not None
        assert fleet["b"].links.by_virtual_address(address) is None  # the feed is later
        link = await fleet["b"].links.await_virtual_address(address)
        assert link is not None
        assert link.machine.public_key == machine.key


@BOTH
async def test_a_machine_that_asks_another_server_keeps_its_stream(kind: str) -> None:
    async with fleet_of("a", "b", kind=kind) as fleet:
        machine, ended = FakeMachine(tunnel=True), list[str]()
        answer = await fleet["a"].join(machine)
        link, path = fleet["a"].link(answer), FakePath(machine.key)
        fleet["a"].monitor.open_stream(link, path, lambda refusal: ended.append(str(refusal)))
        fleet["a"].device.hear(machine.key, path, handshake=True)
        await fleet["a"].monitor.check()
        await fleet.is_owned_by(machine, "a")
        await fleet.pass_time(200)
        fleet["a"].device.hear(machine.key)
        again = await fleet["b"].join(machine)
        assert again.grpc_peer_addr_port == answer.grpc_peer_addr_port
        await fleet.pass_time(200)  # silent at its owner: existing machines restart a stuck tunnel only for another address
        fresh = await fleet["b"].join(machine)
        assert fresh.grpc_peer_addr_port != answer.grpc_peer_addr_port
        await settled(lambda: ended == ["replaced"])


@BOTH
async def test_a_machine_linked_at_another_server_is_not_pending(kind: str) -> None:
    async with fleet_of("a", "b", kind=kind) as fleet:
        machine = await linked(fleet, "a")
        assert [link.state for link in fleet["b"].links] == [LinkState.DOWN]
        assert fleet["b"].links.pending == 0
        for _ in range(2):
            await fleet.pass_time(150)
            fleet["a"].device.hear(machine.key)
        assert [link.state for link in fleet["a"].links] == [LinkState.UP]
        assert fleet["b"].links.pending == 0


async def test_a_machine_that_joins_while_rows_are_read_again_is_not_forgotten() -> None:
    class Slow(MemoryStore):
        """A machine joins after its page was read."""

        while_read: Callable[[], object] | None = None

        async def machines(self) -> AsyncIterator[Machine]:
            async for row in super().machines():
                yield row
            if self.while_read is not None:
                await self.while_read()  # type: ignore[misc]

    store, late = Slow(), FakeMachine()
    async with fleet_of("a", "b", store=store) as fleet:
        await linked(fleet, "a")

        async def join() -> None:
            store.while_read = None
            await linked(fleet, "a", late)

        store.while_read = join
        await fleet["b"].reconciler.resync("")
        assert late.key in fleet["b"].device.configs
        assert not [event for event in await fleet["b"].events() if isinstance(event, MachineLeft)]


async def test_machines_heard_by_other_servers_are_not_absent() -> None:
    async with fleet_of("a", "b") as fleet:
        machine = await linked(fleet, "a")
        for _ in range(6):
            await fleet.pass_time(100)
            fleet["a"].device.hear(machine.key)
        await fleet["b"].machines.forget_absent_now(300)
        assert await fleet["b"].machines.find(machine.node_uuid) is not None


# --- ownership


@BOTH
async def test_a_server_that_lost_a_link_is_silent_until_the_machine_returns(kind: str) -> None:
    async with fleet_of("a", "b", kind=kind) as fleet:
        machine = await linked(fleet, "a")
        link = fleet["a"].links.by_key(machine.key)
        assert link is not None
        fleet["b"].device.hear(machine.key, UdpPath("198.51.100.7:2"), handshake=True)
        await fleet.is_owned_by(machine, "b")
        assert fleet["a"].device.configs[machine.key].persistent_keepalive == 0
        assert link.state is LinkState.DOWN
        # packets in flight to the old server change nothing
        fleet["a"].device.hear(machine.key, UdpPath("198.51.100.7:3"))
        await fleet.pass_time(IN_FLIGHT_SECONDS)
        await fleet.is_owned_by(machine, "b")
        fleet["a"].device.hear(machine.key, UdpPath("198.51.100.7:4"))
        await fleet.is_owned_by(machine, "a")
        assert fleet["a"].device.configs[machine.key].persistent_keepalive == 25


async def test_a_path_without_a_handshake_takes_no_link_without_owner_or_on_a_kernel_device() -> None:
    """An initiation changes an active peer's path, and the kernel's passive ones: and it may be a replay."""
    async with fleet_of("a", "b") as fleet:
        new = FakeMachine()
        await fleet["a"].join(new)
        fleet["a"].device.hear(new.key, UdpPath("198.51.100.7:1"))
        await owners(fleet["a"]).settle()
        assert owners(fleet["a"]).owner_of((await fleet["a"].row(new)).id) is None
        machine = await linked(fleet, "b")
        by_kernel = Owners(membership(fleet["a"]), fleet["a"].links, fleet["a"].store, fleet.time.clock, paths_are_proven=False)
        await by_kernel.load()
        link = fleet["a"].links.by_key(machine.key)
        assert link is not None
        by_kernel.heard(link, is_new_session=False)
        await by_kernel.settle()
        assert by_kernel.owner_of(link.machine.id) == "b"
        by_kernel.heard(link, is_new_session=True)
        await by_kernel.settle()
        assert by_kernel.owner_of(link.machine.id) == "a"


async def test_a_new_session_takes_a_link_at_once() -> None:
    async with fleet_of("a", "b") as fleet:
        machine = await linked(fleet, "a")
        for name in ("b", "a", "b"):
            fleet[name].device.hear(machine.key, UdpPath(f"198.51.100.7:{name}"), handshake=True)
            await fleet.is_owned_by(machine, name)


async def test_a_renewed_session_of_the_owner_writes_nothing() -> None:
    async with fleet_of("a", "b") as fleet:
        machine = await linked(fleet, "a")
        row = await fleet["a"].row(machine)
        for _ in range(3):
            await fleet.pass_time(120)
            await fleet["a"].handshake(machine)
            await owners(fleet["a"]).settle()
        owner = owners(fleet["a"]).of(row.id)
        assert owner is not None
        assert owner.epoch == 1


@pytest.mark.parametrize("first", ["a", "b"])
async def test_of_two_that_take_a_link_at_once_the_later_commit_owns_it(first: str) -> None:
    async with fleet_of("a", "b", "c") as fleet:
        machine = await linked(fleet, "c")
        row = await fleet["a"].row(machine)
        order = [first, "b" if first == "a" else "a"]
        for name in order:
            fleet[name].device.hear(machine.key, UdpPath("198.51.100.7:2"), handshake=True)
        for name in order:
            await owners(fleet[name]).settle()
        await fleet.is_owned_by(machine, order[1])
        owner = await fleet["a"].store.transact(lambda transaction: transaction.ownership.of(row.id))
        assert owner is not None
        assert owner.server_id == order[1]


async def test_takeovers_lost_by_a_promoted_replica_are_repeated_with_higher_epochs() -> None:
    async with fleet_of("a", "b") as fleet:
        machine = await linked(fleet, "a")
        row = await fleet["a"].row(machine)

        async def stored() -> Ownership:
            found = await fleet["a"].store.transact(lambda transaction: transaction.ownership.of(row.id))
            assert found is not None
            return found

        async def go_back(transaction: Transaction) -> None:
            transaction.ownership.forget(row.id)  # type: ignore[attr-defined]
            await transaction.ownership.take(replace(first, epoch=first.epoch - 1))

        first = await stored()
        for name in "bab":
            await fleet[name].handshake(machine)
            await fleet.is_owned_by(machine, name)
        last = await stored()
        await fleet["a"].store.transact(go_back)
        assert await stored() == first
        for name in "ab":
            await fleet[name].reconciler.resync(EVERYTHING)
            await owners(fleet[name]).settle()
        again = await stored()
        assert (again.server_id, again.epoch) == ("b", last.epoch + 1)
        await fleet.is_owned_by(machine, "b")
        fleet["b"].device.hear(machine.key, UdpPath("198.51.100.7:2"))
        await fleet["b"].fleet.last_seen.write()  # its last-seen times are stored again
        assert (await stored()).endpoint == "198.51.100.7:2"
        await fleet["a"].handshake(machine)
        await fleet.is_owned_by(machine, "a")


@BOTH
async def test_last_seen_times_of_a_lost_link_are_not_stored(kind: str) -> None:
    async with fleet_of("a", "b", kind=kind) as fleet:
        machine = await linked(fleet, "a")
        await fleet.pass_time(10)
        fleet["a"].device.hear(machine.key, UdpPath("192.0.2.77:1"))
        fleet["b"].device.hear(machine.key, UdpPath("198.51.100.7:2"), handshake=True)
        await fleet.is_owned_by(machine, "b")
        await fleet["b"].fleet.last_seen.write()
        fleet["a"].monitor.said_goodbye(fleet["a"].links.by_key(machine.key))  # type: ignore[arg-type]
        await fleet["a"].fleet.last_seen.write()
        row = await fleet["b"].row(machine)
        assert (row.last_endpoint, row.goodbye_at) == ("198.51.100.7:2", None)
