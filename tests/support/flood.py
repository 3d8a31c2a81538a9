"""A flood of valid handshake initiations from one source address or from many; test_flood runs it in a namespace.

Usage: python -m tests.support.flood PUBLIC_KEY HOST PORT PER_SECOND SECONDS SOURCE…
"""

import os
import socket
import sys
import time
from ipaddress import ip_address

from siderolink.common.keys import PublicKey
from siderolink.common.wireguard.noise import Engine
from tests.support.virtual import CIPHERS, VirtualPath


def well_made_initiation(private_key: bytes, public_key: PublicKey) -> bytes:
    """An initiation from this key with a valid mac1 for the other."""
    engine = Engine(private_key, entropy=os.urandom, unix_time_ns=time.time_ns, ciphers=CIPHERS)
    peer = engine.add_peer(bytes(public_key))
    peer.path = VirtualPath("victim")
    engine.initiate(peer, 10.0)
    [(_, datagram)] = engine.output.take_datagrams()
    return datagram


def well_made_initiations(public_key: PublicKey, count: int) -> list[bytes]:
    """Initiations with a valid mac1 from keys that the other side does not know."""
    return [well_made_initiation(os.urandom(32), public_key) for _ in range(count)]


def main() -> None:
    key, host, port, rate, seconds, *sources = sys.argv[1:]
    messages = well_made_initiations(PublicKey.parse(key), 50)
    family = socket.AF_INET6 if ip_address(host).version == 6 else socket.AF_INET
    sockets = []
    for source in sources:
        opened = socket.socket(family, socket.SOCK_DGRAM | socket.SOCK_NONBLOCK)
        opened.bind((source, 0))
        opened.connect((host, int(port)))
        sockets.append(opened)
    sys.stdout.write("ready\n")
    sys.stdout.flush()
    began = time.monotonic()
    sent = 0
    while (elapsed := time.monotonic() - began) < float(seconds):
        for _ in range(max(0, int(elapsed * float(rate)) - sent)):
            try:
                sockets[sent % len(sockets)].send(messages[sent % len(messages)])
            except OSError:
                pass
            sent += 1
        time.sleep(0.001)
    sys.stdout.write(f"{sent}\n")


if __name__ == "__main__":
    main()
