"""The four commands of existing machines' command-line client, played to the letter, against `siderolink join`."""

import time
from collections.abc import Callable
from typing import TypeVar

import pytest
import yaml

from tests.netns.test_machine_command import DOCUMENTS, UUID, address_in, end, net
from tests.support.commands import read_until, start
from tests.support.netns import Namespace
from tests.support.talosctl import CommandError, Talosctl
from tests.support.topology import Net

__all__ = ["net"]

T = TypeVar("T")
LAN = "192.0.2.2"


def rows(table: str) -> list[dict[str, str]]:
    """A table by the heads of its columns."""
    head, *lines = table.splitlines()
    names = head.split("   ")
    starts = [head.index(name) for name in names if name]
    ends = [*starts[1:], None]
    return [
        {head[begin:end].strip(): line[begin:end].strip() for begin, end in zip(starts, ends, strict=True)} for line in lines
    ]


def run(namespace: Namespace, node: str, command: Callable[[Talosctl], T]) -> T:
    return namespace.call(lambda: command(Talosctl(node)))


def test_version_get_and_apply_config_before_and_over_siderolink(net: Net) -> None:
    serve = ("serve", "--api-listen", "0.0.0.0:4000", "--wireguard-endpoint", "192.0.2.1:51820", "--no-state")
    server = start(
        net.server, *serve, "--event-sink-port", "8090", "--log-port", "8092", "--print-machine-logs", "--device", "userspace"
    )
    read_until(server, "log receiver")
    machine = start(net.machine, "join", "--maintenance-api", "--uuid", UUID, "--device", "userspace")
    read_until(machine, "waiting")

    said = run(net.server, LAN, Talosctl.version)
    assert f"NODE:        {LAN}\n" in said
    assert "Tag:         v" in said
    assert "OS/Arch:     linux/" in said
    read_by_anyone(net.server)
    apply(net.server)
    read_until(machine, "connected")
    address = address_in(read_until(server, "AddressEvent", f"kernel log: {UUID}"))
    read_by_the_admin(net.server, address)
    # no longer by the regular address
    with pytest.raises(OSError, match="refused"):
        run(net.server, LAN, Talosctl.version)
    end(machine)
    end(server)


EVERY_KIND: dict[str, set[str]] = {
    "members": set(),
    "nodeaddress": {"current", "default", "routed"},
    "routes": {"inet4//192.0.2.0/24/0"},
    "disks": set(),
    "systemdisk": set(),
    "extensions": set(),
    "cpus": {"CPU-0"},
    "memorymodules": set(),
    "meta": set(),
    "machinestatus": {"machine"},
    "securitystate": {"securitystate"},
    "platformmetadata": {"platformmetadata"},
    "kernelcmdline": {"cmdline"},
    "hostname": {"hostname"},
    "diagnostics": set(),
    "versions": {"version"},
}


def get(alias: str, resource_id: str = "", output: str = "table") -> Callable[[Talosctl], str]:
    return lambda command: command.get(alias, resource_id, output=output)


def read_by_anyone(server: Namespace) -> None:
    """``get``, on the regular address."""
    links = {row["ID"]: row for row in rows(run(server, LAN, get("links")))}
    assert (links["lo"]["NODE"], links["lo"]["NAMESPACE"], links["lo"]["TYPE"]) == (LAN, "network", "LinkStatus")
    assert links["eth0"] | {"KIND": "veth", "OPER STATE": "up", "LINK STATE": "true"} == links["eth0"]
    assert len(links["eth0"]["HW ADDR"].split(":")) == 6
    assert "loopback" in run(server, LAN, get("linkstatuses.net.talos.dev", "lo"))
    assert LAN in run(server, LAN, get("addresses"))
    assert UUID in run(server, LAN, get("systeminformation"))
    assert "linkstatuses.net.talos.dev" in run(server, LAN, get("rd"))
    assert sorted(run(server, LAN, lambda command: command.watch("links", 2))) == ["+ eth0", "+ lo"]
    assert run(server, LAN, get("siderolinkstatus", output="yaml")) == ""
    for alias, wanted in EVERY_KIND.items():
        assert wanted <= {row["ID"] for row in rows(run(server, LAN, get(alias)))}, alias
    for alias, words in {
        "mc": "PERMISSION_DENIED desc = not authorized",
        "linkspec": "PERMISSION_DENIED desc = not authorized",
        "nothing": "not registered",
    }.items():
        with pytest.raises(CommandError, match=words):
            run(server, LAN, get(alias))
    with pytest.raises(CommandError, match="NOT_FOUND desc = resource .*eth9.* doesn't exist"):
        run(server, LAN, get("links", "eth9"))


