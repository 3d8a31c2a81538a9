"""Several servers of one store, in virtual time."""

from collections.abc import AsyncIterator, Callable
from contextlib import AsyncExitStack, asynccontextmanager
from dataclasses import dataclass
from typing import cast

import anyio

from siderolink.server import MemoryStore
from siderolink.server.fleet.membership import Membership
from siderolink.server.fleet.owners import Owners
from siderolink.server.store.sql.postgres import PostgresStore
from tests.support.fake_device import FakePath, VirtualClock
from tests.support.manager import FakeMachine, Manager, following
from tests.support.postgres import cluster


class UdpPath(FakePath):
    def __init__(self, endpoint: str) -> None:
        super().__init__()
        self._endpoint = endpoint

    def __str__(self) -> str:
        return self._endpoint


async def settled(is_so: Callable[[], bool]) -> None:
    with anyio.fail_after(30):
        while not is_so():
            await anyio.lowlevel.checkpoint()


@dataclass
class Fleet:
    """Managers by name, with one store and one clock."""

    managers: dict[str, Manager]
    time: VirtualClock
    asked: list[tuple[str, str]]
    """The queries: which server, about which machine."""
    is_connected: bool = True

    def __getitem__(self, name: str) -> Manager:
        return self.managers[name]

    async def heard_at(self, owner_server_id: str, machine_id: str) -> float | None:
        """See `OwnerQueries`."""
        self.asked.append((owner_server_id, machine_id))
        return await self[owner_server_id].fleet.liveness.heard_at(machine_id) if self.is_connected else None

    async def pass_time(self, seconds: float, *living: str) -> None:
        """Advance the time with heartbeats of these servers, by default of all."""
        while seconds > 0:
            step = min(seconds, 1.0 if seconds <= 10 else 2.0)
            self.time.advance(step)
            seconds -= step
            for name in living or self.managers:
                await membership(self[name]).beat()
        for name in living or self.managers:
            await self[name].monitor.check()

    async def is_owned_by(self, machine: FakeMachine, name: str) -> None:
        """Wait until every server knows that this one owns the machine's link, and has set its peer accordingly."""
        row = await self[name].row(machine)
        await settled(lambda: all(owners(one).owner_of(row.id) == name for one in self.managers.values()))
        await settled(lambda: all(self.is_passive(other, machine) == (other != name) for other in self.managers))

    def is_passive(self, name: str, machine: FakeMachine) -> bool:
        return self[name].device.configs[machine.key].is_passive


def membership(manager: Manager) -> Membership:
    assert manager.membership is not None
    return manager.membership


def owners(manager: Manager) -> Owners:
    assert manager.fleet.owners is not None
    return manager.fleet.owners


@asynccontextmanager
async def fleet_of(*names: str, store: MemoryStore | None = None, kind: str = "memory") -> AsyncIterator[Fleet]:
    """With `kind` "postgres", each has its own connections to one database."""
    store, time = store or MemoryStore(), VirtualClock()
    async with AsyncExitStack() as stack:
        stores = [store] * len(names)
        if kind == "postgres":
            url = cluster().url(stack.enter_context(cluster().database()))
            stores = [
                cast("MemoryStore", await stack.enter_async_context(PostgresStore.open(url, unsealed_secrets=True)))
                for _ in names
            ]
        managers = (Manager(store=one, time=time, server_id=name) for name, one in zip(names, stores, strict=True))
        fleet = Fleet(dict(zip(names, managers, strict=True)), time, [])
        for manager in fleet.managers.values():
            manager.fleet.liveness.owner_queries = fleet
            await stack.enter_async_context(following(manager))
        await fleet.pass_time(2)
        yield fleet


async def linked(fleet: Fleet, name: str, machine: FakeMachine | None = None) -> FakeMachine:
    """A machine that joined at one server and has a session there; all servers know it."""
    machine = machine or FakeMachine()
    await fleet[name].join(machine)
    await settled(lambda: all(machine.key in one.device.configs for one in fleet.managers.values()))
    fleet[name].device.hear(machine.key, UdpPath(f"{machine.source}:51820"), handshake=True)
    await fleet[name].monitor.check()
    await fleet.is_owned_by(machine, name)
    return machine
