"""Looks up the stored token that a call presents, and manages the uses of limited tokens, inside the transaction of `admit`.

A use is a pair of a token and a row. It is reserved by the call and spent once a handshake proves the call's key; the row may
present the token again. Uses of a token that limits known machines are never spent: they end with their rows. Unlimited tokens
have no uses: they take no lock and cost no write.
"""

import random
from collections.abc import Sequence
from dataclasses import replace

from siderolink.server.admission.rows import refusal
from siderolink.server.admission.signed_tokens import SignedToken
from siderolink.server.admission.tokens import JoinTokenResult, JoinTokenState
from siderolink.server.clock import Clock
from siderolink.server.refusals import JoinRefusal, JoinRejectedError
from siderolink.server.store import JoinToken, Machine, TokenColumn, TokenKind, TokenState, TokenUse, Transaction
from siderolink.server.store.sealing import Sealer, place_of_token
from siderolink.server.store.tokens import DEFAULT_TOKEN, TokenKey

USED_UP_TEXT = "invalid join token: its limit of uses is reached"


class TokenRules:
    """Checks the join tokens of calls."""

    def __init__(self, sealer: Sealer, clock: Clock) -> None:
        self._sealer = sealer
        self._clock = clock

    def wanted(self, join: JoinTokenResult) -> Sequence[TokenKey]:
        """The keys of stored tokens needed to check this one."""
        if join.signed is not None:
            wanted: list[TokenKey] = [] if join.signed.signing_provider is not None else [DEFAULT_TOKEN]
            return [*wanted, *_provider_keys(join.signed)]
        is_decided = join.is_valid or join.digest is None or join.state is JoinTokenState.MALFORMED
        return [] if is_decided else [(TokenColumn.DIGEST, join.digest)]

    async def check(
        self, transaction: Transaction, join: JoinTokenResult, node_uuid: str, rows: Sequence[Machine]
    ) -> JoinTokenResult:
        """The result after looking up the stored tokens that are `wanted`. `rows` are the rows concerned: they may already have
        a use."""
        found = await (self._find_plain(transaction, join) if join.signed is None else self._find_signed(transaction, join))
        token = found.token
        if token is None:
            return found
        is_right = token.state(self._clock.time()) is TokenState.ACTIVE and token.bound_uuid in (None, node_uuid)
        if not is_right or token.limit is None:
            return found if is_right else replace(join, state=JoinTokenState.WRONG)
        if self._has_room(token, await transaction.tokens.uses(token.id), rows):
            return found
        return replace(join, state=JoinTokenState.WRONG, is_full=token.max_machines is not None)

    async def _find_plain(self, transaction: Transaction, join: JoinTokenResult) -> JoinTokenResult:
        assert join.digest is not None
        token = await transaction.tokens.find(TokenColumn.DIGEST, join.digest)
        if token is None or token.kind is not TokenKind.PLAIN:
            return join
        return replace(join, state=JoinTokenState.VALID, token=token)

    async def _find_signed(self, transaction: Transaction, join: JoinTokenResult) -> JoinTokenResult:
        """Find the token that signed this one; if the default token did, the provider's own entry, if it has one."""
        assert join.signed is not None
        tokens, name, keys = transaction.tokens, join.signed.provider, _provider_keys(join.signed)
        provider = await tokens.find(*keys[0]) if keys else None
        is_valid, signer = join.is_valid, provider
        if join.signed.signing_provider is None:
            default = await tokens.find(*DEFAULT_TOKEN)
            is_valid = join.is_valid if default is None else self._has_signed(default, join)
            signer = provider if provider is not None and provider.kind is TokenKind.V1 else default
        else:
            is_valid = provider is not None and provider.kind is TokenKind.V2 and self._has_signed(provider, join)
        if not is_valid:
            return replace(join, state=JoinTokenState.WRONG)
        is_gone = name is not None and (provider is None or provider.state(self._clock.time()) is not TokenState.ACTIVE)
        return replace(join, state=JoinTokenState.VALID, token=None if is_gone else signer, is_provider_gone=is_gone)

    def _has_signed(self, token: JoinToken, join: JoinTokenResult) -> bool:
        assert join.signed is not None
        secret = self._sealer.open(token.secret, place_of_token(token.id)).decode()
        return join.signed.is_signed_by(secret) and token.state(self._clock.time()) is TokenState.ACTIVE

    def _has_room(self, token: JoinToken, uses: Sequence[TokenUse], rows: Sequence[Machine]) -> bool:
        now = self._clock.time()
        is_user = any(use.machine_id == row.id and not use.is_free(now) for use in uses for row in rows)
        return is_user or bool(_free_slots(token, uses, now))

    async def take_use(
        self, transaction: Transaction, token: JoinToken, machine_id: str, *, until: float | None, is_proved: bool
    ) -> bool:
        """Reserve a use for a row, or spend it if the row's key is proved. Returns whether the proof must spend or confirm it.

        `until`: end of the reservation; None for the lifetime of the row. Raises JoinRejectedError if no use is free.
        """
        now = self._clock.time()
        uses = await transaction.tokens.uses(token.id)
        own = next((use for use in uses if use.machine_id == machine_id and not use.is_free(now)), None)
        is_spent = token.max_machines is None
        if own is not None and (own.spent_at is not None or own.expires_at is None and not is_spent):
            return False
        if own is None:
            free = _free_slots(token, uses, now)
            if not free:
                raise _used_up(token)
            own = TokenUse(
                token_id=token.id, slot=random.choice(free), machine_id=machine_id, reserved_at=now, expires_at=until
            )
        elif own.expires_at is None and not is_proved:
            return True
        ends = None if until is None or own.expires_at is None else max(until, own.expires_at)
        use = replace(own, reserved_at=now, expires_at=ends)
        if is_proved:
            use = replace(use, expires_at=None, spent_at=now if is_spent else None)
        await transaction.tokens.put_use(use)
        return not is_proved and (is_spent or use.expires_at is not None)


