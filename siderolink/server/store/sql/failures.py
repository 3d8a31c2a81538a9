"""Maps database errors to this package's errors."""

import sqlite3
from collections.abc import Iterator
from contextlib import contextmanager

from sqlalchemy.exc import DBAPIError, SQLAlchemyError

from siderolink.common.errors import StoreError, StoreFullError
from siderolink.common.text import one_line

_FULL = "database or disk is full"


@contextmanager
def translated() -> Iterator[None]:
    """Raises StoreFullError or StoreError for what the database raises; no message holds a row's values."""
    try:
        yield
    except (DBAPIError, sqlite3.Error) as error:
        reason = one_line(str(error.orig if isinstance(error, DBAPIError) else error))
        if _FULL in reason:
            raise StoreFullError("the state cannot be written: the disk is full") from error
        raise StoreError(f"the state cannot be read or written: {reason}") from error
    except SQLAlchemyError as error:
        raise StoreError(f"the state cannot be read or written: {type(error).__name__}") from error
