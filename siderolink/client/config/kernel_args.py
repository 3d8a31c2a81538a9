"""The kernel command line: what a machine is told by the way it is booted."""

import os
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path

from siderolink.client.config.files import read_up_to
from siderolink.client.config.log_url import LogURL
from siderolink.client.config.settings import MachineSettings, Setting
from siderolink.common.errors import ConfigurationError
from siderolink.common.hostport import HostPort
from siderolink.common.join_url import JoinURL

URL_ARGUMENT = "siderolink.api"
EVENT_SINK_ARGUMENT = "talos.events.sink"
KERNEL_LOG_ARGUMENT = "talos.logging.kernel"

PROC_CMDLINE = Path("/proc/cmdline")
MAX_BYTES = 64 * 1024
"""Kernels take a few KiB; a longer file is none of theirs."""

_SPACES = frozenset(" \t\n\v\f\r\xa0")
_CONTAINER_FILES = ("run/.containerenv", "run/systemd/container")
_FIRST_PID_NAMESPACE = "pid:[4026531836]"  # the kernel gives its first one a fixed number


def split_arguments(line: str) -> Iterator[tuple[str, str | None]]:
    """Names and values, as the kernel takes a line apart; None where an argument has no ``=``.

    Quotes keep spaces together and vanish where they surround a value or a whole argument. What follows a lone ``--`` is for
    the first process and is left out.
    """
    start, end = 0, len(line)
    while start < end:
        if line[start] in _SPACES:
            start += 1
            continue
        stop, is_quoted = start, False
        while stop < end and (is_quoted or line[stop] not in _SPACES):
            is_quoted ^= line[stop] == '"'
            stop += 1
        name, value = _split_argument(line[start:stop])
        if (name, value) == ("--", None):
            return
        yield name, value
        start = stop


def _split_argument(text: str) -> tuple[str, str | None]:
    if text.startswith('"'):
        text = text[1:].removesuffix('"')
    # an argument that begins with = is a name without a value
    equals = text.find("=", 1)
    if equals < 0:
        return text, None
    value = text[equals + 1 :]
    if value.startswith('"'):
        value = value[1:].removesuffix('"')
    return text[:equals], value


def first_values(line: str) -> dict[str, str]:
    """Each argument's first value; those without one are left out."""
    found: dict[str, str] = {}
    for name, value in split_arguments(line):
        if value is not None:
            found.setdefault(name, value)
    return found


def parse_kernel_arguments(line: str, source: str = "the kernel command line") -> MachineSettings:
    """What a line says. An empty value says nothing. Raises ConfigurationError, which names the argument."""
    found = first_values(line)

    def read(name: str) -> Setting[str] | None:
        value = found.get(name)
        return Setting(value, f"{source}: {name}") if value else None

    try:
        url, sink, log = read(URL_ARGUMENT), read(EVENT_SINK_ARGUMENT), read(KERNEL_LOG_ARGUMENT)
        name = URL_ARGUMENT
        settings_url = Setting(JoinURL.parse(url.value), url.source) if url else None
        name = EVENT_SINK_ARGUMENT
        settings_sink = Setting(HostPort.parse(sink.value), sink.source) if sink else None
        name = KERNEL_LOG_ARGUMENT
        settings_logs = (Setting(LogURL.parse(log.value), log.source),) if log else ()
    except ConfigurationError as error:
        raise ConfigurationError(f"{source}: {name}: {error}") from None
    return MachineSettings(url=settings_url, event_sink=settings_sink, kernel_logs=settings_logs)


def in_container(root: Path = Path("/"), environ: Mapping[str, str] = os.environ) -> bool:
    """Whether this is a container, whose kernel was booted for somebody else.

    By what container managers say, and by the PID namespace. A file such as ``/.dockerenv`` proves nothing: virtual machines
    made from container images have it, too.
    """
    if environ.get("container") or environ.get("PLATFORM") == "container":
        return True
    if any(root.joinpath(name).exists() for name in _CONTAINER_FILES):
        return True
    try:
        return os.readlink(root / "proc/self/ns/pid") != _FIRST_PID_NAMESPACE
    except OSError:
        return False


def read_kernel_arguments(file: Path | None = None, *, read: Callable[[Path, int], bytes] = read_up_to) -> MachineSettings:
    """What the kernel command line says, or a file of the same form.

    In a container the host's own command line is passed over; a file that is given is read everywhere. `read` reads a file up
    to so many bytes. Raises ConfigurationError.
    """
    if file is None and in_container():
        return MachineSettings(notes=("the kernel command line is passed over, since this is a container",))
    try:
        data = read(file or PROC_CMDLINE, MAX_BYTES + 1)
    except ConfigurationError as error:
        if file is None:
            return MachineSettings(notes=(f"no kernel command line: {error}",))
        raise
    if len(data) > MAX_BYTES:
        raise ConfigurationError(f"{file or PROC_CMDLINE} is longer than {MAX_BYTES // 1024} KiB")
    return parse_kernel_arguments(data.decode(errors="surrogateescape"), str(file or PROC_CMDLINE))
