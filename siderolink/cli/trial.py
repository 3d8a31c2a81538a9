"""Stores the working settings while others are being tested, so that a crash during the test returns to the old ones.

Files and META already contain the new settings when their test begins; a restart alone would use only those.
"""

import hashlib
import json
import logging
from dataclasses import dataclass, field
from pathlib import Path

from siderolink.common.errors import SideroLinkError
from siderolink.common.join_url import JoinURL
from siderolink.common.private_files import read_private, replace_private
from siderolink.common.tasks import in_thread

log = logging.getLogger("siderolink")

_LARGEST_FILE = 1 << 20
_FORMAT = 1


@dataclass(frozen=True, slots=True, kw_only=True)
class JoinSettings:
    """All settings that affect the link."""

    url: JoinURL
    uuid: str
    unique_token: str = field(repr=False)
    roots: str | None = field(default=None, repr=False)
    """Trusted roots (PEM), in addition to the system's."""

    def encode(self) -> bytes:
        """Encode as JSON, including secrets."""
        found = {"url": self.url.encode(), "uuid": self.uuid, "unique_token": self.unique_token, "roots": self.roots}
        return json.dumps({"version": _FORMAT, **found}).encode()

    @classmethod
    def decode(cls, data: bytes) -> "JoinSettings | None":
        """None for data that this release's `encode` does not write."""
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
    """The note of a running test: a private file named after the new settings, containing the old ones."""

    def __init__(self, folder: Path | None, machine: str) -> None:
        """`machine` distinguishes machines that share a folder.

        Without a folder nothing is stored, and after a crash the contents of files and META apply.
        """
        self._folder = folder
        self._prefix = f"trial-{_digest(machine.encode())[:12]}-"
        self._noted: JoinSettings | None = None

    async def begin(self, new: JoinSettings, old: JoinSettings) -> None:
        """Note that `new` is about to be tested alongside `old`. A failure to write the note is logged."""
        if self._folder is None or self._noted == new:
            return
        await self.end()
        try:
            await in_thread(_write, self._file(self._folder, new), old.encode())
        except OSError as error:
            log.warning("cannot store the working settings in %s during a trial: %s", self._folder, error.strerror or error)
            return
        self._noted = new

    async def end(self) -> None:
        """The test is over: the link uses the new settings, or they were withdrawn."""
        self._noted = None
        if self._folder is None:
            return
        try:
            await in_thread(_remove, self._folder, self._prefix)
        except OSError as error:
            log.warning("cannot remove the notes of trials in %s: %s", self._folder, error.strerror or error)

    async def interrupted(self, new: JoinSettings) -> JoinSettings | None:
        """The settings that worked before an interrupted test of `new`; None if there was none."""
        if self._folder is None:
            return None
        try:
            data = await in_thread(read_private, self._file(self._folder, new), _LARGEST_FILE)
        except SideroLinkError as error:
            log.warning("lost the settings from before an interrupted trial: %s", error)
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
    replace_private(path, data)


def _remove(folder: Path, prefix: str) -> None:
    for path in folder.glob(f"{prefix}*.json"):
        path.unlink(missing_ok=True)
