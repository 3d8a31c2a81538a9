"""Probes that decide about a machine without a unique token: what counts as an answer, and shared probes."""

import anyio
import pytest
from grpclib import GRPCError

from tests.support.fake_device import FakePath
from tests.support.manager import FakeMachine
from tests.unit.server.test_who_takes_a_row import HERE, Link, Scene, Verdict, machine_again, thief

pytestmark = pytest.mark.anyio


async def test_a_living_machine_is_probed_once_and_answers_within_a_second() -> None:
    scene = Scene(False, Link.ALIVE)
    await scene.set_up()
    began_at = scene.manager.time.now
    assert await scene.attempt(thief(scene, HERE)) is Verdict.REFUSED
    assert scene.manager.time.now - began_at == 1.0
    assert scene.manager.device.calls.count(("handshake", scene.machine.key)) == 1


async def test_on_a_busy_host_a_dead_machine_still_answers_no_probe() -> None:
    """Seen on loaded hosts: time that passed between two looks counted as an answer, and the machine waited for a minute."""
    scene = Scene(False, Link.KILLED)
    await scene.set_up()
    scene.manager.device.look_seconds = 0.05
    assert await scene.attempt(machine_again(scene, HERE)) is Verdict.TAKES


async def test_a_machine_killed_after_it_answered_probes_is_probed_again() -> None:
    scene = Scene(False, Link.ALIVE)
    await scene.set_up()
    manager, verdicts = scene.manager, dict[str, str]()

    async def call(name: str, actor: FakeMachine) -> None:
        try:
            await manager.join(actor)
            verdicts[name] = "admitted"
        except GRPCError as error:
            verdicts[name] = error.status.name

    def kill_and_start_again() -> None:
        manager.time.on_sleep = lambda: None
        manager.device.answering.clear()
        tasks.start_soon(call, "machine", machine_again(scene, HERE))

    manager.time.turns, manager.time.on_sleep = 50, kill_and_start_again
    async with anyio.create_task_group() as tasks:
        tasks.start_soon(call, "thief", thief(scene, HERE))
    assert verdicts == {"thief": "ALREADY_EXISTS", "machine": "admitted"}


async def test_behind_a_proxy_a_dead_stream_is_probed_where_others_went_on() -> None:
    scene = Scene(False, Link.PROXY_CUT)
    await scene.set_up()
    assert await scene.attempt(machine_again(scene, HERE)) is Verdict.REFUSED, "all streams were cut at once"
    scene = Scene(False, Link.CUT_AND_KILLED)
    await scene.set_up()
    neighbour = FakeMachine(tunnel=True)
    path = FakePath(neighbour.key)
    stream = scene.manager.monitor.open_stream(
        scene.manager.link(await scene.manager.join(neighbour)), path, lambda refusal: None, HERE
    )
    scene.manager.device.hear(neighbour.key, path)
    await scene.manager.handshake(neighbour)
    assert stream.is_proven
    assert await scene.attempt(thief(scene, HERE)) is Verdict.REFUSED, "this stream was opened after the cut"
    stream.opened_at = 0.0
    assert await scene.attempt(machine_again(scene, HERE)) is Verdict.TAKES


async def test_a_server_that_was_away_gives_machines_time_to_open_their_streams() -> None:
    scene = Scene(False, Link.CUT_AND_KILLED, restarted=True)
    await scene.set_up()
    assert await scene.attempt(thief(scene, HERE)) is Verdict.REFUSED, "a server that is gone is not the machine's death"
    await scene.manager.pass_time(31)
    assert await scene.attempt(machine_again(scene, HERE)) is Verdict.TAKES


async def test_a_strangers_stream_does_not_count_as_an_answer_to_probes() -> None:
    scene = Scene(False, Link.PROXY_CUT)
    await scene.set_up()
    manager = scene.manager
    link = manager.links.by_key(scene.machine.key)
    assert link is not None
    manager.monitor.open_stream(link, FakePath(), lambda refusal: None, HERE)
    assert await scene.attempt(thief(scene, HERE)) is Verdict.REFUSED


async def test_many_calls_share_one_run_of_probes() -> None:
    scene = Scene(False, Link.KILLED)
    await scene.set_up()
    manager, verdicts = scene.manager, list[str]()

    async def call() -> None:
        try:
            await manager.join(thief(scene, HERE))
            verdicts.append("admitted")
        except GRPCError as error:
            verdicts.append(error.status.name)

    async with anyio.create_task_group() as tasks:
        for _ in range(20):
            tasks.start_soon(call)
    assert manager.device.calls.count(("handshake", scene.machine.key)) == 5
    assert verdicts.count("admitted") == 2, "claims of one address to one row"
