"""Failing servers of one store, in virtual time: who dials, with which timestamps, and operation without the database."""

from dataclasses import replace
from ipaddress import IPv4Address
from itertools import pairwise

import anyio
import pytest

from siderolink.common.errors import StoreError
from siderolink.common.keys import PublicKey
from siderolink.common.tasks import background_tasks
from siderolink.common.wireguard.noise.tai64n import CommonTimestamps, Timestamps
from siderolink.common.wireguard.path import Path
from siderolink.server import MemoryStore
from siderolink.server.fleet.dialling import dial_remembered
from siderolink.server.fleet.directory import MachineLink
from siderolink.server.fleet.failover import (
    DIAL_PAUSES,
    INVITATIONS,
    INVITE_AFTER,
    INVITE_INTERVAL_SECONDS,
    INVITE_SECONDS,
    Failover,
    Lease,
)
from siderolink.server.fleet.membership import DEAD_AFTER, SURE_SECONDS, Membership
from siderolink.server.fleet.owners import IN_FLIGHT_SECONDS, Owners
from tests.support.fake_device import FakeKernelDevice, FakePath, VirtualClock
from tests.support.manager import FakeMachine, Manager, following
from tests.support.several import Fleet, UdpPath, fleet_of, linked, membership, owners, settled

pytestmark = pytest.mark.anyio


# --- timestamps


def stamp(seconds: float) -> bytes:
    return Timestamps().next(int(seconds * 1e9))


def test_shared_timestamps_rise_for_each_peer_and_follow_the_clock() -> None:
    now = [1000.0]
    stamps = CommonTimestamps(lambda: int(now[0] * 1e9))
    one = [stamps.for_peer(b"1", 0) for _ in range(50)]
    assert all(earlier is not None and later is not None and earlier < later for earlier, later in pairwise(one))
    assert [stamps.for_peer(bytes([number]), 0) for number in range(10)] == [stamp(1000)] * 10  # others need not wait
    while (another := stamps.for_peer(b"1", 0)) is not None:
        one.append(another)
    assert stamp(1001.9) < (one[-1] or b"") <= stamp(1002)
    now[0] = 1003
    assert stamps.for_peer(b"1", 0) == stamp(1003)


def test_a_successor_begins_above_what_the_owner_stored_or_waits() -> None:
    now = [1000.0]
    successor = CommonTimestamps(lambda: int(now[0] * 1e9), high_water=stamp(900))
    successor.begin_above(b"1", stamp(1001))
    first = successor.for_peer(b"1", 0)
    assert first is not None
    assert stamp(1001) < first < stamp(1001.1)
    successor.begin_above(b"2", stamp(1010))
    assert successor.for_peer(b"2", 0) is None  # the common clock was set back
    now[0] = 1009
    assert (successor.for_peer(b"2", 0) or b"") > stamp(1010)


async def test_owners_store_their_last_timestamp_and_successors_read_it() -> None:
    async with fleet_of("a", "b") as fleet:
        machine = FakeMachine()
        stamps = {name: CommonTimestamps(lambda: int(fleet.time.clock.time() * 1e9)) for name in ("a", "b")}
        for name, of in stamps.items():
            owners(fleet[name]).stamps = of
        sent = stamps["a"].for_peer(bytes(machine.key), 0)
        await linked(fleet, "a", machine)
        assert stamps["b"].last(bytes(machine.key)) == sent
        await fleet.pass_time(120)
        again = stamps["a"].for_peer(bytes(machine.key), 0)
        await fleet["a"].handshake(machine)
        await fleet["a"].fleet.last_seen.write()
        await fleet.pass_time(DEAD_AFTER + 1, "b")
        assert fleet["b"].fleet.failover is not None
        await fleet["b"].fleet.failover.take_over("a")
        assert stamps["b"].last(bytes(machine.key)) == again


async def test_a_kernel_device_with_a_wrong_clock_dials_nobody_and_inherits_nothing() -> None:
    store, time = MemoryStore(), VirtualClock()
    wrong = replace(time.clock, host_time=lambda: time.clock.time() + 0.6)
    by_kernel = Membership(store, wrong, server_id="a", stamps_by_host=True)
    by_engine = Membership(store, wrong, server_id="b")
    right = Membership(store, time.clock, server_id="c", stamps_by_host=True)
    for one in (by_kernel, by_engine, right) * 2:
        await one.beat()
    assert [one.has_wrong_clock for one in (by_kernel, by_engine, right)] == [True, False, False]
    assert {one.heir(str(number)) for one in (by_kernel, by_engine, right) for number in range(20)} == {"c"}


