"""`siderolink token`: the join tokens of a server."""

from collections.abc import Awaitable, Callable
from enum import StrEnum
from pathlib import Path
from typing import Annotated

import typer

from siderolink.cli.admin.bans import Watch
from siderolink.cli.admin.commands import PAGE_SIZE, Call, all_pages, command
from siderolink.cli.admin.completion import complete_tokens
from siderolink.cli.admin.connection import Connection
from siderolink.cli.admin.formats import (
    CHECK_EXPIRY,
    CHECK_LABELS,
    Column,
    OutputFormat,
    View,
    age,
    fields_of,
    labels,
    print_list,
    print_one,
    read_expiry,
    read_labels,
    to_yaml,
    until,
)
from siderolink.cli.admin.machines import Selector, TunnelChoice
from siderolink.cli.output import show, show_message, to_json
from siderolink.cli.secret import read_secret
from siderolink.common.errors import ConfigurationError
from siderolink.common.pb.siderolink.admin.v1 import (
    CreateTokenRequest,
    ListTokensRequest,
    ListTokenUsersRequest,
    RenewTokenRequest,
    Token,
    TokenRequest,
    TokenServiceStub,
    TokenUser,
    UpdateTokenRequest,
)
from siderolink.common.text import one_line, timestamp

app = typer.Typer(help="Manage join tokens.", no_args_is_help=True, add_completion=False)


class TokenKindChoice(StrEnum):
    PLAIN = "plain"
    V1 = "v1"
    V2 = "v2"


class TokenStateChoice(StrEnum):
    ACTIVE = "active"
    REVOKED = "revoked"
    EXPIRED = "expired"
    USED_UP = "used-up"
    FULL = "full"


Name = Annotated[str, typer.Argument(help="The token's name or id.", metavar="TOKEN", autocompletion=complete_tokens)]
Expires = Annotated[
    str | None,
    typer.Option(
        help="When it stops admitting machines: 90s, 30m, 24h, 7d or 2w from now, or a time such as 2026-12-31T12:00:00Z.",
        metavar="WHEN",
        show_default="never",
        callback=CHECK_EXPIRY,
    ),
]
Labels = Annotated[
    list[str] | None,
    typer.Option(
        "--label",
        help="Label for the machines that join by it. Repeatable.",
        metavar="KEY=VALUE",
        callback=CHECK_LABELS,
    ),
]
BoundUuid = Annotated[
    str | None, typer.Option("--uuid", help="Only the machine with this UUID may join by it.", metavar="UUID")
]
MachinesAtATime = Annotated[
    int | None,
    typer.Option(
        help="How many machines that joined by it may be known at a time; not together with --uses.",
        min=1,
        metavar="COUNT",
        show_default="any number",
    ),
]
Note = Annotated[str | None, typer.Option(help="A note about the token.", metavar="TEXT")]


def uses_of(token: Token) -> str:
    """Number of uses and their limit."""
    return str(token.uses) if token.max_uses is None else f"{token.uses}/{token.max_uses}"


def machines_of(token: Token) -> str:
    """Number of known machines and their limit."""
    return str(token.machines) if token.max_machines is None else f"{token.machines}/{token.max_machines}"


TOKENS = View(
    columns=(
        Column[Token]("NAME", lambda token: token.name),
        Column[Token]("STATE", lambda token: token.state),
        Column[Token]("DEFAULT", lambda token: "yes" if token.is_default else ""),
        Column[Token]("USES", uses_of),
        Column[Token]("MACHINES", machines_of),
        Column[Token]("EXPIRES", lambda token: "never" if token.expires_at is None else f"in {until(token.expires_at)}"),
        Column[Token]("AGE", lambda token: age(token.created_at)),
        Column[Token]("NOTE", lambda token: token.note),
        Column[Token]("KIND", lambda token: token.kind, is_wide=True),
        Column[Token]("PROVIDER", lambda token: token.provider, is_wide=True),
        Column[Token]("UUID", lambda token: token.bound_uuid, is_wide=True),
        Column[Token]("LABELS", lambda token: labels(token.labels), is_wide=True),
        Column[Token]("TUNNEL", lambda token: token.tunnel, is_wide=True),
        Column[Token]("DIGEST", lambda token: token.digest, is_wide=True),
        Column[Token]("BY", lambda token: token.created_by, is_wide=True),
        Column[Token]("ID", lambda token: token.id, is_wide=True),
    ),
    name=lambda token: token.name,
)


