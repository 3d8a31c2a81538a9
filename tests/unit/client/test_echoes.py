"""When echo requests are sent over a link: on a fake device, by looks that are counted."""

from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from dataclasses import replace
from ipaddress import IPv6Address

import anyio
import pytest

from siderolink.client.link import echoes
from siderolink.client.link.echoes import EchoCheck
from siderolink.client.link.signals import EchoesUnanswered, Signal
from siderolink.common.keys import PrivateKey, PublicKey
from siderolink.common.tasks import background_tasks
from siderolink.common.wireguard.device import PeerConfig, PeerStatus
from tests.support.fake_device import FakeDevice, FakeKernelDevice, VirtualClock

pytestmark = [pytest.mark.anyio, pytest.mark.usefixtures("no_leaks")]

SERVER = IPv6Address("fdae:41e4:649b:9303::1")


class _Looks:
    """A device whose peer was heard some time ago; counts the looks at it."""

    looks = 0
    silent_for = 0.0

    async def peer(self, public_key: PublicKey) -> PeerStatus | None:
        self.looks += 1
        status: PeerStatus | None = await super().peer(public_key)  # type: ignore[misc]
        return status and replace(status, last_handshake=1.0, silent_for=self.silent_for)


class Userspace(_Looks, FakeDevice):
    pass


class Kernel(_Looks, FakeKernelDevice):
    pass


class Bench:
    """The check of one link, and its host."""

    def __init__(self, device: Userspace | Kernel) -> None:
        self.device = device
        self.key = PrivateKey.generate().public_key()
        self.has_api = False
        self.answers = [True]
        """Whether each next check is answered; the last one stays."""
        self.checks = 0
        self.told: list[Signal] = []

    async def is_answered(self, interface: str, server: IPv6Address, wait: float = 0.0) -> bool:
        self.checks += 1
        return self.answers.pop(0) if len(self.answers) > 1 else self.answers[0]

    @asynccontextmanager
    async def running(self, *, may_move: bool = True) -> AsyncIterator[EchoCheck]:
        await self.device.set_peer(PeerConfig(public_key=self.key))
        self.device.looks = 0
        check = EchoCheck(
            self, self.device, self.key, SERVER, self.told.append, may_move=may_move, has_api=lambda: self.has_api
        )
        async with background_tasks() as tasks:
            tasks.start_soon(check.run)
            yield check


@pytest.fixture(params=[Userspace, Kernel])
def bench(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> Bench:
    for name, seconds in (("MIN_POLL_SECONDS", 0.005), ("UNANSWERED_AFTER", 0.01), ("SILENT_AFTER", 0.02)):
        monkeypatch.setattr(echoes, name, seconds)
    return Bench(request.param(VirtualClock()))


async def until(bench: Bench, checks: int) -> None:
    with anyio.fail_after(10):
        while bench.checks < checks:
            await anyio.sleep(0.005)


async def test_a_silent_server_is_pinged_while_there_is_no_api_connection(bench: Bench) -> None:
    async with bench.running():
        bench.device.silent_for = 1.0
        await until(bench, 3)
        assert bench.told == []
        bench.answers = [False]
        await until(bench, bench.checks + 1)
        await anyio.wait_all_tasks_blocked()
        assert bench.told == [EchoesUnanswered("nothing was heard for a while, and echoes go unanswered")]


async def test_a_server_that_never_answered_an_echo_is_not_suspected_for_its_silence(bench: Bench) -> None:
    bench.answers = [False]
    bench.device.silent_for = 1.0
    async with bench.running() as check:
        await until(bench, 1)
        await anyio.wait_all_tasks_blocked()
        assert bench.told == []
        check.check_now()  # unless a server died
        await until(bench, 2)
        await anyio.wait_all_tasks_blocked()
        assert [type(one) for one in bench.told] == [EchoesUnanswered]


@pytest.mark.parametrize(("may_move", "has_api"), [(True, True), (False, False)])
async def test_otherwise_silence_causes_no_echo_and_the_kernel_is_not_polled(
    bench: Bench, may_move: bool, has_api: bool
) -> None:
    bench.has_api, bench.device.silent_for = has_api, 1.0
    async with bench.running(may_move=may_move) as check:
        if isinstance(bench.device, Userspace) and may_move:
            with anyio.fail_after(10):
                while bench.device.looks < 3:
                    await anyio.sleep(0.005)
            assert bench.checks == 0
        else:
            await anyio.sleep(0.1)
            assert (bench.device.looks, bench.checks) == (0, 0)
        check.check_now()
        await until(bench, 1)


async def test_a_guessed_failure_counts_only_where_echoes_were_answered_in_time(bench: Bench) -> None:
    bench.answers = [False]
    async with bench.running() as check:

        def shows_failure() -> bool:
            return check.shows_failure

        check.check_now(has_failed=True, is_guess=True)
        await until(bench, 1)
        assert not shows_failure()
        check.note_answer(echoes.ECHO_SECONDS * 2)
        check.check_now(has_failed=True, is_guess=True)
        assert not shows_failure(), "it came too late to say anything about the next one"
        check.check_now(has_failed=True)
        assert shows_failure(), "it is reported"
        check.note_answer(echoes.ECHO_SECONDS / 2)
        assert not shows_failure(), "the server was heard"
        check.check_now(has_failed=True, is_guess=True)
        assert shows_failure()


async def test_a_server_that_is_heard_again_has_not_failed(bench: Bench) -> None:
    async with bench.running() as check:
        check.check_now(has_failed=True)
        await until(bench, 1)
        await anyio.wait_all_tasks_blocked()
        assert not check.shows_failure, "the echo was answered"

        async def fail() -> None:
            bench.answers = [False]
            check.check_now(has_failed=True)
            await until(bench, bench.checks + 1)
            await anyio.wait_all_tasks_blocked()
            assert check.shows_failure

        await fail()
        check.note_handshake()
        assert not check.shows_failure
        await fail()
        bench.answers = [True]
        with anyio.fail_after(10):
            while isinstance(bench.device, Kernel) and not await check.still_carries():
                await anyio.sleep(0.005)  # not right after an unanswered one
        assert check.shows_failure is isinstance(bench.device, Userspace)
