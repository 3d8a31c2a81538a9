"""What becomes of new settings while a link runs, on a fake device and a real API on the loopback."""

from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from dataclasses import replace

import anyio
import pytest
from grpclib import GRPCError, Status

from siderolink.client.link import events
from siderolink.client.link.events import ConnectionState
from siderolink.client.link.provisioning import NodeInfo
from siderolink.client.link.runner import LinkOptions
from siderolink.client.link.supervisor import LinkSupervisor, Verdict, describe_changes, try_first
from siderolink.common.keys import PublicKey
from siderolink.common.tasks import background_tasks
from tests.support.provision import new_key, provision_api, response
from tests.unit.client.test_runner import ONE, TWO, Bench, running

pytestmark = [pytest.mark.anyio, pytest.mark.usefixtures("no_leaks")]

WRONG = GRPCError(Status.PERMISSION_DENIED, "invalid join token")


@asynccontextmanager
async def connected(server: PublicKey) -> AsyncIterator[tuple[Bench, LinkSupervisor]]:
    async with running(response(server, ONE)) as bench, background_tasks() as tasks:
        supervisor = LinkSupervisor(bench.runner, bench.emit)
        tasks.start_soon(supervisor.run)
        await bench.saw(events.Connecting)
        await anyio.wait_all_tasks_blocked()
        bench.shake_hands(server)
        await bench.saw(events.Connected)
        yield bench, supervisor


def with_token(bench: Bench, token: str = "of META") -> LinkOptions:
    options = bench.runner.options
    return replace(options, machine=replace(options.machine, unique_token=token))


async def test_a_change_with_the_same_answer_keeps_the_session() -> None:
    server = new_key()
    async with connected(server) as (bench, supervisor):
        assert bench.device is not None
        calls = list(bench.device.calls)
        bench.trial = "there must be no trial"
        assert await supervisor.apply(with_token(bench)) == Verdict(outcome="applied")
        assert bench.service.requests[-1].node_unique_token == "of META"
        assert await supervisor.apply(with_token(bench)) == Verdict(outcome="unchanged")
        assert bench.device.calls == calls
        assert bench.state() is ConnectionState.CONNECTED


async def test_a_new_server_key_is_used_on_the_same_interface() -> None:
    server, other = new_key(), new_key()
    async with connected(server) as (bench, supervisor):
        bench.service.answer = response(other, TWO)
        assert (await supervisor.apply(with_token(bench))).outcome == "applied"
        await bench.saw(events.Connecting, 2)
        await anyio.wait_all_tasks_blocked()
        bench.shake_hands(other)
        await bench.saw(events.Connected, 2)
        assert bench.device is not None
        assert set(bench.device.configs) == {other}
        assert len(bench.configs) == 1


async def test_a_failed_handshake_silences_the_link_and_brings_it_back() -> None:
    server = new_key()
    async with connected(server) as (bench, supervisor):
        assert bench.device is not None
        bench.service.answer = response(server, TWO)
        bench.trial = "no handshake by udp"
        bench.device.calls.clear()
        verdict = await supervisor.apply(with_token(bench))
        assert (verdict.outcome, verdict.reason) == ("refused", "the server accepted them, but no handshake by udp")
        await anyio.wait_all_tasks_blocked()
        removed = bench.device.calls.index(("remove", server))
        assert ("handshake", server) in bench.device.calls[removed:]
        bench.shake_hands(server)
        await anyio.wait_all_tasks_blocked()
        assert bench.state() is ConnectionState.CONNECTED
        assert bench.runner.options.machine.unique_token == ""
        assert not any(isinstance(event, events.Disconnected) for event in bench.events)


async def test_a_refusal_is_reported_and_the_settings_are_dropped_unless_kept() -> None:
    async with connected(new_key()) as (bench, supervisor):
        bench.service.answer = WRONG
        before = bench.runner.options
        for keep in (False, True):
            verdict = await supervisor.apply(with_token(bench), keep=keep)
            assert verdict.is_refused
            assert "invalid join token" in verdict.reason
            assert ("invalid join token" in supervisor.refusal) == keep
        assert await supervisor.apply(before) == Verdict(outcome="unchanged")
        assert supervisor.refusal == ""


async def test_the_last_refusal_is_kept_until_settings_are_applied() -> None:
    async with connected(new_key()) as (bench, supervisor):
        answer, bench.service.answer = bench.service.answer, WRONG
        await supervisor.apply(with_token(bench))
        assert supervisor.last_refused.startswith("unique token: ")
        assert "invalid join token" in supervisor.last_refused
        assert await supervisor.apply(bench.runner.options) == Verdict(outcome="unchanged")
        assert supervisor.last_refused, "it is what somebody wants to know"
        bench.service.hold = anyio.Event()
        await supervisor.apply(with_token(bench), timeout=0.1)
        assert "within 0 s" in supervisor.last_refused
        bench.service.hold.set()
        bench.service.answer = answer
        assert (await supervisor.apply(with_token(bench))).outcome == "applied"
        assert supervisor.last_refused == ""


async def test_a_trial_is_pending_when_the_server_waits_for_its_answer() -> None:
    """Some servers answer the new Provision only when their META write has returned: it is pending, and goes on."""
    async with connected(new_key()) as (bench, supervisor):
        bench.service.hold = anyio.Event()
        verdict = await supervisor.apply(with_token(bench), timeout=0.2, keep=True)
        assert verdict.outcome == "pending"
        bench.service.hold.set()
        await bench.saw(events.SettingsApplied)
        assert bench.runner.options.machine.unique_token == "of META"


