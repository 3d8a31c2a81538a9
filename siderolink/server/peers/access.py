"""Access control of the port for other servers: authenticates the calling server and the caller it acts for."""

from base64 import b64decode, b64encode
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext
from typing import Any, Final

import anyio

from siderolink.common.errors import UnauthenticatedError
from siderolink.common.grpc import certificate_of, valid_token
from siderolink.common.pb.siderolink.peers.v1 import Caller
from siderolink.common.protobuf_wire import has_declared_types
from siderolink.common.text import one_line
from siderolink.server.admin.api_keys import ApiKeys
from siderolink.server.peers.identity import fingerprint
from siderolink.server.store import Actor, FleetServer, Role

CALLER: Final = "siderolink-caller"
"""Metadata with the original caller, in base64 text: byte streams do not keep binary metadata."""
_NAME_LIMIT: Final = 64


def caller_metadata(actor: Actor) -> dict[str, str]:
    """The metadata that names the original caller of a relayed call."""
    caller = Caller(name=actor.name, role=str(actor.role or ""), source=actor.source, key_id=actor.key_id)
    return {CALLER: b64encode(bytes(caller)).decode()}


class PeerAccess:
    """Admits live servers of the store. The role of a relayed API key is looked up here, not taken from the calling server."""

    def __init__(self, others: Callable[[], Sequence[FleetServer]], api_keys: ApiKeys) -> None:
        self._others = others
        self._api_keys = api_keys
        self._held: dict[anyio.CancelScope, str] = {}

    async def of(self, call: Any) -> tuple[Actor, AbstractContextManager[anyio.CancelScope | None]]:
        """See `Access`."""
        certificate = certificate_of(call)
        digest = "" if certificate is None else fingerprint(certificate)
        server = self._server(digest)
        if server is None:
            raise UnauthenticatedError("the caller is not a live server of this store")
        valid_token(call)
        actor, hold = self._actor(call.metadata, server)
        return actor, self._holding(digest, hold)

    def _server(self, digest: str) -> FleetServer | None:
        return next((one for one in self._others() if digest and one.peer_fingerprint == digest), None)

    def _actor(
        self, metadata: Mapping[str, object], server: FleetServer
    ) -> tuple[Actor, AbstractContextManager[anyio.CancelScope | None]]:
        by = f"server {one_line(server.id, limit=_NAME_LIMIT)}"
        told = metadata.get(CALLER)
        if told is None:
            return Actor(name="server", role=Role.VIEWER, source=by), nullcontext(None)
        caller = _parse_caller(told)
        source = f"{one_line(caller.source, limit=_NAME_LIMIT)} by {by}"
        if caller.key_id:
            actor, principal = self._api_keys.recall(caller.key_id, source)
            return actor, self._api_keys.holding(principal)
        try:
            role = Role(caller.role)
        except ValueError:
            raise UnauthenticatedError("this server does not know the caller's role") from None
        return Actor(name=one_line(caller.name, limit=_NAME_LIMIT), role=role, source=source), nullcontext(None)

    @contextmanager
    def _holding(
        self, digest: str, hold: AbstractContextManager[anyio.CancelScope | None]
    ) -> Iterator[anyio.CancelScope | None]:
        scope = anyio.CancelScope()
        self._held[scope] = digest
        try:
            with scope, hold as inner:
                yield inner
        finally:
            del self._held[scope]
        if scope.cancelled_caught:
            raise UnauthenticatedError("the calling server is no longer alive")

    def end_calls_of_stopped_servers(self) -> None:
        """End the calls of servers that are no longer alive."""
        for scope, digest in list(self._held.items()):
            if self._server(digest) is None:
                scope.cancel()


def _parse_caller(told: object) -> Caller:
    try:
        caller = Caller.parse(b64decode(told, validate=True)) if isinstance(told, str) else Caller()
        is_one = has_declared_types(caller)
    except Exception:
        is_one = False
    if not is_one:
        raise UnauthenticatedError("the caller that the server names cannot be read")
    return caller
