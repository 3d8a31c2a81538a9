"""Run a program that cannot open netlink sockets: ``without_netlink.py PROGRAM ARGUMENT...``

Chromium listens for changes of addresses by netlink, and aborts what it loads when there is one (ERR_NETWORK_CHANGED).
This could fail any page in a namespace where addresses and devices come and go. Without netlink, its network is steady.
Where no seccomp filter can be set, it says so on stderr and runs the program all the same.
"""

import ctypes
import errno
import os
import platform
import struct
import sys

_PR_SET_SECCOMP, _PR_SET_NO_NEW_PRIVS, _SECCOMP_MODE_FILTER = 22, 38, 2
_AF_NETLINK = 16
_LOAD_WORD, _JUMP_IF_EQUAL, _RETURN = 0x20, 0x15, 0x06
_ALLOW, _ERRNO = 0x7FFF0000, 0x00050000
_NUMBER_AT, _ARCHITECTURE_AT, _FIRST_ARGUMENT_AT = 0, 4, 16  # in struct seccomp_data, little endian
_SOCKET_CALL = {"x86_64": (0xC000003E, 41), "aarch64": (0xC00000B7, 198)}
"""The audit architecture and the number of socket(2)."""


def refuse_netlink() -> None:
    """socket(AF_NETLINK, ...) fails with EAFNOSUPPORT from now on, in this process and in those that it starts."""
    if platform.machine() not in _SOCKET_CALL:
        raise OSError(errno.ENOSYS, f"not written for {platform.machine()}")
    architecture, number = _SOCKET_CALL[platform.machine()]
    steps = [
        (_LOAD_WORD, 0, 0, _ARCHITECTURE_AT),
        (_JUMP_IF_EQUAL, 0, 5, architecture),
        (_LOAD_WORD, 0, 0, _NUMBER_AT),
        (_JUMP_IF_EQUAL, 0, 3, number),
        (_LOAD_WORD, 0, 0, _FIRST_ARGUMENT_AT),
        (_JUMP_IF_EQUAL, 0, 1, _AF_NETLINK),
        (_RETURN, 0, 0, _ERRNO | errno.EAFNOSUPPORT),
        (_RETURN, 0, 0, _ALLOW),
    ]
    code = ctypes.create_string_buffer(b"".join(struct.pack("=HBBI", *step) for step in steps))
    program = ctypes.create_string_buffer(struct.pack("@HP", len(steps), ctypes.addressof(code)))
    libc = ctypes.CDLL(None, use_errno=True)
    libc.prctl.argtypes = [ctypes.c_int, *[ctypes.c_ulong] * 4]
    for call in (
        (_PR_SET_NO_NEW_PRIVS, 1, 0, 0, 0),
        (_PR_SET_SECCOMP, _SECCOMP_MODE_FILTER, ctypes.addressof(program), 0, 0),
    ):
        if libc.prctl(*call):
            raise OSError(ctypes.get_errno(), os.strerror(ctypes.get_errno()))


if __name__ == "__main__":
    try:
        refuse_netlink()
    except OSError as error:
        sys.stderr.write(f"without_netlink: no seccomp filter can be set here ({error}): netlink stays open\n")
        sys.stderr.flush()
    os.execvp(sys.argv[1], sys.argv[1:])
