"""Servers that share a store: authentication, queries, relayed calls, and merged answers."""

import asyncio
from base64 import b64encode
from collections.abc import AsyncIterator
from contextlib import AsyncExitStack, asynccontextmanager
from dataclasses import replace
from pathlib import Path

import anyio
import pytest

from siderolink.common.errors import SideroLinkError
from siderolink.common.grpc import (
    GrpcChannel,
    GRPCError,
    Status,
    open_byte_stream,
    open_channel,
    pinned_channel,
    translate_errors,
)
from siderolink.common.grpc.messages import framed
from siderolink.common.keys import PrivateKey
from siderolink.common.pb.siderolink.admin import v1 as pb
from siderolink.common.pb.siderolink.peers import v1 as peers_pb
from siderolink.server import KeepOptions, ReportOptions
from siderolink.server.admin.services.forward import FORWARD
from siderolink.server.peers.access import CALLER
from siderolink.server.peers.channels import PEER_LIMITS, Purpose
from siderolink.server.peers.identity import PeerIdentity
from siderolink.server.peers.watch import POLL_SECONDS
from siderolink.server.reporting.archive import Archive
from siderolink.server.reporting.ingest import ReportIngest
from siderolink.server.reporting.reports import Reports
from siderolink.server.store import FleetServer, Role
from tests.support.manager import FakeMachine
from tests.support.siblings import SHARED_KEY, Registry, Sibling, open_sibling
from tests.unit.admin.test_api import bearer
from tests.unit.reporting.test_archive import line

pytestmark = pytest.mark.anyio


@asynccontextmanager
async def two(folder: Path, *reports: Reports) -> AsyncIterator[tuple[Sibling, Sibling]]:
    registry = Registry()
    kept = [*reports, None, None]
    async with (
        open_sibling(folder, "a", registry, reports=kept[0]) as a,
        open_sibling(folder, "b", registry, reports=kept[1]) as b,
    ):
        yield a, b


async def answer_of(a: Sibling, identity: PeerIdentity, fingerprint: str = "") -> str:
    """A server's refusal of a client with this identity; "" if it is answered."""
    row = a.registry.rows["a"]
    host, _, port = row.peer_address.rpartition(":")
    pinned = fingerprint or row.peer_fingerprint
    channel = pinned_channel(host, int(port), identity.client_tls, PEER_LIMITS, pinned)
    try:
        with translate_errors():
            await peers_pb.PeerServiceStub(channel).last_heard(peers_pb.LastHeardRequest(machine_id="x"))
    except GRPCError as error:
        return error.status.name
    except SideroLinkError as error:
        return str(error)
    finally:
        await channel.shut_down()
    return ""


async def test_only_a_living_server_with_the_shared_key_and_its_own_row_is_answered(tmp_path: Path) -> None:
    registry = Registry()
    async with open_sibling(tmp_path, "a", registry) as a:
        member = PeerIdentity.make(SHARED_KEY, "c")
        assert await answer_of(a, member) == "UNAUTHENTICATED"  # signed by the root, but without a row
        registry.rows["c"] = FleetServer(
            id="c", peer_address="127.0.0.1:1", peer_fingerprint=member.fingerprint, heartbeat_at=0.0
        )
        assert await answer_of(a, member) == ""
        other = PeerIdentity.make(PrivateKey.generate(), "c")  # its row exists, but another key has signed it
        registry.rows["c"] = replace(registry.rows["c"], peer_fingerprint=other.fingerprint)
        assert (
            "TLS" in (refusal := await answer_of(a, other)) or "lost" in refusal or "trusted" in refusal or "abort" in refusal
        )
        registry.rows["c"] = replace(registry.rows["c"], peer_fingerprint=member.fingerprint)
        assert "another server" in await answer_of(a, member, fingerprint="00" * 32)
        del registry.rows["c"]
        assert await answer_of(a, member) == "UNAUTHENTICATED"
        # without any certificate, and without TLS
        host, _, port = registry.rows["a"].peer_address.rpartition(":")
        async with open_channel(host, int(port), direct=True) as plain:
            with pytest.raises(SideroLinkError), translate_errors():
                await peers_pb.PeerServiceStub(plain).last_heard(peers_pb.LastHeardRequest(machine_id="x"), timeout=5)


