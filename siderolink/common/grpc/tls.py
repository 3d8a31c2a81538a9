"""TLS contexts for gRPC: HTTP/2 by ALPN, TLS 1.2 or newer (RFC 9113, 9.2), and reloadable server certificates."""

import asyncio
import contextlib
import os
import socket
import ssl
import time
from collections.abc import Iterator
from pathlib import Path

from cryptography.x509 import load_pem_x509_certificates

from siderolink.common.errors import ConfigurationError

_VERIFY_FLAGS = ssl.VerifyFlags.VERIFY_X509_TRUSTED_FIRST | ssl.VerifyFlags.VERIFY_X509_PARTIAL_CHAIN
"""The same on every Python version. From 3.13 on the default includes VERIFY_X509_STRICT, which rejects private CAs without a
key identifier; curl and Go accept these. A trusted certificate need not be a root."""
_PAIR_TRIES = 5
_PAIR_PAUSE = 0.1


def client_tls(ca_file: str | Path | None = None, *, extra_roots: str | None = None) -> ssl.SSLContext:
    """A context that verifies the server's certificate and name with the system's roots, or only with `ca_file` (PEM).

    `extra_roots` (PEM text) are trusted in addition. Raises ConfigurationError if either is unreadable or has no certificate.
    """
    try:
        context = _verifying(None if ca_file is None else str(ca_file))
    except (OSError, ssl.SSLError) as error:
        raise ConfigurationError(f"the CA file {str(ca_file)!r} cannot be used: {error}") from error
    if extra_roots is not None:
        try:
            context.load_verify_locations(cadata=extra_roots)
        except (TypeError, ValueError, ssl.SSLError):
            raise ConfigurationError("the trusted roots are not certificates in PEM form") from None
    return _http2(context)


def certified_name(host: str) -> str:
    """What the certificate of a host must name: an address without its zone, or a name without the dot of the root."""
    return host.partition("%")[0].removesuffix(".")


def proxy_tls() -> ssl.SSLContext:
    """A context for an https proxy, verified with the system's roots."""
    return _verifying(None)


def _verifying(ca_file: str | None) -> ssl.SSLContext:
    context = ssl.create_default_context(ssl.Purpose.SERVER_AUTH, cafile=ca_file)
    context.verify_flags = _VERIFY_FLAGS
    return context


def server_tls(cert: str | Path, key: str | Path | None = None) -> ssl.SSLContext:
    """A context that presents the certificate chain in `cert` (PEM), with its private key in `key` or in the same file.

    Raises ConfigurationError if the files are unreadable or do not belong together.
    """
    return ServerCertificate(cert, key).context


def mutual_tls(chain: bytes, root: str, *, server: bool) -> ssl.SSLContext:
    """A context for one end of mutual TLS 1.3: presents `chain` (PEM, with key), accepts certificates signed by `root` (PEM).

    Names are not checked; the caller identifies the other end by its certificate. Raises ssl.SSLError.
    """
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER if server else ssl.PROTOCOL_TLS_CLIENT)
    context.minimum_version = ssl.TLSVersion.TLSv1_3
    context.check_hostname = False
    context.verify_mode = ssl.CERT_REQUIRED
    context.verify_flags = _VERIFY_FLAGS
    context.load_verify_locations(cadata=root)
    with _memory_file(chain) as path:
        context.load_cert_chain(path)
    context.set_alpn_protocols(["h2"])
    if server:
        context.num_tickets = 0  # each connection does a full handshake
    return context


