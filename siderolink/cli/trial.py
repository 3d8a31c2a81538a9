"""Remembers the settings that work while others are being tried, so that a crash meanwhile comes back with the old ones.

Files and META hold the new settings already when their trial begins; a restart would join by them alone.
"""

import hashlib
import json
import logging
from dataclasses import dataclass, field
from pathlib import Path

import anyio.to_thread

from siderolink.client.maintenance.meta import read_private, write_private
from siderolink.common.errors import SideroLinkError
from siderolink.common.join_url import JoinURL

log = logging.getLogger("siderolink")

_LARGEST_FILE = 1 << 20
_FORMAT = 1


@dataclass(frozen=True, slots=True, kw_only=True)
class JoinSettings:
    """Everything in the settings that decides about the link."""

    url: JoinURL
    uuid: str
    unique_token: str = field(repr=False)
    roots: str | None = field(default=None, repr=False)
    """Trusted roots (PEM), besides the system's."""

    def encode(self) -> bytes:
        """As JSON, with the secrets."""
        found = {"url": self.url.encode(), "uuid": self.uuid, "unique_token": self.unique_token, "roots": self.roots}
        return json.dumps({"version": _FORMAT, **found}).encode()

    @classmethod
    def decode(cls, data: bytes) -> "JoinSettings | None":
        """None for what `encode` of this release does not write."""
        try:
            found = json.loads(data)
            texts = {name: str(found[name]) for name in ("url", "uuid", "unique_token")}
            roots = None if found["roots"] is None else str(found["roots"])
            if found["version"] != _FORMAT:
                return None
            return cls(url=JoinURL.parse(texts.pop("url")), roots=roots, **texts)
        except (ValueError, KeyError, TypeError, RecursionError, SideroLinkError):
            return None


class SettingsTrial:
    """The note of a running trial: a private file that is named after the new settings and holds the old ones."""

    def __init__(self, folder: Path | None, machine: str) -> None:
        """`machine` tells the machines apart that share a folder.

        Without a folder nothing is kept, and a crash comes back with whatever files and META hold.
        """
        self._folder = folder
        self._prefix = f"trial-{_digest(machine.encode())[:12]}-"
        self._noted: JoinSettings | None = None

    async def begin(self, new: JoinSettings, old: JoinSettings) -> None:
        """Note that `new` is about to be tried beside `old`. A note that cannot be written is logged, and missing."""
        if self._folder is None or self._noted == new:
            return
        await self.end()
        try:
            await anyio.to_thread.run_sync(_write, self._file(self._folder, new), old.encode())
        except OSError as error:
            log.warning("the settings that work cannot be kept in %s during a trial: %s", self._folder, error.strerror or error)
            return
        self._noted = new

    async def end(self) -> None:
        """The trial is over: the link runs by the new settings, or nobody wants them any more."""
        self._noted = None
        if self._folder is None:
            return
        try:
            await anyio.to_thread.run_sync(_remove, self._folder, self._prefix)
        except OSError as error:
            log.warning("notes of trials in %s cannot be removed: %s", self._folder, error.strerror or error)

    async def interrupted(self, new: JoinSettings) -> JoinSettings | None:
        """The settings that worked when a trial of `new` was interrupted; None if none was."""
        if self._folder is None:
            return None
        try:
            data = await anyio.to_thread.run_sync(read_private, self._file(self._folder, new), _LARGEST_FILE)
        except SideroLinkError as error:
            log.warning("the settings before an interrupted trial are lost: %s", error)
            return None
        old = None if data is None else JoinSettings.decode(data)
        if old is not None:
            self._noted = new
        return old

    def _file(self, folder: Path, new: JoinSettings) -> Path:
        return folder / f"{self._prefix}{_digest(new.encode())}.json"


def _digest(data: bytes) -> str:
    return hashlib.sha256(data).hexdigest()[:32]


def _write(path: Path, data: bytes) -> None:
    path.parent.mkdir(mode=0o700, parents=True, exist_ok=True)
    write_private(path, data)


def _remove(folder: Path, prefix: str) -> None:
    for path in folder.glob(f"{prefix}*.json"):
        path.unlink(missing_ok=True)