# --- without the database


async def test_without_the_database_only_machines_heard_just_now_are_sent_to() -> None:
    async with fleet_of("a", "b") as fleet:
        heard, silent = await linked(fleet, "a"), await linked(fleet, "a")
        lease = fleet["a"].fleet.lease
        assert lease is not None

        async def passive() -> list[bool]:
            await lease.check()
            await owners(fleet["a"]).settle()
            return [fleet.is_passive("a", machine) for machine in (heard, silent)]

        await fleet.pass_time(9, "b")
        assert await passive() == [False, False]
        await fleet.pass_time(22, "b")
        fleet["a"].device.hear(heard.key)
        assert await passive() == [False, True]
        fleet["a"].device.hear(silent.key, UdpPath("198.51.100.7:5"))  # the machine is here after all
        assert await passive() == [False, False]
        await fleet.pass_time(31, "b")
        assert await passive() == [True, True]
        await fleet.pass_time(2)  # the database is back
        assert await passive() == [False, False]


async def test_a_server_ends_when_the_database_was_away_for_too_long() -> None:
    async with fleet_of("a", "b") as fleet:
        a = fleet["a"]
        lease = Lease(owners(a), a.links, a.device, fleet.time.clock, 60.0)
        await fleet.pass_time(59, "b")
        await lease.check()
        await fleet.pass_time(1, "b")
        with pytest.raises(StoreError, match="60 s"):
            await lease.check()


async def test_a_server_that_was_away_trusts_its_links_only_after_reading_what_others_took() -> None:
    """A process that was stopped still has its connections, and may write its heartbeat before it reads its feed."""
    async with fleet_of("a", "b") as fleet:
        machine = await linked(fleet, "a")
        a = membership(fleet["a"])
        late = Owners(a, fleet["a"].links, fleet["a"].store, fleet.time.clock)
        passive: list[PublicKey | None] = []
        told: list[str | float | None] = []
        fails = [True]

        async def apply(link: MachineLink) -> None:
            assert not late.may_send(link.machine.id)
            passive.append(link.machine.public_key)

        async def refresh() -> None:
            await late.refresh()
            if fails.pop():
                raise StoreError("away again")
            told.append("knows")

        late.apply, a.on_return, a.on_beat = apply, refresh, told.append
        await fleet.pass_time(2)
        assert (told, passive) == ([SURE_SECONDS] * 2, [])
        await fleet.pass_time(DEAD_AFTER + 1, "b")
        fleet["b"].device.hear(machine.key, UdpPath("198.51.100.7:2"), handshake=True)
        await owners(fleet["b"]).settle()
        told.clear()
        with pytest.raises(StoreError, match="away again"):
            await a.beat()
        fails.append(False)
        assert (told, passive) == ([], [machine.key])
        await a.beat()
        await a.beat()
        assert told == ["knows", SURE_SECONDS, SURE_SECONDS]


async def test_peers_are_settled_by_a_heartbeat_and_by_changes_at_once() -> None:
    """After an outage of the database, while the feed reports what others took meanwhile."""
    async with fleet_of("a", "b") as fleet:
        machines = [FakeMachine() for _ in range(100)]
        for machine in machines:
            await fleet["a"].join(machine)
        here = owners(fleet["a"])
        here.settle_all([link.machine.id for link in fleet["a"].links])
        async with anyio.create_task_group() as tasks:
            tasks.start_soon(here.refresh)
            tasks.start_soon(here.settle)
        await linked(fleet, "a")  # its own task goes on