class ServerCertificate:
    """A certificate chain and its key in PEM files. Connections after `reload` use the new one."""

    def __init__(self, cert: str | Path, key: str | Path | None = None) -> None:
        """Raises ConfigurationError like server_tls. A pair that does not match is read again for half a second, because it
        may be being replaced."""
        self._cert, self._key = Path(cert), None if key is None else Path(key)
        self.context = _serving()
        for attempt in range(1, _PAIR_TRIES + 1):
            self._in_use = self._read_files()
            try:
                self._load(self.context, self._in_use)
            except ConfigurationError as error:
                if attempt == _PAIR_TRIES or not _is_mismatch(error):
                    raise
                time.sleep(_PAIR_PAUSE)
            else:
                break

    @property
    def files(self) -> tuple[Path, ...]:
        return (self._cert,) if self._key is None else (self._cert, self._key)

    @property
    def expires_at(self) -> float:
        """When the first certificate of the chain in use expires, as Unix time in seconds."""
        return min(found.not_valid_after_utc.timestamp() for found in load_pem_x509_certificates(self._in_use[0]))

    def reload(self) -> bool:
        """Read the files again; returns whether they contain another certificate or key than the one in use.

        Raises ConfigurationError, in which case the old pair stays in use.
        """
        found = self._read_files()
        if found == self._in_use:
            return False
        # OpenSSL loads the certificate first: a key that does not belong to it must not leave half a pair in use.
        self._load(_serving(), found)
        self._load(self.context, found)
        self._in_use = found
        return True

    def _read_files(self) -> tuple[bytes, ...]:
        try:
            return tuple(file.read_bytes() for file in self.files)
        except OSError as error:
            what = f"{error.filename} cannot be read: {error.strerror}"
            raise ConfigurationError(f"the certificate {str(self._cert)!r} and its key cannot be used: {what}") from error

    def _load(self, context: ssl.SSLContext, pems: tuple[bytes, ...]) -> None:
        """Load the bytes read before, whatever the files contain now. Raises ConfigurationError."""
        try:
            with contextlib.ExitStack() as stack:
                paths = [stack.enter_context(_memory_file(pem)) for pem in pems]
                context.load_cert_chain(paths[0], paths[1] if len(paths) > 1 else None, password=_no_password)
        except (OSError, ssl.SSLError) as error:
            raise ConfigurationError(f"the certificate {str(self._cert)!r} and its key cannot be used: {error}") from error


@contextlib.contextmanager
def _memory_file(data: bytes) -> Iterator[str]:
    """The path of an in-memory file, because OpenSSL reads certificates and keys only from paths."""
    descriptor = os.memfd_create("pem")
    try:
        with open(descriptor, "wb", closefd=False) as file:
            file.write(data)
        yield f"/proc/self/fd/{descriptor}"
    finally:
        os.close(descriptor)


def _is_mismatch(error: ConfigurationError) -> bool:
    return isinstance(error.__cause__, ssl.SSLError) and error.__cause__.reason == "KEY_VALUES_MISMATCH"


def _serving() -> ssl.SSLContext:
    return _http2(ssl.create_default_context(ssl.Purpose.CLIENT_AUTH))


def _no_password() -> str:
    raise ConfigurationError("the private key is encrypted; give an unencrypted one")


def _http2(context: ssl.SSLContext) -> ssl.SSLContext:
    context.minimum_version = ssl.TLSVersion.TLSv1_2
    context.set_ciphers("ECDHE+AESGCM:ECDHE+CHACHA20")
    context.set_alpn_protocols(["h2"])
    return context


_HANDSHAKE, _CLIENT_HELLO = 22, 1
_RECORD_HEADER, _MESSAGE_HEADER = 5, 4
_LONGEST_RECORD = 16 * 1024 + 256
_LONGEST_HELLO = 20 * 1024


def hello_bytes(data: bytes) -> int:
    """The length of a connection's first TLS message, as far as its beginning shows (RFC 8446, 4 and 5.1).

    Anything that is not a ClientHello counts as complete: TLS refuses it at no cost.
    """
    pos, message = 0, b""
    while pos < _LONGEST_HELLO:
        body = pos + _RECORD_HEADER
        if len(data) < body:
            return body
        length = int.from_bytes(data[body - 2 : body])
        if data[pos] != _HANDSHAKE or not 0 < length <= _LONGEST_RECORD:
            break
        if len(data) < body + length:
            return body + length
        message, pos = message + data[body : body + length], body + length
        is_known = len(message) >= _MESSAGE_HEADER
        if message[0] != _CLIENT_HELLO or (is_known and len(message) >= _MESSAGE_HEADER + int.from_bytes(message[1:4])):
            break
    return pos


