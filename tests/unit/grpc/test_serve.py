"""Listening addresses of the API, with and without TLS, and the error texts if one is not available."""

import asyncio
import contextlib
import datetime
import gc
import ipaddress
import socket
import ssl
import subprocess
import sys
import warnings
from functools import partial
from pathlib import Path
from typing import Any

import anyio
import anyio.lowlevel
import pytest
from cryptography import x509
from cryptography.hazmat.primitives import hashes, serialization
from cryptography.hazmat.primitives.asymmetric import ec
from cryptography.x509.oid import NameOID

from siderolink.common.errors import AddressInUseError, ConfigurationError, ServerUnreachableError
from siderolink.common.grpc import Limits, Refusal, client_tls, open_channel, serve, server_tls, translate_errors
from siderolink.common.grpc.listeners import listen_tcp
from siderolink.server.api.standard import HealthService, ReflectionService
from tests.support.api import Raw, Service, bystander, method, serving
from tests.support.http2 import RawPeer

pytestmark = pytest.mark.anyio


@pytest.fixture(scope="module")
def certificate(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A certificate for localhost and 127.0.0.1, signed by itself, with its key in the same file."""
    key = ec.generate_private_key(ec.SECP256R1())
    name = x509.Name([x509.NameAttribute(NameOID.COMMON_NAME, "localhost")])
    now = datetime.datetime.now(datetime.UTC)
    names = x509.SubjectAlternativeName([x509.DNSName("localhost"), x509.IPAddress(ipaddress.ip_address("127.0.0.1"))])
    built = (
        x509.CertificateBuilder()
        .subject_name(name)
        .issuer_name(name)
        .public_key(key.public_key())
        .serial_number(1)
        .not_valid_before(now - datetime.timedelta(days=1))
        .not_valid_after(now + datetime.timedelta(days=1))
        .add_extension(names, critical=False)
        .add_extension(x509.BasicConstraints(ca=True, path_length=None), critical=True)
        .sign(key, hashes.SHA256())
    )
    pem = built.public_bytes(serialization.Encoding.PEM) + key.private_bytes(
        serialization.Encoding.PEM, serialization.PrivateFormat.PKCS8, serialization.NoEncryption()
    )
    path = tmp_path_factory.mktemp("tls") / "server.pem"
    path.write_bytes(pem)
    return path


async def test_calls_over_tls(certificate: Path) -> None:
    async with serve([Service()], host="127.0.0.1", tls=server_tls(certificate)) as server:
        for host in ("127.0.0.1", "localhost"):
            async with open_channel(host, server.port, client_tls(certificate)) as channel:
                assert (await method(channel)(Raw(b"x"))).data == b"x"


async def test_a_given_tls_context_is_set_to_offer_http2(certificate: Path) -> None:
    async with serve([Service()], host="127.0.0.1", tls=server_tls(certificate)) as server:
        async with open_channel("127.0.0.1", server.port, ssl.create_default_context(cafile=certificate)) as channel:
            assert (await method(channel)(Raw(b"x"))).data == b"x"


async def test_a_certificate_that_is_not_trusted(certificate: Path) -> None:
    async with serve([Service()], host="127.0.0.1", tls=server_tls(certificate)) as server:
        distrust = "certificate of the server's API is not trusted"
        with pytest.raises(ServerUnreachableError, match=distrust), translate_errors():
            async with open_channel("127.0.0.1", server.port, True) as channel:
                await method(channel)(Raw(b"x"))


async def test_tls_against_plaintext() -> None:
    async with serving() as server, open_channel("127.0.0.1", server.port, client_tls()) as channel:
        with pytest.raises(ServerUnreachableError), translate_errors():
            await method(channel)(Raw(b"x"))
        assert server.refusals == {Refusal.NOT_HTTP2: 1}


async def test_plaintext_against_tls(certificate: Path) -> None:
    async with serve([Service()], host="127.0.0.1", tls=server_tls(certificate)) as server:
        async with RawPeer.connect(server.port) as peer:
            peer.write(b"PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n")
            await peer.reader.read()
        assert server.refusals == {Refusal.TLS_HANDSHAKE_FAILED: 1}


async def test_a_tls_handshake_that_never_ends_is_counted_as_a_connection(certificate: Path) -> None:
    limits = Limits(preface_timeout=60, max_connections_per_address=2, crowded_from=0)
    async with serve([Service()], host="127.0.0.1", tls=server_tls(certificate), limits=limits) as server:
        async with RawPeer.connect(server.port), RawPeer.connect(server.port):
            async with RawPeer.connect(server.port) as third:
                await third.reader.read()
            assert server.refusals == {Refusal.TOO_MANY_CONNECTIONS_FROM_ADDRESS: 1}


async def test_a_tls_handshake_that_never_ends_is_ended_in_time(certificate: Path) -> None:
    limits = Limits(preface_timeout=0.3)
    async with serve([Service()], host="127.0.0.1", tls=server_tls(certificate), limits=limits) as server:
        async with RawPeer.connect(server.port) as first, RawPeer.connect(server.port) as second:
            await first.reader.read()
            await second.reader.read()
        assert server.refusals == {Refusal.TLS_HANDSHAKE_FAILED: 2}
        assert server.connections == 0


async def test_a_tls_peer_without_http2(certificate: Path) -> None:
    context = server_tls(certificate)
    context.set_alpn_protocols(["http/1.1"])
    async with (
        serve([Service()], host="127.0.0.1", tls=context) as server,
        open_channel("127.0.0.1", server.port, client_tls(certificate)) as channel,
    ):
        with pytest.raises(ServerUnreachableError, match="HTTP/2"), translate_errors():
            await method(channel)(Raw(b"x"))


async def test_a_port_that_is_taken() -> None:
    async with serving() as server:
        with pytest.raises(AddressInUseError, match=f"port {server.port} .* is in use"):
            async with serve([Service()], host="127.0.0.1", port=server.port):
                pass


async def test_a_foreign_listen_address_is_refused() -> None:
    with pytest.raises(ConfigurationError, match="192.0.2.1"):
        async with serve([Service()], host="192.0.2.1"):
            pass


async def test_several_hosts_share_one_port() -> None:
    async with serve([Service()], host=["127.0.0.1", "::1"]) as server:
        for host in ("127.0.0.1", "::1"):
            async with open_channel(host, server.port) as channel:
                assert (await method(channel)(Raw(b"x"))).data == b"x"


@pytest.mark.parametrize("host", [None, "", "::"])
async def test_the_unspecified_address_listens_on_ipv4_and_ipv6(host: str | None) -> None:
    async with serve([Service()], host=host) as server:
        for target in ("127.0.0.1", "::1"):
            async with open_channel(target, server.port) as channel:
                assert (await method(channel)(Raw(b"x"))).data == b"x"


async def test_a_local_socket(tmp_path: Path) -> None:
    path = tmp_path / "control.sock"
    with socket.socket(socket.AF_UNIX) as dead:
        dead.bind(str(path))
    async with serve([Service()], path=path) as server:
        assert server.port == 0
        assert path.stat().st_mode & 0o777 == 0o600
        async with open_channel(path=str(path)) as channel:
            assert (await method(channel)(Raw(b"x"))).data == b"x"
        with pytest.raises(AddressInUseError, match="in use"):
            async with serve([Service()], path=path):
                pass
        async with open_channel(path=str(path)) as channel:
            assert (await method(channel)(Raw(b"x"))).data == b"x"
    assert not path.exists()


async def test_files_that_hold_no_certificate(tmp_path: Path) -> None:
    empty = tmp_path / "empty.pem"
    empty.touch()
    for make in (client_tls, server_tls):
        with pytest.raises(ConfigurationError, match=r"empty\.pem"):
            make(empty)
        with pytest.raises(ConfigurationError, match="absent"):
            make(tmp_path / "absent")


async def test_a_name_that_cannot_be_resolved_and_a_port_where_nobody_listens() -> None:
    for host, port, why in (("name.invalid", 1, "resolved"), ("127.0.0.1", 1, "cannot be reached")):
        async with open_channel(host, port) as channel:
            with pytest.raises(ServerUnreachableError, match=why), translate_errors():
                await method(channel)(Raw(b"x"))


async def test_a_server_that_accepts_and_says_nothing() -> None:
    with socket.create_server(("127.0.0.1", 0)) as silent:
        limits = Limits(connect_timeout=0.05)
        context = client_tls()
        async with open_channel("127.0.0.1", silent.getsockname()[1], context, limits=limits) as channel:
            with pytest.raises(ServerUnreachableError, match=r"within 0\.05 s"), translate_errors():
                await method(channel)(Raw(b"x"))


async def test_tls_false_means_plaintext() -> None:
    assert client_tls().verify_mode is ssl.CERT_REQUIRED
    async with serving() as server, bystander(server), open_channel("127.0.0.1", server.port, False) as channel:
        assert (await method(channel)(Raw(b"x"))).data == b"x"


def test_limits_beyond_http2s_range_are_refused() -> None:
    for wrong in ({"max_frame_bytes": 16_383}, {"connection_window_bytes": 65_534}, {"stream_window_bytes": 0}):
        with pytest.raises(ConfigurationError):
            Limits(**wrong)


async def test_a_connection_that_is_accepted_as_the_server_stops_is_closed() -> None:
    listening = socket.create_server(("127.0.0.1", 0))
    with socket.create_connection(listening.getsockname(), timeout=5) as client:
        async with serve([Service()], listening=[listening]) as server:
            # two turns of the event loop: the connection is accepted, and nothing else has happened to it
            for _ in range(2):
                await asyncio.sleep(0)
            assert server.connections == 1
        assert server.connections == 0
        client.settimeout(30)
        with contextlib.suppress(ConnectionResetError):
            while client.recv(4096):
                pass


async def test_a_start_that_is_cancelled_at_any_moment_leaves_no_socket_open() -> None:
    async def run(**where: Any) -> None:
        async with serve([Service(), HealthService(), ReflectionService()], **where):
            await anyio.sleep_forever()

    for turns in range(1, 30):
        for is_open in (False, True):
            sockets = listen_tcp(["127.0.0.1"], 0) if is_open else []
            where: dict[str, Any] = {"listening": sockets} if is_open else {"host": "127.0.0.1"}
            with warnings.catch_warnings(record=True) as lost:
                warnings.simplefilter("always", ResourceWarning)
                async with anyio.create_task_group() as tasks:
                    tasks.start_soon(partial(run, **where))
                    for _ in range(turns):
                        await anyio.lowlevel.checkpoint()
                    tasks.cancel_scope.cancel()
                gc.collect()
            assert [str(one.message) for one in lost] == []
            assert all(sock.fileno() == -1 for sock in sockets)


def test_the_models_of_all_messages_are_ready_before_the_first_caller_comes() -> None:
    """In an interpreter of its own, in which nobody has used a model yet."""
    program = """
import anyio, sys
from siderolink.common.grpc import serve
from siderolink.common.pb.grpc.health.v1 import HealthCheckRequest, HealthCheckResponse
from siderolink.common.pb.grpc.reflection.v1 import ServerReflectionRequest, FileDescriptorResponse
from siderolink.server.api.standard import HealthService, ReflectionService

async def main():
    async with serve([HealthService(), ReflectionService()], host="127.0.0.1"):
        before = set(sys.modules)
        for kind in (HealthCheckRequest, HealthCheckResponse, ServerReflectionRequest, FileDescriptorResponse):
            assert "_betterproto_meta" in vars(kind), kind
            kind.FromString(bytes(kind()))
        assert set(sys.modules) == before, set(sys.modules) - before

anyio.run(main)
"""
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, timeout=100, check=False)
    assert done.returncode == 0, done.stderr
