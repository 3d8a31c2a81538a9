"""The Provision call: the request, the checked answer, and retries with backoff."""

import logging
import ssl
from collections.abc import Callable
from dataclasses import dataclass, field, replace
from ipaddress import IPv6Address, IPv6Interface

from grpclib.const import Status
from grpclib.exceptions import GRPCError

from siderolink.client.link import events
from siderolink.common.addressing import OVERLAYS, format_peer_addr_port, parse_peer_addr_port, swap_endpoints
from siderolink.common.backoff import Backoff, RetryTrigger
from siderolink.common.errors import (
    ConfigurationError,
    InvalidAnswerError,
    JoinError,
    JoinRefusedError,
    KeyFormatError,
    ServerUnreachableError,
)
from siderolink.common.grpc import Limits, open_channel, translate_errors
from siderolink.common.hostport import HostPort
from siderolink.common.join_url import JoinURL
from siderolink.common.keys import PublicKey
from siderolink.common.pb.sidero.link import ProvisionRequest, ProvisionResponse, ProvisionServiceStub
from siderolink.common.text import one_line
from siderolink.common.transport.choice import choose

log = logging.getLogger("siderolink")

PROVISION_TIMEOUT = 30.0
"""Seconds; servers may delay an answer this long while they wait for an administrator's decision."""
MAX_ENDPOINTS = 32
MAX_FIELDS = 256
"""Fields of an answer: one for each endpoint and four more, and newer servers may send others."""
_LIMITS = Limits(max_message_bytes=16 * 1024, max_answer_fields=MAX_FIELDS)
"""Room for an answer with `MAX_ENDPOINTS` of the longest names. Decoding takes some 3 µs per field of two bytes."""

_UNREACHABLE = frozenset({Status.UNAVAILABLE, Status.DEADLINE_EXCEEDED})


@dataclass(frozen=True, slots=True, kw_only=True)
class NodeInfo:
    """The data that a machine sends when it joins."""

    uuid: str
    unique_token: str = field(default="", repr=False)
    version: str = ""
    """A release's tag such as ``v1.13.0``; not sent when empty."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Provisioned:
    """The server's answer, checked."""

    server_key: PublicKey
    address: IPv6Interface
    """This machine's overlay address, with the overlay's prefix length, /64."""
    server_address: IPv6Address
    endpoints: tuple[HostPort, ...]
    """The server's UDP endpoints, in order of preference; empty for the tunnel."""
    virtual_address: tuple[IPv6Address, int] | None
    """This machine's address on the tunnel stream; None for UDP."""


def make_request(url: JoinURL, machine: NodeInfo, public_key: PublicKey) -> ProvisionRequest:
    """The request message: optional fields only if they have a value, the unique token always."""
    return ProvisionRequest(
        node_uuid=machine.uuid,
        node_public_key=public_key.encode(),
        join_token=url.join_token or None,
        node_unique_token=machine.unique_token,
        talos_version=machine.version or None,
        wireguard_over_grpc=True if url.tunnel else None,
    )


def read_response(response: ProvisionResponse, public_key: PublicKey) -> Provisioned:
    """Check an answer to the machine with `public_key`. Raises InvalidAnswerError, which names the field.

    An answer changes this host's addresses and routes, so it is limited to one /64 of unique local addresses.
    """
    try:
        server_key = PublicKey.parse(response.server_public_key)
    except KeyFormatError as error:
        raise InvalidAnswerError(f"the server's answer is invalid: server_public_key: {error}") from None
    if server_key == public_key:
        raise InvalidAnswerError("the server's answer is invalid: server_public_key is this machine's own key")
    if server_key.is_low_order:
        raise InvalidAnswerError("the server's answer is invalid: server_public_key: no private key belongs to this one")
    address, server_address = _read_addresses(response)
    virtual_address: tuple[IPv6Address, int] | None = None
    endpoints: tuple[HostPort, ...] = ()
    if response.grpc_peer_addr_port:
        try:
            virtual_address = parse_peer_addr_port(response.grpc_peer_addr_port)
        except ConfigurationError as error:
            raise InvalidAnswerError(f"the server's answer is invalid: grpc_peer_addr_port: {error}") from None
    else:
        endpoints = _read_endpoints(response.server_endpoint)
    return Provisioned(
        server_key=server_key,
        address=address,
        server_address=server_address,
        endpoints=endpoints,
        virtual_address=virtual_address,
    )


def _read_addresses(response: ProvisionResponse) -> tuple[IPv6Interface, IPv6Address]:
    try:
        address = IPv6Interface(response.node_address_prefix)
    except ValueError:
        raise InvalidAnswerError("the server's answer is invalid: node_address_prefix is not an IPv6 address/64") from None
    network = address.network
    if network.prefixlen != 64 or address.scope_id is not None or not network.subnet_of(OVERLAYS):
        raise InvalidAnswerError(
            f"the server's answer is invalid: node_address_prefix {address} is not a /64 within {OVERLAYS}"
        )
    try:
        server_address = IPv6Address(response.server_address)
    except ValueError:
        raise InvalidAnswerError("the server's answer is invalid: server_address is not an IPv6 address") from None
    if server_address.scope_id is not None or server_address not in network or server_address == address.ip:
        raise InvalidAnswerError(
            f"the server's answer is invalid: server_address {server_address} is not a different address within {network}"
        )
    return address, server_address


