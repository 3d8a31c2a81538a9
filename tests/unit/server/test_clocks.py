"""Steps of the wall clock change nothing in rules about silence, and delete nothing."""

import os
import pickle
import ssl
import subprocess
import sys
from dataclasses import replace

import pytest
from grpclib import Status

from siderolink.common.keys import PrivateKey
from siderolink.common.wireguard.noise.tai64n import CommonTimestamps, later
from siderolink.server.admin.audit_log import AuditLog
from siderolink.server.clock import Clock, RetentionTime, SteadyTime
from siderolink.server.peers.identity import PeerIdentity
from siderolink.server.store import AuditEntry, MemoryStore
from siderolink.server.store.audit import EMBEDDER
from tests.support.fake_device import VirtualClock
from tests.support.manager import FakeMachine, Manager, new_key
from tests.support.postgres import faketime

pytestmark = pytest.mark.anyio


DAY, YEAR = 86_400.0, 31_536_000.0


class Stepped(VirtualClock):
    """A wall clock that a test sets."""

    step = 0.0

    @property
    def clock(self) -> Clock:
        return Clock(monotonic=lambda: self.now, time=lambda: 1_000_000.0 + self.now + self.step, sleep=self.sleep)


async def a_new_key_is_admitted_after_a_minute(manager: Manager, machine: FakeMachine) -> None:
    """Whoever calls with the UUID of a living machine, whose silence begins now, takes its row after 60 s and not before."""
    reborn = replace(machine, key=new_key(), source="203.0.113.9")
    for seconds in (0, 59):
        await manager.pass_time(seconds)
        assert (await manager.refuses(reborn))[0] is Status.ALREADY_EXISTS
    await manager.pass_time(1)
    await manager.join(reborn)
    await manager.handshake(reborn)
    assert (await manager.row(machine)).public_key == reborn.key


@pytest.mark.parametrize("step", [120.0, -3600.0])
async def test_a_clock_step_neither_frees_a_live_row_nor_excludes_a_machine(step: float) -> None:
    time = Stepped()
    manager, machine = Manager(time=time), FakeMachine()
    await manager.join(machine)
    await manager.handshake(machine)
    await manager.pass_time(10)
    manager.device.hear(machine.key)
    time.step = step
    await a_new_key_is_admitted_after_a_minute(manager, machine)


async def test_a_silent_link_goes_down_in_time_although_the_clock_goes_back() -> None:
    time = Stepped()
    manager, machine = Manager(time=time), FakeMachine(tunnel=True)
    answer = await manager.join(machine)
    await manager.handshake(machine)
    time.step = -3600.0
    await manager.pass_time(275)
    assert manager.link(answer).state == "down"


async def test_a_row_last_seen_in_the_future_is_not_kept_from_its_machine_for_as_long() -> None:
    """The clock was a year ahead when the row was written, and was set back before this start."""
    store, ahead = MemoryStore(), Stepped()
    ahead.step = YEAR
    before, machine = Manager(time=ahead, store=store), FakeMachine()
    await before.join(machine)
    await before.handshake(machine)
    await before.fleet.last_seen.write()
    after = Manager(store=store, time=Stepped())
    await after.reconciler.load()
    await a_new_key_is_admitted_after_a_minute(after, machine)


@pytest.mark.parametrize("step", [-YEAR, -7200.0])
async def test_a_claim_ends_in_time_though_the_clock_goes_back(step: float) -> None:
    store, time, machine = MemoryStore(), Stepped(), FakeMachine()
    manager = Manager(time=time, store=store)
    await manager.join(machine)
    await manager.handshake(machine)
    await manager.pass_time(61)
    await manager.join(replace(machine, key=new_key()))
    assert len(await store.all_claims()) == 1
    time.step = step
    again = Manager(time=time, store=store)
    await again.reconciler.load()
    await again.pass_time(61)
    assert await store.all_claims() == []


