"""Shared by the demos: named steps with a time limit, hosts, and a final check for leftovers."""

import socket
import time
from collections.abc import Awaitable, Callable, Sequence
from contextlib import AsyncExitStack
from typing import Any, Final

import anyio

from siderolink.cli.demo import namespace
from siderolink.cli.demo.host import DemoError, DemoHost, start_host
from siderolink.cli.demo.report import Report
from siderolink.common.errors import SideroLinkError

Fields = dict[str, Any]
Work = Callable[[], Awaitable[tuple[str, Fields]]]

STEP_TIMEOUT: Final = 40.0


class StepFailed(DemoError):
    """Raised when a step fails; `step` is its name."""

    def __init__(self, step: str, reason: str) -> None:
        super().__init__(reason)
        self.step = step


class Steps:
    """The steps of one run. Nothing is left behind, whatever happens."""

    def __init__(self, report: Report) -> None:
        self.report = report
        self.count = 0
        self._began_at = time.monotonic()
        self._before = _own_interfaces()

    async def run(self, name: str, work: Work, *, timeout: float = STEP_TIMEOUT, begun: bool = False) -> None:
        """Run one step, which returns a text and fields for programs. Raises StepFailed."""
        if not begun:
            self.report.begin(name)
        try:
            with anyio.fail_after(timeout):
                text, fields = await work()
        except TimeoutError:
            raise StepFailed(name, f"not done within {timeout:.0f} s") from None
        except SideroLinkError as error:
            raise StepFailed(name, str(error)) from error
        self.count += 1
        self.report.end(name, text, fields)

    async def start_hosts(self, stack: AsyncExitStack, names: Sequence[str], *module: str) -> list[DemoHost]:
        """Start hosts, each in its own network namespace, until the stack is closed."""
        return [await stack.enter_async_context(start_host(name, self.report.note, *module)) for name in names]

    async def leave(self, hosts: Sequence[DemoHost]) -> tuple[str, Fields]:
        """Stop each host's links and server."""
        for host in hosts:
            left = [name for name in (await host.ask("leave"))["interfaces"] if name.startswith("siderolink")]
            if left:
                raise DemoError(f"{host.name} still has {', '.join(left)}")
        return "no overlay interface is left in any namespace", {}

    async def nothing_left(self, hosts: Sequence[DemoHost]) -> tuple[str, Fields]:
        """Check that the hosts, and everything they created, no longer exist."""
        processes = [host.name for host in hosts if host.is_running]
        namespaces = [host.name for host in hosts if namespace.is_in_use(host.namespace)]
        interfaces = sorted(_own_interfaces() - self._before)
        if processes or namespaces or interfaces:
            raise DemoError(f"processes {processes}, namespaces {namespaces} and interfaces {interfaces} are left")
        return "no process, namespace or interface", {}

    def summary(self, **fields: object) -> Fields:
        return {"ok": True, "steps": self.count, "seconds": round(time.monotonic() - self._began_at, 1), **fields}


def _own_interfaces() -> set[str]:
    """The host's own interfaces that have the demo's names."""
    return {name for _, name in socket.if_nameindex() if name.startswith(("siderolink", "machine", "server"))}
