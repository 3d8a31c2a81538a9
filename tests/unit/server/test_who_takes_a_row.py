"""Who may take a machine's row: every situation with its verdict written by hand.

The server's parts are the real ones; the device is a fake that says who was heard and who answers.
"""

import asyncio
from dataclasses import dataclass, field, replace
from enum import StrEnum

import pytest
from grpclib import GRPCError, Status

from siderolink.common.goodbye import Goodbye
from siderolink.server import ClaimRefused, JoinRefusal, JoinRefused, MachineRekeyed, UniqueTokenBound
from siderolink.server.admission.tokens import unique_token_digest
from siderolink.server.fleet.directory import LinkState, Stream
from siderolink.server.fleet.goodbyes import Goodbyes
from siderolink.server.store import Ban, BanKind
from tests.support.fake_device import FakePath
from tests.support.manager import FakeMachine, Manager, new_key

pytestmark = pytest.mark.anyio

HERE, ELSEWHERE, NEIGHBOUR = "198.51.100.7", "203.0.113.9", "198.51.100.8"
TOKEN = '{"Fingerprint":"aa","Token":"11111111-1111-4111-8111-111111111111"}'


class Place(FakePath):
    """A UDP address."""

    def __init__(self, host: str) -> None:
        super().__init__()
        self.host = host

    def __str__(self) -> str:
        return f"{self.host}:40000"


class Link(StrEnum):
    """The state of the machine's link."""

    ALIVE = "alive"
    KILLED = "killed 5 s ago"
    SILENT = "silent for 61 s"
    GOODBYE = "said goodbye"
    CUT = "its stream was cut, and it is alive"
    CUT_AND_KILLED = "its stream ended, and it is dead"
    PROXY_CUT = "a proxy cut all streams"


class Verdict(StrEnum):
    TAKES = "takes the row"
    SAME = "is told what is known, and changes nothing"
    REFUSED = "is refused"


@dataclass
class Scene:
    """A machine that has joined by UDP or by the tunnel, and what happened to it since."""

    bound: bool
    link: Link
    restarted: bool = False
    manager: Manager = field(init=False)
    machine: FakeMachine = field(init=False)
    streams: list[tuple[FakePath, Stream]] = field(default_factory=list)

    async def set_up(self) -> None:
        self.manager = Manager()
        by_stream = self.link in (Link.CUT, Link.CUT_AND_KILLED, Link.PROXY_CUT)
        self.machine = FakeMachine(unique_token=TOKEN if self.bound else None, tunnel=by_stream)
        await self._join(self.machine)
        if self.link is Link.PROXY_CUT:
            await self._join(FakeMachine(tunnel=True))
        await self.manager.pass_time(100)
        self.manager.device.hear(self.machine.key)
        await getattr(self, f"_{self.link.name.lower()}")()
        if self.restarted:
            await self._restart()

    async def _join(self, machine: FakeMachine) -> None:
        answer = await self.manager.join(machine)
        if machine.tunnel:
            path = FakePath(machine.key)
            stream = self.manager.monitor.open_stream(self.manager.link(answer), path, lambda refusal: None, HERE)
            self.streams.append((path, stream))
            self.manager.device.hear(machine.key, path)
        else:
            self.manager.device.hear(machine.key, Place(HERE))
        await self.manager.handshake(machine)

    async def _alive(self) -> None:
        await self.manager.pass_time(3)
        self.manager.device.answering.add(self.machine.key)

    async def _killed(self) -> None:
        await self.manager.pass_time(5)

    async def _silent(self) -> None:
        await self.manager.pass_time(61)

    async def _goodbye(self) -> None:
        row = await self.manager.row(self.machine)
        goodbyes = Goodbyes(self.manager.links, self.manager.monitor, self.manager.machines.remove)
        message = Goodbye(public_key=self.machine.key).encode()
        assert goodbyes.receive(message, row.overlay_address) is not None
        await self.manager.pass_time(1)

    async def _cut(self) -> None:
        """The machine opens another stream at once, as ours does, and is heard there."""
        await self._end_stream()
        self.manager.time.on_sleep = lambda: self.manager.device.hear(self.machine.key)

    async def _cut_and_killed(self) -> None:
        await self._end_stream()
        await self.manager.pass_time(5)

    async def _proxy_cut(self) -> None:
        await self._end_stream()

    async def _end_stream(self) -> None:
        for path, stream in self.streams:
            path.is_open = False
            self.manager.monitor.close_stream(stream)

    async def _restart(self) -> None:
        before = self.manager
        await before.fleet.last_seen.write()
        self.manager = Manager(store=before.store, time=before.time)
        self.manager.device.answering = before.device.answering
        await self.manager.reconciler.load()

    async def attempt(self, actor: FakeMachine) -> Verdict:
        """Call, shake hands with a key of its own, and see whose the row is."""
        manager, key_before = self.manager, (await self.manager.row(self.machine)).public_key
        digest_before = (await manager.row(self.machine)).unique_token_digest
        try:
            await manager.join(actor)
        except GRPCError:
            row = await manager.row(self.machine)
            assert (row.public_key, row.unique_token_digest) == (key_before, digest_before)
            return Verdict.REFUSED
        row = await manager.row(self.machine)
        assert (row.public_key, row.unique_token_digest) == (key_before, digest_before), "a call changes nothing"
        if actor.key == key_before:
            return Verdict.SAME
        assert manager.device.configs[actor.key].allowed_ips == ()
        await manager.handshake(actor)
        row = await manager.row(self.machine)
        if row.public_key != actor.key:
            return Verdict.REFUSED
        assert [str(network.network_address) for network in manager.device.configs[actor.key].allowed_ips] == [
            str(row.overlay_address)
        ]
        assert key_before not in manager.device.configs
        return Verdict.TAKES


