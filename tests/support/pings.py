"""Pings that wait for late answers: on a stalled host, `ping` counts those as lost that come after its last request.

ping(net.machine, "fd00::1", "-s1200")           # each of three is answered
with pinging(net.machine, "fd00::1") as pings:   # in the background
    ...
    assert pings.lost() == []
"""

import os
import select
import shlex
import socket
import struct
import time
from collections.abc import Callable, Iterator
from concurrent.futures import Future
from contextlib import contextmanager
from threading import Event, Thread

from tests.support.netns import Namespace

_ECHO_REQUEST, _ECHO_REPLY = 128, 129
_ECHO = struct.Struct("!BBH4sI")
"""Type, code, checksum (the kernel's), the sender's name where others have identifier and sequence, number."""
_LAST = 0xFFFF_FFFF
_PATIENCE = 60.0


def ping(namespace: Namespace, address: object, *options: str, count: int = 3) -> None:
    """Ping one by one; each must be answered within 20 s."""
    once = shlex.join(["ping", "-q", "-c1", "-W20", *options, str(address)])
    namespace.run(["sh", "-ec", "\n".join([once] * count)], timeout=count * 21 + 10)


class Pings:
    """Echo requests to an IPv6 address, numbered from 0."""

    def __init__(self, sock: socket.socket, address: str, interval: float) -> None:
        self._socket, self._address, self._interval = sock, address, interval
        self._name = os.urandom(4)
        self._unanswered: set[int] = set()
        self._stopping, self._is_through = Event(), False
        self._ended: Future[None] = Future()
        self.sent = 0
        self._thread = Thread(target=self._run_to_end, daemon=True)
        self._thread.start()

    def oldest_unanswered(self) -> int:
        """The number of the first request that has no answer yet; `sent` if each has one."""
        return min(set(self._unanswered), default=self.sent)

    def wait_sent(self, count: int) -> None:
        """Until so many more requests were sent."""
        enough = self.sent + count
        self.wait(lambda: self.sent >= enough)

    def lost(self) -> list[int]:
        """End, and give the numbers of those that were never answered, although a later one was."""
        self._stopping.set()
        self._ended.result(_PATIENCE + 10)
        return sorted(self._unanswered)

    def end(self) -> None:
        self._is_through = True
        self._thread.join()

    def wait(self, condition: Callable[[], bool]) -> None:
        """Until it holds; raises what ended the pings."""
        deadline = time.monotonic() + _PATIENCE
        while not condition():
            if self._ended.done():
                self._ended.result()
            assert time.monotonic() < deadline, f"{self.sent} were sent, {len(self._unanswered)} of them not answered"
            time.sleep(self._interval)

    def _run_to_end(self) -> None:
        try:
            self._run()
        except BaseException as error:
            self._ended.set_exception(error)
        else:
            self._ended.set_result(None)

    def _run(self) -> None:
        due, deadline = time.monotonic(), 0.0
        while not self._is_through:
            if select.select([self._socket], [], [], max(due - time.monotonic(), 0))[0]:
                self._take(self._socket.recv(2048))
            if (now := time.monotonic()) < due:
                continue
            if not self._stopping.is_set():
                self._unanswered.add(self.sent)
                self._send(self.sent)
                self.sent += 1
                due = max(due + self._interval, now)
            else:
                deadline = deadline or now + _PATIENCE
                assert now < deadline, "the last one is not answered"
                self._send(_LAST)
                due = now + 0.2

    def _send(self, number: int) -> None:
        self._socket.sendto(_ECHO.pack(_ECHO_REQUEST, 0, 0, self._name, number), (self._address, 0))

    def _take(self, message: bytes) -> None:
        if len(message) != _ECHO.size:
            return
        kind, _, _, name, number = _ECHO.unpack(message)
        if (kind, name) == (_ECHO_REPLY, self._name):
            self._unanswered.discard(number)
            self._is_through = number == _LAST


@contextmanager
def pinging(namespace: Namespace, address: object, interval: float = 0.02) -> Iterator[Pings]:
    """Pings until the block ends, which begins when they are answered."""
    with namespace.call(socket.socket, socket.AF_INET6, socket.SOCK_RAW, socket.IPPROTO_ICMPV6) as sock:
        pings = Pings(sock, str(address), interval)
        try:
            pings.wait(lambda: pings.oldest_unanswered() > 0)
            yield pings
        finally:
            pings.end()
