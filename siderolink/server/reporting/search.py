"""Searches machines' reports, in files or in memory, and follows new ones.

Files are read in a thread, 64 KiB at a time, so that the event loop runs in between. Search text is literal, never a pattern,
so no text is more expensive than another.
"""

import math
import os
import time
from collections import deque
from collections.abc import AsyncGenerator, AsyncIterator, Callable, Generator, Iterator, Sequence
from contextlib import aclosing
from dataclasses import dataclass, replace
from functools import partial
from typing import Final

import anyio
from anyio.lowlevel import checkpoint

from siderolink.common.errors import ConfigurationError
from siderolink.common.tasks import in_parts, in_thread, to_its_end
from siderolink.server.reporting.archive import Archive, decode_event, decode_line
from siderolink.server.reporting.ingest import ReportIngest
from siderolink.server.reporting.model import KernelLine, LogLine, MachineEvent, ReportedEvent, ReportsLost
from siderolink.server.reporting.segments import Kept, Segment
from siderolink.server.store import Machine

Report = KernelLine | ReportedEvent
Decode = Callable[[bytes], Report | None]
"""Parses a record; None for an invalid one."""

CHUNK: Final = 65_536
MAX_TEXT: Final = 1000
"""Maximum length of search text."""
MAX_TAIL: Final = 100_000
SEARCHES: Final = 2
"""Concurrent searches that read files; further ones wait."""
_PART: Final = 200


@dataclass(frozen=True, slots=True, kw_only=True)
class ReportQuery:
    """Selects reports of one machine, oldest first."""

    since: float | None = None
    """Unix time."""
    until: float | None = None
    """Before this time, in Unix time."""
    tail: int = 0
    """Only the last ones of those stored; 0 for all."""
    text: str = ""
    """Lines whose message contains this text, and events whose summary does."""
    ignore_case: bool = False
    kinds: Sequence[str] = ()
    """Short names of event types; empty for all."""

    def __post_init__(self) -> None:
        if len(self.text) > MAX_TEXT:
            raise ConfigurationError(f"search text may have at most {MAX_TEXT} characters")
        if not 0 <= self.tail <= MAX_TAIL:
            raise ConfigurationError(f"tail must be 0 to {MAX_TAIL}, not {self.tail}")

    def matches(self, report: KernelLine | ReportedEvent) -> bool:
        """Whether the query selects the report."""
        if self.since is not None and report.received_at < self.since:
            return False
        if self.until is not None and report.received_at >= self.until:
            return False
        if isinstance(report, ReportedEvent) and self.kinds and report.kind not in self.kinds:
            return False
        return not self.text or self._holds(report)

    def _holds(self, report: KernelLine | ReportedEvent) -> bool:
        text = report.message if isinstance(report, KernelLine) else f"{report.kind} {report.summary}"
        return self.text.lower() in text.lower() if self.ignore_case else self.text in text


EVERYTHING = ReportQuery()


class _Filter:
    """Skips blocks of a file in which no line can contain the text."""

    def __init__(self, query: ReportQuery) -> None:
        # text that JSON may encode differently is searched in each decoded line, and so are escapes
        is_plain = query.text.isascii() and all(
            character.isalnum() or character in " .:=,;-_+()[]@#" for character in query.text
        )
        self._ignore_case = query.ignore_case
        self._text = (query.text.lower() if query.ignore_case else query.text).encode() if is_plain else b""

    def may_hold(self, block: bytes) -> bool:
        if not self._text or b"\\u" in block:
            return True
        return self._text in (block.lower() if self._ignore_case else block)