def machine_again(scene: Scene, source: str) -> FakeMachine:
    """The machine after a restart: another key, the same token."""
    return replace(scene.machine, key=new_key(), source=source)


def thief(scene: Scene, source: str) -> FakeMachine:
    """Knows the UUID and the join token."""
    return replace(scene.machine, key=new_key(), source=source, unique_token="a thief's")


def replayer(scene: Scene, source: str) -> FakeMachine:
    """Repeats the machine's public key, too, with a unique token of its own."""
    return replace(scene.machine, source=source, unique_token="a thief's")


YES, SAME, NO = Verdict.TAKES, Verdict.SAME, Verdict.REFUSED

# bound, link, server restarted: the machine from its own address and from another, the thief from either, who replays
TABLE: list[tuple[bool, Link, bool, tuple[Verdict, Verdict, Verdict, Verdict, Verdict]]] = [
    # A bound unique token always decides.
    (True, Link.ALIVE, False, (YES, YES, NO, NO, NO)),
    (True, Link.KILLED, False, (YES, YES, NO, NO, NO)),
    (True, Link.SILENT, False, (YES, YES, NO, NO, NO)),
    (True, Link.GOODBYE, False, (YES, YES, NO, NO, NO)),
    (True, Link.CUT, False, (YES, YES, NO, NO, NO)),
    (True, Link.PROXY_CUT, False, (YES, YES, NO, NO, NO)),
    (True, Link.ALIVE, True, (YES, YES, NO, NO, NO)),
    (True, Link.KILLED, True, (YES, YES, NO, NO, NO)),
    (True, Link.GOODBYE, True, (YES, YES, NO, NO, NO)),
    # Without one, a call with another key than a living machine's is not from that machine.
    (False, Link.ALIVE, False, (NO, NO, NO, NO, SAME)),
    # A caller from a dead link's address takes its row at once, others after a minute.
    (False, Link.KILLED, False, (YES, NO, YES, NO, SAME)),
    (False, Link.SILENT, False, (YES, YES, YES, YES, SAME)),
    (False, Link.GOODBYE, False, (YES, YES, YES, YES, SAME)),
    # The end of a stream does not prove that the machine died.
    (False, Link.CUT, False, (NO, NO, NO, NO, SAME)),
    (False, Link.CUT_AND_KILLED, False, (YES, NO, YES, NO, SAME)),
    (False, Link.PROXY_CUT, False, (NO, NO, NO, NO, SAME)),
    # A server that has just started dials where the machine was heard before.
    (False, Link.ALIVE, True, (NO, NO, NO, NO, SAME)),
    (False, Link.KILLED, True, (YES, NO, YES, NO, SAME)),
    (False, Link.GOODBYE, True, (YES, YES, YES, YES, SAME)),
]
ACTORS = [
    ("machine", machine_again, HERE),
    ("machine elsewhere", machine_again, ELSEWHERE),
    ("thief at the machine's address", thief, HERE),
    ("thief", thief, ELSEWHERE),
    ("replayer", replayer, ELSEWHERE),
]
CASES = [
    pytest.param(
        bound, link, restarted, column, verdict, id=f"{'bound' if bound else 'free'}, {link}, {restarted}, {ACTORS[column][0]}"
    )
    for bound, link, restarted, verdicts in TABLE
    for column, verdict in enumerate(verdicts)
]


