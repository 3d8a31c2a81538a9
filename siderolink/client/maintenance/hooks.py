"""Hooks of an embedder for calls of the machine's API, with their requests and answers."""

import platform
import re
from collections.abc import AsyncIterator, Awaitable, Callable
from dataclasses import dataclass, field
from datetime import timedelta
from importlib.metadata import PackageNotFoundError, version
from typing import Literal

from siderolink.client.link.identity import TALOS_VERSION
from siderolink.common.errors import ConfigurationError
from siderolink.common.pb.machine import ServiceInfo
from siderolink.common.text import one_line

ApplyMode = Literal["reboot", "auto", "no-reboot", "staged", "try"]
ServiceAction = Literal["start", "stop", "restart"]
API_RELEASE = TALOS_VERSION
"""The release whose API this machine implements. `Version` returns it, and it is the default to report to servers."""

WipeMode = Literal["all", "system-disk", "user-disks"]


def _package_version() -> str:
    try:
        return semantic_version(version("siderolink"))
    except PackageNotFoundError:
        return "v0.0.0"


def semantic_version(text: str) -> str:
    """A Python package's version in the form that existing clients compare: ``1.2rc1`` is ``v1.2.0-rc.1``."""
    found = _PACKAGE_VERSION.match(text)
    if found is None:
        return "v0.0.0"
    numbers = [str(int(number)) for number in found["release"].split(".")]
    early = "".join(f"-{name}.{int(number or 0)}" for name, number in _EARLY.findall(found["rest"])[:1])
    return f"v{'.'.join((*numbers, '0', '0')[:3])}{early}"


_PACKAGE_VERSION = re.compile(r"(?:[0-9]+!)?(?P<release>[0-9]+(?:\.[0-9]+)*)(?P<rest>[^+]*)")
_EARLY = re.compile(r"(a|b|rc|dev)([0-9]*)")
_SEMANTIC = re.compile(
    r"v?(?:0|[1-9][0-9]*)(?:\.(?:0|[1-9][0-9]*)){2}"
    r"(?:-(?:0|[1-9][0-9]*|[0-9]*[A-Za-z-][0-9A-Za-z-]*)(?:\.(?:0|[1-9][0-9]*|[0-9]*[A-Za-z-][0-9A-Za-z-]*))*)?"
    r"(?:\+[0-9A-Za-z-]+(?:\.[0-9A-Za-z-]+)*)?\Z"
)
_ARCHITECTURES = {"x86_64": "amd64", "aarch64": "arm64"}


@dataclass(frozen=True, slots=True, kw_only=True)
class MachineVersion:
    """The release that the machine is compatible with; `sha` contains this package's own version.

    Existing clients parse the tag as a semantic version, refuse to work if it is none, and warn if it is older than their own.
    Raises ConfigurationError for a tag that is not a semantic version.
    """

    tag: str = API_RELEASE
    sha: str = field(default_factory=_package_version)
    built: str = ""
    os: str = field(default_factory=lambda: platform.system().lower())
    arch: str = field(default_factory=lambda: _ARCHITECTURES.get(platform.machine(), platform.machine()))
    platform: str = "metal"
    mode: str = "metal"

    def __post_init__(self) -> None:
        if not _SEMANTIC.match(self.tag):
            raise ConfigurationError(
                f"a version's tag is a semantic version such as v1.2.3, not {one_line(self.tag, limit=60)!r}"
            )


@dataclass(frozen=True, slots=True, kw_only=True)
class ApplyRequest:
    """A configuration to apply."""

    data: bytes = field(repr=False)
    """YAML documents, unchanged."""
    mode: ApplyMode
    dry_run: bool
    """Check only, change nothing."""
    try_timeout: timedelta | None
    """With the mode ``try``: the time after which the change is reverted."""
    by_admin: bool = True
    """Whether the caller is an admin; others do not see the present configuration."""


@dataclass(frozen=True, slots=True, kw_only=True)
class ApplyAnswer:
    """The result of applying a configuration."""

    warnings: tuple[str, ...] = ()
    mode: ApplyMode = "no-reboot"
    """The mode that was chosen."""
    details: str = ""
    """For people."""


@dataclass(frozen=True, slots=True, kw_only=True)
class ResetPartition:
    """A partition of the system disk to be reset."""

    label: str
    wipe: bool


@dataclass(frozen=True, slots=True, kw_only=True)
class ResetRequest:
    """A request to reset the machine."""

    graceful: bool
    reboot: bool
    system_partitions: tuple[ResetPartition, ...]
    """Empty for all of them."""
    user_disks: tuple[str, ...]
    mode: WipeMode
    actor_id: str
    """The actor id for the events of this reset."""


@dataclass(frozen=True, slots=True, kw_only=True)
class RebootRequest:
    """A request to reboot."""

    power_cycle: bool
    actor_id: str
    """The actor id for the events of this reboot."""


@dataclass(frozen=True, slots=True, kw_only=True)
class ShutdownRequest:
    """A request to power off."""

    force: bool
    actor_id: str
    """The actor id for the events of this shutdown."""


@dataclass(frozen=True, slots=True, kw_only=True)
class InstallRequest:
    """A request to install or upgrade the operating system."""

    image: str
    disk: str = ""
    """Empty for an upgrade."""
    is_upgrade: bool = False


@dataclass(frozen=True, slots=True, kw_only=True)
class LogRequest:
    """A request for the lines of a log."""

    id: str
    follow: bool
    tail_lines: int
    """Past lines to start with; negative for all."""


@dataclass(frozen=True, slots=True, kw_only=True)
class MachineHooks:
    """The functions that serve permitted API calls.

    None selects the default in docs/machine.md: a refusal, or for logs, services and the kernel's log what a plain Linux host
    provides. A hook that raises ConfigurationError refuses the call (INVALID_ARGUMENT, with the error's text). GRPCError is
    returned to the caller; any other exception becomes INTERNAL and is logged. The caller waits for the hook, so start long
    operations without awaiting them.
    """

    version: MachineVersion = field(default_factory=MachineVersion)
    apply_configuration: Callable[[ApplyRequest], Awaitable[ApplyAnswer]] | None = None
    reboot: Callable[[RebootRequest], Awaitable[None]] | None = None
    reset: Callable[[ResetRequest], Awaitable[None]] | None = None
    shutdown: Callable[[ShutdownRequest], Awaitable[None]] | None = None
    pull_image: Callable[[str], Awaitable[str]] | None = None
    """Fetch an installer's image, the first call of an installation; returns the image's name."""
    install: Callable[[InstallRequest], AsyncIterator[str]] | None = None
    """Install or upgrade; yields lines of progress, and has succeeded when it ends."""
    meta_write: Callable[[int, bytes], Awaitable[None]] | None = None
    """Write a META key (0 to 255)."""
    meta_delete: Callable[[int], Awaitable[bool]] | None = None
    """Delete a META key; returns False if it does not exist."""
    logs: Callable[[LogRequest], AsyncIterator[bytes]] | None = None
    """The lines of a log, each with its end."""
    log_names: tuple[str, ...] = ()
    """The logs that `logs` has."""
    dmesg: Callable[[bool, bool], AsyncIterator[bytes]] | None = None
    """The kernel's log; arguments: whether to follow it, and whether to return only new lines."""
    services: Callable[[], Awaitable[list[ServiceInfo]]] | None = None
    control_service: Callable[[ServiceAction, str], Awaitable[str]] | None = None
    """Start, stop or restart a service; returns a text for people."""