def _read_endpoints(texts: list[str]) -> tuple[HostPort, ...]:
    if not 1 <= len(texts) <= MAX_ENDPOINTS:
        raise InvalidAnswerError(f"the server's answer is invalid: {len(texts)} endpoints; 1 to {MAX_ENDPOINTS} are allowed")
    try:
        return tuple(dict.fromkeys(HostPort.parse(text) for text in swap_endpoints(texts)))
    except ConfigurationError as error:
        raise InvalidAnswerError(f"the server's answer is invalid: server_endpoint: {error}") from None


async def provision(
    url: JoinURL,
    machine: NodeInfo,
    public_key: PublicKey,
    *,
    tls: ssl.SSLContext | None = None,
    timeout: float = PROVISION_TIMEOUT,
) -> Provisioned:
    """Call Provision once, on a separate connection. For an https URL, `tls` replaces the system's roots.

    Raises ServerUnreachableError, JoinRefusedError or InvalidAnswerError.
    """
    request = make_request(url, machine, public_key)
    try:
        with translate_errors():
            async with open_channel(url.host, url.port, (tls or True) if url.tls else None, limits=_LIMITS) as channel:
                response = await ProvisionServiceStub(channel).provision(request, timeout=timeout)
    except GRPCError as error:
        raise _refusal(error, url, machine) from None
    except TimeoutError:
        raise ServerUnreachableError(f"{url.authority} did not answer within {timeout:.0f} s") from None
    return read_response(response, public_key)


def _refusal(error: GRPCError, url: JoinURL, machine: NodeInfo) -> JoinError:
    message = one_line(error.message or "no reason given", secrets=(url.join_token, machine.unique_token))
    if error.status in _UNREACHABLE:
        return ServerUnreachableError(f"{url.authority} cannot be reached: {message}")
    return JoinRefusedError(error.status.name, message)


PASSING = frozenset({"ALREADY_EXISTS", "RESOURCE_EXHAUSTED", "ABORTED", "CANCELLED", "INTERNAL", "UNKNOWN"})
"""Temporary refusals: another link of this machine must end first, there is no room at present, or the server or a proxy
failed."""


class Provisioner:
    """Calls Provision for one machine; its settings may be replaced.

    The trigger ends the wait for an unreachable API early, but not the wait after a refusal.
    """

    def __init__(
        self,
        url: JoinURL,
        machine: NodeInfo,
        public_key: PublicKey,
        emit: Callable[[events.LinkEvent], None],
        retry: RetryTrigger,
        *,
        tls: ssl.SSLContext | None,
        timeout: float,
    ) -> None:
        self._emit = emit
        self._retry = retry
        self._no_retry = RetryTrigger()
        self._timeout = timeout
        self.use(url, machine, public_key, tls)

    def use(self, url: JoinURL, machine: NodeInfo, public_key: PublicKey, tls: ssl.SSLContext | None) -> None:
        """Use these settings from now on."""
        self._url = url
        self._machine = machine
        self._public_key = public_key
        self._tls = tls

    async def request(self, *, tunnel: bool = False) -> Provisioned:
        """Call once; `tunnel` requests the tunnel even if the URL does not. Raises JoinError."""
        url = replace(self._url, tunnel=True) if tunnel else self._url
        try:
            answer = await provision(url, self._machine, self._public_key, tls=self._tls, timeout=self._timeout)
        except JoinError:
            raise
        except Exception as error:
            log.exception("the Provision call failed")
            raise ServerUnreachableError(f"internal error in the Provision call: {type(error).__name__}") from error
        self.announce(answer)
        return answer

    def announce(self, answer: Provisioned) -> None:
        """Emit the event for an answer."""
        self._emit(
            events.Joined(
                server_key=answer.server_key,
                address=answer.address,
                server_address=answer.server_address,
                transport=choose(self._url, answer, self._tls).kind,
                endpoints=tuple(str(endpoint) for endpoint in answer.endpoints),
                virtual_address=format_peer_addr_port(*answer.virtual_address) if answer.virtual_address else "",
            )
        )

    async def request_until_answered(self, *, tunnel: bool = False) -> Provisioned:
        """Call until it succeeds; each failure is an event."""
        away = Backoff(first=0.5, cap=30.0, factor=1.5)
        passing = Backoff(first=2.0, cap=20.0)
        refused = Backoff(first=60.0, floor=30.0, cap=300.0)
        while True:
            try:
                return await self.request(tunnel=tunnel)
            except ServerUnreachableError as error:
                problem: JoinError = error
                delay, retry = away.next(), self._retry
            except JoinError as error:
                problem = error
                passes = isinstance(error, JoinRefusedError) and error.status in PASSING
                delay, retry = (passing if passes else refused).next(), self._no_retry
            self._emit(events.ProvisionFailed(reason=str(problem), retry_in=delay))
            await retry.sleep(delay)