_SUPPORTED_GROUPS, _SUPPORTED_VERSIONS, _KEY_SHARE = 10, 43, 51
_TLS13 = 0x0304
_X25519MLKEM768 = 0x11EC
_GROUPS = frozenset((0x001D, 0x0017, _X25519MLKEM768))
"""Key share groups that every server accepts, including the one newer servers request: X25519, P-256."""


def may_need_another(hello: bytes) -> bool:
    """Whether the server may answer a ClientHello by requesting a second one (RFC 8446, 4.1.4), and sign only after that.

    True for TLS 1.3 without a key share that servers accept. Anything that is not a ClientHello is refused without one.
    """
    try:
        extensions = _extensions(hello)
    except IndexError:
        return False
    if _TLS13 not in _numbers(extensions.get(_SUPPORTED_VERSIONS, b"")[1:]):
        return False
    shares, data = set[int](), extensions.get(_KEY_SHARE, b"")[2:]
    while data:
        shares.add(int.from_bytes(data[:2]))
        data = data[4 + int.from_bytes(data[2:4]) :]
    wants_newer = _X25519MLKEM768 in _numbers(extensions.get(_SUPPORTED_GROUPS, b"")[2:]) and _X25519MLKEM768 not in shares
    return wants_newer or not shares & _GROUPS


def _numbers(data: bytes) -> list[int]:
    return [int.from_bytes(data[start : start + 2]) for start in range(0, len(data), 2)]


def _extensions(hello: bytes) -> dict[int, bytes]:
    """The extensions of a ClientHello in its records, by type (RFC 8446, 4.1.2). Raises IndexError if it is cut short."""
    message = bytearray()
    while hello:
        end = _RECORD_HEADER + int.from_bytes(hello[3:_RECORD_HEADER])
        message += hello[_RECORD_HEADER:end]
        hello = hello[end:]
    pos = _MESSAGE_HEADER + 2 + 32  # the version and the random
    pos += 1 + message[pos]  # the session id
    pos += 2 + int.from_bytes(message[pos : pos + 2])  # the cipher suites
    pos += 1 + message[pos]  # the compression methods
    found, pos = dict[int, bytes](), pos + 2
    while pos < len(message):
        size = int.from_bytes(message[pos + 2 : pos + 4])
        found[int.from_bytes(message[pos : pos + 2])] = bytes(message[pos + 4 : pos + 4 + size])
        pos += 4 + size
    return found


async def wait_for_hello(sock: socket.socket) -> bytes:
    """Wait until a client's first TLS message is complete, without consuming it. Until then its handshake costs nothing.

    Returns the available bytes. Raises OSError.
    """
    loop = asyncio.get_running_loop()
    wanted = _RECORD_HEADER
    try:
        while True:
            sock.setsockopt(socket.SOL_SOCKET, socket.SO_RCVLOWAT, wanted)
            await _readable(loop, sock)
            data = sock.recv(_LONGEST_HELLO + _LONGEST_RECORD, socket.MSG_PEEK)
            needed = hello_bytes(data)
            if len(data) < wanted or needed <= len(data):  # the connection ended, or the message is complete
                return data[:needed]
            wanted = needed
    finally:
        with contextlib.suppress(OSError):
            sock.setsockopt(socket.SOL_SOCKET, socket.SO_RCVLOWAT, 1)


async def _readable(loop: asyncio.AbstractEventLoop, sock: socket.socket) -> None:
    ready = asyncio.Event()
    loop.add_reader(sock, ready.set)
    try:
        await ready.wait()
    finally:
        loop.remove_reader(sock)
