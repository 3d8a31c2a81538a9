"""docs/logs.md explains every event that a command logs."""

import ast
import re
from collections.abc import Iterator
from pathlib import Path

ROOT = Path(__file__).resolve().parents[3]
PAGE = (ROOT / "docs" / "logs.md").read_text()
COMMANDS = ROOT / "siderolink" / "cli"


def logged() -> Iterator[str]:
    """The names in `say("name", …)`, and those that describe.py gives to events."""
    for path in COMMANDS.rglob("*.py"):
        if "demo" in path.parts:
            continue
        for node in ast.walk(ast.parse(path.read_text())):
            match node:
                case ast.Call(func=ast.Name(id="say"), args=[ast.Constant(value=str(name)), *_]):
                    yield name
    described = (COMMANDS / "describe.py").read_text()
    yield from re.findall(r'\b_of_machine\(\s*machine, "([^"]+)"', described)
    yield from re.findall(r'name="([^"]+)"', described)
    yield from re.findall(r'events\.\w+: \(\s*"([^"]+)"', described)


def test_the_page_explains_every_event() -> None:
    events = set(logged())
    assert {"refused", "joined", "provisioned", "link down", "kernel log", "reloaded"} <= events
    cells = [line.split("|")[1] for line in PAGE.splitlines() if line.startswith("| `")]
    explained = set(re.findall(r"`([^`]+)`", "".join(cells)))
    assert events - explained == set()
