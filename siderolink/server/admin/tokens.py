"""The administration of join tokens. Every change is audited in its transaction; entries contain no secret."""

import secrets
from collections.abc import Awaitable, Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Final

from siderolink.common.errors import AlreadyExistsError, NotFoundError, SideroLinkError
from siderolink.common.node_uuid import parse_uuid
from siderolink.common.selection import changed_labels
from siderolink.common.tasks import uninterrupted
from siderolink.common.text import one_line, text_digest
from siderolink.server.admin.names import check_note, require
from siderolink.server.admin.token_values import check_limits, check_name, check_provider, check_secret, expiry, random_secret
from siderolink.server.admission.signed_tokens import PROVIDER, sign
from siderolink.server.admission.tokens import JoinTokenCheck
from siderolink.server.store import (
    Actor,
    AuditEntry,
    JoinToken,
    Role,
    Store,
    TokenColumn,
    TokenKind,
    TokenState,
    Transaction,
    TunnelSetting,
    UniqueViolationError,
)
from siderolink.server.store.audit import EMBEDDER
from siderolink.server.store.sealing import place_of_token
from siderolink.server.store.tokens import DEFAULT_TOKEN, GIVEN_TOKEN

_SHOWN: Final = (
    "name",
    "kind",
    "provider",
    "note",
    "expires_at",
    "revoked_at",
    "max_uses",
    "max_machines",
    "bound_uuid",
    "tunnel",
    "labels",
    "is_default",
)
"""The fields shown in the audit."""

Change = Callable[[Transaction, JoinToken], Awaitable[JoinToken]]


@dataclass(frozen=True, slots=True, kw_only=True)
class TokenStatus:
    """One join token's current status."""

    token: JoinToken
    """Its `secret` is sealed; `Tokens.show` returns it."""
    state: TokenState
    uses: int
    """For a limited token, its reserved and spent uses; for others, the number of machines that it last admitted."""
    machines: int
    """Known machines that it last admitted; with `max_machines`, including those about to join."""
    is_given: bool = False
    """Whether it is the server's `join_token`, which cannot be changed or removed here."""


@dataclass(frozen=True, slots=True, kw_only=True)
class CreatedToken:
    """A new token and its text. The text is shown again only by `show`."""

    status: TokenStatus
    secret: str = field(repr=False)


