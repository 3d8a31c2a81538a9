"""A machine by the tunnel is asked to leave its server: not one echo is lost, where the host wakes everyone in time."""

import uuid
from contextlib import ExitStack
from functools import partial
from pathlib import Path

import anyio

from siderolink import connect
from siderolink.cli.demo.balancer import Balancer
from siderolink.cli.demo.probe import EchoCount, keep_pinging
from siderolink.client import Disconnected, LinkEvent, Moved
from siderolink.common.hostport import HostPort
from tests.netns.test_serve_memory import pings
from tests.netns.test_several_servers import servers
from tests.support.serving import TOKEN
from tests.support.topology import several
from tests.support.waiting import until


def test_a_machine_by_tunnel_opens_a_stream_to_the_next_server_before_it_leaves_the_old_one(tmp_path: Path) -> None:
    told: list[LinkEvent] = []
    with several(2) as net, servers(net, tmp_path) as (a, b), net.machines[0].portal() as portal, ExitStack() as stack:
        apis = [HostPort(net.address(number), 4000) for number in range(2)]
        stack.enter_context(portal.wrap_async_context_manager(Balancer(apis).run(4000)))
        through = f"grpc://127.0.0.1:4000?jointoken={TOKEN}&grpc_tunnel=true"
        context = connect(through, uuid=str(uuid.uuid4()), device="userspace", on_event=told.append)
        with portal.wrap_async_context_manager(context) as link:
            assert pings(net.machines[0], link.server_address, 20)
            echoes, stop_echoes = EchoCount(), portal.call(anyio.Event)
            pinging = portal.start_task_soon(partial(keep_pinging, link.server_address, echoes, stop_echoes))
            first, other = (a, b) if pings(a.namespace, link.address, 5) else (b, a)
            assert first.command(["drain", "--timeout", "50s"]).splitlines()[-1].startswith("no machine is left")
            assert pings(other.namespace, link.address, 10)
            portal.call(stop_echoes.set)
            pinging.result(60)
            assert len(echoes.sent_at) > 100
            assert echoes.lost == []
            # told once the first stream has been read to its end, a second after the move
            until(lambda: any(isinstance(event, Moved) for event in told))
            assert not any(isinstance(event, Disconnected) for event in told)
