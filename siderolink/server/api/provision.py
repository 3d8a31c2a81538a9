"""The ProvisionService: parses and bounds calls, and maps decisions to responses or gRPC statuses."""

import logging
import re
from collections import Counter
from collections.abc import Callable, Mapping
from dataclasses import replace
from ipaddress import IPv6Network
from typing import ClassVar

import anyio
from grpclib import GRPCError, Status
from grpclib.const import Cardinality, Handler
from grpclib.server import Stream

from siderolink.common.addressing import format_address, format_peer_addr_port, server_address, swap_endpoints
from siderolink.common.errors import ConfigurationError, KeyFormatError, SideroLinkError, StoreFullError, StoreUnavailableError
from siderolink.common.grpc import CallLimits, valid_token
from siderolink.common.hostport import HostPort
from siderolink.common.keys import PublicKey
from siderolink.common.node_uuid import parse_uuid
from siderolink.common.pb.sidero.link import ProvisionRequest, ProvisionResponse
from siderolink.common.text import one_line, shared
from siderolink.server.admission.policy import JoinPolicy, decide
from siderolink.server.admission.request import Allow, Authorize, Credentials, Deny, JoinRequest, Rejection, allow_all
from siderolink.server.admission.tokens import MAX_UNIQUE_TOKEN_BYTES, JoinTokenCheck, parse_unique_token
from siderolink.server.api.provision_codec import PlainRequest, encode_response
from siderolink.server.clock import Clock
from siderolink.server.events import EventHub, JoinRefused
from siderolink.server.fleet.directory import Directory
from siderolink.server.fleet.known import QueryBudget
from siderolink.server.fleet.machines import Machines
from siderolink.server.fleet.membership import Membership
from siderolink.server.refusals import JoinRefusal, JoinRejectedError
from siderolink.server.store import Machine

log = logging.getLogger("siderolink")

_VERSION = re.compile(r"[\x20-\x7e]{0,64}")

STATUSES = {
    JoinRefusal.MALFORMED_UUID: Status.INVALID_ARGUMENT,
    JoinRefusal.MALFORMED_PUBLIC_KEY: Status.INVALID_ARGUMENT,
    JoinRefusal.MALFORMED_VERSION: Status.INVALID_ARGUMENT,
    JoinRefusal.MALFORMED_UNIQUE_TOKEN: Status.INVALID_ARGUMENT,
    JoinRefusal.PLACEHOLDER_UUID: Status.INVALID_ARGUMENT,
    JoinRefusal.UNREADABLE_UNIQUE_TOKEN: Status.PERMISSION_DENIED,
    JoinRefusal.UNSUPPORTED_VERSION: Status.FAILED_PRECONDITION,
    JoinRefusal.INVALID_JOIN_TOKEN: Status.PERMISSION_DENIED,
    JoinRefusal.PROVIDER_GONE: Status.NOT_FOUND,
    JoinRefusal.TOO_MANY_REFUSALS: Status.RESOURCE_EXHAUSTED,
    JoinRefusal.DENIED: Status.PERMISSION_DENIED,
    JoinRefusal.AUTHORIZE_FAILED: Status.INTERNAL,
    JoinRefusal.BANNED: Status.PERMISSION_DENIED,
    JoinRefusal.OTHER_UNIQUE_TOKEN: Status.PERMISSION_DENIED,
    # The caller may retry: after a minute of silence, a link without a unique token may be taken.
    JoinRefusal.LINK_ALIVE: Status.ALREADY_EXISTS,
    JoinRefusal.KEY_IN_USE: Status.ALREADY_EXISTS,
    JoinRefusal.TOKEN_FULL: Status.RESOURCE_EXHAUSTED,
    JoinRefusal.TOO_MANY_MACHINES: Status.RESOURCE_EXHAUSTED,
    JoinRefusal.TOO_MANY_PENDING: Status.RESOURCE_EXHAUSTED,
    JoinRefusal.TOO_MANY_CLAIMS: Status.RESOURCE_EXHAUSTED,
    JoinRefusal.STORE_FULL: Status.RESOURCE_EXHAUSTED,
    JoinRefusal.STORE_UNAVAILABLE: Status.UNAVAILABLE,
    JoinRefusal.INTERNAL_ERROR: Status.INTERNAL,
}
"""The gRPC status of each refusal."""

_BY_TOKENS = {JoinRefusal.INVALID_JOIN_TOKEN, JoinRefusal.TOKEN_FULL, JoinRefusal.PROVIDER_GONE, JoinRefusal.OTHER_UNIQUE_TOKEN}
_ALLOW = Allow()
INTERNAL_TEXT = "internal server error"
MAX_ENDPOINTS = 32
"""Maximum in an answer; existing machines accept no more."""


