"""Roles: every method of the machine's API with the role it needs, and the refusals of methods that are not served.

A caller's role depends on the socket that accepted the connection. The socket bound to the SideroLink interface receives only
packets that WireGuard has authenticated, so there the server's address identifies the admin. On every other socket all callers
are readers, regardless of their source address.
"""

from collections.abc import Iterator
from dataclasses import dataclass
from enum import StrEnum
from ipaddress import AddressValueError, IPv6Address

from grpclib import GRPCError, Status

from siderolink.common.text import one_line


class CallerRole(StrEnum):
    """The permissions of a caller."""

    READER = "reader"
    """Read non-sensitive data, and apply a configuration while there is none."""
    ADMIN = "admin"
    """Everything."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Admittance:
    """Properties of callers that follow from the accepting socket."""

    admin: IPv6Address | None = None
    """The admin's source address; None if this socket has no admin."""
    readers_apply: bool = False
    """Whether readers may apply a configuration: as long as there is none, because then nobody else could."""

    def role(self, source: object) -> CallerRole:
        """The role of a caller at a socket address."""
        if self.admin is None or not isinstance(source, tuple) or not source:
            return CallerRole.READER
        try:
            address = IPv6Address(str(source[0]))
        except AddressValueError:
            return CallerRole.READER
        return CallerRole.ADMIN if address == self.admin else CallerRole.READER


@dataclass(frozen=True, slots=True, kw_only=True)
class MethodRule:
    """One method of the API."""

    path: str
    role: CallerRole
    """The lowest role that may call it."""
    refusal: tuple[Status, str] | None = None
    """The error for callers with that role if nothing serves the method."""
    note: str = ""
    """This machine's behaviour, for the documentation."""

    @property
    def service(self) -> str:
        return self.path.split("/")[1]

    @property
    def name(self) -> str:
        return self.path.split("/")[2]


APPLY = "/machine.MachineService/ApplyConfiguration"
INSTALL_REFUSAL = (
    "this machine runs SideroLink on another operating system and cannot be installed or upgraded by its server: "
    "it stays in maintenance; install the operating system itself, or remove the machine"
)
_READER, _ADMIN = CallerRole.READER, CallerRole.ADMIN
_NEVER_INSTALLED = "FAILED_PRECONDITION: this machine is never installed or upgraded by its server"
_NO_FILES = "the files of this host are not for readers"
_NO_DISKS = "this machine never changes the disks of its host"
_NO_CONTAINERS = "this machine runs no containers"
_NO_IMAGES = "no images are kept here"
_HOOK = "an embedder's hook; without one UNIMPLEMENTED"
_INSTALL = "an embedder's hook; without one FAILED_PRECONDITION, since the machine is not installed by its server"
_KERNEL = "the kernel's figures (/proc, /sys)"
_NO_WRITING = "write access is not allowed"