@pytest.mark.parametrize(("bound", "link", "restarted", "column", "verdict"), CASES)
async def test_who_may_take_a_row(bound: bool, link: Link, restarted: bool, column: int, verdict: Verdict) -> None:
    scene = Scene(bound, link, restarted)
    await scene.set_up()
    _, actor, source = ACTORS[column]
    began_at = scene.manager.time.now
    assert await scene.attempt(actor(scene, source)) is verdict
    assert scene.manager.time.now - began_at <= 8, "no call takes longer"


async def test_the_thief_that_claims_a_silent_row_loses_it_to_the_machine_that_is_heard_again() -> None:
    scene = Scene(False, Link.SILENT)
    await scene.set_up()
    manager, stranger = scene.manager, thief(scene, ELSEWHERE)
    await manager.join(stranger)
    manager.device.hear(scene.machine.key)
    await manager.events()
    await manager.handshake(stranger)
    assert (await manager.row(scene.machine)).public_key == scene.machine.key
    assert stranger.key not in manager.device.configs
    (refused,) = [event for event in await manager.events() if isinstance(event, ClaimRefused)]
    assert (refused.source, refused.known_source) == (f"{ELSEWHERE}:1", HERE)


@pytest.mark.parametrize("is_alive", [True, False], ids=["idle", "killed"])
async def test_the_server_cannot_tell_an_idle_machine_from_a_dead_one_after_a_proxy_cut(is_alive: bool) -> None:
    """A living machine may be idle for 50 s (docs/decisions.md); until its first packet the server sees no difference."""
    scene = Scene(False, Link.PROXY_CUT)
    await scene.set_up()
    for seconds in (0, 20, 29):
        await scene.manager.pass_time(seconds)
        assert await scene.attempt(thief(scene, HERE)) is Verdict.REFUSED
        assert await scene.attempt(machine_again(scene, HERE)) is Verdict.REFUSED
        assert scene.manager.device.calls.count(("handshake", scene.machine.key)) == 0, "no probe has a way to it"
    if is_alive:
        scene.manager.device.hear(scene.machine.key)
    await scene.manager.pass_time(11)
    assert await scene.attempt(thief(scene, ELSEWHERE)) is (Verdict.REFUSED if is_alive else Verdict.TAKES)


async def test_a_claim_whose_caller_hung_up_gets_its_peer_with_the_next_call(monkeypatch: pytest.MonkeyPatch) -> None:
    scene = Scene(False, Link.SILENT)
    await scene.set_up()
    manager, again = scene.manager, machine_again(scene, HERE)

    async def hang_up(config: object) -> None:
        raise asyncio.CancelledError

    with monkeypatch.context() as patch, pytest.raises(asyncio.CancelledError):
        patch.setattr(manager.device, "set_peer", hang_up)
        await manager.join(again)
    assert again.key not in manager.device.configs
    assert await scene.attempt(again) is Verdict.TAKES


async def test_of_two_claims_the_first_that_is_proved_has_the_row() -> None:
    scene = Scene(False, Link.SILENT)
    await scene.set_up()
    manager, one, two = scene.manager, thief(scene, ELSEWHERE), machine_again(scene, HERE)
    await manager.join(one)
    await manager.join(two)
    await manager.handshake(two)
    await manager.handshake(one)
    assert (await manager.row(scene.machine)).public_key == two.key
    assert set(manager.device.configs) == {two.key}


async def test_takeovers_and_bindings_are_reported_with_both_sources() -> None:
    scene = Scene(False, Link.SILENT)
    await scene.set_up()
    manager, again = scene.manager, replace(machine_again(scene, ELSEWHERE), unique_token=TOKEN)
    await manager.join(again)
    await manager.events()
    manager.device.hear(again.key, Place(ELSEWHERE))
    await manager.handshake(again)
    events = await manager.events()
    (rekeyed,) = [event for event in events if isinstance(event, MachineRekeyed)]
    assert (rekeyed.old_source, rekeyed.source, rekeyed.basis) == (HERE, ELSEWHERE, "silence")
    assert rekeyed.old_key == scene.machine.key
    assert [event.source for event in events if isinstance(event, UniqueTokenBound)] == [ELSEWHERE]


async def test_refusals_are_reported_with_both_sources() -> None:
    scene = Scene(True, Link.ALIVE)
    await scene.set_up()
    await scene.manager.events()
    await scene.manager.refuses(thief(scene, ELSEWHERE))
    (refused,) = [event for event in await scene.manager.events() if isinstance(event, JoinRefused)]
    assert refused.reason is JoinRefusal.OTHER_UNIQUE_TOKEN
    assert (refused.source, refused.known_source) == (f"{ELSEWHERE}:1", HERE)


