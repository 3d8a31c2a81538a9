"""Whether connections and datagrams get through, told by what a closed port answers: it refuses what is let in."""

import socket
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor

from tests.support.netns import Namespace

REFUSED = "refused"
NOTHING = "nothing"
_SECONDS = 0.7


def lets_in(namespace: Namespace, *attempts: Callable[[], str]) -> bool:
    """Whether attempts from a namespace all come as far as a closed port, which refuses them: soon, or later on a busy host."""
    return any(set(together(namespace, *attempts)) == {REFUSED} for _ in range(10))


def keeps_out(namespace: Namespace, *attempts: Callable[[], str]) -> bool:
    """Whether nothing at all answers to attempts from a namespace."""
    return set(together(namespace, *attempts)) == {NOTHING}


def together(namespace: Namespace, *attempts: Callable[[], str]) -> list[str]:
    """What becomes of several attempts from a namespace at once: those that nothing answers take their time."""

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
