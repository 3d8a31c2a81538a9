"""Short keyed hashes of all known tokens, so that a call without any of them is refused without a query.

The tokens are the stored join tokens that are not revoked, and the bound or assigned unique tokens. Each hash takes eight bytes
in a table that is at most three quarters full. The hash key is random per process, so nobody can search for collisions.
"""

import asyncio
import os
from array import array
from hashlib import blake2b
from typing import Final

from anyio.lowlevel import checkpoint

from siderolink.common.newest_dict import NewestDict
from siderolink.common.tasks import in_parts
from siderolink.common.token_bucket import TokenBucket
from siderolink.server.admission.rules import source_key
from siderolink.server.admission.tokens import JoinTokenResult, JoinTokenState, assigned_digest
from siderolink.server.clock import Clock
from siderolink.server.store import JoinToken, Machine, Store, TokenKind, TokenState

_SHARDS: Final = 256
"""A growing table is copied as a whole, so it is divided into many small ones."""
_LEAST_SLOTS: Final = 4
_REFUSED_PER_SECOND, _REFUSED_AT_ONCE = 200.0, 1000.0
_REFUSED_PER_SOURCE, _REFUSED_PER_SOURCE_AT_ONCE = 5.0, 100.0
_MOST_SOURCES: Final = 4096
_AT_ONCE: Final = 128
"""Tokens that are hashed before other tasks run."""
_UNIQUE, _JOIN, _SIGNER = b"u", b"j", b"s"


class HashTable:
    """A multiset of 64-bit numbers, with open addressing in flat arrays."""

    def __init__(self) -> None:
        self._shards = [_empty(_LEAST_SLOTS) for _ in range(_SHARDS)]
        self._counts = [0] * _SHARDS

    def __len__(self) -> int:
        return sum(self._counts)

    def __contains__(self, number: int) -> bool:
        slots = self._shards[number % _SHARDS]
        return slots[_find(slots, number or 1)] != 0

    @property
    def size(self) -> int:
        """Bytes of all slots."""
        return sum(len(slots) * slots.itemsize for slots in self._shards)

    def add(self, number: int) -> None:
        at = number % _SHARDS
        slots = self._shards[at]
        if 4 * (self._counts[at] + 1) > 3 * len(slots):
            grown = _empty(2 * len(slots))
            for other in slots:
                if other:
                    _put(grown, other)
            slots = self._shards[at] = grown
        _put(slots, number or 1)
        self._counts[at] += 1

    def discard(self, number: int) -> None:
        """Remove one occurrence of the number, if any."""
        shard = number % _SHARDS
        slots, mask = self._shards[shard], len(self._shards[shard]) - 1
        at = _find(slots, number or 1)
        if not slots[at]:
            return
        self._counts[shard] -= 1
        following = at
        while True:  # later entries move up, so that no search ends at the gap
            following = (following + 1) & mask
            other = slots[following]
            if not other:
                break
            home = _home(other, mask)
            if (following - home) & mask >= (following - at) & mask:
                slots[at], at = other, following
        slots[at] = 0


def _empty(count: int) -> "array[int]":
    return array("Q", bytes(8 * count))


def _home(number: int, mask: int) -> int:
    return number >> 8 & mask


def _find(slots: "array[int]", number: int) -> int:
    """The slot of the number, or where its search ends."""
    mask = len(slots) - 1
    at = _home(number, mask)
    while slots[at] and slots[at] != number:
        at = (at + 1) & mask
    return at


def _put(slots: "array[int]", number: int) -> None:
    mask = len(slots) - 1
    at = _home(number, mask)
    while slots[at]:
        at = (at + 1) & mask
    slots[at] = number