async def test_a_server_reports_when_it_heard_a_machine_and_a_stopped_one_does_not(tmp_path: Path) -> None:
    async with two(tmp_path) as (a, b):
        machine_id = await a.join(FakeMachine())
        a.registry.time.advance(40)
        heard_at = await b.peers.queries.heard_at("a", machine_id)
        assert heard_at is not None
        assert a.registry.store.time() - heard_at == pytest.approx(40, abs=5)
        assert await b.peers.queries.heard_at("a", "no such machine") == 0.0
        assert await b.peers.queries.heard_at("c", machine_id) is None
        a.registry.rows["a"] = replace(a.registry.rows["a"], peer_address="127.0.0.1:9")
        assert await b.peers.queries.heard_at("a", machine_id) is None
        a.die()
        assert await b.peers.queries.heard_at("a", machine_id) is None


async def test_a_query_to_a_silent_server_ends_after_a_second(tmp_path: Path) -> None:
    registry = Registry()
    listener = await anyio.create_tcp_listener(local_host="127.0.0.1", local_port=0)
    async with listener, open_sibling(tmp_path, "b", registry) as b:
        port = listener.extra(anyio.abc.SocketAttribute.local_port)
        registry.rows["a"] = FleetServer(id="a", peer_address=f"127.0.0.1:{port}", peer_fingerprint="00" * 32, heartbeat_at=0.0)
        with anyio.fail_after(10):
            assert await b.peers.queries.heard_at("a", "x") is None


async def test_machines_of_another_server_have_the_state_that_it_reports(tmp_path: Path) -> None:
    async with two(tmp_path) as (a, b):
        here, there = FakeMachine(), FakeMachine()
        mine, its = await b.join(here), await a.join(there)
        await b.knows(its)
        async with b.admin_server.local() as channel:
            machines = pb.MachineServiceStub(channel)
            up = await machines.list_machines(pb.ListMachinesRequest(filter=pb.MachineFilter(states=["up"])))
            assert {one.id for one in up.machines} == {mine, its}
            seen = await machines.list_machines(pb.ListMachinesRequest(sort="-seen"))
            assert all(one.last_seen_at for one in seen.machines)
            assert {one.link for one in seen.machines} == {"up"}
            known = [one async for one in machines.watch_machines(pb.WatchMachinesRequest())]
            assert {one.machine.link for one in known if one.machine is not None} == {"up"}
            a.admin_server.manager.device.beyond_limits[there.key] = (0, 5)
            await a.admin_server.administration.limits.poll()
            assert (await b.get(its)).limits_biting == ["bandwidth_out"]
            a.die()
            await anyio.sleep(1.1)  # how old the answer of the others may be
            alone = await machines.list_machines(pb.ListMachinesRequest(filter=pb.MachineFilter(states=["up"])))
            assert [one.id for one in alone.machines] == [mine]


async def test_a_call_about_a_machine_is_made_at_its_owner_and_audited_for_the_caller(tmp_path: Path) -> None:
    async with two(tmp_path) as (a, b):
        machine_id = await a.join(FakeMachine())
        await b.knows(machine_id)
        _, secret = await b.admin_server.administration.api_keys.create("ops", Role.OPERATOR)
        _, weak = await b.admin_server.administration.api_keys.create("look", Role.VIEWER)
        async with b.admin_server.remote() as remote:
            machines = pb.MachineServiceStub(remote)
            renamed = await machines.rename_machine(
                pb.RenameMachineRequest(name=machine_id, new_name="berlin"), metadata=bearer(secret)
            )
            assert (renamed.name, renamed.link) == ("berlin", "up")
            with pytest.raises(GRPCError) as refused:
                await machines.rename_machine(pb.RenameMachineRequest(name="berlin", new_name="x"), metadata=bearer(weak))
            assert refused.value.status is Status.PERMISSION_DENIED
        (entry, *_) = (await a.admin_server.administration.audit.page()).items
        assert (entry.action, entry.actor.name, entry.actor.role) == ("machine.rename", "ops", Role.OPERATOR)
        assert entry.actor.source == "127.0.0.1 by server b"
        local = await b.get("berlin")
        assert local.link == "up"
        await b.admin_server.administration.machines.deny("berlin")
        assert (await b.get("berlin")).admission == "denied"