def _provider_keys(signed: SignedToken) -> list[TokenKey]:
    """Where the token of the provider is that a signed token names; not in the store if no provider can have that name."""
    name = signed.provider
    return [(TokenColumn.PROVIDER, name)] if name is not None and name.isprintable() else []


def _used_up(token: JoinToken) -> JoinRejectedError:
    if token.max_machines is not None:
        return JoinRejectedError(JoinRefusal.TOKEN_FULL, refusal(JoinRefusal.TOKEN_FULL).text)
    return JoinRejectedError(JoinRefusal.INVALID_JOIN_TOKEN, USED_UP_TEXT)


def _free_slots(token: JoinToken, uses: Sequence[TokenUse], now: float) -> list[int]:
    """Slots that may still be taken. After a limit was lowered, slots beyond it may be taken.

    Returns the lowest ones, so that a transaction with an older view of the uses cannot exceed the limit.
    """
    limit, taken = token.limit or 0, {use.slot for use in uses if not use.is_free(now)}
    free = [slot for slot in range(limit) if slot not in taken]
    return free[: max(0, limit - len(taken))]


async def spend_use(transaction: Transaction, token_id: str, machine_id: str, now: float) -> bool:
    """Confirm or spend a reserved use after a handshake proved its key. False if the reservation has ended."""
    token = await transaction.tokens.find(TokenColumn.ID, token_id)
    if token is None:
        return True  # deleted tokens have no uses, and existing links stay
    for use in await transaction.tokens.uses(token_id):
        if use.machine_id == machine_id:
            spent_at = now if use.spent_at is None and token.max_machines is None else use.spent_at
            await transaction.tokens.put_use(replace(use, reserved_at=now, expires_at=None, spent_at=spent_at))
            return True
    return False
