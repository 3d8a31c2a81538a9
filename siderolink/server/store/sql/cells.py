"""The values of rows in the form of their columns."""

import json
from collections.abc import Callable, Mapping
from functools import cache
from ipaddress import IPv6Address
from operator import attrgetter

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


@cache
def _reader(table: Table) -> Callable[[Row], tuple[object, ...]]:
    """Reads the fields of a row that are its table's columns."""
    return attrgetter(*names(table))


def cells_of(row: Row, table: Table) -> dict[str, object]:
    """A row's fields in the form of its table's columns."""
    found = [value if type(value) in _PLAIN else cell(value) for value in _reader(table)(row)]
    return dict(zip(names(table), found, strict=True))
