"""History, kernel lines and events by the admin API, over its real sockets, from real files."""

import time
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from pathlib import Path

import anyio
import pytest

from siderolink.common.grpc import GRPCError, Status
from siderolink.common.pb.siderolink.admin import v1 as pb
from siderolink.server import KeepOptions, ReportOptions
from siderolink.server.reporting.archive import Archive
from siderolink.server.reporting.ingest import ReportIngest
from siderolink.server.reporting.reports import Reports
from tests.support.admin_server import AdminServer, open_admin_server
from tests.support.manager import FakeMachine
from tests.unit.reporting.test_archive import event, line

pytestmark = pytest.mark.anyio


@asynccontextmanager
async def reporting(folder: Path) -> AsyncIterator[tuple[AdminServer, Archive, ReportIngest, FakeMachine]]:
    """A server that keeps what one machine reports."""
    archive = Archive(KeepOptions(folder=folder / "kept", max_age=1e12))
    archive.open()
    try:
        ingest = ReportIngest(ReportOptions(), lambda address: None)
        ingest.keep = archive.add
        async with open_admin_server(folder, reports=Reports(ingest, archive)) as admin_server:
            machine = FakeMachine()
            await admin_server.manager.join(machine)
            await admin_server.manager.handshake(machine)
            yield admin_server, archive, ingest, machine
    finally:
        archive.close()


async def test_the_history_is_listed_in_pages_for_one_machine_and_for_all(tmp_path: Path) -> None:
    async with reporting(tmp_path) as (admin_server, _, _, machine), admin_server.local() as channel:
        await admin_server.manager.join(FakeMachine())
        await admin_server.manager.refuses(machine, join_token="wrong")
        row = await admin_server.manager.row(machine)
        await admin_server.administration.machines.rename(row.id, "berlin-7")
        stub = pb.HistoryServiceStub(channel)
        for name in (row.id, machine.node_uuid, machine.node_uuid.upper(), "berlin-7", machine.key.encode()):
            found = (await stub.list_history(pb.ListHistoryRequest(machine=name))).entries
            assert [entry.kind for entry in found] == ["refused", "up", "joined"]
        assert (found[1].machine_name, found[1].machine_id, found[1].transport) == ("berlin-7", row.id, "udp")
        assert found[1].version == "v1.13.0"
        assert row.join_token_digest is not None
        assert found[2].join_token == f"given ({row.join_token_digest.hex()[:12]})"
        page = await stub.list_history(pb.ListHistoryRequest(page_size=2))
        rest = await stub.list_history(pb.ListHistoryRequest(page_size=2, page_token=page.next_page_token))
        assert [entry.kind for entry in [*page.entries, *rest.entries]] == ["refused", "joined", "up", "joined"]
        assert rest.next_page_token == ""
        only = await stub.list_history(pb.ListHistoryRequest(kinds=["up"]))
        assert [entry.kind for entry in only.entries] == ["up"]
        for request, status in (
            (pb.ListHistoryRequest(kinds=["nothing"]), Status.INVALID_ARGUMENT),
            (pb.ListHistoryRequest(page_token="x"), Status.INVALID_ARGUMENT),
            (pb.ListHistoryRequest(page_size=10_000), Status.INVALID_ARGUMENT),
            (pb.ListHistoryRequest(machine="nobody"), Status.NOT_FOUND),
        ):
            with pytest.raises(GRPCError) as refused:
                await stub.list_history(request)
            assert refused.value.status is status


async def test_logs_and_events_are_searched_and_followed(tmp_path: Path) -> None:
    async with reporting(tmp_path) as (admin_server, archive, ingest, machine), admin_server.local() as channel:
        row = await admin_server.manager.row(machine)
        for number in range(10):
            archive.add(line(f"number {number}", number, of=row))
        archive.add(event("boot", of=row))
        stub = pb.HistoryServiceStub(channel)
        lines = [
            one
            async for one in stub.machine_logs(
                pb.MachineLogsRequest(machine=machine.node_uuid, tail=2, grep="NUMBER", ignore_case=True)
            )
        ]
        assert [one.message for one in lines] == ["number 8", "number 9"]
        assert (lines[0].level, lines[0].facility, lines[0].machine_id, lines[0].received_at) == ("info", "kern", row.id, 8.0)
        assert b'"msg": "number 8"' in lines[0].raw
        events = [one async for one in stub.machine_events(pb.MachineEventsRequest(machine=row.id, kinds=["TaskEvent"]))]
        assert [(one.kind, one.summary, one.id) for one in events] == [("TaskEvent", "task boot: start", "id-boot")]
        assert [one async for one in stub.machine_events(pb.MachineEventsRequest(machine=row.id, kinds=["PhaseEvent"]))] == []
        seen: list[str] = []
        with anyio.fail_after(30):
            async for one in stub.machine_logs(pb.MachineLogsRequest(machine=row.id, since=9, follow=True)):
                seen.append(one.message)
                if len(seen) == 3:
                    break
                ingest.add_line(row, b'{"msg": "it comes"}')
        assert seen == ["number 9", "it comes", "it comes"]
        for request in (pb.MachineLogsRequest(machine="nobody"), pb.MachineLogsRequest(machine=row.id, grep="x" * 2000)):
            with pytest.raises(GRPCError):
                [one async for one in stub.machine_logs(request)]