class Tokens:
    """The join tokens of a server and of all servers that share its store; available as `server.tokens`.

    Tokens are identified by name or id. Methods raise NotFoundError for an unknown token, AlreadyExistsError for a name in use,
    ConfigurationError for an invalid value, ForbiddenError if the role is too low, SideroLinkError if the token's state forbids
    the operation, and StoreError.
    """

    def __init__(
        self,
        store: Store,
        given: JoinTokenCheck,
        *,
        on_changed: Callable[[JoinToken, bool], None] = lambda token, is_gone: None,
        count_machines: Callable[[str], int] = lambda token_id: 0,
    ) -> None:
        """`on_changed` is called with each token changed here and whether it was removed, before the caller continues.

        `count_machines` returns how many machines the token with an id last admitted.
        """
        self._store = store
        self._given = given
        self._on_changed = on_changed
        self._count_machines = count_machines

    # --- reading

    async def list(self, *, after: str = "", limit: int = 100, states: Iterable[TokenState] = ()) -> Sequence[TokenStatus]:
        """One page of tokens ordered by name, after the name `after`; only those in `states`, if given."""
        wanted = set(states)
        found: list[TokenStatus] = []
        given = await self._given_status() if after < GIVEN_TOKEN else None
        while len(found) < limit:
            page = await self._store.tokens(after, limit)
            statuses = await self._statuses(page)
            if given is not None and (len(page) < limit or page[-1].name > GIVEN_TOKEN):
                statuses, given = sorted([*statuses, given], key=lambda status: status.token.name), None
            found += [status for status in statuses if not wanted or status.state in wanted]
            if len(page) < limit:
                break
            after = page[-1].name
        return found[:limit]

    async def get(self, name: str) -> TokenStatus:
        given = await self._given_status() if name == GIVEN_TOKEN else None
        return given or (await self._statuses([await self._find(name)]))[0]

    async def show(self, name: str, *, actor: Actor = EMBEDDER) -> str:
        """Return the token's text. Audited."""
        require(actor, Role.OPERATOR)
        if name == GIVEN_TOKEN and self._given.secret is not None:
            given = self._given.secret
            await self._store.transact(
                lambda transaction: transaction.audit(self._entry(actor, "token.show", _given(), {}, {}))
            )
            return given

        async def work(transaction: Transaction) -> str:
            token = await _named(transaction, name)
            await transaction.audit(self._entry(actor, "token.show", token, {}, {}))
            return self._open(token)

        return await self._store.transact(work)

    async def signed(
        self, name: str, extra: Mapping[str, str] | None = None, *, version: TokenKind = TokenKind.V2, actor: Actor = EMBEDDER
    ) -> str:
        """Create a token for a provider's machines, signed by a V2 token itself or else by the default token. Audited."""
        require(actor, Role.OPERATOR)
        status = await self.get(name)
        token = status.token
        if token.kind is TokenKind.V1 or version is TokenKind.V1:
            signer = await self._store.transact(lambda transaction: transaction.tokens.find(*DEFAULT_TOKEN))
            secret = self._given.secret if signer is None else self._open(signer)
            if secret is None:
                raise SideroLinkError("there is no default token to sign with")
            kind = TokenKind.V1
        else:
            secret, kind = await self.show(name, actor=actor), TokenKind.V2
        provider = {} if token.provider is None else {PROVIDER: token.provider}
        if kind is TokenKind.V1:
            entry = self._entry(actor, "token.sign", token, {}, {})
            await self._store.transact(lambda transaction: transaction.audit(entry))
        return sign(kind.value, secret, {**(extra or {}), **provider})

    # --- changing

    @uninterrupted
    async def create(
        self,
        name: str,
        *,
        token: str | None = None,
        note: str = "",
        kind: TokenKind = TokenKind.PLAIN,
        provider: str | None = None,
        expires_at: float | None = None,
        expires_in: float | None = None,
        max_uses: int | None = None,
        max_machines: int | None = None,
        one_time: bool = False,
        bound_uuid: str | None = None,
        labels: Mapping[str, str] | None = None,
        tunnel: TunnelSetting = TunnelSetting.INHERIT,
        make_default: bool = False,
        actor: Actor = EMBEDDER,
    ) -> CreatedToken:
        """Add a token with a random text or the text `token`. It expires never, at a Unix time, or after some seconds.

        `max_uses`: how many machines may join by it, 1 to MAX_USES; `one_time` means 1. `max_machines`: how many of its
        machines may be known at a time. At most one of the two can be set. `bound_uuid`: the only UUID that may use it.
        `labels` and `tunnel` are given to its machines. `kind` V1 and V2: for the machines of an infrastructure `provider`.
        """
        require(actor, Role.OPERATOR)
        max_uses = check_limits(max_uses, max_machines, one_time=one_time)
        now, secret = self._store.time(), check_secret(token) if token is not None else random_secret()
        token_id = secrets.token_hex(8)
        made = JoinToken(
            id=token_id,
            name=check_name(name),
            digest=text_digest(secret),
            secret=self._store.sealer.seal(secret.encode(), place_of_token(token_id)),
            kind=TokenKind(kind),
            provider=check_provider(TokenKind(kind), provider),
            note=check_note(note),
            created_at=now,
            created_by=actor.name,
            expires_at=expiry(now, expires_at, expires_in),
            max_uses=max_uses,
            max_machines=max_machines,
            bound_uuid=None if bound_uuid is None else parse_uuid(bound_uuid),
            tunnel=TunnelSetting(tunnel),
            labels=changed_labels({}, labels or {}, ()),
        )

        async def work(transaction: Transaction) -> JoinToken:
            added = replace(made, is_default=True) if make_default else made
            if make_default:
                await _clear_default(transaction)
            await transaction.tokens.put(added)
            await transaction.audit(self._entry(actor, "token.create", added, {}, _shown(added)))
            return added

        with _translated(made):
            added = await self._store.transact(work)
        self._on_changed(added, False)
        return CreatedToken(status=(await self._statuses([added]))[0], secret=secret)

    async def update(
        self,
        name: str,
        *,
        new_name: str | None = None,
        note: str | None = None,
        tunnel: TunnelSetting | None = None,
        bound_uuid: str | None = None,
        max_uses: int | None = None,
        max_machines: int | None = None,
        labels: Mapping[str, str] | None = None,
        set_labels: Mapping[str, str] | None = None,
        remove_labels: Iterable[str] = (),
        actor: Actor = EMBEDDER,
    ) -> TokenStatus:
        """Change the values that are not None. `bound_uuid` "" unbinds it, `max_uses` or `max_machines` 0 lifts its limit,
        `labels` replaces all labels, `set_labels` and `remove_labels` change some.

        A token created without a limit cannot get one later, because its machines were not counted.
        """

        gone = frozenset(remove_labels)

        async def change(transaction: Transaction, token: JoinToken) -> JoinToken:
            for limit, wanted in (("max_uses", max_uses), ("max_machines", max_machines)):
                if wanted and getattr(token, limit) is None:
                    raise SideroLinkError(
                        f"a token created without {limit} cannot get it later, because its machines "
                        f"were not counted; create a new token with {limit}"
                    )
            check_limits(max_uses or None, max_machines or None)
            fields: dict[str, object] = {
                "name": None if new_name is None else check_name(new_name),
                "note": None if note is None else check_note(note),
                "tunnel": None if tunnel is None else TunnelSetting(tunnel),
                "bound_uuid": parse_uuid(bound_uuid) if bound_uuid else None,
                "max_uses": max_uses or None,
                "max_machines": max_machines or None,
                "labels": changed_labels(token.labels if labels is None else labels, set_labels or {}, gone),
            }
            changed = replace(token, **{key: value for key, value in fields.items() if value is not None})  # type: ignore[arg-type]
            changed = replace(changed, bound_uuid=None) if bound_uuid == "" else changed
            changed = replace(changed, max_uses=None) if max_uses == 0 else changed
            return replace(changed, max_machines=None) if max_machines == 0 else changed

        return await self._change(name, "token.update", actor, change)

    async def revoke(self, name: str, *, actor: Actor = EMBEDDER) -> TokenStatus:
        """Stop admitting machines by it. Links stay, and a machine with a bound unique token may still join."""
        now = self._store.time()

        async def change(transaction: Transaction, token: JoinToken) -> JoinToken:
            return token if token.revoked_at is not None else replace(token, revoked_at=now)

        return await self._change(name, "token.revoke", actor, change)

    async def reinstate(self, name: str, *, actor: Actor = EMBEDDER) -> TokenStatus:
        """Undo a revocation. An expiry stays."""

        async def change(transaction: Transaction, token: JoinToken) -> JoinToken:
            return replace(token, revoked_at=None)

        return await self._change(name, "token.reinstate", actor, change)

    async def renew(
        self, name: str, *, expires_at: float | None = None, expires_in: float | None = None, actor: Actor = EMBEDDER
    ) -> TokenStatus:
        """Change the expiry, or remove it. Does not undo a revocation."""
        new_expiry = expiry(self._store.time(), expires_at, expires_in)

        async def change(transaction: Transaction, token: JoinToken) -> JoinToken:
            return replace(token, expires_at=new_expiry)

        return await self._change(name, "token.renew", actor, change)

    async def make_default(self, name: str, *, actor: Actor = EMBEDDER) -> TokenStatus:
        """Make it the token that signs ``v1:`` tokens, and ``v2:`` tokens without a provider. It may be a revoked one."""

        async def change(transaction: Transaction, token: JoinToken) -> JoinToken:
            if token.kind is not TokenKind.PLAIN:
                raise SideroLinkError("the token of a provider cannot be the default token")
            if not token.is_default:
                await _clear_default(transaction)
            return replace(token, is_default=True)

        return await self._change(name, "token.default", actor, change)

    @uninterrupted
    async def delete(self, name: str, *, actor: Actor = EMBEDDER) -> TokenStatus:
        """Remove a token and its uses, and return its last status. Links stay. The default token cannot be removed."""
        require(actor, Role.OPERATOR)
        status = await self.get(name)
        _refuse_given(name)

        async def work(transaction: Transaction) -> JoinToken:
            token = await _named(transaction, name)
            if token.is_default:
                raise SideroLinkError("deleting default join token is not possible; make another one the default first")
            await transaction.tokens.delete(token.id)
            await transaction.audit(self._entry(actor, "token.delete", token, _shown(token), {}))
            return token

        token = await self._store.transact(work)
        self._on_changed(token, True)
        return replace(status, token=token)

    # --- implementation

    @uninterrupted
    async def _change(self, name: str, action: str, actor: Actor, change: Change) -> TokenStatus:
        require(actor, Role.OPERATOR)
        _refuse_given(name)

        async def work(transaction: Transaction) -> JoinToken:
            old = await _named(transaction, name)
            new = await change(transaction, old)
            if new != old:
                await transaction.tokens.put(new)
                before, after = _shown(old), _shown(new)
                changed = [key for key in after if before[key] != after[key]]
                before, after = {key: before[key] for key in changed}, {key: after[key] for key in changed}
                await transaction.audit(self._entry(actor, action, new, before, after))
            return new

        with _translated(None):
            token = await self._store.transact(work)
        self._on_changed(token, False)
        return (await self._statuses([token]))[0]

    def _entry(
        self, actor: Actor, action: str, token: JoinToken, before: Mapping[str, object], after: Mapping[str, object]
    ) -> AuditEntry:
        return AuditEntry(
            at=self._store.time(),
            actor=actor,
            action=action,
            object_kind="token",
            object_id=token.id,
            object_name=token.name,
            before=before,
            after=after,
        )

    def _open(self, token: JoinToken) -> str:
        return self._store.sealer.open(token.secret, place_of_token(token.id)).decode()

    async def _find(self, name: str) -> JoinToken:
        return await self._store.transact(lambda transaction: _named(transaction, name))

    async def _statuses(self, tokens: Sequence[JoinToken]) -> Sequence[TokenStatus]:
        now = self._store.time()
        limited = [token.id for token in tokens if token.limit is not None]
        counts = await self._store.use_counts(limited, now) if limited else {}
        found: list[TokenStatus] = []
        for token in tokens:
            known = self._count_machines(token.id)
            uses = known if token.limit is None else counts.get(token.id, 0)
            state = token.state(now)
            if token.limit is not None and uses >= token.limit and state is TokenState.ACTIVE:
                state = TokenState.USED_UP if token.max_machines is None else TokenState.FULL
            machines = known if token.max_machines is None else uses
            found.append(TokenStatus(token=token, state=state, uses=uses, machines=machines))
        return found

    async def _given_status(self) -> TokenStatus | None:
        """The server's own token, in the form of a stored one."""
        if self._given.secret is None:
            return None
        default = await self._store.transact(lambda transaction: transaction.tokens.find(*DEFAULT_TOKEN))
        token = replace(_given(), digest=text_digest(self._given.secret), is_default=default is None)
        uses = self._count_machines(GIVEN_TOKEN)
        return TokenStatus(token=token, state=TokenState.ACTIVE, uses=uses, machines=uses, is_given=True)


