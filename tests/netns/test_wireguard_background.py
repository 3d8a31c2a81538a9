"""`siderolink wireguard --background` in the hands of scripts that run any userspace WireGuard."""

import subprocess
import sys
from pathlib import Path

from siderolink.common.keys import PrivateKey
from tests.support.bare import bare
from tests.support.netns import Namespace, link, stop
from tests.support.waiting import until

ROOT = Path(__file__).resolve().parents[2]


def program(folder: Path) -> Path:
    """What an installation has as `siderolink-wireguard`."""
    found = folder / "siderolink-wireguard"
    found.write_text(
        f"#!{sys.executable}\nimport sys\nsys.path.insert(0, {str(ROOT)!r})\n"
        "from siderolink.cli import wireguard\nwireguard()\n"
    )
    found.chmod(0o755)
    return found


def shell(namespace: Namespace, script: str, *, status: int = 0) -> str:
    """Run a script where UAPI sockets are its own; what it leaves running must hold none of its outputs."""
    process = namespace.popen(
        ["bash", "-c", script], own_uapi_folder=True, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, start_new_session=True
    )
    try:
        output, _ = process.communicate(timeout=60)
    finally:
        stop(process)
    assert process.returncode == status, output
    return output


def test_it_returns_when_the_interface_is_there_and_ends_with_it(tmp_path: Path) -> None:
    run = program(tmp_path)
    with Namespace("script") as namespace:
        output = shell(
            namespace,
            f"""
            {run} wg0 || exit 10
            wg set wg0 listen-port 4242 || exit 11
            wg show wg0 listen-port
            {run} wg0 && exit 12
            ip link del wg0
            for _ in {{1..100}}; do [ -e /var/run/wireguard/wg0.sock ] || exit 0; sleep 0.05; done
            exit 13
            """,
        )
        assert output.splitlines() == [
            "4242",
            "siderolink: the interface wg0 already exists: remove it, or choose another name",
        ]
        until(lambda: not pids(namespace))


def pids(namespace: Namespace) -> list[str]:
    return subprocess.run(["ip", "netns", "pids", namespace.name], capture_output=True, text=True, check=True).stdout.split()


def test_the_log_level_comes_from_the_environment(tmp_path: Path) -> None:
    run = program(tmp_path)
    key, other = PrivateKey.generate(), PrivateKey.generate()
    with Namespace("script") as namespace:
        output = shell(
            namespace,
            f"""
            set -e
            LOG_LEVEL=silent {run} wg0
            LOG_LEVEL=verbose {run} wg1
            wg set wg0 private-key <(echo {key.encode()}) listen-port 4242 peer {other.public_key().encode()}
            ip link set wg0 up
            ip link set wg1 up
            wg set wg1 private-key <(echo {other.encode()}) \
                peer {key.public_key().encode()} endpoint 127.0.0.1:4242 persistent-keepalive 25
            until [[ $(wg show wg1 latest-handshakes) != *$'\\t0' ]]; do sleep 0.05; done
            ip link del wg0
            ip link del wg1
            """,
        )
        assert f"wg1: handshake with {key.public_key()} completed" in output
        assert "wg0: " not in output


def test_wg_quick_sends_everything_through_it(tmp_path: Path) -> None:
    run, file = program(tmp_path), tmp_path / "wgq.conf"
    key, far_key = PrivateKey.generate(), PrivateKey.generate()
    file.write_text(
        f"[Interface]\nPrivateKey = {key.encode()}\nAddress = 10.1.0.1/24, fd01::1/64\nListenPort = 4242\n"
        f"[Peer]\nPublicKey = {far_key.public_key().encode()}\nAllowedIPs = 0.0.0.0/0, ::/0\nEndpoint = 192.0.2.2:4243\n"
    )
    file.chmod(0o600)
    with Namespace("quick") as near, Namespace("far") as far, bare(far, "wg1") as wg1:
        link(near, far, addresses=(["192.0.2.1/24"], ["192.0.2.2/24"]))
        wg1.set("private-key", "/dev/stdin", "listen-port", "4243", stdin=far_key.encode())
        wg1.set("peer", key.public_key().encode(), "allowed-ips", "10.1.0.1/32,fd01::1/128")
        for address in ("10.9.0.9/32", "fd09::9/128"):
            far.add_address("wg1", address)
        far.set_link("wg1", up=True)
        far.run(["ip", "route", "add", "10.1.0.0/24", "dev", "wg1"])
        far.run(["ip", "route", "add", "fd01::/64", "dev", "wg1"])
        output = shell(
            near,
            f"""
            set -e
            export WG_QUICK_USERSPACE_IMPLEMENTATION={run}
            wg-quick up {file} 2>/dev/null
            ping -q -c3 -i0.05 -W20 10.9.0.9
            ping -q -c3 -i0.05 -W20 fd09::9
            wg show wgq dump
            wg-quick down {file} 2>/dev/null
            """,
        )
        assert output.count(" 0% packet loss") == 2
        assert "0.0.0.0/0,::/0" in output
        until(lambda: not pids(near))