async def test_heartbeats_go_on_while_a_server_reads_what_others_took(monkeypatch: pytest.MonkeyPatch) -> None:
    """With very many machines this takes longer than the others wait. Another outage meanwhile is handled separately."""
    monkeypatch.setattr("siderolink.server.fleet.membership.HEARTBEAT_SECONDS", 0.001)
    async with fleet_of("a", "b") as fleet:
        a, told, refreshed = membership(fleet["a"]), list[float | None](), list[float]()

        async def written_at() -> float:
            rows = await fleet["a"].store.transact(lambda transaction: transaction.ownership.servers())
            return next(row.heartbeat_at for row in rows if row.id == "a")

        async def refresh() -> None:
            if not refreshed:
                fleet.time.advance(DEAD_AFTER + 1)
            refreshed.append(fleet.time.clock.time())
            with anyio.fail_after(30):
                while await written_at() < refreshed[-1]:
                    await anyio.sleep(0.001)

        a.on_return, a.on_beat = refresh, told.append
        fleet.time.advance(DEAD_AFTER + 1)
        await a.beat()
        assert len(refreshed) == 2
        assert told == [SURE_SECONDS]
        assert a.offline_for == 0


async def test_a_single_server_always_trusts_its_links() -> None:
    async with fleet_of("a") as fleet:
        told: list[float | None] = []
        membership(fleet["a"]).on_beat = told.append
        await fleet.pass_time(2)
        assert set(told) == {None}


# --- dialling


def failover_of(fleet: Fleet, name: str) -> Failover:
    found = fleet[name].fleet.failover
    assert found is not None
    return found


async def test_a_stream_that_was_opened_before_its_server_was_known_to_be_dead_is_used_then() -> None:
    async with fleet_of("a", "b", "c") as fleet:
        for _ in range(4):  # whichever of the two would dial it
            machine = FakeMachine(tunnel=True)
            answer = await fleet["a"].join(machine)
            await settled(lambda: all(machine.key in one.device.configs for one in fleet.managers.values()))  # noqa: B023
            fleet["a"].device.hear(machine.key, FakePath(machine.key), handshake=True)
            await fleet.is_owned_by(machine, "a")
            link = fleet["b"].link(answer)
            fleet["b"].monitor.open_stream(link, FakePath(machine.key), lambda refusal: None)
            assert fleet.is_passive("b", machine)
        await fleet.pass_time(DEAD_AFTER + 1, "b", "c")
        for name in "bc":
            failover = fleet[name].fleet.failover
            assert failover is not None
            await failover.take_over("a")
            await owners(fleet[name]).settle()
        assert not any(peer.is_passive for peer in fleet["b"].device.configs.values())


async def test_the_machines_of_a_dead_server_are_dialled_by_exactly_one_of_the_others() -> None:
    async with fleet_of("a", "b", "c") as fleet:
        machines = [await linked(fleet, "a") for _ in range(12)]
        by_tunnel, at_b = FakeMachine(tunnel=True), await linked(fleet, "b")
        await fleet["a"].join(by_tunnel)
        await settled(lambda: all(by_tunnel.key in one.device.configs for one in fleet.managers.values()))
        fleet["a"].device.hear(by_tunnel.key, FakePath(by_tunnel.key), handshake=True)
        await fleet.is_owned_by(by_tunnel, "a")
        fleet["a"].device.hear(machines[0].key, UdpPath("198.51.100.7:9"))  # moved since it was taken
        await fleet["a"].fleet.last_seen.write()
        dialled = {name: list[tuple[PublicKey, object]]() for name in "bc"}
        await fleet.pass_time(DEAD_AFTER + 1, "b", "c")
        for name in "bc":
            failover = fleet[name].fleet.failover
            assert failover is not None
            await failover.take_over("a")
            given = {peer.public_key: peer.endpoint for peer in fleet[name].device.given if peer.endpoint is not None}
            dialled[name] += given.items()
        keys = [key for name in "bc" for key, _ in dialled[name]]
        assert sorted(map(str, keys)) == sorted(str(machine.key) for machine in machines)
        assert all(dialled.values())  # each has its share
        assert (IPv4Address("198.51.100.7"), 9) in [endpoint for name in "bc" for _, endpoint in dialled[name]]
        for name in "bc":
            for key, _ in dialled[name]:
                assert not fleet[name].device.configs[key].is_passive
                fleet[name].device.hear(key, handshake=True)
        owned = [(name, machine) for name in "bc" for machine in machines if machine.key in dict(dialled[name])]
        for name, machine in owned:
            row = await fleet["b"].row(machine)
            await settled(lambda: owners(fleet["b"]).owner_of(row.id) == owners(fleet["c"]).owner_of(row.id) == name)  # noqa: B023
            owner = owners(fleet[name]).of(row.id)
            assert owner is not None
            assert owner.endpoint is not None  # for the server that dials it next
            assert ("handshake", machine.key) in fleet[name].device.calls
        await fleet.is_owned_by(at_b, "b")


