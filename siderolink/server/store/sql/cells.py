"""The values of rows in the form of their columns."""

import json
from collections.abc import Callable, Mapping
from functools import cache
from ipaddress import IPv6Address
from operator import attrgetter
from types import UnionType
from typing import NamedTuple, get_args, get_type_hints

from sqlalchemy import Table

from siderolink.common.keys import PublicKey
from siderolink.server.store.audit import Principal
from siderolink.server.store.history import HistoryEntry
from siderolink.server.store.ownership import Ownership
from siderolink.server.store.rows import Claim, Machine
from siderolink.server.store.tokens import JoinToken, TokenUse

Row = Machine | Claim | JoinToken | TokenUse | Principal | Ownership | HistoryEntry

_PLAIN = {str, bytes, float, int, bool, type(None)}


def cell(value: object) -> object:
    """A field's value in its column's form."""
    if type(value) in _PLAIN:
        return value
    if isinstance(value, str):
        return str(value)  # of an enumeration
    if isinstance(value, PublicKey):
        return bytes(value)
    if isinstance(value, IPv6Address):
        return value.packed
    if isinstance(value, Mapping):
        return "{}" if not value else json.dumps(dict(value), sort_keys=True, separators=(",", ":"))
    if isinstance(value, tuple):
        return json.dumps([str(one) for one in value])
    return value


@cache
def names(table: Table) -> tuple[str, ...]:
    """The names of a table's columns, in order."""
    return tuple(column.name for column in table.columns)


class _Form(NamedTuple):
    """How a row becomes cells of its table."""

    names: tuple[str, ...]
    read: Callable[[Row], tuple[object, ...]]
    """Reads the fields that are columns, in the order of `names`."""
    converted: tuple[int, ...]
    """Positions of the fields whose types are not those of columns."""


@cache
def _form(kind: type, table: Table) -> _Form:
    columns, types = names(table), get_type_hints(kind)
    converted = (at for at, name in enumerate(columns) if not _alternatives(types[name]) <= _PLAIN)
    return _Form(columns, attrgetter(*columns), tuple(converted))


def _alternatives(annotation: type | UnionType) -> set[object]:
    return set(get_args(annotation)) if isinstance(annotation, UnionType) else {annotation}


def cells_of(row: Row, table: Table) -> dict[str, object]:
    """A row's fields in the form of its table's columns."""
    kind: type = type(row)
    columns, read, converted = _form(kind, table)
    found = list(read(row))
    for at in converted:
        found[at] = cell(found[at])
    return dict(zip(columns, found, strict=True))
