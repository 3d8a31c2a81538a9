"""API keys: created, listed, revoked, and authenticated by their digests."""

import logging
import secrets
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import replace
from typing import Final

import anyio

from siderolink.common.errors import (
    AlreadyExistsError,
    ConfigurationError,
    NotFoundError,
    SideroLinkError,
    UnauthenticatedError,
)
from siderolink.common.tasks import uninterrupted
from siderolink.common.text import one_line, text_digest
from siderolink.server.admin.lists import Page, page_of
from siderolink.server.admin.names import check_name, require
from siderolink.server.admission.admit import new_id
from siderolink.server.clock import Clock
from siderolink.server.fleet.machines import find_named
from siderolink.server.store import (
    Actor,
    AuditEntry,
    Principal,
    Role,
    Store,
    Transaction,
    UniqueViolationError,
)
from siderolink.server.store.audit import EMBEDDER, ForwardGrant

log = logging.getLogger(__name__)

PREFIX: Final = "slk_"
"""The prefix of every key, by which scanners for leaked secrets find it."""
KEY_BYTES: Final = 32
MAX_KEYS: Final = 1000
MAX_GRANTS: Final = 100
"""Machines and ports per key."""
_MAX_KEY_LENGTH: Final = 128
_NOTE_EVERY: Final = 60.0


class ApiKeys:
    """Every method needs the role admin and raises ForbiddenError without it."""

    def __init__(self, store: Store, clock: Clock) -> None:
        self._store = store
        self._clock = clock
        self._by_digest: dict[bytes, Principal] = {}
        self._used: dict[str, tuple[float, str]] = {}
        self._held: dict[str, set[anyio.CancelScope]] = {}
        self._writing = anyio.Lock()
        self._changing = anyio.Lock()
        """Keeps an older read of the keys from replacing a newer one."""

    def now(self) -> float:
        """Unix time of the clock by which keys expire."""
        return self._clock.time()

    # --- administration

    @uninterrupted
    async def create(
        self,
        name: str,
        role: Role,
        *,
        expires_at: float | None = None,
        ttl: float | None = None,
        forward: Sequence[str] = (),
        actor: Actor = EMBEDDER,
    ) -> tuple[Principal, str]:
        """Create a key; returns it and its secret, which is not stored. `ttl` is in seconds from now.

        `forward` lists machines as ``MACHINE`` or ``MACHINE:PORT`` whose ports the key may forward to regardless of its role.
        Raises ConfigurationError, NotFoundError, or AlreadyExistsError for a name already in use.
        """
        require(actor, Role.ADMIN)
        now = self._clock.time()
        secret = PREFIX + secrets.token_urlsafe(KEY_BYTES)
        principal = Principal(
            id=new_id(),
            name=check_name(name),
            role=role,
            key_digest=text_digest(secret),
            created_at=now,
            created_by=actor.name,
            expires_at=expiry(now, expires_at, ttl),
        )

        if len(forward) > MAX_GRANTS:
            raise ConfigurationError(f"an API key may forward to {MAX_GRANTS} machines or ports at most")

        async def work(transaction: Transaction) -> Principal:
            if len(await transaction.principals()) >= MAX_KEYS:
                raise ConfigurationError(f"there are {MAX_KEYS} keys already; delete some")
            made = replace(principal, grants=tuple([await _grant(transaction, text) for text in forward]))
            await transaction.put_principal(made)
            await transaction.audit(self._entry(actor, "apikey.create", None, made))
            return made

        async with self._changing:
            try:
                principal = await self._store.transact(work)
            except UniqueViolationError:
                raise AlreadyExistsError(f"another key has the name {principal.name}") from None
            self._by_digest[principal.key_digest] = principal
        return principal, secret

    async def page(self, page_size: int = 0, page_token: str = "", *, actor: Actor = EMBEDDER) -> Page[Principal]:
        """One page of keys, ordered by name."""
        require(actor, Role.ADMIN)
        found = sorted(await self._all(), key=_sort_key)
        return page_of([self._with_use(one) for one in found], _sort_key, page_size, page_token)

    async def revoke(self, name: str, *, actor: Actor = EMBEDDER) -> Principal:
        """End a key and the calls made with it; the key stays listed."""
        now = self._clock.time()
        return await self._end(name, "apikey.revoke", actor, lambda one: replace(one, revoked_at=one.revoked_at or now))

    async def delete(self, name: str, *, actor: Actor = EMBEDDER) -> Principal:
        """End a key and the calls made with it, and remove it."""
        return await self._end(name, "apikey.delete", actor, lambda one: None)

    @uninterrupted
    async def _end(self, name: str, action: str, actor: Actor, change: Callable[[Principal], Principal | None]) -> Principal:
        require(actor, Role.ADMIN)

        async def work(transaction: Transaction) -> Principal:
            known = await transaction.principals()
            found = next((one for one in known if name == one.id or name.lower() == one.name), None)
            if found is None:
                raise NotFoundError(f"no API key has the name or id {one_line(name, limit=64)!r}")
            changed = change(found)
            if changed == found:
                return found
            if changed is None:
                await transaction.delete_principal(found.id)
            else:
                await transaction.put_principal(changed)
            await transaction.audit(self._entry(actor, action, found, changed))
            return changed or found

        ended = await self._store.transact(work)
        await self.refresh()
        return self._with_use(ended)

    def _entry(self, actor: Actor, action: str, before: Principal | None, after: Principal | None) -> AuditEntry:
        shown = after or before
        assert shown is not None
        return AuditEntry(
            at=self._clock.time(),
            actor=actor,
            action=action,
            object_kind="api_key",
            object_id=shown.id,
            object_name=shown.name,
            before=_shown(before),
            after=_shown(after),
        )

    async def _all(self) -> Sequence[Principal]:
        return await self._store.transact(lambda transaction: transaction.principals())

    def _with_use(self, principal: Principal) -> Principal:
        """The principal with its last use, which may not be stored yet."""
        if (used := self._used.get(principal.id)) is None:
            return principal
        return replace(principal, last_used_at=used[0], last_source=used[1])

    # --- authentication

    def authenticate(self, secret: str, source: str) -> tuple[Actor, Principal]:
        """The principal of this key, without a query. UnauthenticatedError does not reveal whether the key was ever valid."""
        principal = self._by_digest.get(text_digest(secret)) if len(secret) <= _MAX_KEY_LENGTH else None
        now = self._clock.time()
        if principal is None:
            raise UnauthenticatedError("the API key is not valid")
        if not principal.is_active(now):
            raise UnauthenticatedError("the API key is revoked or has expired")
        self._used[principal.id] = (now, source)
        return _actor(principal, source), principal

    def recall(self, principal_id: str, source: str) -> tuple[Actor, Principal]:
        """The principal with this id, whose key another server has checked. Raises UnauthenticatedError."""
        principal = next((one for one in self._by_digest.values() if one.id == principal_id), None)
        if principal is None or not principal.is_active(self._clock.time()):
            raise UnauthenticatedError("the API key is unknown, was revoked, or has expired")
        return _actor(principal, source), principal

    @contextmanager
    def holding(self, principal: Principal) -> Iterator[anyio.CancelScope]:
        """A scope that is cancelled when the key ends."""
        scope = anyio.CancelScope()
        if principal.expires_at is not None:
            scope.deadline = anyio.current_time() + principal.expires_at - self._clock.time()
        scopes = self._held.setdefault(principal.id, set())
        scopes.add(scope)
        try:
            with scope:
                yield scope
        finally:
            scopes.discard(scope)
            if not scopes:
                self._held.pop(principal.id, None)

    async def refresh(self) -> None:
        """Read the keys again and end the calls of removed ones. If reading fails, no key is accepted."""
        async with self._changing:
            try:
                known = {one.key_digest: one for one in await self._all()}
            except SideroLinkError:
                self._by_digest = {}
                raise
            self._by_digest = known
        active = {one.id for one in known.values() if one.revoked_at is None}
        for principal_id, scopes in list(self._held.items()):
            if principal_id not in active:
                for scope in list(scopes):
                    scope.cancel()

    async def note_uses(self) -> None:
        """Write the times of last use periodically, until cancelled."""
        while True:
            await self._clock.sleep(_NOTE_EVERY)
            await self.write_uses()

    async def write_uses(self) -> None:
        """Write the times of last use."""
        async with self._writing:
            used = dict(self._used)
            try:
                if used:
                    await self._store.note_principals(used)
            except SideroLinkError as error:
                log.warning("cannot store when API keys were last used: %s", error)
                return
            for principal_id, use in used.items():  # listed from `used` until then
                if self._used.get(principal_id) == use:
                    del self._used[principal_id]