async def test_a_dead_servers_machines_that_do_not_answer_are_dialled_again_by_the_same_server() -> None:
    async with fleet_of("a", "b", "c") as fleet:
        machines = [await linked(fleet, "a") for _ in range(6)]
        await fleet.pass_time(DEAD_AFTER + 1, "b", "c")

        def dials(name: str, machine: FakeMachine) -> int:
            return fleet[name].device.calls.count(("handshake", machine.key))

        answers, heard = machines[0], list[str]()

        def answer() -> None:
            for name in "bc":
                if dials(name, answers) and not heard:
                    heard.append(name)
                    fleet[name].device.hear(answers.key, handshake=True)

        fleet.time.on_sleep = answer
        for name in "bc":
            before = fleet.time.now
            await failover_of(fleet, name).succeed("a")
            assert fleet.time.now - before >= sum(DIAL_PAUSES)
        counted = [sorted(dials(name, machine) for name in "bc") for machine in machines]
        assert counted == [[0, 1], *[[0, 1 + len(DIAL_PAUSES)]] * (len(machines) - 1)]


async def test_the_machines_of_a_server_that_lives_again_are_not_dialled_any_more() -> None:
    async with fleet_of("a", "b") as fleet:
        machine = await linked(fleet, "a")
        await fleet.pass_time(DEAD_AFTER + 1, "b")
        beats: list[float] = []

        async def sleep(seconds: float) -> None:
            beats.append(seconds)
            await membership(fleet["a"]).beat()
            await membership(fleet["b"]).beat()

        b = fleet["b"]
        clock = replace(fleet.time.clock, sleep=sleep)
        await Failover(owners(b), b.links, b.fleet.sessions, b.reconciler, b.store, clock).succeed("a")
        assert b.device.calls.count(("handshake", machine.key)) == 1
        assert beats == [DIAL_PAUSES[0]]


async def test_a_second_dead_server_does_not_hasten_dials_of_the_first_ones_machines() -> None:
    turns: list[str] = []
    sleeps: list[anyio.Event] = []

    class Counted(Failover):
        async def take_over(self, server_id: str) -> None:
            turns.append(server_id)

    async def sleep(seconds: float) -> None:
        assert seconds == DIAL_PAUSES[0]
        sleeps.append(anyio.Event())
        await sleeps[-1].wait()

    async with fleet_of("a", "b", "c") as fleet, background_tasks() as tasks:
        b = fleet["b"]
        clock = replace(fleet.time.clock, sleep=sleep)
        failover = Counted(owners(b), b.links, b.fleet.sessions, b.reconciler, b.store, clock)
        tasks.start_soon(failover.run)
        for number, name in enumerate("ac", 1):
            await membership(fleet[name]).leave()
            await settled(lambda: len(sleeps) == number)  # noqa: B023
        assert turns == ["a", "c"]
        sleeps[0].set()
        await settled(lambda: len(sleeps) == 3)
        assert turns == ["a", "c", "a"]


async def test_a_kernel_device_drops_old_sessions_before_dialling_and_keeps_used_ones() -> None:
    async with fleet_of("a", "b") as fleet:
        machine, b = await linked(fleet, "a"), fleet["b"]
        b.device.__class__ = FakeKernelDevice
        await membership(fleet["a"]).leave()
        await settled(lambda: not membership(b).is_alive("a"))
        b.device.calls.clear()
        await failover_of(fleet, "b").take_over("a")
        assert b.device.calls == [("remove", machine.key), ("set", machine.key), ("set", machine.key)]
        b.device.hear(machine.key, handshake=True)
        await fleet.is_owned_by(machine, "b")
        b.device.calls.clear()
        link = b.links.by_key(machine.key)
        assert link is not None
        await b.reconciler.dial(link, (IPv4Address("198.51.100.7"), 51820))
        assert b.device.calls == [("set", machine.key), ("set", machine.key)]


# --- draining


async def stays(fleet: Fleet, name: str, is_draining: bool) -> None:
    """Begin or cancel the drain of a server; all servers have seen it."""
    membership(fleet[name]).describe(is_draining=is_draining)
    await fleet.pass_time(2)


