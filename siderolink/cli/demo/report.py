"""Output of the demo: coloured on a terminal, plain lines in a pipe, JSON lines for programs."""

import json
import sys
import time
from typing import TYPE_CHECKING, Any, Protocol

from rich.console import Console
from rich.markup import escape

from siderolink.cli.output import flush, show

if TYPE_CHECKING:
    from rich.status import Status

Fields = dict[str, Any]


class Report(Protocol):
    """Receives the demo's progress."""

    def begin(self, step: str) -> None: ...

    def note(self, host: str, name: str, text: str) -> None: ...

    def end(self, step: str, text: str, fields: Fields) -> None: ...

    def fail(self, step: str, reason: str) -> None: ...

    def finish(self, summary: Fields) -> None: ...


def make_report(*, as_json: bool) -> Report:
    if as_json:
        return JsonReport()
    console = Console(highlight=False)
    return RichReport(console) if console.is_terminal else PlainReport()


class PlainReport:
    """One line per event, without colour."""

    def begin(self, step: str) -> None:
        self._say(f"== {step}")

    def note(self, host: str, name: str, text: str) -> None:
        self._say(f"   {host}: {name}: {text}")

    def end(self, step: str, text: str, fields: Fields) -> None:
        self._say(f"   ok: {text}")

    def fail(self, step: str, reason: str) -> None:
        self._say(f"FAILED: {step}: {reason}")

    def finish(self, summary: Fields) -> None:
        self._say("")
        for line in _summary_lines(summary):
            self._say(line)

    def _say(self, text: str) -> None:
        show(text, flush=True)


class RichReport:
    """For a terminal: a spinner while a step runs, a tick when it succeeds."""

    def __init__(self, console: Console) -> None:
        self._console = console
        self._status: Status | None = None
        self._began_at = 0.0

    def begin(self, step: str) -> None:
        self._began_at = time.monotonic()
        self._status = self._console.status(f"[bold]{escape(step)}[/]")
        self._status.start()

    def note(self, host: str, name: str, text: str) -> None:
        self._console.print(f"    [cyan]{host:9}[/] {escape(name):20} [dim]{escape(text)}[/]", soft_wrap=True)

    def end(self, step: str, text: str, fields: Fields) -> None:
        self._stop()
        seconds = time.monotonic() - self._began_at
        self._console.print(f"[green]✓[/] [bold]{escape(step)}[/]  {escape(text)} [dim]{seconds:.1f} s[/]", soft_wrap=True)

    def fail(self, step: str, reason: str) -> None:
        self._stop()
        self._console.print(f"[red]✗ [bold]{escape(step)}[/]: {escape(reason)}[/]", soft_wrap=True)

    def finish(self, summary: Fields) -> None:
        self._stop()
        self._console.print()
        colour = "green" if summary["ok"] else "red"
        for line in _summary_lines(summary):
            self._console.print(f"[{colour}]{escape(line)}[/]", soft_wrap=True)

    def _stop(self) -> None:
        if self._status is not None:
            self._status.stop()
            self._status = None


class JsonReport:
    """One JSON object per line: notes and steps as they happen, and a summary at the end."""

    def begin(self, step: str) -> None:
        self._say({"type": "begin", "step": step})

    def note(self, host: str, name: str, text: str) -> None:
        self._say({"type": "event", "host": host, "name": name, "text": text})

    def end(self, step: str, text: str, fields: Fields) -> None:
        self._say({"type": "step", "step": step, "ok": True, "text": text, **fields})

    def fail(self, step: str, reason: str) -> None:
        self._say({"type": "step", "step": step, "ok": False, "text": reason})

    def finish(self, summary: Fields) -> None:
        self._say({"type": "summary", **summary})

    def _say(self, fields: Fields) -> None:
        sys.stdout.write(json.dumps({"time": round(time.time(), 3), **fields}) + "\n")
        flush()


def _machine_line(name: str, machine: Fields) -> str:
    parts = []
    if "back_after" in machine:
        parts.append(f"back {machine['back_after']:.1f} s after kill -9")
    if "lost_in_drain" in machine:
        parts.append(f"{machine['lost_in_drain']} echoes lost in the drain")
    return f"{name} by {machine['link']:6}   {', '.join(parts)}"


def _summary_lines(summary: Fields) -> list[str]:
    if not summary["ok"]:
        return [f"The demo failed at: {summary['failed']}"]
    lines = [_machine_line(name, machine) for name, machine in summary.get("machines", {}).items()]
    for name, link in summary.get("links", {}).items():
        lines.append(
            f"{name:7} {link['up_mbit']:7.0f} Mbit/s up {link['down_mbit']:7.0f} Mbit/s down   ping {link['ping_ms']:.2f} ms"
        )
    return [*lines, f"All {summary['steps']} steps succeeded, after {summary['seconds']:.0f} s."]
