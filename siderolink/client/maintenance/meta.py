"""META, the key-value store that a server writes on its machine."""

import base64
import binascii
import json
from collections.abc import Mapping
from pathlib import Path

import anyio
from grpclib import GRPCError, Status

from siderolink.client.maintenance.resources import specs
from siderolink.client.maintenance.resources.definitions import META_KEY
from siderolink.client.maintenance.resources.store import ResourceStore
from siderolink.common.errors import ConfigurationError
from siderolink.common.private_files import read_private, replace_private
from siderolink.common.tasks import in_thread

UUID_KEY, UNIQUE_TOKEN_KEY = 15, 16
"""The keys by which a server gives a machine its identity."""
MAX_BYTES = 250 * 1024
"""Size of all values together with `_KEY_BYTES` per key, about as on existing machines."""
_KEY_BYTES = 8
_MAX_FILE = 512 * 1024
_FORMAT = 1


class MetaStore:
    """META's values, shown as MetaKey resources and kept in a file if there is one."""

    def __init__(self, resources: ResourceStore, path: Path | None = None) -> None:
        """Raises ConfigurationError if the file exists and cannot be read."""
        self._resources = resources
        self._path = path
        self._writing = anyio.Lock()
        self._values = {} if path is None else _load(path)
        self._show()

    @property
    def values(self) -> Mapping[int, bytes]:
        return self._values

    async def write(self, key: int, value: bytes) -> None:
        """Set a key. Raises GRPCError if there is no room or the file cannot be written; then nothing changed."""
        async with self._writing:
            values = self._values | {key: bytes(value)}
            if sum(len(found) + _KEY_BYTES for found in values.values()) > MAX_BYTES:
                raise GRPCError(Status.RESOURCE_EXHAUSTED, "meta write failed")
            await self._replace(values)

    async def delete(self, key: int) -> bool:
        """Remove a key; False if it does not exist. Raises GRPCError if the file cannot be written."""
        async with self._writing:
            if key not in self._values:
                return False
            await self._replace({other: value for other, value in self._values.items() if other != key})
            return True

    async def set(self, key: int, value: bytes | None) -> None:
        """Set a key, or remove it. Raises GRPCError like `write`."""
        await (self.delete(key) if value is None else self.write(key, value))

    async def _replace(self, values: dict[int, bytes]) -> None:
        if self._path is not None:
            encoded = {str(key): base64.b64encode(value).decode() for key, value in sorted(values.items())}
            data = json.dumps({"version": _FORMAT, "values": encoded}).encode()
            try:
                await in_thread(replace_private, self._path, data)
            except OSError as error:
                text = f"meta write failed: {self._path.name} cannot be written: {error.strerror}"
                raise GRPCError(Status.INTERNAL, text) from error
        self._values = values
        self._show()

    def _show(self) -> None:
        shown = {f"0x{key:02x}": specs.meta_key(value) for key, value in self._values.items()}
        self._resources.replace(META_KEY, shown)


def _load(path: Path) -> dict[int, bytes]:
    data = read_private(path, _MAX_FILE)
    if data is None:
        return {}
    try:
        found = json.loads(data)
        if found["version"] != _FORMAT:
            raise ConfigurationError(f"{path} was written by a newer release and cannot be read by this one")
        values = {int(key): base64.b64decode(value, validate=True) for key, value in found["values"].items()}
    except ConfigurationError:
        raise
    except (ValueError, KeyError, TypeError, AttributeError, binascii.Error):
        raise ConfigurationError(f"{path} is not a META file; use another, or remove it") from None
    if not all(0 <= key <= 255 for key in values) or sum(map(len, values.values())) > MAX_BYTES:
        raise ConfigurationError(f"{path} has keys or values that META does not allow; use another file, or remove it")
    return values