class Known:
    """The hashes of one server. A positive answer is wrong once in 2^64 times."""

    def __init__(self, clock: Clock) -> None:
        self._clock = clock
        self._table = HashTable()
        self._key = os.urandom(16)
        self._tokens: dict[str, tuple[int, ...]] = {}
        """Hashes of stored tokens, by token id."""
        self._expires: dict[int, float] = {}
        """Expiry times of tokens that expire."""
        self._changed: set[str] = set()
        """While the stored tokens are loaded: those that were applied since the load began."""
        self._loading = asyncio.Lock()

    @property
    def size(self) -> int:
        """Bytes of the table."""
        return self._table.size

    def __len__(self) -> int:
        return len(self._table)

    # --- queries

    def may_admit(self, join: JoinTokenResult) -> bool:
        """Whether a checked join token may be a stored one, or signed by one."""
        if join.state is JoinTokenState.MALFORMED or join.digest is None:
            return False
        if join.signed is None:
            return self.has_join_token(join.digest)
        provider = join.signed.signing_provider
        return self._is_active(self._hash(_SIGNER, b"" if provider is None else b"p" + provider.encode("utf-8", "replace")))

    def has_join_token(self, digest: bytes) -> bool:
        """Whether a plain token with this digest is active, apart from its uses."""
        return self._is_active(self._hash(_JOIN, digest))

    def has_unique_token(self, digest: bytes) -> bool:
        return self._hash(_UNIQUE, digest) in self._table

    def _is_active(self, number: int) -> bool:
        if number not in self._table:
            return False
        expires_at = self._expires.get(number)
        return expires_at is None or self._clock.time() < expires_at

    # --- changes

    def add_row(self, machine: Machine) -> None:
        for digest in (machine.bound_digest, assigned_digest(machine)):
            if digest is not None:
                self._table.add(self._hash(_UNIQUE, digest))

    def remove_row(self, machine: Machine) -> None:
        for digest in (machine.bound_digest, assigned_digest(machine)):
            if digest is not None:
                self._table.discard(self._hash(_UNIQUE, digest))

    def set_token(self, token: JoinToken, is_gone: bool = False) -> None:
        """Apply an added, changed or removed token; idempotent."""
        if self._loading.locked():
            self._changed.add(token.id)
        self.forget_token(token.id)
        if is_gone or token.state(self._clock.time()) is not TokenState.ACTIVE:
            return
        self._tokens[token.id] = tuple(self._token_hashes(token))
        for number in self._tokens[token.id]:
            self._table.add(number)
            if token.expires_at is not None:
                self._expires[number] = token.expires_at

    async def load_tokens(self, store: Store) -> None:
        """Load the stored tokens; `set_token` may be called meanwhile. Raises StoreError."""
        async with self._loading:
            self._changed.clear()
            before, after = set(self._tokens), ""
            while page := await store.tokens(after):
                after = page[-1].name
                for part in in_parts(page, _AT_ONCE):
                    for token in part:
                        if token.id not in self._changed:  # what was read may be older
                            self.set_token(token)
                    await checkpoint()
            for token_id in before - self._changed:
                self.forget_token(token_id)

    def forget_token(self, token_id: str) -> None:
        for number in self._tokens.pop(token_id, ()):
            self._table.discard(number)
            self._expires.pop(number, None)

    def _token_hashes(self, token: JoinToken) -> list[int]:
        found = [self._hash(_JOIN, token.digest)] if token.kind is TokenKind.PLAIN else []
        if token.is_default:
            found.append(self._hash(_SIGNER, b""))
        if token.kind is TokenKind.V2:
            found.append(self._hash(_SIGNER, b"p" + (token.provider or "").encode("utf-8", "replace")))
        return found

    def _hash(self, kind: bytes, value: bytes) -> int:
        return int.from_bytes(blake2b(value, digest_size=8, key=self._key, person=kind).digest())


class QueryBudget:
    """Limits the queries for calls that have known values but are still refused, per source and in total."""

    def __init__(self, clock: Clock) -> None:
        self._clock = clock
        self._all = TokenBucket(_REFUSED_PER_SECOND, _REFUSED_AT_ONCE, clock.monotonic)
        self._sources: NewestDict[str, TokenBucket] = NewestDict(_MOST_SOURCES)

    def allows(self, source: str) -> bool:
        """Whether a query for a call from this source is allowed now."""
        known = self._sources.get(source_key(source) or source)
        return not self._all.is_empty and (known is None or not known.is_empty)

    def charge(self, source: str) -> None:
        """Record a query for a call that was refused."""
        key = source_key(source) or source
        bucket = self._sources.get(key)
        if bucket is None:
            bucket = TokenBucket(_REFUSED_PER_SOURCE, _REFUSED_PER_SOURCE_AT_ONCE, self._clock.monotonic)
        bucket.charge(1)
        self._all.charge(1)
        self._sources.put(key, bucket)