async def test_a_machine_that_is_gone_is_found_until_its_records_are_deleted_which_is_audited(tmp_path: Path) -> None:
    async with reporting(tmp_path) as (admin_server, archive, _, machine), admin_server.local() as channel:
        row = await admin_server.manager.row(machine)
        archive.add(line("last words", of=row))
        await admin_server.administration.machines.remove(row.id)
        stub = pb.HistoryServiceStub(channel)
        for name in (row.id, machine.node_uuid):
            found = await stub.list_history(pb.ListHistoryRequest(machine=name))
            assert [entry.kind for entry in found.entries] == ["left", "up", "joined"]
            assert [one.message async for one in stub.machine_logs(pb.MachineLogsRequest(machine=name))] == ["last words"]
        done = await stub.delete_history(pb.DeleteHistoryRequest(machine=row.id))
        assert (done.entries, done.bytes > 10) == (3, True)
        with pytest.raises(GRPCError) as refused:
            await stub.delete_history(pb.DeleteHistoryRequest(machine=row.id))
        assert refused.value.status is Status.NOT_FOUND
        audit = await pb.AuditServiceStub(channel).list_audit(
            pb.ListAuditRequest(filter=pb.AuditFilter(action="machine.delete"))
        )
        assert [(entry.action, entry.object_id) for entry in audit.entries] == [("machine.delete-history", row.id)]
        assert '"entries": 3' in audit.entries[0].before


async def test_old_records_are_deleted_and_the_kept_size_is_reported(tmp_path: Path) -> None:
    async with reporting(tmp_path) as (admin_server, archive, _, machine), admin_server.local() as channel:
        row, other = await admin_server.manager.row(machine), FakeMachine()
        await admin_server.manager.join(other)
        archive.add(line("old", 5.0, of=row))
        archive.add(line("new", time.time(), of=row))
        stub = pb.HistoryServiceStub(channel)
        found = await stub.get_retention(pb.GetRetentionRequest())
        assert (found.history_seconds, found.history_machine_entries, found.history_entries) == (30 * 86_400, 500, 200_000)
        assert (found.keeps_history, found.keeps_reports, found.reports_seconds) == (True, True, 1e12)
        assert found.history_oldest is not None
        done = await stub.delete_history(pb.DeleteHistoryRequest(machine=row.id, until=100.0))
        assert (done.entries, done.bytes > 10) == (0, True)
        assert [one.message async for one in stub.machine_logs(pb.MachineLogsRequest(machine=row.id))] == ["new"]
        done = await stub.delete_history(pb.DeleteHistoryRequest(machine=row.id, until=8e9))
        assert (done.entries, done.bytes > 10) == (2, True)
        assert len((await stub.list_history(pb.ListHistoryRequest())).entries) == 1
        done = await stub.delete_history(pb.DeleteHistoryRequest(until=8e9))
        assert (done.entries, done.bytes) == (1, 0)
        for request in (pb.DeleteHistoryRequest(), pb.DeleteHistoryRequest(until=float("nan"))):
            with pytest.raises(GRPCError) as refused:
                await stub.delete_history(request)
            assert refused.value.status is Status.INVALID_ARGUMENT
        audit = await pb.AuditServiceStub(channel).list_audit(pb.ListAuditRequest(filter=pb.AuditFilter(action="server.")))
        assert [(entry.action, entry.object_name) for entry in audit.entries] == [("server.delete-history", "all machines")]
        assert '"until": 8000000000.0' in audit.entries[0].before


async def test_a_viewer_may_read_records_but_not_delete_them(tmp_path: Path) -> None:
    async with reporting(tmp_path) as (admin_server, _, _, machine):
        async with admin_server.local() as local:
            request = pb.CreateApiKeyRequest(name="viewer", role="viewer")
            key = (await pb.ApiKeyServiceStub(local).create_api_key(request)).secret
        async with admin_server.remote() as channel:
            stub = pb.HistoryServiceStub(channel, metadata={"authorization": f"Bearer {key}"})
            assert (await stub.list_history(pb.ListHistoryRequest(machine=machine.node_uuid))).entries
            with pytest.raises(GRPCError) as refused:
                await stub.delete_history(pb.DeleteHistoryRequest(machine=machine.node_uuid))
            assert refused.value.status is Status.PERMISSION_DENIED