async def test_claims_are_few_per_row_and_source_and_end_after_a_minute() -> None:
    scene = Scene(False, Link.SILENT)
    await scene.set_up()
    manager = scene.manager
    for source in (ELSEWHERE, ELSEWHERE, NEIGHBOUR, NEIGHBOUR):
        await manager.join(thief(scene, source))
    manager.time.advance(4)
    for source in (ELSEWHERE, "192.0.2.77"):
        status, text = await manager.refuses(thief(scene, source))
        assert (status, text[:8]) == (Status.RESOURCE_EXHAUSTED, "too many")
    assert len(manager.device.configs) == 5
    manager.time.advance(1)
    await manager.join(thief(scene, ELSEWHERE))
    assert len(manager.device.configs) == 5, "one that has had time for a handshake gave way"
    await manager.pass_time(60)
    assert set(manager.device.configs) == {scene.machine.key}
    assert await manager.store.all_claims() == []


async def test_claims_do_not_exclude_a_caller_with_the_bound_token() -> None:
    scene = Scene(True, Link.KILLED)
    await scene.set_up()
    for _ in range(8):
        await scene.manager.join(machine_again(scene, HERE))
    assert await scene.attempt(machine_again(scene, HERE)) is Verdict.TAKES


async def test_a_token_is_not_bound_to_a_key_that_another_call_presented() -> None:
    """The machine's claim expired before its handshake; a stranger who read its key then presents it with another token."""
    scene = Scene(False, Link.SILENT)
    await scene.set_up()
    manager, again = scene.manager, machine_again(scene, HERE)
    await manager.join(again)
    await manager.pass_time(61)
    await manager.join(replace(again, unique_token="a thief's", source=ELSEWHERE))
    await manager.handshake(again)
    row = await manager.row(again)
    assert (row.public_key, row.unique_token_digest) == (again.key, None)


async def test_an_unproven_row_binds_no_token() -> None:
    manager, stranger = Manager(), FakeMachine(unique_token="a stranger's")
    await manager.join(stranger)
    owner = FakeMachine(node_uuid=stranger.node_uuid, unique_token="mine")
    await manager.join(owner)
    await manager.handshake(owner)
    row = await manager.row(owner)
    assert row.public_key == owner.key
    assert set(manager.device.configs) == {owner.key}
    assert (await manager.refuses(stranger))[0] is Status.PERMISSION_DENIED


async def test_a_claim_outlives_the_server() -> None:
    scene = Scene(True, Link.KILLED)
    await scene.set_up()
    again = machine_again(scene, HERE)
    await scene.manager.join(again)
    after = Manager(store=scene.manager.store, time=scene.manager.time)
    await after.reconciler.load()
    assert after.device.configs[again.key].allowed_ips == ()
    await after.handshake(again)
    assert (await after.row(again)).public_key == again.key


async def test_a_goodbye_by_another_key_or_a_stranger_is_ignored() -> None:
    scene = Scene(False, Link.ALIVE)
    await scene.set_up()
    goodbyes = Goodbyes(scene.manager.links, scene.manager.monitor, scene.manager.machines.remove)
    row = await scene.manager.row(scene.machine)
    assert goodbyes.receive(Goodbye(public_key=new_key()).encode(), row.overlay_address) is None
    assert goodbyes.receive(Goodbye(public_key=scene.machine.key).encode(), row.overlay_address + 1) is None
    assert await scene.attempt(thief(scene, ELSEWHERE)) is Verdict.REFUSED


async def test_a_machine_heard_after_its_goodbye_is_alive() -> None:
    scene = Scene(False, Link.GOODBYE)
    await scene.set_up()
    await scene.manager.pass_time(5)
    scene.manager.device.hear(scene.machine.key)
    assert await scene.attempt(thief(scene, ELSEWHERE)) is Verdict.REFUSED


async def test_a_handshake_that_was_under_way_at_the_goodbye_does_not_undo_it() -> None:
    scene = Scene(False, Link.GOODBYE)
    await scene.set_up()
    scene.manager.device.hear(scene.machine.key, handshake=True, keys_age=1.2)  # the goodbye came a second ago
    row = await scene.manager.row(scene.machine)
    link = scene.manager.links.get(row.id)
    assert link is not None
    assert link.state is LinkState.DOWN
    assert await scene.attempt(thief(scene, HERE)) is Verdict.TAKES, "whoever comes next is admitted at once"


