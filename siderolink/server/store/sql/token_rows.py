"""Join tokens and their uses within one work's transaction."""

from collections.abc import Hashable, Sequence

from siderolink.server.store.feed import Change
from siderolink.server.store.rows import UniqueViolationError
from siderolink.server.store.sql.batch_reads import TOKEN, USES_OF, Key, Reads
from siderolink.server.store.tokens import JoinToken, TokenChanged, TokenColumn, TokenUse, unique_token_values

_SLOT, _USER = "slot", "user"


class SqlTokens:
    """See `TokenRepository`. Reads of uses do not cause a conflict: their unique constraints decide."""

    def __init__(self, reader: Reads, reads: set[Key], writes: set[Key], changes: list[Change]) -> None:
        """`reads`, `writes` and `changes` are those of the whole transaction."""
        self._reader = reader
        self._reads = reads
        self._writes = writes
        self._changes = changes
        self.tokens: dict[str, JoinToken | None] = {}
        """New values of tokens by id; None deletes the token and its uses."""
        self.put_uses: dict[tuple[str, str], TokenUse] = {}
        """New uses, by token and machine."""
        self.released: set[tuple[str, str]] = set()
        """Uses to end unless they are spent, by token and machine."""

    @property
    def has_changes(self) -> bool:
        return bool(self.tokens or self.put_uses or self.released)

    async def find(self, column: TokenColumn, value: Hashable) -> JoinToken | None:
        for token in self.tokens.values():
            if token is not None and (column, value) in unique_token_values(token):
                return token
        key = (TOKEN + column.value, value)
        self._reads.add(key)
        found = await self._reader.read(key)
        if not isinstance(found, JoinToken) or found.id in self.tokens:
            return None
        self._reads.add((TOKEN + TokenColumn.ID.value, found.id))
        return found

    async def put(self, token: JoinToken) -> None:
        old: JoinToken | None = None
        for column, value in unique_token_values(token):
            other = await self.find(column, value)
            if other is not None and other.id != token.id:
                raise UniqueViolationError(column.value, "token")
            old = other if column is TokenColumn.ID else old
        self._write(token.id, old, token)
        self._changes.append(TokenChanged(token=token))

    async def delete(self, token_id: str) -> JoinToken | None:
        token = await self.find(TokenColumn.ID, token_id)
        if token is not None:
            self._write(token_id, token, None)
            self._changes.append(TokenChanged(token=token, is_gone=True))
        return token

    def _write(self, token_id: str, old: JoinToken | None, new: JoinToken | None) -> None:
        for token in (old, new):
            if token is not None:
                self._writes.update((TOKEN + column.value, value) for column, value in unique_token_values(token))
        self.tokens[token_id] = new

    async def uses(self, token_id: str) -> Sequence[TokenUse]:
        here = {machine_id: use for (token, machine_id), use in self.put_uses.items() if token == token_id}
        if token_id in self.tokens and self.tokens[token_id] is None:
            return list(here.values())
        found = await self._reader.read((USES_OF, token_id))
        stored = {use.machine_id: use for use in found if isinstance(use, TokenUse)} if isinstance(found, Sequence) else {}
        taken = {use.slot for use in here.values()}
        for use in list(stored.values()):
            is_released = (token_id, use.machine_id) in self.released and use.spent_at is None
            if use.slot in taken or is_released:
                del stored[use.machine_id]
        return list((stored | here).values())

    async def put_use(self, use: TokenUse) -> None:
        for other in await self.uses(use.token_id):
            if other.slot == use.slot and other.machine_id != use.machine_id and not other.is_free(use.reserved_at):
                raise UniqueViolationError("slot", "use")
        self._writes |= {(_SLOT, (use.token_id, use.slot)), (_USER, (use.token_id, use.machine_id))}
        self.put_uses[use.token_id, use.machine_id] = use
        self.released.discard((use.token_id, use.machine_id))

    def release(self, token_id: str, machine_id: str) -> None:
        key = (token_id, machine_id)
        self._writes.add((_USER, key))
        use = self.put_uses.get(key)
        if use is None or use.spent_at is None:
            self.put_uses.pop(key, None)
            self.released.add(key)