def _given() -> JoinToken:
    return JoinToken(id=GIVEN_TOKEN, name=GIVEN_TOKEN, digest=b"", secret=b"", created_at=0.0, note="the server's join_token")


def _refuse_given(name: str) -> None:
    if name == GIVEN_TOKEN:
        raise SideroLinkError("the server's own token can only be changed at the server: --join-token-file, or join_token")


class _translated:
    """Translates a duplicate value to an administration error."""

    def __init__(self, made: JoinToken | None) -> None:
        self._made = made

    def __enter__(self) -> None: ...

    def __exit__(self, kind: object, error: BaseException | None, traceback: object) -> None:
        if not isinstance(error, UniqueViolationError):
            return
        match error.column:
            case TokenColumn.NAME:
                raise AlreadyExistsError("another token has this name") from None
            case TokenColumn.PROVIDER:
                raise AlreadyExistsError("another token is this provider's") from None
            case TokenColumn.DIGEST:
                raise AlreadyExistsError("another token has this text") from None


async def _named(transaction: Transaction, name: str) -> JoinToken:
    token = await transaction.tokens.find(TokenColumn.NAME, name) or await transaction.tokens.find(TokenColumn.ID, name)
    if token is None:
        raise NotFoundError(f'no token with id "{one_line(name, limit=64)}" exists')
    return token


async def _clear_default(transaction: Transaction) -> None:
    """Unset the previous default token."""
    old = await transaction.tokens.find(*DEFAULT_TOKEN)
    if old is not None:
        await transaction.tokens.put(replace(old, is_default=False))


def _shown(token: JoinToken) -> dict[str, object]:
    found = {name: getattr(token, name) for name in _SHOWN}
    return {name: dict(value) if isinstance(value, Mapping) else value for name, value in found.items()}
