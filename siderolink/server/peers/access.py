"""Who calls at the port for other servers: a living server, for itself or for a caller of its own."""

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
"""The metadata that names for whom a call is made, in base64: of byte streams, binary metadata is not kept."""
_NAME_LIMIT: Final = 64


def caller_metadata(actor: Actor) -> dict[str, str]:
    """What tells another server for whom a call is made."""
    caller = Caller(name=actor.name, role=str(actor.role or ""), source=actor.source, key_id=actor.key_id)
    return {CALLER: b64encode(bytes(caller)).decode()}


class PeerAccess:
    """Admits living servers, and checks their callers again: an API key counts as this server knows it."""

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
            raise UnauthenticatedError("the caller is no living server of this store")
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
        caller = _read(told)
        source = f"{one_line(caller.source, limit=_NAME_LIMIT)} by {by}"
        if caller.key_id:
            actor, principal = self._api_keys.recall(caller.key_id, source)
            return actor, self._api_keys.holding(principal)
        try:
            role = Role(caller.role)
        except ValueError:
            raise UnauthenticatedError("the caller's role is not known here") from None
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
            raise UnauthenticatedError("the calling server is not alive any more")

    def end_calls_of_the_gone(self) -> None:
        """End the calls of servers that are not alive any more."""
        for scope, digest in list(self._held.items()):
            if self._server(digest) is None:
                scope.cancel()


def _read(told: object) -> Caller:
    try:
        caller = Caller.parse(b64decode(told, validate=True)) if isinstance(told, str) else Caller()
        is_one = has_declared_types(caller)
    except Exception:
        is_one = False
    if not is_one:
        raise UnauthenticatedError("the caller that the server names cannot be read")
    return caller
