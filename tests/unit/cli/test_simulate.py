"""`siderolink simulate` where machines cannot join or connect; tests/netns/test_simulate.py runs it against a real server."""

import sys
from subprocess import PIPE

import anyio
import pytest

from siderolink.cli.simulate.machine import SimulatedMachine
from siderolink.cli.simulate.swarm import Load, open_swarm
from siderolink.common.errors import ServerUnreachableError
from siderolink.common.join_url import JoinURL
from tests.support.provision import new_key, provision_api, response

pytestmark = pytest.mark.anyio


async def test_a_machine_that_has_not_joined_has_nothing_to_reconnect() -> None:
    """A swarm reconnects while some of its machines are being replaced."""
    url = JoinURL("127.0.0.1", 1, tls=False)
    machine = SimulatedMachine(url, tunnel=False, source=None, on_up=lambda seconds: None)
    with pytest.raises(ServerUnreachableError):
        await machine.join()
    machine.reconnect()
    assert not machine.is_up
    await machine.close()


async def test_a_replacement_that_cannot_connect_is_counted() -> None:
    async with (
        provision_api(response(new_key(), "127.0.0.1:9")) as (service, url),
        open_swarm(url, Load(machines=2, sources="127.0.0.1/32")) as swarm,
    ):
        assert (await swarm.join()).failed == 0
        await swarm.connect(0.01)
        service.answer = response(new_key(), "[::1]:9")  # which cannot be reached from 127.0.0.1
        before = swarm.phase.failed
        async with anyio.create_task_group() as tasks:
            tasks.start_soon(swarm.churn, 1000)
            with anyio.fail_after(60):
                while swarm.phase.failed < before + 3:
                    await anyio.sleep(0.01)
            tasks.cancel_scope.cancel()
        assert len(swarm.machines) == 2


async def test_that_no_machine_could_connect_is_one_line() -> None:
    async with provision_api(response(new_key(), "127.0.0.1:9")) as (_, url):
        options = ["--machines", "2", "--sources", "203.0.113.9/32", "--churn", "100"]
        command = [sys.executable, "-m", "siderolink", "simulate", url.encode(), *options]
        with anyio.fail_after(60):
            done = await anyio.run_process(command, check=False, stderr=PIPE)
    said = done.stderr.decode()
    assert done.returncode == 1
    assert "none of the 2 machines could connect: " in said
    assert "Traceback" not in said