def apply(server: Namespace) -> None:
    """``apply-config``, on the regular address."""
    documents = DOCUMENTS.encode()

    def dry(command: Talosctl) -> str:
        return command.apply_config(documents, dry_run=True)

    assert "Applied configuration without a reboot (skipped in dry-run)." in run(server, LAN, dry)
    with pytest.raises(CommandError, match=r"INVALID_ARGUMENT desc = the configuration:[0-9]+: not YAML"):
        run(server, LAN, lambda command: command.apply_config(b"kind: ["))
    assert run(server, LAN, Talosctl.version)
    cluster = b"version: v1alpha1\nmachine:\n  type: worker\n"
    for text, words in {
        b"": "config not found",
        cluster: "runs no cluster",
        b"kind: SiderolinkConfig\n": "missing apiVersion",
    }.items():
        with pytest.raises(CommandError, match=words):
            run(server, LAN, lambda command, text=text: command.apply_config(text))  # type: ignore[misc]
    with pytest.raises(CommandError, match="INVALID_ARGUMENT desc = config not found"):
        run(server, LAN, lambda command: command.apply_config(b"---\n", mode="staged"))
    said = run(server, LAN, lambda command: command.apply_config(documents))
    assert said.splitlines()[-1] == "Applied configuration without a reboot"


def read_by_the_admin(server: Namespace, address: str) -> None:
    """``version`` and ``get``, over SideroLink."""
    assert f"NODE:        {address}\n" in run(server, address, Talosctl.version_soon)
    status = yaml.safe_load(run(server, address, get("siderolinkstatus", output="yaml")))
    assert status["node"] == address
    assert status["metadata"]["type"] == "SiderolinkStatuses.siderolink.talos.dev"
    assert status["metadata"]["id"] == "siderolink-status"
    assert status["spec"] == {"host": "192.0.2.1", "connected": True, "linkName": "siderolink", "grpcTunnel": False}
    assert "siderolink" in run(server, address, get("links"))
    config = yaml.safe_load(run(server, address, get("mc", "v1alpha1", "yaml")))
    assert config["spec"] == DOCUMENTS
    link = yaml.safe_load(run(server, address, get("linkspec", "siderolink", "yaml")))["spec"]
    assert len(link["wireguard"]["privateKey"]) == 44
    assert set(EVERY_KIND["meta"]) <= {row["ID"] for row in rows(run(server, address, get("meta")))}
    trial(server, address)


def trial(server: Namespace, address: str) -> None:
    """``apply-config --mode try``, over SideroLink: the link stays, and what was tried goes again."""
    more = DOCUMENTS.encode() + b"---\napiVersion: v1alpha1\nkind: RegistryAuthConfig\nname: registry.example\n"

    def configured() -> str:
        return str(yaml.safe_load(run(server, address, get("mc", "v1alpha1", "yaml")))["spec"])

    said = run(server, address, lambda command: command.apply_config(more, mode="try", timeout=2, dry_run=True))
    assert "+kind: RegistryAuthConfig" in said
    assert "RegistryAuthConfig" not in configured()
    said = run(server, address, lambda command: command.apply_config(more, mode="try", timeout=2))
    assert said.endswith("The config is applied in 'try' mode and will be automatically reverted back in 2s\n")
    assert "RegistryAuthConfig" in configured()
    deadline = time.monotonic() + 30
    while "RegistryAuthConfig" in configured():
        assert time.monotonic() < deadline
        time.sleep(0.1)