def expiry(now: float, expires_at: float | None, ttl: float | None) -> float | None:
    """The Unix time of expiry. Raises ConfigurationError."""
    if expires_at is not None and ttl is not None:
        raise ConfigurationError("give an expiry or a time to live, not both")
    if ttl is not None:
        expires_at = now + ttl
    if expires_at is not None and not now < expires_at < now + 1e10:
        raise ConfigurationError("an expiry must be in the future")
    return expires_at


def _actor(principal: Principal, source: str) -> Actor:
    return Actor(name=principal.name, role=principal.role, source=source, key_id=principal.id, grants=principal.grants)


async def _grant(transaction: Transaction, text: str) -> ForwardGrant:
    """Parse ``MACHINE`` or ``MACHINE:PORT``. The grant stores the machine's id, so it survives a rename."""
    name, colon, digits = text.rpartition(":")
    if not (colon and digits.isascii() and digits.isdigit()):
        name, digits = text, ""
    port = int(digits[:6]) if digits else None
    if port is not None and not 1 <= port <= 65535:
        raise ConfigurationError(f"{one_line(text, limit=80)!r} has no port between 1 and 65535")
    machine = await find_named(transaction, name)
    if machine is None:
        raise NotFoundError(f"no machine has the name, id, UUID or public key {one_line(name, limit=64)!r}")
    return ForwardGrant(machine.id, port)


def _sort_key(principal: Principal) -> tuple[str, str]:
    return principal.name, principal.id


def _shown(principal: Principal | None) -> dict[str, object]:
    if principal is None:
        return {}
    shown = {"role": str(principal.role), "expires_at": principal.expires_at, "revoked_at": principal.revoked_at}
    return shown | ({"forward": [str(grant) for grant in principal.grants]} if principal.grants else {})