async def test_the_owner_refuses_an_unknown_key_and_ends_the_calls_of_a_revoked_one(tmp_path: Path) -> None:
    async with two(tmp_path) as (a, b):
        machine_id = await a.join(FakeMachine())
        await b.knows(machine_id)
        keys = b.admin_server.administration.api_keys
        _, secret = await keys.create("ops", Role.VIEWER)
        async with b.admin_server.remote() as remote:
            events = pb.EventServiceStub(remote).follow_events(pb.FollowEventsRequest(), metadata=bearer(secret))
            waiting = anyio.Event()

            async def follow() -> None:
                with pytest.raises(GRPCError) as ended:
                    async for _ in events:
                        waiting.set()
                assert ended.value.status is Status.UNAUTHENTICATED

            async with anyio.create_task_group() as tasks:
                tasks.start_soon(follow)
                with anyio.fail_after(20):
                    while not waiting.is_set():
                        await a.admin_server.manager.join(FakeMachine())  # which only A tells
                        await anyio.sleep(0.05)
                    await keys.revoke("ops")


async def test_a_dead_owner_is_skipped_and_its_running_calls_end(tmp_path: Path) -> None:
    async with two(tmp_path) as (a, b):
        machine_id = await a.join(FakeMachine())
        await b.knows(machine_id)
        assert (await b.get(machine_id)).link == "up"
        a.registry.rows["a"] = replace(a.registry.rows["a"], peer_address="127.0.0.1:9")  # alive, but unreachable
        assert (await b.get(machine_id)).id == machine_id
        a.die()
        assert (await b.get(machine_id)).link != "up"


async def test_calls_of_a_server_that_dies_end(tmp_path: Path) -> None:
    async with two(tmp_path) as (a, b):
        channel = a.peers.channels.to(b.registry.rows["b"])
        with anyio.fail_after(20):
            with pytest.raises((GRPCError, SideroLinkError)), translate_errors():
                events = pb.EventServiceStub(channel).follow_events(pb.FollowEventsRequest())
                async with anyio.create_task_group() as tasks:

                    async def die() -> None:
                        await anyio.sleep(0.2)
                        a.die()

                    tasks.start_soon(die)
                    async for _ in events:
                        pass


@asynccontextmanager
async def archives(folder: Path) -> AsyncIterator[list[tuple[Archive, Reports]]]:
    found = []
    async with AsyncExitStack() as stack:
        for name in ("one", "two"):
            archive = Archive(KeepOptions(folder=folder / name, max_age=1e12))
            archive.open()
            stack.callback(archive.close)
            ingest = ReportIngest(ReportOptions(), lambda address: None)
            ingest.keep = archive.add
            found.append((archive, Reports(ingest, archive)))
        yield found


async def test_lines_kept_by_all_servers_are_merged_and_deleted_everywhere(tmp_path: Path) -> None:
    async with archives(tmp_path) as kept, two(tmp_path, *(reports for _, reports in kept)) as (a, b):
        machine = FakeMachine()
        machine_id = await a.join(machine)
        await b.knows(machine_id)
        row = await a.admin_server.manager.row(machine)
        for number in range(10):
            kept[number % 2][0].add(line(f"number {number}", number, of=row))
        async with b.admin_server.local() as channel:
            history = pb.HistoryServiceStub(channel)

            async def shown(**wanted: object) -> list[str]:
                request = pb.MachineLogsRequest(machine=machine_id, **wanted)  # type: ignore[arg-type]
                return [one.message async for one in history.machine_logs(request)]

            assert await shown() == [f"number {number}" for number in range(10)]
            assert await shown(tail=3) == ["number 7", "number 8", "number 9"]
            followed: list[str] = []
            with anyio.fail_after(20):
                async for one in history.machine_logs(pb.MachineLogsRequest(machine=machine_id, tail=2, follow=True)):
                    followed.append(one.message)
                    if len(followed) == 2:
                        kept[0][0].add(line("late at a", 20, of=row))
                        kept[1][0].add(line("late at b", 21, of=row))
                    if len(followed) == 4:
                        break
            assert followed[:2] == ["number 8", "number 9"]
            assert set(followed[2:]) == {"late at a", "late at b"}
            with pytest.raises(GRPCError) as unknown:
                async for _ in history.machine_logs(pb.MachineLogsRequest(machine="nobody", follow=True)):
                    pass
            assert unknown.value.status is Status.NOT_FOUND
            deleted = await history.delete_history(pb.DeleteHistoryRequest(machine=machine_id))
            assert deleted.bytes > 0
            assert await shown() == []


