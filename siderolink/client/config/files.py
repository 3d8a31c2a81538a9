"""Reading files that hold settings."""

from dataclasses import dataclass, field
from pathlib import Path

from siderolink.common.errors import ConfigurationError


def read_up_to(path: Path, limit: int) -> bytes:
    """Read a file up to a limit. Raises ConfigurationError."""
    try:
        with path.open("rb") as file:
            return file.read(limit)
    except OSError as error:
        raise ConfigurationError(f"{path} cannot be read: {error.strerror}") from None


@dataclass(frozen=True, slots=True)
class Reading:
    """Reads files. The contents of pipes, which can be read only once, are remembered."""

    _kept: dict[Path, bytes] = field(default_factory=dict)

    def read(self, path: Path, limit: int) -> bytes:
        """See `read_up_to`."""
        if path in self._kept:
            return self._kept[path]
        is_kept = path.exists() and not path.is_file() and not path.is_dir()
        data = read_up_to(path, limit)
        if is_kept:
            self._kept[path] = data
        return data
