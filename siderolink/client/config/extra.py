"""Imports the packages of the `config` extra when they are first needed."""

from collections.abc import Iterator
from contextlib import contextmanager

from siderolink.common.errors import ConfigurationError

_BROUGHT = frozenset({"pydantic", "pydantic_core", "watchfiles", "yaml"})


@contextmanager
def needing_extra() -> Iterator[None]:
    """Wraps an import and turns a missing package into a clear error."""
    try:
        yield
    except ModuleNotFoundError as error:
        if error.name not in _BROUGHT:
            raise
        raise ConfigurationError(f"configuration documents need {error.name}: pip install 'siderolink[config]'") from None
