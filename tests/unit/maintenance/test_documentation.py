"""docs/machine.md describes the API: its tables are generated from the same data."""

from pathlib import Path

from siderolink.client.maintenance.resources.definitions import EMPTY_TYPES, MACHINE_TYPES, NAMESPACE, RESOURCE_DEFINITION
from siderolink.client.maintenance.roles import METHODS, CallerRole

DOCUMENT = Path(__file__).resolve().parents[3] / "docs" / "machine.md"


def table_of_methods() -> str:
    """The table of the documentation, made from what is served."""
    rows = ["| method | role | what this machine does |", "| --- | --- | --- |"]
    for path in sorted(METHODS, key=lambda path: (METHODS[path].service != "machine.MachineService", path)):
        method = METHODS[path]
        rows.append(f"| `{path.removeprefix('/')}` | {method.role} | {method.note} |")
    return "\n".join(rows)


def test_the_documentation_has_every_method() -> None:
    assert table_of_methods() in DOCUMENT.read_text(), f"docs/machine.md needs this table:\n{table_of_methods()}"


def table_of_resources() -> str:
    """The same for the types of resources."""
    empty = "registered; this machine never has one"
    rows = ["| type | namespace | who reads it | |", "| --- | --- | --- | --- |"]
    for kind in (RESOURCE_DEFINITION, NAMESPACE, *MACHINE_TYPES):
        reader = CallerRole.ADMIN if kind.is_sensitive else CallerRole.READER
        rows.append(
            f"| `{kind.name}` | {kind.namespace} | {reader} | {empty if kind in EMPTY_TYPES else NOTES[kind.singular]} |"
        )
    return "\n".join(rows)


NOTES = {
    "ResourceDefinition": "what types there are",
    "Namespace": "what namespaces there are",
    "LinkStatus": "interfaces, with what VLANs, bridges, bonds and VRFs have of their own",
    "AddressStatus": "their addresses",
    "RouteStatus": "routes, 2,048 at most, the default ones first",
    "NodeAddress": "`current`, `routed`, `accumulative`, `default`: addresses by which others reach the host",
    "HostnameStatus": "`hostname`",
    "SystemInformation": "the firmware's words; the UUID that the machine joins with",
    "Processor": "by the firmware's table (SMBIOS), else one a socket by /proc/cpuinfo",
    "MemoryModule": "by the firmware's table, else one for all memory",
    "PlatformMetadata": "`platformmetadata`: `metal`",
    "MetaKey": "META, by keys such as `0x0a`",
    "UniqueMachineToken": "the unique token in use",
    "MachineStatus": "`machine`: in maintenance, ready",
    "Version": "`version`: the release that this API is compatible with",
    "SecurityState": "`securitystate`: secure boot, SELinux, FIPS, signed modules",
    "KernelCmdline": "`cmdline`",
    "Disk": "disks with a size, by their names",
    "SiderolinkStatus": "`siderolink-status`: host, connected, interface, tunnel",
    "LinkSpec": "the WireGuard interface with its private key",
    "SiderolinkConfig": "the join URL with its token",
    "SiderolinkTunnel": "the tunnel's virtual address",
    "MachineConfig": "`v1alpha1` in force, `persistent` for the next start; text, since it may be several documents",
}


def test_the_documentation_has_every_resource() -> None:
    assert table_of_resources() in DOCUMENT.read_text(), f"docs/machine.md needs this table:\n{table_of_resources()}"
