"""`siderolink doctor`: its findings on a good host, and with one fault each."""

import json
import ssl
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest

from siderolink.common.grpc import server_tls
from siderolink.server import Server
from tests.support import without_netlink
from tests.support.certificates import make_certificate
from tests.support.netns import Namespace
from tests.support.proxy import running_proxy
from tests.support.topology import SERVER_V4, Net, direct

TOKEN = "the-join-token"
URL = f"grpc://{SERVER_V4}:4000?jointoken={TOKEN}"
pytestmark = pytest.mark.timeout(240)


@contextmanager
def serving(tls: ssl.SSLContext | None = None) -> Iterator[Net]:
    with direct() as net, net.server.portal() as portal:
        server = Server(api_listen="0.0.0.0:4000", wireguard_endpoints=[f"{SERVER_V4}:51820"], join_token=TOKEN, tls=tls)
        with portal.wrap_async_context_manager(server):
            yield net


def examine(namespace: Namespace, *args: str) -> dict[str, dict[str, Any]]:
    """The findings by their checks."""
    said = namespace.run([sys.executable, "-m", "siderolink", "doctor", "--json", *args], check=False, timeout=60)
    return {finding["check"]: finding for finding in json.loads(said)}


@pytest.mark.parametrize("query", ["", "&grpc_tunnel=true"], ids=["udp", "tunnel"])
def test_all_is_well(query: str) -> None:
    with serving() as net:
        found = examine(net.machine, URL + query)
        assert not [finding for finding in found.values() if finding["is_good"] is False]
        assert found["join"]["is_good"]
        assert found["data plane"]["is_good"]
        assert "siderolink" in found["data plane"]["text"].lower()
        [route] = [name for name in found if name.startswith("tunnel " if query else "udp ") and not name.endswith("MTU")]
        assert found[route]["is_good"]
        assert "1280 bytes pass" in found[f"{route}, MTU"]["text"]
        assert net.machine.interfaces() == {"lo", "eth0"}


def test_blocked_udp_and_a_wrong_token_are_reported_with_remedies() -> None:
    with serving() as net:
        net.machine.drop_udp()
        found = examine(net.machine, URL)
        route = f"udp {SERVER_V4}:51820"
        assert found[route]["is_good"] is False
        assert "grpc_tunnel=true" in found[route]["remedy"]
        found = examine(net.machine, f"grpc://{SERVER_V4}:4000?jointoken=another")
        assert found["join"]["is_good"] is False
        assert "token" in found["join"]["remedy"]
        found = examine(net.machine, f"https://{SERVER_V4}:4000?jointoken={TOKEN}")
        assert found["TLS"]["is_good"] is False


def test_certificate_problems_are_reported_with_remedies(tmp_path: Path) -> None:
    root = make_certificate("the root")
    (tmp_path / "ca.pem").write_text(root.certificate_pem)
    url, trusting = f"https://{SERVER_V4}:4000?jointoken={TOKEN}", ["--ca-file", str(tmp_path / "ca.pem")]
    for certified, args, remedy in (
        (root.sign(SERVER_V4), trusting, ""),
        (root.sign(SERVER_V4), [], "--ca-file"),
        (root.sign("203.0.113.9"), trusting, "for another name"),
        (root.sign(SERVER_V4, hours=-1), trusting, "clock"),
    ):
        (tmp_path / "server.pem").write_text(certified.pem)
        with serving(server_tls(tmp_path / "server.pem")) as net:
            found = examine(net.machine, url, *args)["TLS"]
        assert found["is_good"] is not bool(remedy)
        assert remedy in found["remedy"]