async def test_a_handshake_after_the_goodbye_is_a_new_start() -> None:
    scene = Scene(False, Link.GOODBYE)
    await scene.set_up()
    scene.manager.device.hear(scene.machine.key, handshake=True, keys_age=0.8)
    row = await scene.manager.row(scene.machine)
    link = scene.manager.links.get(row.id)
    assert link is not None
    assert link.state is LinkState.UP


async def test_a_machine_that_asks_to_be_forgotten_is() -> None:
    scene = Scene(True, Link.ALIVE)
    await scene.set_up()
    goodbyes = Goodbyes(scene.manager.links, scene.manager.monitor, scene.manager.machines.remove)
    row = await scene.manager.row(scene.machine)
    goodbye = goodbyes.receive(Goodbye(public_key=scene.machine.key, forget=True).encode(), row.overlay_address)
    assert goodbye is not None
    await goodbyes.forget(goodbye)
    assert await scene.manager.machines.find(scene.machine.node_uuid) is None


async def test_a_key_presented_with_two_different_tokens_is_bound_to_neither() -> None:
    """The server lost its state, and a stranger who read a machine's key calls before the machine."""
    manager, machine = Manager(), FakeMachine(unique_token=TOKEN)
    await manager.join(replace(machine, unique_token="a thief's", source=ELSEWHERE))
    await manager.join(machine)
    await manager.join(replace(machine, unique_token="a thief's", source=ELSEWHERE))
    await manager.handshake(machine)
    assert (await manager.row(machine)).bound_digest is None
    await manager.pass_time(61)
    again = replace(machine, key=new_key())
    await manager.join(again)
    await manager.handshake(again)
    assert (await manager.row(machine)).bound_digest is not None


async def test_a_claim_made_without_the_tunnel_gets_an_address_for_it_when_the_machine_asks() -> None:
    """A machine that restarted where UDP is blocked tries UDP first, and then the tunnel with the same key."""
    scene = Scene(True, Link.KILLED)
    await scene.set_up()
    manager, again = scene.manager, machine_again(scene, HERE)
    assert not (await manager.join(again)).grpc_peer_addr_port
    answer = await manager.join(replace(again, tunnel=True))
    assert answer == await manager.join(replace(again, tunnel=True))
    path = FakePath(again.key)
    link = manager.link(answer)
    assert link.machine.public_key == again.key
    manager.monitor.open_stream(link, path, lambda refusal: None, HERE)
    manager.device.hear(again.key, path)
    await manager.handshake(again)
    row = await manager.row(again)
    assert (row.public_key, row.tunnel, row.virtual_address) == (again.key, True, link.machine.virtual_address)
    assert manager.link(answer).machine == row


async def test_a_claim_made_with_the_tunnel_and_proved_by_udp_leaves_a_row_that_is_dialled() -> None:
    scene = Scene(True, Link.KILLED)
    await scene.set_up()
    manager, again = scene.manager, replace(machine_again(scene, HERE), tunnel=True)
    await manager.join(again)
    assert not (await manager.join(replace(again, tunnel=False))).grpc_peer_addr_port
    manager.device.hear(again.key, Place(HERE))
    await manager.handshake(again)
    row = await manager.row(again)
    assert (row.public_key, row.tunnel) == (again.key, False)


@pytest.mark.parametrize("kind", [BanKind.KEY, BanKind.UNIQUE])
async def test_a_claim_that_is_banned_before_its_handshake_takes_nothing(kind: BanKind) -> None:
    scene = Scene(False, Link.SILENT)
    await scene.set_up()
    manager, stranger = scene.manager, thief(scene, ELSEWHERE)
    await manager.join(stranger)
    digest = unique_token_digest("a thief's")
    assert digest is not None
    ban = Ban(kind=kind, value=stranger.key.encode() if kind is BanKind.KEY else digest.hex())
    await manager.store.transact(lambda transaction: transaction.set_banned(ban, True))
    await manager.handshake(stranger)
    assert (await manager.row(scene.machine)).public_key == scene.machine.key
    assert stranger.key not in manager.device.configs


async def test_a_claim_to_a_row_that_is_denied_meanwhile_takes_nothing() -> None:
    scene = Scene(False, Link.SILENT)
    await scene.set_up()
    manager, stranger = scene.manager, thief(scene, ELSEWHERE)
    await manager.join(stranger)
    row = await manager.admin.deny((await manager.row(scene.machine)).id)
    await manager.handshake(stranger)
    assert manager.device.configs == {}
    link = manager.links.get(row.id)
    assert link is not None
    assert (link.machine.public_key, link.state.value) == (scene.machine.key, "down")