class _Reader:
    """Reads one machine's files in a thread."""

    def __init__(self, archive: Archive, machine: str, query: ReportQuery, kind: Kept) -> None:
        self._archive = archive
        self._machine = machine
        self._query = query
        self._kind = kind
        self._decode: Decode = decode_line if kind is Kept.LINES else decode_event
        self._filter = _Filter(query if kind is Kept.LINES else EVERYTHING)

    def read(self) -> Generator[list[Report]]:
        """The matching reports of each chunk; often none."""
        query = self._query
        segments = [one for one in self._archive.segments(self._machine, self._kind) if self._may_hold(one[1])]
        if not query.tail:
            for path, _ in segments:
                yield from self._read_segment(path)
            return
        found: deque[Report] = deque()
        for path, _ in reversed(segments):
            last: deque[Report] = deque(maxlen=query.tail - len(found))
            for part in self._read_segment(path):
                last.extend(part)
                yield []
            found.extendleft(reversed(last))
            if len(found) >= query.tail:
                break
        yield from in_parts(found, _PART)

    def _may_hold(self, segment: Segment) -> bool:
        query = self._query
        is_too_old = query.since is not None and segment.last_at < query.since
        return not is_too_old and (query.until is None or segment.begun_at < query.until)

    def _read_segment(self, path: str) -> Iterator[list[Report]]:
        descriptor = self._archive.open_segment(path)
        if descriptor is None:
            return
        try:
            rest = b""
            while chunk := os.read(descriptor, CHUNK):
                block, newline, rest = (rest + chunk).rpartition(b"\n")
                yield list(self._found(block)) if newline else []
        finally:
            os.close(descriptor)

    def _found(self, block: bytes) -> Iterator[Report]:
        if not self._filter.may_hold(block):
            return
        for record in block.split(b"\n"):
            report = self._decode(record)
            if report is not None and self._query.matches(report):
                yield report


class ReportSearch:
    """Searches the reports of one server."""

    def __init__(self, ingest: ReportIngest, archive: Archive | None) -> None:
        self._ingest = ingest
        self._archive = archive
        self._limiter = anyio.CapacityLimiter(SEARCHES)

    async def lines(self, machine: str, query: ReportQuery, *, follow: bool = False) -> AsyncGenerator[KernelLine, None]:
        """A machine's lines, by its id or UUID; with `follow` also new ones, until the caller stops."""
        live = self._ingest.lines.subscribe() if follow else None
        recent = self._ingest.recent_lines.of(machine) if self._archive is None else ()
        async with aclosing(self._find(machine, query, Kept.LINES, live, recent)) as reports:
            async for report in reports:
                if isinstance(report, KernelLine):
                    yield report

    async def events(self, machine: str, query: ReportQuery, *, follow: bool = False) -> AsyncGenerator[ReportedEvent, None]:
        """Like `lines`, for events."""
        live = self._ingest.events.subscribe() if follow else None
        recent = self._ingest.recent_events.of(machine) if self._archive is None else ()
        async with aclosing(self._find(machine, query, Kept.EVENTS, live, recent)) as reports:
            async for report in reports:
                if isinstance(report, ReportedEvent):
                    yield report

    async def _find(
        self, machine: str, query: ReportQuery, kind: Kept, live: AsyncIterator[object] | None, recent: Sequence[Report]
    ) -> AsyncGenerator[Report, None]:
        """Stored reports, then live ones. Live reports that a slow caller misses are read from the files."""
        cut = time.time()
        if self._archive is None:
            for report in await _chosen(recent, query):
                yield report
        else:
            async for report in self._read_until(_Reader(self._archive, machine, query, kind), cut):
                yield report
        async for item in live or _nothing():
            if isinstance(item, ReportsLost) and self._archive is not None:
                missed = replace(query, since=max(math.nextafter(cut, math.inf), query.since or 0.0), tail=0)
                cut = time.time()
                async for report in self._read_until(_Reader(self._archive, machine, missed, kind), cut):
                    yield report
            elif isinstance(item, LogLine | MachineEvent) and _is_of(item.machine, machine) and query.matches(item):
                is_shown = self._archive is not None and item.received_at <= cut
                if not is_shown:
                    yield item

    async def _read_until(self, reader: _Reader, before: float) -> AsyncIterator[Report]:
        """Stored reports received before a time; later ones are followed instead."""
        parts = reader.read()
        try:
            while True:
                # a generator that a thread still runs cannot be closed
                found = await to_its_end(in_thread(partial(next, parts, None), limiter=self._limiter))
                if found is None:
                    return
                for report in found:
                    if report.received_at <= before:
                        yield report
        finally:
            parts.close()


def _is_of(machine: Machine, name: str) -> bool:
    return name in (machine.id, machine.node_uuid)


async def _chosen(recent: Sequence[Report], query: ReportQuery) -> Sequence[Report]:
    found: deque[Report] = deque(maxlen=query.tail or None)
    for part in in_parts(recent, _PART):
        found.extend(report for report in part if query.matches(report))
        await checkpoint()
    return found


async def _nothing() -> AsyncIterator[object]:
    return
    yield