_SERVED: dict[str, tuple[CallerRole, str]] = {
    "machine.MachineService/ApplyConfiguration": (
        _READER,
        "checked as by the machine's own decoder; open to readers while no SideroLink is configured",
    ),
    "machine.MachineService/Containers": (_READER, "none: an empty list"),
    "machine.MachineService/CPUFreqStats": (_READER, _KERNEL),
    "machine.MachineService/CPUInfo": (_READER, _KERNEL),
    "machine.MachineService/DiskStats": (_READER, _KERNEL),
    "machine.MachineService/Dmesg": (_READER, "the kernel's log (/dev/kmsg)"),
    "machine.MachineService/Events": (_READER, "the machine's events: the last 256, and new ones"),
    "machine.MachineService/Hostname": (_READER, "the host's name"),
    "machine.MachineService/ImageList": (_READER, "none: an empty stream"),
    "machine.MachineService/LoadAvg": (_READER, _KERNEL),
    "machine.MachineService/Logs": (_READER, "of `siderolink` (this program) and `kernel`"),
    "machine.MachineService/LogsContainers": (_READER, "the names of these logs"),
    "machine.MachineService/Memory": (_READER, _KERNEL),
    "machine.MachineService/MetaDelete": (_ADMIN, "any key from 0 to 255"),
    "machine.MachineService/MetaWrite": (_ADMIN, "any key from 0 to 255"),
    "machine.MachineService/Mounts": (_READER, _KERNEL),
    "machine.MachineService/NetworkDeviceStats": (_READER, _KERNEL),
    "machine.MachineService/Processes": (_READER, f"{_KERNEL}; arguments and executables for admins alone"),
    "machine.MachineService/Read": (_ADMIN, "a few files of the kernel, the boot id among them; no others"),
    "machine.MachineService/Reboot": (_ADMIN, _HOOK),
    "machine.MachineService/Reset": (_ADMIN, _HOOK),
    "machine.MachineService/ServiceList": (_READER, "this program, or what an embedder's hook lists"),
    "machine.MachineService/ServiceRestart": (_ADMIN, _HOOK),
    "machine.MachineService/ServiceStart": (_ADMIN, _HOOK),
    "machine.MachineService/ServiceStop": (_ADMIN, _HOOK),
    "machine.MachineService/Shutdown": (_ADMIN, _HOOK),
    "machine.MachineService/Stats": (_READER, "no containers: an empty list"),
    "machine.MachineService/SystemStat": (_READER, _KERNEL),
    "machine.MachineService/Upgrade": (_ADMIN, _INSTALL),
    "machine.MachineService/Version": (_READER, "the release that this API is compatible with"),
    "storage.StorageService/Disks": (_READER, "the host's disks, none of them a system disk"),
    "machine.StorageService/Statfs": (_READER, "of mounted file systems"),
    "machine.LifecycleService/Install": (_ADMIN, _INSTALL),
    "machine.LifecycleService/Upgrade": (_ADMIN, _INSTALL),
    "machine.ImageService/List": (_READER, "none: an empty stream"),
    "machine.ImageService/Pull": (_ADMIN, _INSTALL),
    "time.TimeService/Time": (_READER, "the host's clock, which is not compared with any"),
    "cosi.resource.State/Get": (_READER, "sensitive types for admins alone"),
    "cosi.resource.State/List": (_READER, "sensitive types for admins alone"),
    "cosi.resource.State/Watch": (_READER, "sensitive types for admins alone"),
}
_REFUSED: dict[str, tuple[CallerRole, Status, str]] = {
    "machine.MachineService/Bootstrap": (_ADMIN, Status.FAILED_PRECONDITION, "bootstrap is not available yet"),
    "machine.MachineService/Copy": (_ADMIN, Status.UNIMPLEMENTED, "the files of this host are not copied"),
    "machine.MachineService/DiskUsage": (_READER, Status.UNIMPLEMENTED, _NO_FILES),
    "machine.MachineService/GenerateConfiguration": (_ADMIN, Status.UNIMPLEMENTED, "configurations are not made here"),
    "machine.MachineService/ImagePull": (_ADMIN, Status.FAILED_PRECONDITION, INSTALL_REFUSAL),
    "machine.MachineService/List": (_READER, Status.UNIMPLEMENTED, _NO_FILES),
    "machine.MachineService/Netstat": (_READER, Status.UNIMPLEMENTED, "connections of this host are not for readers"),
    "machine.MachineService/PacketCapture": (_ADMIN, Status.UNIMPLEMENTED, "packets of this host are not captured"),
    "machine.MachineService/Restart": (_ADMIN, Status.UNIMPLEMENTED, _NO_CONTAINERS),
    "machine.MachineService/Rollback": (_ADMIN, Status.FAILED_PRECONDITION, INSTALL_REFUSAL),
    "storage.StorageService/BlockDeviceWipe": (_READER, Status.FAILED_PRECONDITION, _NO_DISKS),
    "machine.LVMService/LogicalVolumeRemove": (_READER, Status.FAILED_PRECONDITION, _NO_DISKS),
    "machine.LVMService/PhysicalVolumeRemove": (_READER, Status.FAILED_PRECONDITION, _NO_DISKS),
    "machine.LVMService/VolumeGroupRemove": (_READER, Status.FAILED_PRECONDITION, _NO_DISKS),
    "machine.MDService/Destroy": (_READER, Status.FAILED_PRECONDITION, _NO_DISKS),
    "machine.DebugService/ContainerRun": (_ADMIN, Status.UNIMPLEMENTED, _NO_CONTAINERS),
    "machine.ImageService/Import": (_ADMIN, Status.FAILED_PRECONDITION, INSTALL_REFUSAL),
    "machine.ImageService/Remove": (_ADMIN, Status.UNIMPLEMENTED, _NO_IMAGES),
    "machine.ImageService/Verify": (_READER, Status.UNIMPLEMENTED, _NO_IMAGES),
    "time.TimeService/TimeCheck": (_READER, Status.UNIMPLEMENTED, "this machine asks no time server for others"),
    "inspect.InspectService/ControllerRuntimeDependencies": (
        _READER,
        Status.UNIMPLEMENTED,
        "there are no controllers here",
    ),
    "cosi.resource.State/Create": (_READER, Status.PERMISSION_DENIED, _NO_WRITING),
    "cosi.resource.State/Destroy": (_READER, Status.PERMISSION_DENIED, _NO_WRITING),
    "cosi.resource.State/Teardown": (_READER, Status.PERMISSION_DENIED, _NO_WRITING),
    "cosi.resource.State/TeardownAndDestroy": (_READER, Status.PERMISSION_DENIED, _NO_WRITING),
    "cosi.resource.State/Update": (_READER, Status.PERMISSION_DENIED, _NO_WRITING),
}
_CONTROL_PLANE: dict[str, tuple[CallerRole, str]] = {
    "machine.MachineService/EtcdAlarmDisarm": (_ADMIN, "etcd alarm disarm"),
    "machine.MachineService/EtcdAlarmList": (_READER, "etcd alarm list"),
    "machine.MachineService/EtcdDefragment": (_ADMIN, "etcd defragment"),
    "machine.MachineService/EtcdDowngradeCancel": (_ADMIN, "etcd downgrade cancel"),
    "machine.MachineService/EtcdDowngradeEnable": (_ADMIN, "etcd downgrade enable"),
    "machine.MachineService/EtcdDowngradeValidate": (_ADMIN, "etcd downgrade validate"),
    "machine.MachineService/EtcdForfeitLeadership": (_ADMIN, "etcd forfeit leadership"),
    "machine.MachineService/EtcdLeaveCluster": (_ADMIN, "etcd leave"),
    "machine.MachineService/EtcdMemberList": (_READER, "member list"),
    "machine.MachineService/EtcdRecover": (_ADMIN, "etcd recover"),
    "machine.MachineService/EtcdRemoveMember": (_ADMIN, "etcd remove member"),
    "machine.MachineService/EtcdRemoveMemberByID": (_ADMIN, "etcd remove member"),
    "machine.MachineService/EtcdSnapshot": (_ADMIN, "etcd snapshot"),
    "machine.MachineService/EtcdStatus": (_READER, "etcd status"),
    "machine.MachineService/GenerateClientConfiguration": (_ADMIN, "generate client configuration"),
    "machine.MachineService/Kubeconfig": (_ADMIN, "kubeconfig"),
    "cluster.ClusterService/HealthCheck": (_READER, "cluster health check"),
}
_EXACT = (_NO_WRITING, "bootstrap is not available yet")
"""Texts that clients know; the others name the method."""


