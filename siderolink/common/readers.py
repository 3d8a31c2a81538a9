"""Keeps reading a socket after a pending error."""

import asyncio
import socket
from collections.abc import Callable


def read_on(loop: asyncio.AbstractEventLoop, sock: socket.socket, callback: Callable[..., None], *args: object) -> None:
    """Watch the socket again; call this when receiving raised an error that does not end the socket.

    A pending error (a netlink socket's ENOBUFS, a closed port's ECONNREFUSED) makes uvloop call the reader once more, and then
    never again.
    """
    loop.remove_reader(sock)
    loop.add_reader(sock, callback, *args)