class ResponseBuilder:
    """Builds the answers to admitted calls, from parts common to all of them."""

    def __init__(
        self,
        public_key: PublicKey,
        prefix: IPv6Network,
        endpoints: tuple[HostPort, ...],
        membership: Membership | None = None,
    ) -> None:
        """`membership` provides the endpoints of all live servers if several share the store."""
        self._membership = membership
        self._public_key = public_key.encode()
        self._prefix_length = prefix.prefixlen
        self._server_address = str(server_address(prefix))
        self._endpoints = swap_endpoints([str(endpoint) for endpoint in endpoints])

    def build(self, machine: Machine, *, tunnel: bool) -> ProvisionResponse:
        """The answer for an admitted machine. With `tunnel` it contains a virtual address."""
        response = ProvisionResponse(
            server_endpoint=self._living_endpoints(machine.id),
            server_public_key=self._public_key,
            node_address_prefix=f"{format_address(machine.overlay_address)}/{self._prefix_length}",
            server_address=self._server_address,
        )
        if tunnel and machine.virtual_address is not None:
            response.grpc_peer_addr_port = format_peer_addr_port(machine.virtual_address)
            response.server_endpoint = [response.grpc_peer_addr_port]
        return response

    def _living_endpoints(self, machine_id: str) -> list[str]:
        if self._membership is None:
            return self._endpoints
        return swap_endpoints(self._membership.endpoints(machine_id)[:MAX_ENDPOINTS])


