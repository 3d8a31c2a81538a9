"""Debian's `wireguard-go`, configured with `wg`: another WireGuard implementation at the other end of a link."""

import subprocess
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager

from siderolink.common.keys import PresharedKey, PrivateKey, PublicKey
from tests.support.netns import Namespace, run_beside, stop


class WireguardGo:
    """One running interface; see `wireguard_go`."""

    def __init__(self, namespace: Namespace, process: "subprocess.Popen[str]", name: str) -> None:
        self.namespace = namespace
        self.name = name
        self._process = process

    def wg(self, *args: str, stdin: str | None = None) -> str:
        """Run ``wg`` with these arguments where it sees this interface; `stdin` is what ``/dev/stdin`` holds."""
        return run_beside(self._process, ["wg", *args], input=stdin)

    def end(self) -> None:
        """Stop it before its block ends; the interface goes with it."""
        stop(self._process)

    @property
    def pid(self) -> int:
        return self._process.pid

    def set_peer(
        self,
        public_key: PublicKey,
        allowed_ips: str,
        *,
        endpoint: str | None = None,
        preshared_key: PresharedKey | None = None,
        keepalive: int = 0,
    ) -> None:
        args = ["peer", public_key.encode(), "allowed-ips", allowed_ips, "persistent-keepalive", str(keepalive)]
        if endpoint is not None:
            args += ["endpoint", endpoint]
        if preshared_key is not None:
            args += ["preshared-key", "/dev/stdin"]
        self.wg("set", self.name, *args, stdin=preshared_key.encode() if preshared_key is not None else None)

    def latest_handshake(self, public_key: PublicKey) -> int:
        """Unix time in seconds; 0 if there was none."""
        return int(self._peer_column("latest-handshakes", public_key)[0])

    def endpoint(self, public_key: PublicKey) -> str:
        return self._peer_column("endpoints", public_key)[0]

    def transfer(self, public_key: PublicKey) -> tuple[int, int]:
        """Bytes received from the peer and sent to it."""
        received, sent = self._peer_column("transfer", public_key)
        return int(received), int(sent)

    def _peer_column(self, what: str, public_key: PublicKey) -> list[str]:
        for line in self.wg("show", self.name, what).splitlines():
            key, *values = line.split()
            if key == public_key.encode():
                return values
        raise LookupError(f"no peer {public_key}")


WIREGUARD_GO = ("wireguard-go", "--foreground")


@contextmanager
def wireguard_go(
    namespace: Namespace,
    private_key: PrivateKey,
    *,
    port: int,
    addresses: tuple[str, ...] = (),
    name: str = "wg0",
    mtu: int = 1280,
    command: Sequence[str] = WIREGUARD_GO,
) -> Iterator[WireguardGo]:
    """An interface of wireguard-go in the namespace, up and without peers; it ends with the block.

    `command`, given the interface's name, may be any other program that stays in the foreground and listens to `wg`.
    """
    process = namespace.popen([*command, name], own_uapi_folder=True, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
    try:
        found = WireguardGo(namespace, process, name)
        _wait_for_socket(process, name)
        found.wg("set", name, "private-key", "/dev/stdin", "listen-port", str(port), stdin=private_key.encode())
        for address in addresses:
            namespace.add_address(name, address)
        namespace.set_link(name, up=True, mtu=mtu)
        yield found
    finally:
        stop(process)


def _wait_for_socket(process: "subprocess.Popen[str]", name: str) -> None:
    deadline = time.monotonic() + 30
    while f"{name}.sock" not in run_beside(process, ["ls", "/var/run/wireguard"], check=False).split():
        assert process.poll() is None, f"wireguard-go ended with {process.returncode}"
        assert time.monotonic() < deadline, "wireguard-go opens no socket"
        time.sleep(0.02)
