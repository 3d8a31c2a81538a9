"""`siderolink apikey`: keys for remote management of a server."""

from enum import StrEnum
from typing import Annotated

import typer

from siderolink.cli.admin.bans import Watch
from siderolink.cli.admin.commands import PAGE_SIZE, Call, all_pages, command
from siderolink.cli.admin.completion import complete_api_keys
from siderolink.cli.admin.connection import Connection
from siderolink.cli.admin.formats import (
    CHECK_EXPIRY,
    Column,
    OutputFormat,
    View,
    age,
    fields_of,
    print_one,
    read_expiry,
    to_yaml,
    until,
)
from siderolink.cli.output import show, show_message, to_json
from siderolink.common.pb.siderolink.admin.v1 import (
    ApiKey,
    ApiKeyRequest,
    ApiKeyServiceStub,
    CreateApiKeyRequest,
    ListApiKeysRequest,
)
from siderolink.common.text import one_line, timestamp

app = typer.Typer(
    help="Manage API keys, which allow remote management of the server.", no_args_is_help=True, add_completion=False
)


class RoleChoice(StrEnum):
    VIEWER = "viewer"
    OPERATOR = "operator"
    ADMIN = "admin"


Name = Annotated[str, typer.Argument(help="The key's name or id.", metavar="KEY", autocompletion=complete_api_keys)]

_KEYS = View(
    columns=(
        Column[ApiKey]("NAME", lambda key: key.name),
        Column[ApiKey]("ROLE", lambda key: key.role),
        Column[ApiKey]("STATE", lambda key: key.state),
        Column[ApiKey]("EXPIRES", lambda key: "never" if key.expires_at is None else f"in {until(key.expires_at)}"),
        Column[ApiKey]("USED", lambda key: age(key.last_used_at)),
        Column[ApiKey]("AGE", lambda key: age(key.created_at)),
        Column[ApiKey]("FORWARD", lambda key: ",".join(key.forward), is_wide=True),
        Column[ApiKey]("FROM", lambda key: key.last_source, is_wide=True),
        Column[ApiKey]("BY", lambda key: key.created_by, is_wide=True),
        Column[ApiKey]("ID", lambda key: key.id, is_wide=True),
    ),
    name=lambda key: key.name,
)


@command(app, "create", prints=True)
def create(
    call: Call,
    name: Annotated[str, typer.Argument(help="Name of the key, such as its owner's.", metavar="NAME")],
    role: Annotated[RoleChoice, typer.Option(help="Role of the key; each includes those before it.")] = RoleChoice.VIEWER,
    expires: Annotated[
        str | None,
        typer.Option(
            help="When the key expires: 24h, 7d or 2w from now, or a time such as 2026-12-31T12:00:00Z.",
            metavar="WHEN",
            show_default="never",
            callback=CHECK_EXPIRY,
        ),
    ] = None,
    forward: Annotated[
        list[str] | None,
        typer.Option(
            help="Machine, optionally with a port, that the key may forward to regardless of its role. Repeatable.",
            metavar="MACHINE[:PORT]",
        ),
    ] = None,
) -> None:
    """Create an API key and print it. It is never shown again."""
    expires_at, ttl = (None, None) if expires is None else read_expiry(expires)

    async def work(connection: Connection) -> tuple[ApiKey, str]:
        request = CreateApiKeyRequest(name=name, role=role.value, expires_at=expires_at, ttl=ttl, forward=forward or [])
        made = await connection.stub(ApiKeyServiceStub).create_api_key(request)
        return made.key or ApiKey(), made.secret

    key, secret = call.run(work)
    match call.output:
        case OutputFormat.JSON:
            show(to_json(fields_of(key) | {"secret": secret}))
        case OutputFormat.YAML:
            show(to_yaml(fields_of(key) | {"secret": secret}))
        case OutputFormat.NAME:
            show(key.name)
        case _:
            ends = "never expires" if key.expires_at is None else f"expires {timestamp(key.expires_at)}"
            show_message(f"{one_line(key.name)}: {key.role}, {ends}; the key is not shown again")
            show(secret)


@command(app, "list", prints=True)
def list_keys(call: Call, watch: Watch = False) -> None:
    """List API keys, without the keys themselves."""

    async def fetch(connection: Connection) -> list[ApiKey]:
        stub = connection.stub(ApiKeyServiceStub)
        return await all_pages(
            lambda page: stub.list_api_keys(ListApiKeysRequest(page_size=PAGE_SIZE, page_token=page)),
            lambda answer: answer.keys,
        )

    call.print_or_watch(fetch, _KEYS, watch=watch)


@command(app, "revoke", prints=True, destroys=True)
def revoke(call: Call, name: Name) -> None:
    """Revoke an API key. It stays in the list."""
    call.confirm(f"Revoke the API key {one_line(name, limit=80)}")

    async def work(connection: Connection) -> ApiKey:
        return await connection.stub(ApiKeyServiceStub).revoke_api_key(ApiKeyRequest(name=name))

    print_one(call.run(work), _KEYS, call.output)


@command(app, "delete", destroys=True)
def delete(call: Call, name: Name) -> None:
    """Revoke an API key and remove it from the list."""
    call.confirm(f"Delete the API key {one_line(name, limit=80)}")

    async def work(connection: Connection) -> ApiKey:
        return await connection.stub(ApiKeyServiceStub).delete_api_key(ApiKeyRequest(name=name))

    show(f"{one_line(call.run(work).name)} was deleted")