def test_behind_a_mandatory_proxy_everything_goes_through_it(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    root, name = make_certificate("the root"), "siderolink.example"
    (tmp_path / "ca.pem").write_text(root.certificate_pem)
    (tmp_path / "server.pem").write_text(root.sign(name).pem)
    args = [f"https://{name}:4000?jointoken={TOKEN}&grpc_tunnel=true", "--ca-file", str(tmp_path / "ca.pem")]
    with serving(server_tls(tmp_path / "server.pem")) as net, net.server.portal() as beside:
        net.machine.nft("""
            table inet egress {
                chain output {
                    type filter hook output priority 0; policy drop;
                    tcp dport 3128 accept
                    oifname "lo" accept
                }
            }
        """)
        with beside.wrap_async_context_manager(running_proxy(credentials="me:word", host=SERVER_V4, port=3128)) as proxy:
            monkeypatch.setenv("HTTPS_PROXY", f"http://me:word@{SERVER_V4}:3128")
            found = examine(net.machine, *args)
            assert not [finding for finding in found.values() if finding["is_good"] is False]
            assert found["proxy"]["text"].startswith(f"{name} is reached by http://{SERVER_V4}:3128")
            assert found["TLS"]["is_good"]
            assert found["TLS"]["text"] == "TLSv1.3, and the certificate is trusted"
            assert found["join"]["is_good"]
            assert set(proxy.asked) == {f"{name}:4000"}
            monkeypatch.setenv("HTTPS_PROXY", f"http://me:wrong@{SERVER_V4}:3128")
            found = examine(net.machine, *args)
            assert found["TLS"]["is_good"] is False
            assert f"the proxy http://{SERVER_V4}:3128 failed: it answered 407" in found["TLS"]["text"]
            monkeypatch.setenv("HTTPS_PROXY", "ftp://me:wrong@192.0.2.1")
            found = examine(net.machine, *args)
            assert found["proxy"]["text"].startswith("HTTPS_PROXY is not a proxy URL")
            assert found["proxy"]["is_good"] is False


def test_a_narrow_path_is_found() -> None:
    with serving() as net:
        for namespace in (net.server, net.machine):
            namespace.nft("""
                table inet narrow {
                    chain in { type filter hook input priority -400; iifname "eth0" meta length > 1300 drop; }
                }
            """)
        found = examine(net.machine, URL)
        assert found[f"udp {SERVER_V4}:51820, MTU"]["is_good"] is False


def test_missing_features_of_the_host_are_reported() -> None:
    with Namespace("host") as host:
        host.nft("add table inet strict; add chain inet strict in { type filter hook input priority 0; policy drop; }")
        host.set_link("lo", up=False)
        host.forward()
        found = examine(host)
        assert "table strict, chain in" in found["firewall"]["text"]
        assert found["loopback"]["is_good"] is None
        assert "IPv4 and IPv6" in found["forwarding"]["text"]
        assert any(found[f"{kind} device"]["is_good"] for kind in ("kernel", "userspace"))


def test_a_sandbox_without_netlink_is_reported() -> None:
    with Namespace("host") as host:
        command = [sys.executable, without_netlink.__file__, sys.executable, "-m", "siderolink", "doctor", "--json"]
        process = host.popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE)
        said, problems = process.communicate(timeout=60)
        if "no seccomp filter" in problems:
            pytest.skip(problems)
        found = {finding["check"]: finding for finding in json.loads(said)}
        assert process.returncode == 1
        for kind in ("kernel", "userspace"):
            assert found[f"{kind} device"]["is_good"] is False
            assert "netlink cannot be used" in found[f"{kind} device"]["text"]
        assert {"clock", "loopback", "nf_tables", "forwarding"} <= found.keys()


def test_our_own_firewall_causes_no_warning() -> None:
    with Namespace("host") as host:
        host.nft(
            "add table inet siderolink; add chain inet siderolink input { type filter hook input priority 0; policy drop; }"
        )
        found = examine(host)
        assert "firewall" not in found
        assert found["nf_tables"]["is_good"]
        assert host.run(["nft", "list", "tables"]).split() == ["table", "inet", "siderolink"]  # none of its own stays


def test_a_stopped_doctor_leaves_nothing_behind() -> None:
    with serving() as net:
        net.machine.drop_udp()
        process = net.machine.popen([sys.executable, "-m", "siderolink", "doctor", URL], stdout=subprocess.PIPE)
        assert process.stdout is not None
        assert any("admitted" in line for line in iter(process.stdout.readline, ""))
        process.terminate()
        assert process.wait(60) == 130
        assert net.machine.interfaces() == {"lo", "eth0"}
        assert "siderolink" not in net.machine.run(["nft", "list", "tables"])
