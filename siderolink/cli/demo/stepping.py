"""What every demo has: named steps that hold or fail within a time, hosts, and a look at what is left."""

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
    """The steps of one run. Nothing of them is left afterwards, whatever happens."""

    def __init__(self, report: Report) -> None:
        self.report = report
        self.count = 0
        self._began_at = time.monotonic()
        self._before = _own_interfaces()

    async def run(self, name: str, work: Work, *, timeout: float = STEP_TIMEOUT, begun: bool = False) -> None:
        """One step, which gives a text and fields for programs. Raises StepFailed."""
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
        """Hosts, each in a network namespace of its own, until the stack is left."""
        return [await stack.enter_async_context(start_host(name, self.report.note, *module)) for name in names]

    async def leave(self, hosts: Sequence[DemoHost]) -> tuple[str, Fields]:
        """Let each host end its links and its server."""
        for host in hosts:
            left = [name for name in (await host.ask("leave"))["interfaces"] if name.startswith("siderolink")]
            if left:
                raise DemoError(f"{host.name} still has {', '.join(left)}")
        return "no overlay interface is left in any namespace", {}

    async def nothing_left(self, hosts: Sequence[DemoHost]) -> tuple[str, Fields]:
        """See that the hosts are gone, and what they made."""
        processes = [host.name for host in hosts if host.is_running]
        namespaces = [host.name for host in hosts if namespace.is_in_use(host.namespace)]
        interfaces = sorted(_own_interfaces() - self._before)
        if processes or namespaces or interfaces:
            raise DemoError(f"processes {processes}, namespaces {namespaces} and interfaces {interfaces} are left")
        return "no process, namespace or interface", {}

    def summary(self, **fields: object) -> Fields:
        return {"ok": True, "steps": self.count, "seconds": round(time.monotonic() - self._began_at, 1), **fields}


def _own_interfaces() -> set[str]:
    """Interfaces of the host itself that have the demo's names."""
    return {name for _, name in socket.if_nameindex() if name.startswith(("siderolink", "machine", "server"))}
