"""Random sequences of calls, handshakes and restarts, with two invariants.

Nobody without the token or key takes a living or bound machine; and the machine itself is never out for more than 8 s, with its
token 1 s.
"""

from dataclasses import replace
from typing import TYPE_CHECKING

import anyio
import pytest
from grpclib import GRPCError
from hypothesis import given, settings
from hypothesis import strategies as st

from siderolink.common.goodbye import Goodbye
from siderolink.server.fleet.goodbyes import Goodbyes
from siderolink.server.store import Machine, MemoryStore
from tests.support.manager import FakeMachine, Manager, new_key
from tests.unit.server.test_who_takes_a_row import ELSEWHERE, HERE, TOKEN, Place

if TYPE_CHECKING:
    from siderolink.common.keys import PublicKey

STEPS = st.lists(
    st.sampled_from(
        [
            "machine restarts",
            "machine calls",
            "machine shakes hands",
            "machine stops",
            "machine says goodbye",
            "thief calls",
            "thief calls from the machine's address",
            "thief shakes hands",
            "thief replays the key",
            "a second passes",
            "twenty seconds pass",
            "a minute passes",
            "server restarts",
        ]
    ),
    max_size=40,
)


class World:
    """One machine, one thief, one server, and two invariants."""

    def __init__(self, has_token: bool) -> None:
        self.manager = Manager(store=MemoryStore())
        self.machine = FakeMachine(unique_token=TOKEN if has_token else None)
        self.has_token = has_token
        self.machine_keys: set[PublicKey] = {self.machine.key}
        self.named_keys: set[PublicKey] = set()
        self.admitted_keys: set[PublicKey] = set()
        self.is_running = False
        self.thieves: list[FakeMachine] = []

    async def step(self, step: str) -> None:
        held, was_alive = await self.holder(), self.is_alive()
        bound = held is not None and held.bound_digest is not None
        machines = held is not None and held.public_key in self.machine_keys and held.was_linked
        await getattr(self, "do_" + step.replace(" ", "_").replace("'", ""))()
        row = await self.holder()
        if machines and (was_alive or (bound and self.has_token)):
            assert row is not None, step
            assert row.public_key in self.machine_keys, f"{step}: a living or bound machine was taken"

    async def holder(self) -> Machine | None:
        return await self.manager.machines.find(self.machine.node_uuid)

    def is_alive(self) -> bool:
        """The machine runs and the server has its present key proved."""
        link = self.manager.links.by_key(self.machine.key)
        return self.is_running and link is not None and link.claim is None and link.machine.linked_at is not None

    async def do_machine_restarts(self) -> None:
        self.manager.device.answering.discard(self.machine.key)
        self.machine = replace(self.machine, key=new_key())
        self.machine_keys.add(self.machine.key)
        self.is_running = True

    async def do_machine_calls(self) -> None:
        self.is_running = True
        self.named_keys.add(self.machine.key)
        if await self._call(self.machine):
            self.admitted_keys.add(self.machine.key)

    async def do_machine_shakes_hands(self) -> None:
        if self.is_running and self.machine.key in self.admitted_keys & set(self.manager.device.configs):
            self.manager.device.answering.add(self.machine.key)
            self.manager.device.hear(self.machine.key, Place(HERE))
            await self.manager.handshake(self.machine)

    async def do_machine_stops(self) -> None:
        self.is_running = False
        self.manager.device.answering.discard(self.machine.key)

    async def do_machine_says_goodbye(self) -> None:
        row = await self.holder()
        if self.is_alive() and row is not None:
            goodbyes = Goodbyes(self.manager.links, self.manager.monitor, self.manager.machines.remove)
            goodbyes.receive(Goodbye(public_key=self.machine.key).encode(), row.overlay_address)
            await self.do_machine_stops()

    async def do_thief_calls(self) -> None:
        await self._thief(ELSEWHERE)

    async def do_thief_calls_from_the_machines_address(self) -> None:
        await self._thief(HERE)

    async def _thief(self, source: str) -> None:
        actor = replace(self.machine, key=new_key(), source=source, unique_token="a thief's")
        self.thieves.append(actor)
        await self._call(actor)

    async def do_thief_shakes_hands(self) -> None:
        for actor in self.thieves:
            if actor.key in self.manager.device.configs:
                await self.manager.handshake(actor)

    async def do_thief_replays_the_key(self) -> None:
        if self.machine.key in self.named_keys:  # nobody can have read this key earlier
            await self._call(replace(self.machine, source=ELSEWHERE, unique_token="a thief's"))

    async def _call(self, actor: FakeMachine) -> bool:
        try:
            await self.manager.join(actor)
        except GRPCError:
            return False
        return True

    async def do_a_second_passes(self) -> None:
        await self._pass(1)

    async def do_twenty_seconds_pass(self) -> None:
        await self._pass(20)

    async def do_a_minute_passes(self) -> None:
        for _ in range(3):
            await self._pass(20)

    async def _pass(self, seconds: float) -> None:
        """A machine that runs is heard every 25 s at least."""
        await self.manager.pass_time(seconds)
        if self.is_alive():
            self.manager.device.hear(self.machine.key)

    async def do_server_restarts(self) -> None:
        before = self.manager
        await before.fleet.last_seen.write()
        self.manager = Manager(store=before.store, time=before.time)
        self.manager.device.answering = before.device.answering
        await self.manager.reconciler.load()
        if self.is_running and self.machine.key in self.manager.device.configs:
            self.manager.device.hear(self.machine.key, Place(HERE))
            await self.manager.handshake(self.machine)

    async def comes_back(self) -> None:
        """A machine that starts again has its row within 8 s, with its token within 1 s, unless a thief could take it."""
        row = await self.holder()
        stolen = row is not None and row.was_linked and row.public_key not in self.machine_keys
        claimed_key = row is not None and row.bound_digest is not None and not self.has_token
        if stolen or claimed_key:
            return
        await self.do_machine_restarts()
        began_at = self.manager.time.now
        while not await self._call(self.machine):
            assert self.manager.time.now - began_at < 8, "the machine is kept out"
            await self._pass(1)
        self.admitted_keys.add(self.machine.key)
        assert self.manager.time.now - began_at <= (1 if self.has_token else 8)
        await self.do_machine_shakes_hands()
        assert self.is_alive()
        row = await self.holder()
        assert row is not None
        assert row.public_key == self.machine.key


@pytest.mark.parametrize("has_token", [True, False])
@given(steps=STEPS)
@settings(max_examples=150, deadline=None)
def test_nobody_takes_a_living_or_bound_machine_and_it_comes_back_in_time(has_token: bool, steps: list[str]) -> None:
    async def run() -> None:
        world = World(has_token)
        await world.do_machine_calls()
        await world.do_machine_shakes_hands()
        for step in steps:
            await world.step(step)
        await world.comes_back()

    anyio.run(run)