def not_authorized() -> GRPCError:
    return GRPCError(Status.PERMISSION_DENIED, "not authorized")


def unknown_method(path: str) -> GRPCError:
    """The error for an authorized caller of an unknown method."""
    service, _, name = path.removeprefix("/").partition("/")
    if any(method.service == service for method in METHODS.values()):
        return GRPCError(Status.UNIMPLEMENTED, f"unknown method {one_line(name, limit=100)} for service {service}")
    return GRPCError(Status.UNIMPLEMENTED, f"unknown service {one_line(service, limit=100)}")


def _methods() -> Iterator[MethodRule]:
    for name, (role, note) in _SERVED.items():
        yield MethodRule(path=f"/{name}", role=role, note=note)
    for name, (role, status, text) in _REFUSED.items():
        words = text if text in _EXACT else f"{name.rpartition('.')[2]}: {text}"
        note = _NEVER_INSTALLED if text is INSTALL_REFUSAL else f"{status.name}: {text}"
        yield MethodRule(path=f"/{name}", role=role, refusal=(status, words), note=note)
    for name, (role, api) in _CONTROL_PLANE.items():
        text = f"{api} is only available on control plane nodes"
        yield MethodRule(path=f"/{name}", role=role, refusal=(Status.UNIMPLEMENTED, text), note=f"UNIMPLEMENTED: {text}")


METHODS = {method.path: method for method in _methods()}
"""Every method that machines have, by its path; any other needs an admin and is UNIMPLEMENTED."""
