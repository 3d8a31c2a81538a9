"""Join tokens by gRPC."""

from siderolink.common.errors import ConfigurationError
from siderolink.common.pb.siderolink.admin import v1 as pb
from siderolink.common.selection import Selector
from siderolink.common.tasks import map_in_parts
from siderolink.common.text import one_line
from siderolink.server.admin.lists import page_of
from siderolink.server.admin.machines import MachineQuery, MachineStatus
from siderolink.server.admin.services.access import GetAdministration, actor
from siderolink.server.admin.services.machines import DIGEST_DIGITS, machine_messages, tunnel_setting
from siderolink.server.admin.tokens import Tokens, TokenStatus
from siderolink.server.admission.policy import supports_unique_tokens
from siderolink.server.store import Machine, TokenKind, TokenState

_AT_ONCE = 200
"""Tokens to read from the store before other tasks run."""


class TokenService(pb.TokenServiceBase):
    """See admin.proto."""

    def __init__(self, administration: GetAdministration) -> None:
        self._administration = administration

    @property
    def _tokens(self) -> Tokens:
        return self._administration().tokens

    async def create_token(self, message: pb.CreateTokenRequest) -> pb.CreateTokenResponse:
        made = await self._tokens.create(
            message.name,
            token=message.secret or None,
            note=message.note,
            kind=_kind(message.kind),
            provider=message.provider or None,
            expires_at=message.expires_at,
            expires_in=message.ttl,
            max_uses=message.max_uses,
            max_machines=message.max_machines,
            one_time=message.is_one_time,
            bound_uuid=message.bound_uuid or None,
            labels=message.labels,
            tunnel=tunnel_setting(message.tunnel),
            make_default=message.make_default,
            actor=actor(),
        )
        return pb.CreateTokenResponse(token=_message(made.status), secret=made.secret)

    async def list_tokens(self, message: pb.ListTokensRequest) -> pb.ListTokensResponse:
        states = [_state(text) for text in message.states]
        selector, text = Selector(message.selector), message.text.lower()
        found: list[TokenStatus] = []
        after = ""
        while part := await self._tokens.list(after=after, limit=_AT_ONCE, states=states):
            found += [status for status in part if _matches(status, text, selector)]
            after = part[-1].token.name
        page = page_of(found, lambda status: (status.token.name, status.token.id), message.page_size, message.page_token)
        tokens = await map_in_parts(_message, page.items)
        return pb.ListTokensResponse(tokens=tokens, next_page_token=page.next_page_token, total=page.total)

    async def get_token(self, message: pb.TokenRequest) -> pb.Token:
        return _message(await self._tokens.get(message.name))

    async def show_token_secret(self, message: pb.TokenRequest) -> pb.TokenSecret:
        secret = await self._tokens.show(message.name, actor=actor())
        status = await self._tokens.get(message.name)
        # machines never present a signing token itself
        url = self._administration().join_url(secret) if status.token.kind is TokenKind.PLAIN else ""
        return pb.TokenSecret(token=_message(status), secret=secret, join_url=url)

    async def update_token(self, message: pb.UpdateTokenRequest) -> pb.Token:
        changed = await self._tokens.update(
            message.name,
            new_name=message.new_name,
            note=message.note,
            tunnel=None if message.tunnel is None else tunnel_setting(message.tunnel),
            bound_uuid=message.bound_uuid,
            max_uses=message.max_uses,
            max_machines=message.max_machines,
            set_labels=message.set_labels,
            remove_labels=message.remove_labels,
            actor=actor(),
        )
        return _message(changed)

    async def revoke_token(self, message: pb.TokenRequest) -> pb.Token:
        return _message(await self._tokens.revoke(message.name, actor=actor()))

    async def reinstate_token(self, message: pb.TokenRequest) -> pb.Token:
        return _message(await self._tokens.reinstate(message.name, actor=actor()))

    async def renew_token(self, message: pb.RenewTokenRequest) -> pb.Token:
        renewed = await self._tokens.renew(message.name, expires_at=message.expires_at, expires_in=message.ttl, actor=actor())
        return _message(renewed)

    async def delete_token(self, message: pb.TokenRequest) -> pb.Token:
        return _message(await self._tokens.delete(message.name, actor=actor()))

    async def set_default_token(self, message: pb.TokenRequest) -> pb.Token:
        return _message(await self._tokens.make_default(message.name, actor=actor()))

    async def list_token_users(self, message: pb.ListTokenUsersRequest) -> pb.ListTokenUsersResponse:
        administration = self._administration()
        token = (await self._tokens.get(message.name)).token
        query = MachineQuery(token=token.id, page_size=message.page_size, page_token=message.page_token)
        page = await administration.machines.page(query)
        found = await machine_messages(administration, page.items)
        users = await map_in_parts(_user_message, zip(found, page.items, strict=True))
        return pb.ListTokenUsersResponse(users=users, next_page_token=page.next_page_token, total=page.total)


def _user_message(user: tuple[pb.Machine, MachineStatus]) -> pb.TokenUser:
    machine, status = user
    return pb.TokenUser(machine=machine, warning=_warning(status.machine))


def _warning(machine: Machine) -> str:
    if not supports_unique_tokens(machine.talos_version):
        return "Installed Talos version does not support unique node tokens"
    return "" if machine.bound_digest is not None else "Does not have the node unique token"


def _kind(text: str) -> TokenKind:
    try:
        return TokenKind(text or TokenKind.PLAIN)
    except ValueError:
        raise ConfigurationError(f"the kind of a token must be plain, v1 or v2, not {one_line(text, limit=32)!r}") from None


def _state(text: str) -> TokenState:
    try:
        return TokenState(text)
    except ValueError:
        known = ", ".join(str(state) for state in TokenState)
        raise ConfigurationError(f"the state of a token must be {known}, not {one_line(text, limit=32)!r}") from None


def _matches(status: TokenStatus, text: str, selector: Selector) -> bool:
    token = status.token
    return (not text or text in token.name.lower() or text in token.note.lower()) and selector.matches(token.labels)


def _message(status: TokenStatus) -> pb.Token:
    token = status.token
    return pb.Token(
        id=token.id,
        name=token.name,
        note=token.note,
        kind=str(token.kind),
        provider=token.provider or "",
        state=str(status.state),
        is_default=token.is_default,
        is_given=status.is_given,
        created_at=token.created_at or None,
        created_by=token.created_by,
        expires_at=token.expires_at,
        revoked_at=token.revoked_at,
        max_uses=token.max_uses,
        uses=status.uses,
        max_machines=token.max_machines,
        machines=status.machines,
        bound_uuid=token.bound_uuid or "",
        labels=dict(token.labels),
        tunnel=str(token.tunnel),
        digest=token.digest.hex()[:DIGEST_DIGITS],
    )