async def test_machines_that_stay_at_a_server_that_drains_are_dialled_by_one_successor_for_a_moment() -> None:
    async with fleet_of("a", "b", "c") as fleet:
        machines = [await linked(fleet, "a") for _ in range(8)]
        comes, at_b, by_tunnel = machines[0], await linked(fleet, "b"), FakeMachine(tunnel=True)
        await fleet["a"].join(by_tunnel)
        await settled(lambda: all(by_tunnel.key in one.device.configs for one in fleet.managers.values()))
        fleet["a"].device.hear(by_tunnel.key, FakePath(by_tunnel.key), handshake=True)
        await fleet.is_owned_by(by_tunnel, "a")
        await stays(fleet, "a", False)
        dialled: list[tuple[str, PublicKey]] = []
        for name in "bc":
            device = fleet[name].device

            async def handshake(key: PublicKey, path: Path | None = None, name: str = name) -> None:
                dialled.append((name, key))
                assert not fleet[name].device.configs[key].is_passive
                if key == comes.key:
                    fleet[name].device.hear(key, UdpPath("198.51.100.7:3"), handshake=True)

            device.handshake = handshake  # type: ignore[method-assign, assignment]
            await failover_of(fleet, name).invite("a")
        assert dialled == []  # it does not drain
        await stays(fleet, "a", True)
        for name in "bc":
            await failover_of(fleet, name).invite("a")
        assert sorted(str(key) for _, key in dialled) == sorted(str(machine.key) for machine in machines)
        assert {name for name, _ in dialled} == {"b", "c"}
        [successor] = [name for name, key in dialled if key == comes.key]
        await fleet.is_owned_by(comes, successor)
        for machine in (*machines[1:], by_tunnel):
            await fleet.is_owned_by(machine, "a")  # a machine that does not answer stays, and only its owner sends to it
        await fleet.is_owned_by(at_b, "b")
        assert INVITE_SECONDS < IN_FLIGHT_SECONDS  # the two no longer both send


@pytest.mark.parametrize("is_noted_first", [True, False])
async def test_an_invited_machine_is_its_successors_in_whatever_order_both_servers_commit(is_noted_first: bool) -> None:
    async with fleet_of("a", "b") as fleet:
        machine = await linked(fleet, "a")
        await stays(fleet, "a", True)
        await failover_of(fleet, "b").invite("a")
        assert ("handshake", machine.key) in fleet["b"].device.calls
        fleet["a"].device.hear(machine.key, UdpPath("192.0.2.77:1"), handshake=True)  # the machine sends to both for a moment
        fleet["b"].device.hear(machine.key, UdpPath("198.51.100.7:2"), handshake=True)
        commits = [fleet["a"].fleet.last_seen.write, owners(fleet["b"]).settle]
        for commit in commits if is_noted_first else reversed(commits):
            await commit()
        await fleet.is_owned_by(machine, "b")
        await fleet["b"].fleet.last_seen.write()
        assert (await fleet["b"].row(machine)).last_endpoint == "198.51.100.7:2"


async def test_a_server_invites_some_seconds_after_a_drain_begins_and_not_after_it_ended() -> None:
    invited: list[float] = []

    class Counted(Failover):
        async def invite(self, server_id: str) -> None:
            assert server_id == "a"
            invited.append(clock.monotonic() - began)

    async with fleet_of("a", "b") as fleet:
        b, clock = fleet["b"], VirtualClock().clock
        failover = Counted(owners(b), b.links, b.fleet.sessions, b.reconciler, b.store, clock)
        await stays(fleet, "a", True)
        began = clock.monotonic()
        await failover.relieve("a")
        assert invited == [INVITE_AFTER + turn * INVITE_INTERVAL_SECONDS for turn in range(INVITATIONS)]
        await stays(fleet, "a", False)
        await failover.relieve("a")
        assert len(invited) == INVITATIONS


async def test_a_server_that_starts_dials_no_machine_that_others_have() -> None:
    async with fleet_of("a", "b") as fleet:
        machine = await linked(fleet, "a")
        await fleet["a"].fleet.last_seen.write()
        new = Manager(store=fleet["a"].store, time=fleet.time, server_id="c")
        await membership(new).beat()
        async with following(new):
            await new.reconciler.load()
            await dial_remembered(new.links, new.fleet.sessions, new.reconciler, may_dial=owners(new).is_heir)
            assert new.device.configs[machine.key].is_passive
            assert [given.endpoint for given in new.device.given] == [None]
