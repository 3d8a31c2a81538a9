"""A machine's settings for a command: their sources, and how changes are applied."""

import logging
from collections.abc import Callable, Coroutine
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any, Protocol, TypeVar

import anyio

from siderolink.cli.logs import log_event
from siderolink.cli.secret import read_secret
from siderolink.client.config import MachineSettings, Setting, Sources, merge
from siderolink.client.link.identity import machine_identity
from siderolink.client.link.supervisor import PROMPT_TIMEOUT, VERDICT_TIMEOUT, Verdict
from siderolink.client.maintenance.dispatch import caller_waits
from siderolink.common.backoff import Backoff
from siderolink.common.errors import ConfigurationError, SideroLinkError
from siderolink.common.join_url import JoinURL
from siderolink.common.tasks import background_tasks

T = TypeVar("T")
log = logging.getLogger("siderolink")

_ANSWER_SECONDS = 2.0
"""Time reserved for a result to reach its caller before the caller's deadline."""
HOST = Path("host")
"""Selects this host's kernel command line instead of a file."""


@dataclass(frozen=True, slots=True, kw_only=True)
class SettingsOptions:
    """Options as given on the command line."""

    url: str | None = field(repr=False)
    config: tuple[Path, ...] = ()
    kernel_cmdline: Path | None = None
    uuid: str | None = None
    unique_token: str | None = field(default=None, repr=False)
    unique_token_file: Path | None = None
    join_token_file: Path | None = None


class SettingsReader:
    """Reads the settings that the options select. With only a URL, the host's own settings are not read."""

    def __init__(self, options: SettingsOptions) -> None:
        """Raises ConfigurationError for an invalid URL or secret."""
        unique_token = read_secret("unique-token", options.unique_token, options.unique_token_file)
        url = None if options.url is None else JoinURL.parse(options.url)
        if url is not None and url.join_token is not None and options.join_token_file is not None:
            raise ConfigurationError("give the join token either in the URL or with --join-token-file, not both")
        self._join_token = read_secret("join-token", None, options.join_token_file)
        from_kernel = options.kernel_cmdline
        self.sources = Sources(
            explicit=MachineSettings(
                url=None if url is None else Setting(url, "argument"),
                unique_token=None if unique_token is None else Setting(unique_token, "argument"),
                uuid=None if options.uuid is None else Setting(machine_identity(options.uuid), "argument"),
            ),
            documents=options.config,
            kernel_cmdline=None if from_kernel == HOST else from_kernel,
            host_documents=url is None,
            host_kernel=url is None or from_kernel is not None,
        )

    def read(self) -> MachineSettings:
        """All settings found, merged; a join token from a file completes a URL without one. Raises ConfigurationError."""
        settings = self.sources.read()
        if self._join_token is None or settings.url is None or settings.url.value.join_token is not None:
            return settings
        return replace(settings, url=replace(settings.url, value=replace(settings.url.value, join_token=self._join_token)))


class LinkOfSettings(Protocol):
    """The link that uses the settings."""

    async def try_settings(self, settings: MachineSettings, *, timeout: float, keep: bool) -> Verdict:
        """Test their effect on the link and adopt them if they work; see `LinkSupervisor.apply`."""

    async def note_trial(self, settings: MachineSettings) -> None:
        """After a crash from now on, return to the present settings instead of these; see `SettingsTrial`."""


