"""What an embedder does when the machine's API is called."""

import platform
import re
from collections.abc import Awaitable, Callable
from dataclasses import dataclass, field
from datetime import timedelta
from importlib.metadata import PackageNotFoundError, version
from typing import Literal

from siderolink.common.errors import ConfigurationError
from siderolink.common.text import one_line

ApplyMode = Literal["reboot", "auto", "no-reboot", "staged", "try"]
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
    """What the machine runs; the defaults are this package's.

    Existing clients read the tag as a semantic version and do nothing at all where it is none. Raises ConfigurationError for
    such a tag.
    """

    tag: str = field(default_factory=_package_version)
    sha: str = ""
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
    """A configuration to take."""

    data: bytes = field(repr=False)
    """YAML documents, as they came."""
    mode: ApplyMode
    dry_run: bool
    """Check only, change nothing."""
    try_timeout: timedelta | None
    """With the mode ``try``: how long before the change is taken back."""


@dataclass(frozen=True, slots=True, kw_only=True)
class ApplyAnswer:
    """What became of a configuration."""

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
    """What a reset shall do."""

    graceful: bool
    reboot: bool
    system_partitions: tuple[ResetPartition, ...]
    """Empty for all of them."""
    user_disks: tuple[str, ...]
    mode: WipeMode
    actor_id: str
    """What the events of the reset shall carry."""


@dataclass(frozen=True, slots=True, kw_only=True)
class RebootRequest:
    """How to reboot."""

    power_cycle: bool
    actor_id: str
    """What the events of the reboot shall carry."""


@dataclass(frozen=True, slots=True, kw_only=True)
class MachineHooks:
    """What is called for an API call that the caller may make; what is None is answered UNIMPLEMENTED.

    A hook that raises ConfigurationError refuses the call (INVALID_ARGUMENT, with the error's text); GRPCError answers as it
    says; anything else is INTERNAL, and logged. The caller waits for the hook, so what takes long is begun and not awaited.
    """

    version: MachineVersion = field(default_factory=MachineVersion)
    apply_configuration: Callable[[ApplyRequest], Awaitable[ApplyAnswer]] | None = None
    reboot: Callable[[RebootRequest], Awaitable[None]] | None = None
    reset: Callable[[ResetRequest], Awaitable[None]] | None = None
    meta_write: Callable[[int, bytes], Awaitable[None]] | None = None
    """Write a META key (0 to 255)."""
    meta_delete: Callable[[int], Awaitable[bool]] | None = None
    """Delete a META key; False where there was none."""
