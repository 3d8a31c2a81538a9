"""systemd's journal by its native protocol: each record is a datagram of fields, which `journalctl` can filter.

See systemd's "Native Journal Protocol" and systemd.exec(5), JOURNAL_STREAM.
"""

import errno
import fcntl
import os
import socket
from array import array
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Final

SOCKET: Final = Path("/run/systemd/journal/socket")
IDENTIFIER: Final = "siderolink"
PREFIX: Final = "SIDEROLINK_"
PRIORITIES: Final = {"debug": 7, "info": 6, "warning": 4, "error": 3, "critical": 2}
"""syslog(3) priorities by level."""
_MAX_FIELDS: Final = 64
_MAX_NAME: Final = 48
_SEALS: Final = fcntl.F_SEAL_SHRINK | fcntl.F_SEAL_GROW | fcntl.F_SEAL_WRITE | fcntl.F_SEAL_SEAL
_TOO_LARGE: Final = (errno.EMSGSIZE, errno.ENOBUFS)


def is_journal(descriptor: int, environment: Mapping[str, str]) -> bool:
    """Whether systemd has connected the descriptor to the journal and it was not redirected since."""
    device, colon, inode = environment.get("JOURNAL_STREAM", "").partition(":")
    try:
        status = os.fstat(descriptor)
        return bool(colon) and (int(device), int(inode)) == (status.st_dev, status.st_ino)
    except (OSError, ValueError):
        return False


def encode(message: str, level: str, fields: Mapping[str, object]) -> bytes:
    """Encode one record. Names become ``SIDEROLINK_NAME``; invalid names are left out."""
    found = {"MESSAGE": message, "PRIORITY": PRIORITIES.get(level, 6), "SYSLOG_IDENTIFIER": IDENTIFIER}
    for name, value in list(fields.items())[:_MAX_FIELDS]:
        key = name.upper().replace("-", "_")
        if key.isascii() and key.replace("_", "").isalnum() and len(key) <= _MAX_NAME:
            found[PREFIX + key] = value
    return b"".join(_field(name, str(value).encode(errors="replace")) for name, value in found.items())


def _field(name: str, value: bytes) -> bytes:
    if b"\n" in value:
        return b"%s\n%s%s\n" % (name.encode(), len(value).to_bytes(8, "little"), value)
    return b"%s=%s\n" % (name.encode(), value)


class Journal:
    """Sends records. `send` may block or raise OSError if the journal does not accept them, so call it in a thread."""

    def __init__(self, path: Path = SOCKET) -> None:
        self._path = str(path)
        self._socket = socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM | socket.SOCK_CLOEXEC)

    def close(self) -> None:
        self._socket.close()

    def send(self, records: Sequence[bytes]) -> None:
        """Raises OSError."""
        for record in records:
            try:
                self._socket.sendto(record, self._path)
            except OSError as error:
                if error.errno not in _TOO_LARGE:
                    raise
                self._send_as_file(record)

    def _send_as_file(self, record: bytes) -> None:
        """Pass a record that is too large for a datagram in a sealed memory file."""
        descriptor = os.memfd_create("siderolink-record", os.MFD_CLOEXEC | os.MFD_ALLOW_SEALING)
        try:
            with open(descriptor, "wb", closefd=False) as file:
                file.write(record)
            fcntl.fcntl(descriptor, fcntl.F_ADD_SEALS, _SEALS)
            rights = array("i", [descriptor])
            self._socket.sendmsg([b""], [(socket.SOL_SOCKET, socket.SCM_RIGHTS, rights)], 0, self._path)
        finally:
            os.close(descriptor)