@command(app, "create", prints=True)
def create(
    call: Call,
    name: Annotated[str, typer.Argument(help="The token's name.", metavar="NAME")],
    expires: Expires = None,
    uses: Annotated[
        int | None, typer.Option(help="How many machines may join by it.", min=1, metavar="COUNT", show_default="any number")
    ] = None,
    one_time: Annotated[bool, typer.Option("--one-time", help="The same as --uses 1.")] = False,
    machines: MachinesAtATime = None,
    uuid: BoundUuid = None,
    label: Labels = None,
    tunnel: Annotated[TunnelChoice | None, typer.Option(help="Whether its machines use the gRPC tunnel.")] = None,
    note: Note = None,
    kind: Annotated[
        TokenKindChoice, typer.Option(help="How machines present it: in plain, or as a token signed with it (v1, v2).")
    ] = TokenKindChoice.PLAIN,
    provider: Annotated[
        str, typer.Option(help="The provider whose signed v2 tokens it verifies.", metavar="ID", show_default="none")
    ] = "",
    secret_file: Annotated[
        Path | None, typer.Option(help="File that contains the token itself.", metavar="FILE", show_default="a random one")
    ] = None,
    default: Annotated[bool, typer.Option("--default", help="Make it the default token.")] = False,
) -> None:
    """Create a join token and print it. Later, only `token show --secret` shows it."""
    if uses is not None and one_time:
        raise ConfigurationError("give --uses or --one-time, not both")
    if machines is not None and (uses is not None or one_time):
        raise ConfigurationError("give --machines or a limit of uses, not both")
    expires_at, ttl = (None, None) if expires is None else read_expiry(expires)
    setting, removing = read_labels(label or ())
    if removing:
        raise ConfigurationError("a new token has no labels to remove: write --label key=value")
    request = CreateTokenRequest(
        name=name,
        note=note or "",
        kind=kind.value,
        provider=provider,
        secret="" if secret_file is None else read_secret("token", None, secret_file) or "",
        expires_at=expires_at,
        ttl=ttl,
        max_uses=uses,
        max_machines=machines,
        is_one_time=one_time,
        bound_uuid=uuid or "",
        labels=setting,
        tunnel="" if tunnel is None else tunnel.value,
        make_default=default,
    )

    async def work(connection: Connection) -> tuple[Token, str]:
        made = await connection.stub(TokenServiceStub).create_token(request)
        return made.token or Token(), made.secret

    token, secret = call.run(work)
    _print_secret(call, token, secret)


def _print_secret(call: Call, token: Token, secret: str, join_url: str = "") -> None:
    """Print only the token on standard output, for `TOKEN=$(siderolink token create x)`, and details on standard error."""
    found = {"secret": secret} | ({"join_url": join_url} if join_url else {})
    match call.output:
        case OutputFormat.JSON:
            show(to_json(fields_of(token) | found))
        case OutputFormat.YAML:
            show(to_yaml(fields_of(token) | found))
        case OutputFormat.NAME:
            show(token.name)
        case _:
            ends = "never expires" if token.expires_at is None else f"expires {timestamp(token.expires_at)}"
            limit = f"{uses_of(token)} uses" if token.max_machines is None else f"{machines_of(token)} machines"
            show_message(f"{one_line(token.name)}: {token.state}, {limit}, {ends}")
            if join_url:
                show_message(f"machines join at {one_line(join_url)}")
            show(secret)


@command(app, "list", prints=True)
def list_tokens(
    call: Call,
    state: Annotated[list[TokenStateChoice] | None, typer.Option(help="Only in this state. Repeatable.")] = None,
    name: Annotated[str, typer.Option(help="Only with this text in name or note.", metavar="TEXT")] = "",
    selector: Selector = "",
    watch: Watch = False,
) -> None:
    """List join tokens, without the tokens themselves."""

    async def fetch(connection: Connection) -> list[Token]:
        stub = connection.stub(TokenServiceStub)
        return await all_pages(
            lambda page: stub.list_tokens(
                ListTokensRequest(
                    page_size=PAGE_SIZE,
                    page_token=page,
                    states=[one.value.replace("-", " ") for one in state or ()],
                    text=name,
                    selector=selector,
                )
            ),
            lambda answer: answer.tokens,
        )

    call.print_or_watch(fetch, TOKENS, watch=watch)


@command(app, "show", prints=True)
def show_token(
    call: Call,
    name: Name,
    secret: Annotated[bool, typer.Option("--secret", help="Also print the token itself. The audit records this.")] = False,
    users: Annotated[bool, typer.Option("--users", help="List the machines that last joined by it instead.")] = False,
) -> None:
    """Show one join token; the token itself only with --secret."""
    if users:
        found = call.run(lambda connection: _users(connection, name))
        print_list(found, _USERS, call.output)
    elif secret:

        async def ask(connection: Connection) -> tuple[Token, str, str]:
            told = await connection.stub(TokenServiceStub).show_token_secret(TokenRequest(name=name))
            return told.token or Token(), told.secret, told.join_url

        _print_secret(call, *call.run(ask))
    else:
        _print_after(call, name, lambda stub, request: stub.get_token(request))