class FollowedSettings:
    """Settings that are read again when their files change, and that the machine's API may change."""

    def __init__(self, reader: SettingsReader) -> None:
        """Reads the settings for the first time. Raises ConfigurationError."""
        self._reader = reader
        self._found = reader.read()
        self._applied = MachineSettings()
        self._meta = MachineSettings()
        self._refusal: str | None = None
        self._reported: tuple[str, ...] = ()
        self._is_watched = False
        self._changed = anyio.Event()
        self.link: LinkOfSettings | None = None
        """Tests a change before it is adopted; None adopts changes untested."""
        self.current = self._found

    @property
    def has_url_argument(self) -> bool:
        """Whether a join URL was given as an argument, which overrides every other one."""
        return self._reader.sources.explicit.url is not None

    @property
    def uuid_argument(self) -> str | None:
        """The UUID given as an argument. Only META overrides it."""
        explicit = self._reader.sources.explicit.uuid
        return None if explicit is None else explicit.value

    async def apply(self, documents: MachineSettings) -> Verdict:
        """Use these documents from now on. They override the settings found, and arguments override them.

        Changes of the link are tested first; if they do not work, nothing changes. Takes at most `VERDICT_TIMEOUT` seconds, or
        less if the caller's deadline is earlier, so that it receives the verdict.
        """
        candidate = self._merge(documents, self._meta)
        verdict = Verdict(outcome="applied")
        if self.link is not None:
            timeout = max(_ANSWER_SECONDS, min(VERDICT_TIMEOUT, caller_waits() - _ANSWER_SECONDS))
            verdict = await self.link.try_settings(candidate, timeout=timeout, keep=False)
        if not verdict.is_refused:
            self._applied = documents
            self._use(self._merge(self._applied, self._meta))
        return verdict

    @property
    def meta(self) -> MachineSettings:
        """The UUID and the unique token that the server has written to this machine; they override all others."""
        return self._meta

    async def announce_meta(self, meta: MachineSettings) -> None:
        """Call before META's file gets a new UUID or unique token, which `write_meta` then tests."""
        if self.link is not None:
            await self.link.note_trial(self._merge(self._applied, meta))

    async def write_meta(self, meta: MachineSettings) -> Verdict:
        """Use this UUID and unique token from now on; None falls back to the machine's own.

        Returns within `PROMPT_TIMEOUT` seconds: a server may delay the new Provision call until its META write has returned. A
        change that is still pending then is kept and retried. A refused one must be undone by another call.
        """
        self._meta = meta
        candidate = self._merge(self._applied, meta)
        verdict = Verdict(outcome="applied")
        if self.link is not None:
            verdict = await self.link.try_settings(candidate, timeout=PROMPT_TIMEOUT, keep=True)
        if not verdict.is_refused:
            self._use(candidate)
        return verdict

    async def watch(self) -> None:
        """Read changed files. Reports unusable files and keeps the previous settings. Never returns."""
        await self._reader.sources.watch(self._read_files_again)

    async def changed(self) -> None:
        """Return at the next change of `current`."""
        await self._changed.wait()

    async def follow(self, part: Callable[[MachineSettings], T], use: Callable[[T], Coroutine[Any, Any, None]]) -> None:
        """Run `use` with a part of the settings, and restart it when that part changes. Never returns.

        A failure with the first value is raised. Later failures are logged and retried until `use` works or the part changes.
        """
        backoff = Backoff(first=1.0, cap=60.0)
        is_first = True
        while True:
            value = part(self.current)
            async with background_tasks() as tasks:
                tasks.start_soon(self._use_part, use, value, backoff, is_first)
                while part(self.current) == value:
                    await self._changed.wait()
            is_first = False
            backoff.reset()

    async def _use_part(
        self, use: Callable[[T], Coroutine[Any, Any, None]], value: T, backoff: Backoff, is_first: bool
    ) -> None:
        while True:
            try:
                await use(value)
                return
            except SideroLinkError as error:
                if is_first:
                    raise
                delay = backoff.next()
                log_event("settings failed", f"{error}; again in {delay:.0f} s")
            except Exception:
                delay = backoff.next()
                log.exception("applying changed settings failed; retrying in %.0f s", delay)
            await anyio.sleep(delay)

    def _read_files_again(self) -> None:
        """Called first when the watch begins, which is not logged again."""
        self._read_again()
        if self._is_watched or self.current.problems != self._reported:
            self.log_problems()
        self._is_watched = True

    def log_problems(self) -> None:
        """Log ignored settings, one line each."""
        for problem in self.current.problems:
            log_event("setting ignored", problem)
        self._reported = self.current.problems

    def _read_again(self) -> None:
        try:
            self._found, refusal = self._reader.read(), None
        except ConfigurationError as error:
            refusal = str(error)
        if refusal is not None and refusal != self._refusal:
            log_event("settings refused", f"{refusal}; the previous ones stay in force")
        self._refusal = refusal
        self._use(self._merge(self._applied, self._meta))

    def _merge(self, applied: MachineSettings, meta: MachineSettings) -> MachineSettings:
        """Merge by precedence: META (identity only), arguments, the applied configuration, the documents found."""
        explicit = self._reader.sources.explicit
        explicit = replace(
            explicit,
            uuid=meta.uuid or explicit.uuid,
            unique_token=meta.unique_token or explicit.unique_token,
        )
        return merge(explicit, applied, self._found).keeping(self.current)

    def _use(self, settings: MachineSettings) -> None:
        if settings != self.current:
            self.current = settings
            log_event("settings", "changed")
            self._changed.set()
            self._changed = anyio.Event()