class ProvisionService:
    """Serves sidero.link.ProvisionService."""

    call_limits: ClassVar[Mapping[str, CallLimits]] = {"Provision": CallLimits(max_message_bytes=8 * 1024, max_fields=64)}

    def __init__(
        self,
        machines: Machines,
        directory: Directory,
        responses: ResponseBuilder,
        events: EventHub,
        join_token: JoinTokenCheck,
        *,
        policy: JoinPolicy,
        server_key: PublicKey,
        force_tunnel: bool,
        authorize: Authorize,
        authorize_timeout: float,
        clock: Clock | None = None,
    ) -> None:
        self._machines = machines
        self._directory = directory
        self._policy = policy
        self._responses = responses
        self._events = events
        self._join_token = join_token
        self._server_key = server_key
        self._force_tunnel = force_tunnel
        self._authorize = authorize
        self._authorize_timeout = authorize_timeout
        self._budget = QueryBudget(clock or Clock())
        self.refusals: Counter[JoinRefusal] = Counter()

    def __mapping__(self) -> dict[str, Handler]:
        # The generated base class hides the stream, which has the caller's address.
        return {
            "/sidero.link.ProvisionService/Provision": Handler(
                self._serve, Cardinality.UNARY_UNARY, PlainRequest, ProvisionResponse
            )
        }

    async def _serve(self, stream: Stream[ProvisionRequest, bytes]) -> None:
        request = await stream.recv_message()
        if request is None:
            raise GRPCError(Status.INVALID_ARGUMENT, "the call has no request message")
        response = await self.provision(request, source=_source(stream), on_valid_token=lambda: valid_token(stream))
        await stream.send_message(encode_response(response))

    async def provision(
        self, request: ProvisionRequest, *, source: str, on_valid_token: Callable[[], None] = lambda: None
    ) -> ProvisionResponse:
        """Handle one call. Raises GRPCError with the status and text for the caller."""
        try:
            return await self._admit(request, source, on_valid_token)
        except JoinRejectedError as rejection:
            error = rejection.with_traceback(None)  # drops the traceback, which leads back to this frame
        except StoreFullError as failure:
            log.error("a join from %s was refused: %s", source, failure, extra={"node_uuid": request.node_uuid})
            error = JoinRejectedError(JoinRefusal.STORE_FULL, "the server cannot store more machines at present")
        except StoreUnavailableError as failure:
            log.error("a join from %s was refused: %s", source, failure, extra={"node_uuid": request.node_uuid})
            error = JoinRejectedError(JoinRefusal.STORE_UNAVAILABLE, "the server's database does not answer; try again")
        except SideroLinkError as failure:
            log.error("a join from %s failed: %s", source, failure, extra={"node_uuid": request.node_uuid})
            error = JoinRejectedError(JoinRefusal.INTERNAL_ERROR, INTERNAL_TEXT)
        except Exception:
            log.exception("a join from %s failed", source, extra={"node_uuid": request.node_uuid})
            error = JoinRejectedError(JoinRefusal.INTERNAL_ERROR, INTERNAL_TEXT)
        self.refusals[error.reason] += 1
        node_uuid = _uuid_or_none(_text(request.node_uuid))
        refused = JoinRefused(reason=error.reason, node_uuid=node_uuid, source=source, known_source=error.known_source)
        self._events.publish(refused)
        raise GRPCError(STATUSES[error.reason], error.message)

    async def _admit(self, request: ProvisionRequest, source: str, on_valid_token: Callable[[], None]) -> ProvisionResponse:
        credentials = self._check_tokens(request)
        is_given = credentials.join.is_valid
        if not is_given and not self._budget.allows(source):
            raise JoinRejectedError(
                JoinRefusal.TOO_MANY_REFUSALS, "too many calls from this address were refused; try again later"
            )
        if is_given:
            on_valid_token()
        join_request = self._parse(request, credentials, source)
        verdict = await self._authorize_call(join_request)
        try:
            if self._force_tunnel or verdict.force_tunnel:
                join_request = replace(join_request, force_tunnel=True)
            grant = await self._machines.join(join_request)
        except JoinRejectedError as rejection:
            if not is_given and rejection.reason in _BY_TOKENS:
                self._budget.charge(source)
            raise
        if not is_given:
            on_valid_token()
        return self._responses.build(grant.machine, tunnel=grant.use_tunnel)

    def _check_tokens(self, request: ProvisionRequest) -> Credentials:
        """Refuse a call whose tokens cannot admit it, before any costly work. Raises JoinRejectedError."""
        join = self._join_token.check(_text(request.join_token))
        token = _text(request.node_unique_token)
        unique = parse_unique_token(token) if len(token) <= MAX_UNIQUE_TOKEN_BYTES else None
        version = request.talos_version if isinstance(request.talos_version, str) else None
        credentials = Credentials(join=join, unique=unique, version=version)
        if join.is_valid:
            return credentials
        known = self._directory.known
        if not known.may_admit(join) and (unique is None or not known.has_unique_token(unique.digest)):
            verdict = decide(self._policy, credentials)
            if isinstance(verdict, Rejection):
                raise JoinRejectedError(verdict.reason, verdict.text)
        return credentials

    def _parse(self, request: ProvisionRequest, credentials: Credentials, source: str) -> JoinRequest:
        """Validate all fields of the call. Raises JoinRejectedError; its messages repeat nothing that the caller sent."""
        node_uuid = _uuid_or_none(_text(request.node_uuid))
        if node_uuid is None:
            raise JoinRejectedError(JoinRefusal.MALFORMED_UUID, "node_uuid is not a UUID (8-4-4-4-12 hexadecimal digits)")
        unique_token = _text(request.node_unique_token)
        if len(unique_token) > MAX_UNIQUE_TOKEN_BYTES:
            raise JoinRejectedError(
                JoinRefusal.MALFORMED_UNIQUE_TOKEN, f"node_unique_token is longer than {MAX_UNIQUE_TOKEN_BYTES} bytes"
            )
        version = _text(request.talos_version)
        if _VERSION.fullmatch(version) is None:
            raise JoinRejectedError(
                JoinRefusal.MALFORMED_VERSION, "talos_version is longer than 64 characters or not printable ASCII"
            )
        return JoinRequest(
            node_uuid=node_uuid,
            public_key=self._parse_key(_text(request.node_public_key)),
            join_token=_text(request.join_token) or None,
            unique_token=unique_token or None,
            talos_version=shared(version),  # most machines have the same
            wants_tunnel=request.wireguard_over_grpc is True,
            source=source,
            credentials=credentials,
        )

    def _parse_key(self, text: str) -> PublicKey:
        try:
            public_key = PublicKey.parse(text)
        except KeyFormatError as error:
            raise _bad_key(str(error)) from None
        if public_key == self._server_key:
            raise _bad_key("it is the server's own key")
        if public_key.is_low_order:
            raise _bad_key("it is a low-order point, which has no private key")
        return public_key

    async def _authorize_call(self, request: JoinRequest) -> Allow:
        """Run the embedder's hook. Raises JoinRejectedError."""
        if self._authorize is allow_all:
            return _ALLOW
        known = await self._machines.find(request.node_uuid)
        try:
            with anyio.fail_after(self._authorize_timeout):
                verdict = await self._authorize(request.about(known))
        except TimeoutError:
            fields = {"node_uuid": request.node_uuid} if known is None else known.log_fields
            log.error("the authorize hook took longer than %g s", self._authorize_timeout, extra=fields)
            raise JoinRejectedError(JoinRefusal.AUTHORIZE_FAILED, INTERNAL_TEXT) from None
        except Exception:
            log.exception("the authorize hook failed", extra={"node_uuid": request.node_uuid})
            raise JoinRejectedError(JoinRefusal.AUTHORIZE_FAILED, INTERNAL_TEXT) from None
        if isinstance(verdict, Deny):
            raise JoinRejectedError(JoinRefusal.DENIED, one_line(verdict.reason))
        return verdict


def _text(value: object) -> str:
    """A text field's value; empty if the field had another wire type, which the decoder does not reject."""
    return value if isinstance(value, str) else ""


def _uuid_or_none(text: str) -> str | None:
    try:
        return parse_uuid(text)
    except ConfigurationError:
        return None


def _bad_key(why: str) -> JoinRejectedError:
    return JoinRejectedError(JoinRefusal.MALFORMED_PUBLIC_KEY, f"error parsing Wireguard key: {why}")


def _source(stream: Stream[ProvisionRequest, bytes]) -> str:
    address = stream.peer.addr()
    if isinstance(address, tuple):
        return str(HostPort(address[0], address[1]))
    return "a local socket"
