"""docs/drops.md explains every name under which something is dropped or refused, and no other."""

import re
from enum import StrEnum
from pathlib import Path

import pytest

from siderolink.common.grpc.refusals import Refusal
from siderolink.common.transport.tunnel import TunnelDrop
from siderolink.common.wireguard.interface_rules import RuleDrop
from siderolink.common.wireguard.noise.output import Drop
from siderolink.common.wireguard.tun import TunDrop
from siderolink.server.admin.forwards import ForwardRefusal
from siderolink.server.refusals import JoinRefusal, StreamRefusal
from siderolink.server.reporting.model import ReportDrop

PAGE = (Path(__file__).resolve().parents[2] / "docs" / "drops.md").read_text()
SECTIONS = {
    "Datagrams and packets": Drop,
    "The TUN interface": TunDrop,
    "The firewall rules": RuleDrop,
    "Datagrams in a tunnel": TunnelDrop,
    "Connections, calls and messages": Refusal,
    "Joins": JoinRefusal,
    "Reports": ReportDrop,
    "Tunnel streams": StreamRefusal,
    "Connections to machines' ports": ForwardRefusal,
}


def documented(section: str) -> list[str]:
    text = PAGE.split(f"## {section}\n")[1].split("\n## ")[0]
    return re.findall(r"^\| `([^`]+)` \| \S", text, re.MULTILINE)


@pytest.mark.parametrize(("section", "names"), SECTIONS.items(), ids=[enum.__name__ for enum in SECTIONS.values()])
def test_the_page_lists_each_name_once(section: str, names: type[StrEnum]) -> None:
    assert sorted(documented(section)) == sorted(str(member) for member in names)


def test_the_page_has_no_other_section() -> None:
    assert re.findall(r"^## (.*)", PAGE, re.MULTILINE) == list(SECTIONS)
