"""Every call of a client against a server that breaks the connection, in every way, at every moment, on both event loops.

What comes of it is always one of this package's errors, with a reason, then another try; never a traceback, never an end.
"""

import asyncio
import logging
from collections.abc import Awaitable, Callable
from contextvars import ContextVar
from ipaddress import IPv6Address, IPv6Network
from pathlib import Path
from typing import Any

import anyio
import pytest

from siderolink.cli import control
from siderolink.client.link.probes import watch_api
from siderolink.client.link.provisioning import NodeInfo, provision
from siderolink.client.reporting import event_sender
from siderolink.client.reporting.event_sender import EventSender
from siderolink.common.backoff import RetryTrigger
from siderolink.common.errors import JoinError
from siderolink.common.grpc import GRPCError, Limits, Status
from siderolink.common.grpc import client as grpc_client
from siderolink.common.hostport import HostPort
from siderolink.common.join_url import JoinURL
from siderolink.common.pb.machine import AddressEvent
from siderolink.common.tasks import background_tasks
from siderolink.common.transport import choice
from siderolink.common.wireguard.device import PeerConfig
from tests.support.breaking_peer import MOMENTS, WAYS, BreakingPeer, breaking_peer
from tests.support.fake_device import FakeDevice, VirtualClock
from tests.support.provision import new_key

HASTE = 0.2
"""The time limit for a silent peer, in seconds."""
Run = Callable[[Callable[[str], Awaitable[None]]], None]
UUID = "6ecae4f1-8b8e-4b3a-9a7a-1f3c0f0b1a5e"


@pytest.fixture(params=["asyncio", "uvloop"])
def run(request: pytest.FixtureRequest, caplog: pytest.LogCaptureFixture) -> Run:
    """Runs a test on one of the loops; it fails where anything reached the loop's exception handler or the log as an error."""

    def run_one(test: Callable[[str], Awaitable[None]]) -> None:
        contexts: list[dict[str, Any]] = []

        async def main() -> None:
            asyncio.get_running_loop().set_exception_handler(lambda _, context: contexts.append(context))
            with anyio.fail_after(30):
                await in_every_way(test)

        with caplog.at_level(logging.DEBUG):
            anyio.run(main, backend_options={"use_uvloop": request.param == "uvloop"})
        assert not contexts
        assert not [record for record in caplog.records if record.levelno >= logging.ERROR]

    return run_one


@pytest.fixture(autouse=True)
def haste(monkeypatch: pytest.MonkeyPatch) -> None:
    hasty = Limits(preface_timeout=HASTE, client_ping_interval=HASTE, ping_timeout=HASTE, connect_timeout=HASTE)
    monkeypatch.setattr(grpc_client, "Limits", lambda: hasty)
    monkeypatch.setattr(choice, "WATCHFUL", hasty)
    monkeypatch.setattr(event_sender, "PUBLISH_TIMEOUT", HASTE)
    monkeypatch.setattr(control, "_ANSWER_TIMEOUT", HASTE)


async def in_every_way(test: Callable[[str], Awaitable[None]]) -> None:
    """Run the test for all ways to break a connection, beside each other; an error names the way."""

    async def try_one(way: str) -> None:
        try:
            await test(way)
        except BaseException as error:
            error.add_note(f"where the peer does: {way}")
            raise

    async with anyio.create_task_group() as tasks:
        for way in WAYS:
            tasks.start_soon(try_one, way)


@pytest.fixture(params=MOMENTS)
def moment(request: pytest.FixtureRequest) -> str:
    return str(request.param)


def test_a_broken_server_during_provision(run: Run, moment: str) -> None:
    async def test(way: str) -> None:
        async with breaking_peer(way, moment) as peer:
            url = JoinURL("127.0.0.1", peer.port, tls=False)
            for _ in range(2):
                with pytest.raises(JoinError) as caught:
                    await provision(url, NodeInfo(uuid=UUID), new_key(), timeout=HASTE)
                assert str(caught.value)

    run(test)


def test_a_broken_server_during_a_tunnels_stream(run: Run, moment: str) -> None:
    async def test(way: str) -> None:
        async with breaking_peer(way, moment) as peer, background_tasks() as tasks:
            retry, reasons = RetryTrigger(), list[str]()
            virtual = IPv6Address("fdae:41e4:649b:9304::42"), 50888
            route = choice.TunnelRoute(JoinURL("127.0.0.1", peer.port, tls=False), virtual, None, retry)

            async def carry() -> None:
                config = PeerConfig(public_key=new_key(), allowed_ips=(IPv6Network("fdae::1/128"),))
                await route.carry(FakeDevice(VirtualClock()), config, interrupted)
                raise AssertionError("nothing here refuses the stream for good")

            def interrupted(reason: str) -> None:
                reasons.append(reason)

            tasks.start_soon(carry)
            await again(peer, retry.fire)
            assert reasons
            assert all(reasons)

    run(test)


def test_a_broken_sink_during_the_delivery_of_events(run: Run, moment: str) -> None:
    async def test(way: str) -> None:
        sender = EventSender()
        sender.publish(AddressEvent(hostname="a"))
        async with breaking_peer(way, moment) as peer, background_tasks() as tasks:
            tasks.start_soon(sender.run, HostPort("127.0.0.1", peer.port))
            await again(peer, sender.kick)
            assert (sender.delivered, sender.waiting) == (0, 1)

    run(test)


def test_a_broken_server_during_the_health_call(run: Run, moment: str) -> None:
    async def test(way: str) -> None:
        retry = RetryTrigger()
        # a peer that is silent, or answers in an unknown way, is watched while the connection lasts
        times = 1 if way in ("settings-silence", "odd-status") else 2
        async with breaking_peer(way, moment) as peer, background_tasks() as tasks:
            tasks.start_soon(watch_api, JoinURL("127.0.0.1", peer.port, tls=False), None, lambda signal: None, retry)
            await again(peer, retry.fire, times)

    run(test)


def test_a_broken_process_behind_the_control_socket(
    run: Run, moment: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(control, "directory", lambda: folder.get())
    folder: ContextVar[Path] = ContextVar("folder")

    async def test(way: str) -> None:
        folder.set(tmp_path / way)
        folder.get().mkdir()
        async with breaking_peer(way, moment, path=folder.get() / "wg0.sock"):
            asked = await control.query_all()
            assert not asked.answers
            (failure,) = asked.failures
            assert "wg0.sock does not answer: " in failure

    run(test)


async def again(peer: BreakingPeer, hurry: Callable[[], None], times: int = 3) -> None:
    """Wait until the client has tried again `times` times, with shortened pauses."""
    async with background_tasks() as tasks:

        async def keep_hurrying() -> None:
            while True:
                await anyio.sleep(0.02)
                hurry()

        tasks.start_soon(keep_hurrying)
        await peer.until_connections(lambda count: count >= times)


def test_an_unforeseen_error_is_logged_with_its_traceback_and_costs_one_try(caplog: pytest.LogCaptureFixture) -> None:
    class OddError(Exception):
        pass

    with pytest.raises(JoinError, match="the call to the sink failed: OddError: what nobody foresaw"):
        with grpc_client.translate_errors("the sink"):
            raise OddError("what nobody foresaw")
    (record,) = [record for record in caplog.records if record.levelname == "ERROR"]
    assert record.exc_info is not None
    assert record.exc_info[0] is OddError
    with pytest.raises(GRPCError), grpc_client.translate_errors():
        raise GRPCError(Status.UNAVAILABLE, "passes")
