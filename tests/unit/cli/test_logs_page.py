"""docs/logs.md explains every event that a command logs, and every record of the library; and it explains nothing else."""

import ast
import re
from collections.abc import Iterator
from ipaddress import IPv6Address
from pathlib import Path

from siderolink.server import (
    AdmissionChanged,
    ClaimRefused,
    HandshakeCompleted,
    LeaveReason,
    LimitOver,
    LimitReached,
    LinkDown,
    Machine,
    MachineJoined,
    MachineLeft,
    MachineRekeyed,
    UniqueTokenBound,
)
from siderolink.server.events import describe_event

ROOT = Path(__file__).resolve().parents[3]
PAGE = (ROOT / "docs" / "logs.md").read_text()
COMMANDS = ROOT / "siderolink" / "cli"
LEVELS = ("info", "warning", "error", "exception", "critical")
HAS_MACHINE = re.compile(r"\b(?:a|an expired|of a) machine\b|machine %s|a join from|authorize hook")
"""Texts about one machine."""


def logged() -> Iterator[str]:
    """The names in `say("name", …)`, and those that describe.py and the server give to events."""
    for path in COMMANDS.rglob("*.py"):
        if "demo" in path.parts:
            continue
        for node in ast.walk(ast.parse(path.read_text())):
            match node:
                case ast.Call(func=ast.Name(id="log_event"), args=[ast.Constant(value=str(name)), *_]):
                    yield name
    described = (COMMANDS / "describe.py").read_text() + (ROOT / "siderolink" / "server" / "events.py").read_text()
    yield from re.findall(r'\b_of_machine\(\s*machine, "([^"]+)"', described)
    yield from re.findall(r'name="([^"]+)"', described)
    yield from re.findall(r'events\.\w+: \(\s*"([^"]+)"', described)


def test_the_page_explains_every_event() -> None:
    events = set(logged())
    assert {"refused", "joined", "provisioned", "link down", "kernel log", "reloaded"} <= events
    cells = [line.split("|")[1] for line in PAGE.splitlines() if line.startswith("| `")]
    explained = set(re.findall(r"`([^`]+)`", "".join(cells)))
    assert events - explained == set()


def records() -> Iterator[tuple[Path, ast.Call, str]]:
    """Each call of the library's loggers above debug, and its text."""
    for path in (ROOT / "siderolink").rglob("*.py"):
        for node in ast.walk(ast.parse(path.read_text())) if "pb" not in path.parts else ():
            match node:
                case ast.Call(func=ast.Attribute(value=ast.Name(id=logger), attr=level), args=[ast.Constant(value=text), *_]):
                    if logger in ("log", "_logger") and level in LEVELS:
                        yield path, node, str(text)


def test_the_page_explains_every_record_of_the_library_and_no_other() -> None:
    texts = {re.sub(r"%(?:\.\df|[a-z])", "…", text) for _, _, text in records()}
    assert len(texts) > 50
    notice = re.search(r'f"\{lost\} (log records were lost[^"]*)"', (COMMANDS / "output.py").read_text())
    assert notice is not None
    texts.add(f"… {notice[1]}")
    part = PAGE.partition("## Records of the library")[2]
    cells = [line.split("|")[1] for line in part.splitlines() if line.startswith("| `")]
    explained = set(re.findall(r"`([^`]+)`", "".join(cells)))
    assert texts - explained == set(), "not explained"
    assert explained - texts == set(), "not logged any more"


def test_events_of_machines_have_their_fields() -> None:
    row = Machine(
        id="m-1",
        node_uuid="u-1",
        name="berlin-7",
        public_key=None,
        overlay_address=IPv6Address("fdae::1"),
        created_at=0.0,
        joined_at=0.0,
    )
    for event in (
        MachineJoined(machine=row, is_new=True),
        HandshakeCompleted(machine=row, is_first=True),
        LinkDown(machine=row),
        MachineLeft(machine=row, reason=LeaveReason.REMOVED),
        MachineRekeyed(machine=row, old_key=None, basis="", old_source=None, source=None),
        ClaimRefused(machine=row, source="", known_source=None),
        UniqueTokenBound(machine=row, source=None),
        AdmissionChanged(machine=row),
        LimitReached(machine=row, limit="bandwidth_in"),
        LimitOver(machine=row, limit="bandwidth_in", dropped=1, seconds=0),
    ):
        fields = describe_event(event).fields
        assert (fields["machine_id"], fields["node_uuid"], fields["machine_name"]) == ("m-1", "u-1", "berlin-7")


def test_every_record_about_a_machine_has_its_fields() -> None:
    bare = [
        f"{path.name}: {text}"
        for path, node, text in records()
        if "server" in path.parts and HAS_MACHINE.search(text) and not any(word.arg == "extra" for word in node.keywords)
    ]
    assert bare == []