async def test_a_malformed_forward_is_refused_by_the_first_server(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    async with two(tmp_path) as (a, b):
        here, there = await b.join(FakeMachine()), await a.join(FakeMachine())
        await b.knows(there)
        bad_prefix = b"\x01\0\0\0\x01x"
        async with b.admin_server.local() as channel:
            for sent in (
                framed(b"\x08\x05\x10\x50"),  # the machine is a number instead of a name
                framed(bytes(pb.ForwardRequest(machine="a\0b", port=1))),
                framed(b"\xff" * 40),
                bad_prefix,
                framed(bytes(pb.ForwardRequest(machine=here, port=1))) + bad_prefix,
                framed(bytes(pb.ForwardRequest(machine=there, port=1))) + bad_prefix,
            ):
                with anyio.fail_after(10), pytest.raises(GRPCError) as refused:
                    async with open_byte_stream(channel, FORWARD) as stream:
                        stream.send(memoryview(sent))
                        await stream.wait_ended()
                assert refused.value.status is Status.INVALID_ARGUMENT, sent
        with anyio.fail_after(10):  # and no call keeps waiting
            while any("_run_byte_stream" in repr(task) for task in asyncio.all_tasks()):
                await anyio.sleep(0.01)
    assert not [record for record in caplog.records if record.exc_info]


@pytest.mark.parametrize("told", [b"\x18\x05", b"\x08\x05", b"\xff", b"\x1a\x02\xff\xff", b"\x20\x05"])
async def test_a_malformed_caller_has_no_rights(tmp_path: Path, caplog: pytest.LogCaptureFixture, told: bytes) -> None:
    async with two(tmp_path) as (a, b):
        machines = pb.MachineServiceStub(a.peers.channels.to(b.registry.rows["b"]))
        with pytest.raises(GRPCError) as refused:
            await machines.list_machines(pb.ListMachinesRequest(), metadata={CALLER: b64encode(told).decode()})
        assert refused.value.status is Status.UNAUTHENTICATED
    assert not [record for record in caplog.records if record.exc_info]


async def test_a_refused_connection_shows_a_dead_server_and_a_closed_one_alone_does_not(
    tmp_path: Path,
) -> None:
    registry, stopped = Registry(), list[str]()
    async with open_sibling(tmp_path, "b", registry) as b:
        b.peers.on_stopped = stopped.append
        async with open_sibling(tmp_path, "a", registry) as a:
            # The rows remain when a ends, as those of a killed process do.
            registry.rows["killed"] = replace(registry.rows["a"], id="killed")
            channel = b.peers.channels.to(registry.rows["killed"], Purpose.QUERIES)
            await connected(channel)
            await anyio.sleep(POLL_SECONDS)
            await channel.shut_down()
            await connected(channel)
            await anyio.sleep(POLL_SECONDS)
            assert (a.id, stopped) == ("a", [])
        with anyio.fail_after(20):
            while not stopped:
                await anyio.sleep(0.01)
        await anyio.sleep(2 * POLL_SECONDS)
        assert stopped == ["killed"]  # and a has removed its row


async def connected(channel: GrpcChannel) -> None:
    """Wait until the channel has connected by itself."""
    with anyio.fail_after(20):
        while True:
            with anyio.move_on_after(0.05) as waiting:
                await channel.wait_lost()  # returns without waiting if there is no connection
            if waiting.cancelled_caught:
                return
            await anyio.sleep(0.01)
