"""What the `config` extra brings is imported when first needed."""

from collections.abc import Iterator
from contextlib import contextmanager

from siderolink.common.errors import ConfigurationError

_BROUGHT = frozenset({"pydantic", "pydantic_core", "watchfiles", "yaml"})


@contextmanager
def needing_extra() -> Iterator[None]:
    """Around an import: what is missing is one clear line."""
    try:
        yield
    except ModuleNotFoundError as error:
        if error.name not in _BROUGHT:
            raise
        raise ConfigurationError(f"configuration documents need {error.name}: pip install 'siderolink[config]'") from None
