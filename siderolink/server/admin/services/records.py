"""History, kernel log lines and events of machines by gRPC."""

from collections.abc import AsyncIterator

from siderolink.common.pb.siderolink.admin import v1 as pb
from siderolink.common.tasks import map_in_parts
from siderolink.server.admin.records import Records
from siderolink.server.admin.services.access import GetAdministration, actor
from siderolink.server.reporting import KernelLine, ReportedEvent, ReportQuery
from siderolink.server.store import HistoryEntry


class HistoryService(pb.HistoryServiceBase):
    """See admin.proto."""

    def __init__(self, administration: GetAdministration) -> None:
        self._administration = administration

    @property
    def _records(self) -> Records:
        return self._administration().records

    async def list_history(self, message: pb.ListHistoryRequest) -> pb.ListHistoryResponse:
        records = self._records
        page = await records.history(
            message.machine,
            kinds=message.kinds,
            since=message.since,
            until=message.until,
            size=message.page_size,
            page_token=message.page_token,
        )
        entries = await map_in_parts(lambda entry: _entry_message(entry, records.name_of(entry.machine_id)), page.items)
        return pb.ListHistoryResponse(entries=entries, next_page_token=page.next_page_token)

    async def machine_logs(self, message: pb.MachineLogsRequest) -> AsyncIterator[pb.MachineLogLine]:
        query = ReportQuery(
            since=message.since,
            until=message.until,
            tail=message.tail,
            text=message.grep,
            ignore_case=message.ignore_case,
        )
        machine_id = await self._records.id_of(message.machine)
        async for line in self._records.lines(machine_id, query, follow=message.follow):
            yield _line_message(line, machine_id)

    async def machine_events(self, message: pb.MachineEventsRequest) -> AsyncIterator[pb.MachineEvent]:
        query = ReportQuery(since=message.since, until=message.until, tail=message.tail, kinds=tuple(message.kinds))
        machine_id = await self._records.id_of(message.machine)
        async for event in self._records.events(machine_id, query, follow=message.follow):
            yield _event_message(event, machine_id)

    async def delete_history(self, message: pb.DeleteHistoryRequest) -> pb.DeleteHistoryResponse:
        entries, size = await self._records.delete(message.machine, until=message.until, actor=actor())
        return pb.DeleteHistoryResponse(entries=entries, bytes=size)

    async def get_retention(self, message: pb.GetRetentionRequest) -> pb.Retention:
        found = await self._records.retention()
        answer = pb.Retention(
            keeps_history=found.history is not None,
            history_oldest=found.oldest,
            keeps_reports=found.reports is not None,
            reports_used_bytes=found.reports_size,
        )
        if found.history is not None:
            answer.history_seconds = found.history.max_age
            answer.history_machine_entries = found.history.per_machine
            answer.history_entries = found.history.total
        if found.reports is not None:
            answer.reports_seconds = found.reports.max_age
            answer.reports_machine_bytes = found.reports.machine_bytes
            answer.reports_bytes = found.reports.total_bytes
        return answer


def _entry_message(entry: HistoryEntry, name: str) -> pb.HistoryEntry:
    times = f" ({entry.count} times)" if entry.count > 1 else ""
    return pb.HistoryEntry(
        seq=entry.seq,
        at=entry.at,
        machine_id=entry.machine_id,
        node_uuid=entry.node_uuid,
        machine_name=name,
        kind=str(entry.kind),
        detail=f"{entry.detail}{times}".strip(),
        transport=entry.transport,
        source=entry.source,
        version=entry.version,
        join_token=entry.join_token,
    )


def _line_message(line: KernelLine, machine_id: str) -> pb.MachineLogLine:
    return pb.MachineLogLine(
        received_at=line.received_at,
        machine_id=machine_id,
        level=line.text("talos-level"),
        facility=line.text("facility"),
        message=line.message,
        raw=line.raw,
    )


def _event_message(event: ReportedEvent, machine_id: str) -> pb.MachineEvent:
    return pb.MachineEvent(
        received_at=event.received_at,
        machine_id=machine_id,
        id=event.id,
        actor_id=event.actor_id,
        kind=event.kind,
        summary=event.summary,
        type_url=event.type_url,
        data=event.data,
    )
