"""Where a command finds a machine's settings, and what to do when they change."""

from collections.abc import Callable, Coroutine
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any, TypeVar

import anyio

from siderolink.cli.logs import say
from siderolink.cli.secret import read_secret
from siderolink.client.config import MachineSettings, Setting, Sources, merge
from siderolink.client.link.verdict import Verdict
from siderolink.common.errors import ConfigurationError
from siderolink.common.join_url import JoinURL
from siderolink.common.tasks import background_tasks

T = TypeVar("T")

HOST = Path("host")
"""In place of a file: the kernel command line of this host."""


@dataclass(frozen=True, slots=True, kw_only=True)
class SettingsOptions:
    """As given on the command line."""

    url: str | None = field(repr=False)
    config: tuple[Path, ...] = ()
    kernel_cmdline: Path | None = None
    uuid: str | None = None
    unique_token: str | None = field(default=None, repr=False)
    unique_token_file: Path | None = None
    join_token_file: Path | None = None


class SettingsReader:
    """Reads the settings that the options tell of; a URL alone keeps the host's own out."""

    def __init__(self, options: SettingsOptions) -> None:
        """Raises ConfigurationError for a URL or secret that cannot be used."""
        unique_token = read_secret("unique-token", options.unique_token, options.unique_token_file)
        url = None if options.url is None else JoinURL.parse(options.url)
        if url is not None and url.join_token is not None and options.join_token_file is not None:
            raise ConfigurationError("give the join token either in the URL or by --join-token-file, not both")
        self._join_token = read_secret("join-token", None, options.join_token_file)
        from_kernel = options.kernel_cmdline
        self.sources = Sources(
            explicit=MachineSettings(
                url=None if url is None else Setting(url, "argument"),
                unique_token=None if unique_token is None else Setting(unique_token, "argument"),
                uuid=None if options.uuid is None else Setting(options.uuid, "argument"),
            ),
            documents=options.config,
            kernel_cmdline=None if from_kernel == HOST else from_kernel,
            host_documents=url is None,
            host_kernel=url is None or from_kernel is not None,
        )

    def read(self) -> MachineSettings:
        """All that was found, merged, with the join token of its own where the URL has none. Raises ConfigurationError."""
        settings = self.sources.read()
        if self._join_token is None or settings.url is None or settings.url.value.join_token is not None:
            return settings
        return replace(settings, url=replace(settings.url, value=replace(settings.url.value, join_token=self._join_token)))


class FollowedSettings:
    """Settings that are read again whenever their files change."""

    def __init__(self, reader: SettingsReader) -> None:
        """Reads them a first time. Raises ConfigurationError."""
        self._reader = reader
        self._applied = MachineSettings()
        self._meta = MachineSettings()
        self._refusal: str | None = None
        self._told: tuple[str, ...] = ()
        self._is_watched = False
        self._changed = anyio.Event()
        self.current = reader.read()

    @property
    def has_url_argument(self) -> bool:
        """Whether a join URL was given that is stronger than all that is found or applied."""
        return self._reader.sources.explicit.url is not None

    async def apply(self, documents: MachineSettings) -> Verdict:
        """Use these documents from now on: they override what was found, and arguments override them.

        Where they change the link, it is tried first, for up to `VERDICT_TIMEOUT` seconds; if it does not work nothing changes.
        """
        self._applied = documents
        self._read_again()
        return Verdict(outcome="applied")

    @property
    def meta(self) -> MachineSettings:
        """The UUID and the unique token that the server has given this machine; they override all others."""
        return self._meta

    async def write_meta(self, meta: MachineSettings) -> Verdict:
        """Use this UUID and unique token from now on; None gives way to the machine's own.

        Answers within `PROMPT_TIMEOUT` seconds: a server may hold the new Provision call until its META write has returned. A
        change that is refused by then is dropped; one that is pending is kept and retried.
        """
        self._meta = meta
        self._read_again()
        return Verdict(outcome="applied")

    async def watch(self) -> None:
        """Never returns. Files that cannot be read or used are told of; what was in force stays in force."""
        await self._reader.sources.watch(self._read_files_again)

    async def follow(self, part: Callable[[MachineSettings], T], use: Callable[[T], Coroutine[Any, Any, None]]) -> None:
        """Run `use` with a part of the settings; whenever that part changes, cancel it and run it anew. Never returns."""
        while True:
            value = part(self.current)
            async with background_tasks() as tasks:
                tasks.start_soon(use, value)
                while part(self.current) == value:
                    await self._changed.wait()

    def _read_files_again(self) -> None:
        """The first call comes when the watch begins, and says nothing that was said before."""
        self._read_again()
        if self._is_watched or self.current.problems != self._told:
            self.tell_problems()
        self._is_watched = True

    def tell_problems(self) -> None:
        """Say what had to be ignored, a line each."""
        for problem in self.current.problems:
            say("setting ignored", problem)
        self._told = self.current.problems

    def _read_again(self) -> None:
        try:
            found = self._reader.read()
            explicit = self._reader.sources.explicit
            explicit = replace(
                explicit,
                uuid=self._meta.uuid or explicit.uuid,
                unique_token=self._meta.unique_token or explicit.unique_token,
            )
            settings, refusal = merge(explicit, self._applied, found).keeping(self.current), None
        except ConfigurationError as error:
            settings, refusal = self.current, str(error)
        if refusal is not None and refusal != self._refusal:
            say("settings refused", f"{refusal}; what was in force stays")
        self._refusal = refusal
        if settings != self.current:
            self.current = settings
            say("settings", "changed")
            self._changed.set()
            self._changed = anyio.Event()
