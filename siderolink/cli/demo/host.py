"""The demo's control of one host: start its process, send requests, stop it."""

import json
import sys
from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager
from subprocess import PIPE
from typing import Any

import anyio
from anyio.abc import ByteReceiveStream, Process
from anyio.streams.text import TextReceiveStream

from siderolink.cli.demo.namespace import of_process
from siderolink.common.errors import SideroLinkError
from siderolink.common.tasks import background_tasks

Fields = dict[str, Any]
START_TIMEOUT = 20.0
_END_SECONDS = 15.0
OnEvent = Callable[[str, str, str], None]
"""Receives the host's name, the event's name and its text."""


class DemoError(SideroLinkError):
    """Raised when a step of the demo fails."""


class DemoHost:
    """One host; created by `start_host`."""

    def __init__(self, name: str, process: Process, on_event: OnEvent) -> None:
        self.name = name
        self.pid = process.pid
        self._process = process
        self._on_event = on_event
        self._waiting: dict[int, _Answer] = {}
        self._last_number = 0
        self._complaint = ""
        self._ended = False
        self.ready = anyio.Event()
        self.namespace: int | None = None
        """Identifies the host's network namespace."""

    @property
    def is_running(self) -> bool:
        return self._process.returncode is None

    async def ask(self, do: str, **fields: Any) -> Fields:
        """Run an operation. Raises DemoError if it fails or the host exits."""
        if self._ended or not self.ready.is_set() or self._process.stdin is None:
            raise DemoError(self._epitaph())
        self._last_number += 1
        number, answer = self._last_number, _Answer()
        self._waiting[number] = answer
        try:
            await self._process.stdin.send((json.dumps({"id": number, "do": do, **fields}) + "\n").encode())
            await answer.ready.wait()
        except anyio.BrokenResourceError:
            raise DemoError(self._epitaph()) from None
        finally:
            del self._waiting[number]
        if answer.fields is None:
            raise DemoError(self._epitaph())
        if "error" in answer.fields:
            raise DemoError(f"{self.name}: {answer.fields['error']}")
        done: Fields = answer.fields["ok"]
        return done

    async def read_output(self) -> None:
        async for line in _lines(self._process.stdout):
            fields = json.loads(line)
            if fields.get("event") == "ready":
                self.ready.set()
            elif "event" in fields:
                self._on_event(self.name, fields["event"], fields["text"])
            elif (answer := self._waiting.get(fields["id"])) is not None:
                answer.fields = fields
                answer.ready.set()
        self._ended = True
        self.ready.set()
        for answer in self._waiting.values():
            answer.ready.set()

    async def read_complaints(self) -> None:
        async for line in _lines(self._process.stderr):
            self._complaint = line.strip() or self._complaint

    def _epitaph(self) -> str:
        what = f"{self.name} has {'ended' if self._ended else 'not started'}"
        return f"{what}: {self._complaint}" if self._complaint else what


class _Answer:
    def __init__(self) -> None:
        self.ready = anyio.Event()
        self.fields: Fields | None = None


async def _lines(stream: ByteReceiveStream | None) -> AsyncIterator[str]:
    if stream is None:
        return
    rest = ""
    async for text in TextReceiveStream(stream, errors="replace"):
        *whole, rest = (rest + text).split("\n")
        for line in whole:
            yield line


@asynccontextmanager
async def start_host(name: str, on_event: OnEvent, module: str = "siderolink.cli.demo.node") -> AsyncIterator[DemoHost]:
    """A host in a new network namespace, running a module; both end with the context."""
    # A session of its own: the demo handles an interrupt from the terminal and then stops its hosts in order.
    command = [sys.executable, "-m", module]
    async with await anyio.open_process(command, stdin=PIPE, stdout=PIPE, stderr=PIPE, start_new_session=True) as process:
        host = DemoHost(name, process, on_event)
        try:
            async with background_tasks() as tasks:
                tasks.start_soon(host.read_output)
                tasks.start_soon(host.read_complaints)
                with anyio.move_on_after(START_TIMEOUT):
                    await host.ready.wait()
                host.namespace = of_process(host.pid)
                yield host
        finally:
            await _end(process)


async def _end(process: Process) -> None:
    with anyio.CancelScope(shield=True):
        if process.stdin is not None:
            await process.stdin.aclose()
        with anyio.move_on_after(_END_SECONDS):
            await process.wait()
            return
        process.kill()
        await process.wait()
