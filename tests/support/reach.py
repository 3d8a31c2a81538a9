"""Checks whether connections and datagrams pass a firewall: a closed port refuses those that do."""

import socket
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor

from tests.support.netns import Namespace

REFUSED = "refused"
NOTHING = "nothing"
_SECONDS = 0.7


def lets_in(namespace: Namespace, *attempts: Callable[[], str]) -> bool:
    """Whether all attempts from a namespace reach a closed port, which refuses them; waits longer on a busy host."""
    return any(set(together(namespace, *attempts)) == {REFUSED} for _ in range(10))


def keeps_out(namespace: Namespace, *attempts: Callable[[], str]) -> bool:
    """Whether no attempt from a namespace gets an answer."""
    return set(together(namespace, *attempts)) == {NOTHING}


def together(namespace: Namespace, *attempts: Callable[[], str]) -> list[str]:
    """The results of several attempts from a namespace at once, because unanswered ones take long."""

    def attempt() -> list[str]:
        with ThreadPoolExecutor(len(attempts)) as executor:
            return list(executor.map(lambda call: call(), attempts))

    return namespace.call(attempt)


def dial(to: str, port: int, bind: str | None) -> str:
    family = socket.AF_INET6 if ":" in to else socket.AF_INET
    with socket.socket(family, socket.SOCK_STREAM) as sock:
        sock.settimeout(0.7)
        if bind is not None:
            sock.bind((bind, 0))
        try:
            sock.connect((to, port))
        except ConnectionRefusedError:
            return REFUSED
        except TimeoutError:
            return NOTHING
        return "connected"


def send_udp(to: str, port: int) -> str:
    family = socket.AF_INET6 if ":" in to else socket.AF_INET
    with socket.socket(family, socket.SOCK_DGRAM) as sock:
        sock.settimeout(0.7)
        sock.connect((to, port))
        sock.send(b"x")
        try:
            sock.recv(1)
        except ConnectionRefusedError:
            return REFUSED
        except TimeoutError:
            return NOTHING
        return "answered"


def ruleset(namespace: Namespace) -> str:
    return namespace.run(["nft", "list", "ruleset"])
