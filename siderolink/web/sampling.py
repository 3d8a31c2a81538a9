"""Data for plots: figures of the server, and of machines being viewed, kept for a while."""

import logging
import time
from collections import deque
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Final

import anyio
from anyio.abc import TaskGroup

from siderolink.common.newest_dict import NewestDict
from siderolink.common.pb.siderolink.admin.v1 import (
    EventServiceStub,
    FollowEventsRequest,
    GetStatusRequest,
    Machine,
    MachineAnswer,
    MachineRequest,
    MachineServiceStub,
    ServerServiceStub,
    ServerStatus,
)
from siderolink.common.tasks import background_tasks
from siderolink.web.api import ApiError, Caller, SignedOutError, explained

log = logging.getLogger(__name__)

EVERY: Final = 5.0
KEPT: Final = 720
"""An hour."""
_MACHINES: Final = 256
_MACHINE_SAMPLES: Final = 400
_RETRY_SECONDS: Final = 5.0
_ANSWER_SECONDS: Final = 30.0


@dataclass(frozen=True, slots=True, kw_only=True)
class Sample:
    """The server's figures at one time."""

    at: float
    up: int
    down: int
    waiting: int
    """Accepted machines that were never up."""
    kept_out: int
    """Pending or denied."""
    received_bytes: int
    sent_bytes: int
    joins: int
    """Counted since the web UI started."""
    refusals: int


def sample_of(status: ServerStatus, at: float, joins: int) -> Sample:
    return Sample(
        at=at,
        up=status.links.get("up", 0),
        down=status.links.get("down", 0),
        waiting=status.links.get("pending", 0),
        kept_out=status.machines.get("pending", 0) + status.machines.get("denied", 0),
        received_bytes=status.received_bytes,
        sent_bytes=status.sent_bytes,
        joins=joins,
        refusals=sum(status.refusals.values()),
    )


def rates(times: Sequence[float], totals: Sequence[int]) -> list[float | None]:
    """Rates per second between consecutive times; None where a counter decreased, as after a restart."""
    found: list[float | None] = [None]
    for index in range(1, len(times)):
        passed, more = times[index] - times[index - 1], totals[index] - totals[index - 1]
        found.append(more / passed if passed > 0 and more >= 0 else None)
    return found


class MachineTraffic:
    """Bytes from and to recently viewed machines."""

    def __init__(self) -> None:
        self._samples: NewestDict[str, deque[tuple[float, int, int]]] = NewestDict(_MACHINES)

    def note(self, machine: Machine, at: float) -> Sequence[tuple[float, int, int]]:
        """Add a machine's present counters; returns all its samples."""
        found = self._samples.get(machine.id)
        if found is None:
            found = deque(maxlen=_MACHINE_SAMPLES)
        self._samples.put(machine.id, found)
        if not found or at - found[-1][0] >= 1.0:
            found.append((at, machine.received_bytes, machine.sent_bytes))
        return found


@dataclass(frozen=True, slots=True)
class Answered:
    """The answer of a machine's API, or why there is none."""

    at: float
    answer: MachineAnswer | None = None
    problem: str = ""


class AnsweredMachines:
    """Recent answers of machines, shared by all viewers."""

    def __init__(self) -> None:
        self._found: NewestDict[str, Answered] = NewestDict(_MACHINES)

    def of(self, machine_id: str) -> Answered | None:
        return self._found.get(machine_id)

    async def renewed(self, caller: Caller, machine_id: str) -> Answered:
        """Query the machine again if the last answer is old. Raises SignedOutError."""
        found = self._found.get(machine_id)
        if found is not None and time.monotonic() - found.at < _ANSWER_SECONDS:
            return found
        try:
            with explained():
                answer = await caller.stub(MachineServiceStub).ask_machine(MachineRequest(name=machine_id))
            found = Answered(time.monotonic(), answer)
        except SignedOutError:
            raise
        except ApiError as error:
            found = Answered(time.monotonic(), problem=str(error))
        self._found.put(machine_id, found)
        return found


@dataclass
class Sampler:
    """Collects the server's figures, with this process's own key or that of a signed-in user."""

    caller: Callable[[], Caller | None]
    may_go_on: Callable[[Caller], bool] = lambda caller: True
    """Whether credentials that were given still count."""
    samples: deque[Sample] = field(default_factory=lambda: deque(maxlen=KEPT))
    machines: MachineTraffic = field(default_factory=MachineTraffic)
    answers: AnsweredMachines = field(default_factory=AnsweredMachines)
    joins: int = 0

    async def run(self) -> None:
        """Collect figures until cancelled."""
        async with anyio.create_task_group() as tasks:
            tasks.start_soon(self._count_joins)
            while True:
                if (caller := self.caller()) is not None:
                    try:
                        await self.take_sample(caller)
                    except ApiError as error:
                        log.debug("cannot read the server's figures: %s", error)
                await anyio.sleep(EVERY)

    async def take_sample(self, caller: Caller) -> None:
        """Take one sample. Raises ApiError."""
        with explained():
            status = await caller.stub(ServerServiceStub).get_status(GetStatusRequest())
        self.samples.append(sample_of(status, time.time(), self.joins))

    async def _count_joins(self) -> None:
        while True:
            if (caller := self.caller()) is not None:
                try:
                    async with background_tasks() as tasks:
                        tasks.start_soon(self._end_with, caller, tasks)
                        await self._follow_joins(caller)
                except ApiError as error:
                    log.debug("cannot follow joins: %s", error)
            await anyio.sleep(_RETRY_SECONDS)

    async def _follow_joins(self, caller: Caller) -> None:
        async with caller.following(EventServiceStub) as stub:
            with explained():
                async for _ in stub.follow_events(FollowEventsRequest(kinds=["joined"])):
                    self.joins += 1

    async def _end_with(self, caller: Caller, tasks: TaskGroup) -> None:
        while True:
            await anyio.sleep(_RETRY_SECONDS)
            if not self.may_go_on(caller):
                tasks.cancel_scope.cancel()