async def test_a_trial_ends_in_time_and_later_settings_replace_slow_ones() -> None:
    async with connected(new_key()) as (bench, supervisor):
        bench.service.hold = anyio.Event()
        slow = await supervisor.apply(with_token(bench, "slow"), timeout=0.1)
        assert slow.is_refused
        assert "within 0 s" in slow.reason
        verdicts: list[Verdict] = []

        async def apply(token: str) -> None:
            verdicts.append(await supervisor.apply(with_token(bench, token), keep=True))

        async with anyio.create_task_group() as tasks:
            tasks.start_soon(apply, "first")
            await anyio.wait_all_tasks_blocked()
            tasks.start_soon(apply, "second")
            await anyio.wait_all_tasks_blocked()
            bench.service.hold.set()
        assert [verdict.outcome for verdict in verdicts] == ["refused", "applied"]
        assert bench.runner.options.machine.unique_token == "second"


async def test_a_change_of_uuid_is_answered_before_its_handshake_and_reports_a_refusal() -> None:
    server = new_key()
    async with connected(server) as (bench, supervisor):
        assert bench.device is not None
        before = bench.runner.options
        options = replace(before, machine=replace(before.machine, uuid="another"))
        bench.service.answer = WRONG
        assert (await supervisor.apply(options, keep=True)).is_refused
        assert await supervisor.apply(before, keep=True) == Verdict(outcome="unchanged")
        bench.service.answer = response(server, TWO)
        bench.device.calls.clear()
        verdict = await supervisor.apply(options, keep=True)
        assert (verdict.outcome, "accepted" in verdict.reason) == ("pending", True)
        assert bench.device.calls == [], "the link carries the answer"
        await bench.saw(events.SettingsApplied)
        assert bench.service.requests[-1].node_uuid == "another"


async def test_settings_that_worked_before_a_crash_are_not_replaced_by_untested_ones() -> None:
    """In this process neither link has been up yet."""
    async with running(response(new_key(), ONE)) as bench, background_tasks() as tasks:
        supervisor = LinkSupervisor(bench.runner, bench.emit)
        tasks.start_soon(supervisor.run)
        await bench.saw(events.Connecting)
        before = bench.runner.options
        bench.service.answer = WRONG
        assert (await supervisor.apply(with_token(bench), keep=True, prove_first=True)).is_refused
        assert bench.runner.options is before
        assert "invalid join token" in supervisor.refusal


async def test_settings_that_fail_during_the_switch_are_rolled_back(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr("siderolink.client.link.supervisor._TAKEOVER", 0.2)
    server, other = new_key(), new_key()
    async with connected(server) as (bench, supervisor):
        before = bench.runner.options
        bench.service.answer = response(other, TWO)
        assert (await supervisor.apply(with_token(bench))).outcome == "applied"
        refused = await bench.saw(events.SettingsRefused)
        assert "did not come up" in refused.reason
        assert bench.runner.options is before
        assert "did not come up" in supervisor.refusal
        await bench.saw(events.Connecting, condition=lambda event: event.route == f"udp {ONE}")
        await anyio.wait_all_tasks_blocked()
        bench.shake_hands(server)
        await bench.saw(events.Connected, 2)


async def test_a_change_during_the_switch_does_not_prevent_the_rollback(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("siderolink.client.link.supervisor._TAKEOVER", 0.2)
    server, other = new_key(), new_key()
    async with connected(server) as (bench, supervisor):
        before = bench.runner.options
        bench.service.answer = response(other, TWO)
        assert (await supervisor.apply(with_token(bench))).outcome == "applied"
        await bench.saw(events.SettingsApplied)
        bench.service.answer = WRONG
        second = await supervisor.apply(with_token(bench, "another"))
        assert second.is_refused
        assert bench.runner.options is before


async def test_an_unforeseen_error_is_a_failed_try(monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture) -> None:
    async with connected(new_key()) as (bench, supervisor):

        async def prove(*_: object) -> object:
            raise AttributeError("nobody foresaw it")

        monkeypatch.setattr(supervisor, "prove", prove)
        assert (await supervisor.apply(with_token(bench))).is_refused
        assert "nobody foresaw it" in caplog.text
        assert bench.state() is ConnectionState.CONNECTED
        monkeypatch.undo()
        assert (await supervisor.apply(with_token(bench))).outcome == "applied"


async def test_settings_to_be_kept_replace_a_link_that_was_never_up() -> None:
    async with running(response(new_key(), ONE)) as bench, background_tasks() as tasks:
        supervisor = LinkSupervisor(bench.runner, bench.emit)
        tasks.start_soon(supervisor.run)
        await bench.saw(events.Connecting)
        assert (await supervisor.apply(with_token(bench), keep=True)).outcome == "pending"
        await bench.saw(events.Joined, 2)
        assert bench.service.requests[-1].node_unique_token == "of META"


async def test_a_first_configuration_is_only_refused_by_a_server_that_says_so() -> None:
    async with provision_api(WRONG) as (service, url):
        options = LinkOptions(url=url, machine=NodeInfo(uuid="a-uuid"))
        assert (await try_first(options, {})).is_refused
        service.answer = GRPCError(Status.RESOURCE_EXHAUSTED, "no room now")
        verdict = await try_first(options, {})
        assert (verdict.outcome, len(verdict.warnings)) == ("applied", 1)
        gone = replace(options, url=replace(url, port=1))
        assert (await try_first(gone, {})).outcome == "applied"


async def test_what_changes_is_said_without_secrets() -> None:
    async with connected(new_key()) as (bench, _):
        options = bench.runner.options
        url = options.url
        other = replace(options, url=replace(url, tunnel=True, join_token="another"))
        assert describe_changes(options, other) == "transport: tunnel, without TLS, join token"
        assert describe_changes(options, replace(options, url=replace(url, host="example.org"))) == (
            f"server example.org:{url.port}"
        )
        assert describe_changes(options, with_token(bench)) == "unique token"
