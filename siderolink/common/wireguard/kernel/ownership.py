"""Whose an interface is: a lock that dies with its holder, and a mark that outlives him.

The lock is a socket in the abstract namespace, which the kernel keeps per network namespace just as it keeps interfaces' names,
and closes when the process ends. The mark is the interface's alias. An interface with the mark whose lock is free was left by a
process that is no more; one without the mark is somebody else's.
"""

import socket
import struct
from typing import Final

from siderolink.common.errors import InterfaceInUseError
from siderolink.common.netlink import call_in

__all__ = ["MARK", "hold_name"]

MARK: Final = "made by siderolink"
_CREDENTIALS: Final = struct.Struct("=iII")


def hold_name(name: str, namespace: str | None) -> socket.socket:
    """Hold the interface's name in this namespace until the socket is closed. Raises InterfaceInUseError, naming the holder."""
    address = f"\0siderolink/{name}"

    def take() -> socket.socket:
        held = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM | socket.SOCK_CLOEXEC)
        try:
            held.bind(address)
            held.listen(1)
        except OSError as error:
            held.close()
            raise InterfaceInUseError(
                f"the interface {name} is held by {_holder(address)}: stop it, or choose another name"
            ) from error
        return held

    return call_in(namespace, take)


def _holder(address: str) -> str:
    with socket.socket(socket.AF_UNIX, socket.SOCK_STREAM | socket.SOCK_NONBLOCK) as probe:
        try:
            probe.connect(address)
            raw = probe.getsockopt(socket.SOL_SOCKET, socket.SO_PEERCRED, _CREDENTIALS.size)
        except OSError:
            return "another process"
    process, user, _ = _CREDENTIALS.unpack(raw)
    return f"process {process} of user {user}"
