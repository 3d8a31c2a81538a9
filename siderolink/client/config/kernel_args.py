"""Settings from the kernel command line."""

import base64
import binascii
import codecs
import os
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import TypeVar

from siderolink.client.config.files import read_up_to
from siderolink.client.config.settings import LogURL, MachineSettings, Setting
from siderolink.common.errors import ConfigurationError
from siderolink.common.hostport import HostPort
from siderolink.common.join_url import JoinURL

URL_ARGUMENT = "siderolink.api"
EVENT_SINK_ARGUMENT = "talos.events.sink"
KERNEL_LOG_ARGUMENT = "talos.logging.kernel"
INLINE_ARGUMENT = "talos.config.inline"

PROC_CMDLINE = Path("/proc/cmdline")
MAX_BYTES = 64 * 1024
"""Kernels accept a few KiB, so a longer file is not a kernel command line."""

MAX_INLINE_BYTES = 512 * 1024
"""Maximum decompressed size of the documents in a command line."""

T = TypeVar("T")

_ZSTD_WINDOW = 1 << 23
_ZSTD_STEP = 64
_ZSTD_MAGIC = b"\x28\xb5\x2f\xfd"
_SPACES = frozenset(" \t\n\v\f\r\xa0")
_CONTAINER_FILES = ("run/.containerenv", "run/systemd/container")
_FIRST_PID_NAMESPACE = "pid:[4026531836]"  # the kernel gives its first one a fixed number


def split_arguments(line: str) -> Iterator[tuple[str, str | None]]:
    """Names and values, split as the kernel does; the value is None if an argument has no ``=``.

    Quotes protect spaces; they are removed if they surround a value or a whole argument. Arguments after a lone ``--`` are for
    the first process and are omitted.
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
    """Each argument's first value; arguments without one are omitted."""
    found: dict[str, str] = {}
    for name, value in split_arguments(line):
        if value is not None:
            found.setdefault(name, value)
    return found


def inline_configuration(line: str) -> bytes | None:
    """The documents in a command line: base64, optionally compressed by zstd, in one argument or spread over several.

    None if there are none. Raises ConfigurationError.
    """
    encoded = "".join(value for name, value in split_arguments(line) if name == INLINE_ARGUMENT and value)
    if not encoded:
        return None
    try:
        data = base64.b64decode(encoded, validate=True)
    except (ValueError, binascii.Error):
        raise ConfigurationError("must be base64") from None
    return _decompress(data) if data.startswith(_ZSTD_MAGIC) else data


def _decompress(data: bytes) -> bytes:
    try:
        import zstandard
    except ModuleNotFoundError:
        raise ConfigurationError("is zstd-compressed, which needs zstandard: pip install 'siderolink[config]'") from None
    decompressor = zstandard.ZstdDecompressor(max_window_size=_ZSTD_WINDOW).decompressobj()
    found = bytearray()
    try:
        # decompress a few bytes at a time, so that a decompression bomb is detected early
        for position in range(0, len(data), _ZSTD_STEP):
            found += decompressor.decompress(data[position : position + _ZSTD_STEP])
            if decompressor.eof or len(found) > MAX_INLINE_BYTES:
                return bytes(found)
    except zstandard.ZstdError:
        pass
    raise ConfigurationError("is not zstd-compressed or is damaged")


def parse_kernel_arguments(line: str, source: str = "the kernel command line") -> MachineSettings:
    """The settings in a line. Ignores empty values; an unusable value is a problem and does not affect other arguments.

    The documents of ``talos.config.inline`` are not part of this: see `inline_configuration`.
    """
    found = first_values(line)
    problems: list[str] = []

    def read(name: str, parse: Callable[[str], T]) -> Setting[T] | None:
        value = found.get(name)
        if not value:
            return None
        try:
            return Setting(parse(value), f"{source}: {name}")
        except ConfigurationError as error:
            problems.append(f"{source}: {name}: {error}; it is ignored")
            return None

    url, sink = read(URL_ARGUMENT, JoinURL.parse), read(EVENT_SINK_ARGUMENT, HostPort.parse)
    log = read(KERNEL_LOG_ARGUMENT, LogURL.parse)
    return MachineSettings(url=url, event_sink=sink, kernel_logs=(log,) if log else (), problems=tuple(problems))


def in_container(root: Path = Path("/"), environ: Mapping[str, str] = os.environ) -> bool:
    """Whether this is a container, whose kernel command line belongs to the host.

    Determined by the variables that container managers set, and by the PID namespace. A file such as ``/.dockerenv`` proves
    nothing: virtual machines built from container images have it, too.
    """
    if environ.get("container") or environ.get("PLATFORM") == "container":
        return True
    if any(root.joinpath(name).exists() for name in _CONTAINER_FILES):
        return True
    try:
        return os.readlink(root / "proc/self/ns/pid") != _FIRST_PID_NAMESPACE
    except OSError:
        return False


def read_kernel_line(
    file: Path | None = None, *, read: Callable[[Path, int], bytes] = read_up_to
) -> tuple[str, str, str | None]:
    """The kernel command line, or a file of the same format; its display name; and why it was ignored, if it was.

    A container ignores the host's command line; a given file is always read. `read` reads a file up to a number of bytes.
    Raises ConfigurationError for a given file that cannot be read.
    """
    path = file or PROC_CMDLINE
    if file is None and in_container():
        return "", str(path), "the kernel command line is ignored because this is a container"
    try:
        data = read(path, MAX_BYTES + 1)
    except ConfigurationError as error:
        if file is None:
            return "", str(path), f"no kernel command line: {error}"
        raise
    if len(data) > MAX_BYTES:
        raise ConfigurationError(f"{path} is longer than {MAX_BYTES // 1024} KiB")
    return data.removeprefix(codecs.BOM_UTF8).decode(errors="surrogateescape"), str(path), None


def read_kernel_arguments(file: Path | None = None, *, read: Callable[[Path, int], bytes] = read_up_to) -> MachineSettings:
    """Parse the result of `read_kernel_line`. Raises ConfigurationError as that does."""
    line, source, passed_over = read_kernel_line(file, read=read)
    if passed_over is not None:
        return MachineSettings(notes=(passed_over,))
    return parse_kernel_arguments(line, source)