_USERS = View(
    columns=(
        Column[TokenUser]("MACHINE", lambda user: "" if user.machine is None else user.machine.name),
        Column[TokenUser]("UUID", lambda user: "" if user.machine is None else user.machine.node_uuid),
        Column[TokenUser]("WITHOUT IT", lambda user: user.warning or "joins by its unique token"),
    ),
    name=lambda user: "" if user.machine is None else user.machine.id,
)


async def _users(connection: Connection, name: str) -> list[TokenUser]:
    """The machines that last joined by a token."""
    stub = connection.stub(TokenServiceStub)
    return await all_pages(
        lambda page: stub.list_token_users(ListTokenUsersRequest(name=name, page_size=PAGE_SIZE, page_token=page)),
        lambda answer: answer.users,
    )


def _print_after(call: Call, name: str, ask: Callable[[TokenServiceStub, TokenRequest], Awaitable[Token]]) -> None:
    """Change a token and print the result."""

    async def work(connection: Connection) -> Token:
        return await ask(connection.stub(TokenServiceStub), TokenRequest(name=name))

    print_one(call.run(work), TOKENS, call.output)


def _confirm_end(call: Call, name: str, what: str) -> None:
    """Ask for confirmation, and list the machines that could not return without the token."""
    if not call.is_confirmed:
        stranded = [user for user in call.run(lambda connection: _users(connection, name)) if user.warning]
        for user in stranded[:20]:
            machine = "" if user.machine is None else f"{user.machine.name} ({user.machine.node_uuid})"
            show_message(one_line(f"{machine}: {user.warning}"))
        if len(stranded) > 20:
            show_message(f"and {len(stranded) - 20} more")
    call.confirm(f"{what} {one_line(name, limit=80)}")


@command(app, "revoke", prints=True, destroys=True)
def revoke(call: Call, name: Name) -> None:
    """Revoke a token: it admits no more machines. Links stay; machines with a bound unique token can rejoin without it."""
    _confirm_end(call, name, "Revoke the token")
    _print_after(call, name, lambda stub, request: stub.revoke_token(request))


@command(app, "reinstate", prints=True)
def reinstate(call: Call, name: Name) -> None:
    """Undo a revocation."""
    _print_after(call, name, lambda stub, request: stub.reinstate_token(request))


@command(app, "renew", prints=True)
def renew(call: Call, name: Name, expires: Expires = None) -> None:
    """Set when a token expires; without --expires, never. A revoked token stays revoked."""
    expires_at, ttl = (None, None) if expires is None else read_expiry(expires)

    async def work(connection: Connection) -> Token:
        request = RenewTokenRequest(name=name, expires_at=expires_at, ttl=ttl)
        return await connection.stub(TokenServiceStub).renew_token(request)

    print_one(call.run(work), TOKENS, call.output)


@command(app, "update", prints=True)
def update(
    call: Call,
    name: Name,
    new_name: Annotated[str | None, typer.Option("--name", help="Another name.", metavar="NAME")] = None,
    note: Note = None,
    uses: Annotated[
        int | None, typer.Option(help="How many machines may join by it; 0 for any number.", min=0, metavar="COUNT")
    ] = None,
    machines: Annotated[
        int | None,
        typer.Option(
            help="How many machines that joined by it may be known at a time; 0 for any number.", min=0, metavar="COUNT"
        ),
    ] = None,
    uuid: BoundUuid = None,
    label: Annotated[
        list[str] | None,
        typer.Option(help="key=value sets a label, key- removes one. Repeatable.", metavar="LABEL", callback=CHECK_LABELS),
    ] = None,
    tunnel: Annotated[TunnelChoice | None, typer.Option(help="Whether its machines use the gRPC tunnel.")] = None,
) -> None:
    """Change a token's name, note, labels and limits."""
    setting, removing = read_labels(label or ())
    request = UpdateTokenRequest(
        name=name,
        new_name=new_name,
        note=note,
        tunnel=None if tunnel is None else tunnel.value,
        bound_uuid=uuid,
        max_uses=uses,
        max_machines=machines,
        set_labels=setting,
        remove_labels=removing,
    )

    async def work(connection: Connection) -> Token:
        return await connection.stub(TokenServiceStub).update_token(request)

    print_one(call.run(work), TOKENS, call.output)


@command(app, "delete", destroys=True)
def delete(call: Call, name: Name) -> None:
    """Delete a token. The default one cannot be deleted."""
    _confirm_end(call, name, "Delete the token")

    async def work(connection: Connection) -> Token:
        return await connection.stub(TokenServiceStub).delete_token(TokenRequest(name=name))

    show(f"{one_line(call.run(work).name)} was deleted")


@command(app, "default", prints=True)
def default(call: Call, name: Name) -> None:
    """Make a token the default one, which join URLs contain and which verifies v1 tokens."""
    _print_after(call, name, lambda stub, request: stub.set_default_token(request))
