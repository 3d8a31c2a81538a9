"""Join tokens and their uses in dictionaries."""

import heapq
from collections.abc import Callable, Collection, Hashable, Sequence

from siderolink.server.store.feed import Change
from siderolink.server.store.rows import UniqueViolationError
from siderolink.server.store.tokens import JoinToken, TokenChanged, TokenColumn, TokenKey, TokenUse, unique_token_values

_Uses = dict[str, TokenUse]
"""The uses of one token, by machine."""


class TokenTable:
    """All tokens, an index of their unique values, and their uses."""

    def __init__(self) -> None:
        self.index: dict[TokenKey, JoinToken] = {}
        self.uses: dict[str, _Uses] = {}

    def page(self, after: str, limit: int) -> list[JoinToken]:
        found = (token for (column, name), token in self.index.items() if column is TokenColumn.NAME and token.name > after)
        return heapq.nsmallest(limit, found, key=lambda token: token.name)

    def count(self, token_ids: Collection[str], now: float) -> dict[str, int]:
        uses = {token_id: self.uses.get(token_id, {}).values() for token_id in token_ids}
        return {token_id: sum(not use.is_free(now) for use in found) for token_id, found in uses.items()}


class MemoryTokens:
    """See `TokenRepository`. Changes the table immediately and records how to undo each change."""

    def __init__(self, table: TokenTable, changes: list[Change]) -> None:
        self._table = table
        self._changes = changes
        self._undo: list[Callable[[], None]] = []

    async def find(self, column: TokenColumn, value: Hashable) -> JoinToken | None:
        return self._table.index.get((column, value))

    async def put(self, token: JoinToken) -> None:
        for key in unique_token_values(token):
            other = self._table.index.get(key)
            if other is not None and other.id != token.id:
                raise UniqueViolationError(key[0].value, "token")
        self._replace(self._table.index.get((TokenColumn.ID, token.id)), token)
        self._changes.append(TokenChanged(token=token))

    async def delete(self, token_id: str) -> JoinToken | None:
        token = self._table.index.get((TokenColumn.ID, token_id))
        if token is not None:
            self._keep_uses(token_id)
            self._table.uses.pop(token_id, None)
            self._replace(token, None)
            self._changes.append(TokenChanged(token=token, is_gone=True))
        return token

    def _replace(self, old: JoinToken | None, new: JoinToken | None) -> None:
        index = self._table.index

        def exchange(gone: JoinToken | None, come: JoinToken | None) -> None:
            for key in () if gone is None else unique_token_values(gone):
                del index[key]
            for key in () if come is None else unique_token_values(come):
                index[key] = come  # type: ignore[assignment]

        exchange(old, new)
        self._undo.append(lambda: exchange(new, old))

    async def uses(self, token_id: str) -> Sequence[TokenUse]:
        return list(self._table.uses.get(token_id, {}).values())

    async def put_use(self, use: TokenUse) -> None:
        uses = self._keep_uses(use.token_id)
        for other in list(uses.values()):
            if other.slot == use.slot and other.machine_id != use.machine_id:
                if not other.is_free(use.reserved_at):
                    raise UniqueViolationError("slot", "use")
                del uses[other.machine_id]
        uses[use.machine_id] = use

    def release(self, token_id: str, machine_id: str) -> None:
        use = self._table.uses.get(token_id, {}).get(machine_id)
        if use is not None and use.spent_at is None:
            del self._keep_uses(token_id)[machine_id]

    def _keep_uses(self, token_id: str) -> _Uses:
        """A token's uses, to be changed by the caller; their present state is restored on undo."""
        uses = self._table.uses.setdefault(token_id, {})
        before = dict(uses)

        def restore() -> None:
            self._table.uses[token_id] = before

        self._undo.append(restore)
        return uses

    def undo(self) -> None:
        for step in reversed(self._undo):
            step()