async def test_a_jump_forward_forgets_no_machine_until_it_has_lasted_for_a_day(caplog: pytest.LogCaptureFixture) -> None:
    time, store, machine = Stepped(), MemoryStore(), FakeMachine()
    before = Manager(time=time, store=store)
    await before.join(machine)
    await before.handshake(machine)
    manager = Manager(time=time, store=store)  # which has not heard it yet
    await manager.reconciler.load()
    time.step = YEAR
    await manager.machines.forget_absent_now(30 * DAY)
    time.now += DAY - 1
    await manager.machines.forget_absent_now(30 * DAY)
    assert await manager.machines.find(machine.node_uuid) is not None
    assert caplog.text.count("the clock was set forward by 31536000 s: old machines") == 1
    time.now += 1
    await manager.machines.forget_absent_now(30 * DAY)
    assert await manager.machines.find(machine.node_uuid) is None


async def test_a_clock_that_is_wrong_for_an_hour_deletes_no_audit_entry() -> None:
    store, time = MemoryStore(), Stepped()
    audit = AuditLog(store, time.clock)
    await audit.add(AuditEntry(at=time.clock.time(), actor=EMBEDDER, action="test", object_kind="test"))
    time.step = YEAR
    assert await audit.prune(30 * DAY) == 0
    time.now += 3600
    assert await audit.prune(30 * DAY) == 0
    time.step = 0.0
    time.now += 30 * DAY - 3700
    assert await audit.prune(30 * DAY) == 0
    time.now += 200
    assert await audit.prune(30 * DAY) == 1


def test_retention_follows_a_clock_that_goes_back_and_one_that_drifts() -> None:
    now, wall = 0.0, 1_000_000.0
    told = RetentionTime("records", lambda: wall, lambda: now)
    wall -= YEAR
    assert told() == wall
    for _ in range(100):
        now, wall = now + 1000, wall + 1500
        assert told() == wall


def test_a_second_jump_has_to_last_for_a_day_itself() -> None:
    now, step = 0.0, 0.0
    told = RetentionTime("records", lambda: now + step, lambda: now)
    step = 2 * 3600.0
    assert told() == now
    now, step = DAY - 3600, YEAR
    assert told() == now
    now = DAY
    assert told() == now
    now = 2 * DAY - 3600
    assert told() == now + YEAR


def test_stamps_rise_at_the_clocks_pace_though_the_database_is_set_back() -> None:
    """Each server may use stamps up to two seconds ahead: enough for a hundred handshakes, not for a year of them."""
    now, wall = 0.0, 1_700_000_000.0
    steady = SteadyTime(lambda: wall, lambda: now)
    stamps = CommonTimestamps(lambda: int(steady() * 1e9))
    last = stamps.for_peer(b"a", 0)
    assert last is not None
    wall -= YEAR
    for _ in range(1000):
        now, wall = now + 5.0, wall + 5.0
        stamp = stamps.for_peer(b"a", 0)
        assert stamp is not None
        assert last < stamp <= later(last, 6.0)
        last = stamp
    wall += YEAR
    assert steady() == wall
    wall -= 1.0  # another measurement of the same clock
    assert steady() == wall


MAKES_AN_IDENTITY = """
import pickle, sys
from siderolink.common.keys import PrivateKey
from siderolink.server.peers.identity import PeerIdentity
sys.stdout.buffer.write(pickle.dumps(PeerIdentity.make(PrivateKey(bytes.fromhex(sys.argv[1])), "a")))
"""


@pytest.mark.parametrize("days", [-40, 400])
def test_a_server_that_started_with_a_wrong_clock_is_known_to_the_others(days: int) -> None:
    shared = PrivateKey.generate()
    environment = os.environ | {"LD_PRELOAD": faketime(), "FAKETIME": f"{days:+}d", "FAKETIME_DONT_FAKE_MONOTONIC": "1"}
    command = [sys.executable, "-c", MAKES_AN_IDENTITY, bytes(shared).hex()]
    made = subprocess.run(command, env=environment, capture_output=True, check=True, timeout=60)
    wrong: PeerIdentity = pickle.loads(made.stdout)
    right = PeerIdentity.make(shared, "b")
    to_client, to_server = ssl.MemoryBIO(), ssl.MemoryBIO()
    client = right.client_tls.wrap_bio(to_client, to_server)
    server = wrong.server_tls.wrap_bio(to_server, to_client, server_side=True)
    waiting = [client, server]
    while waiting:
        end = waiting.pop(0)
        try:
            end.do_handshake()
        except ssl.SSLWantReadError:
            waiting.append(end)
    assert client.getpeercert(binary_form=True) is not None
    assert server.getpeercert(binary_form=True) is not None
