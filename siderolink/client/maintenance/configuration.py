"""Applies configurations: the active one, the one for the next start, and trials."""

import logging
from collections.abc import Awaitable, Callable
from dataclasses import dataclass, replace
from datetime import timedelta
from difflib import unified_diff
from pathlib import Path
from typing import TYPE_CHECKING

import anyio
from grpclib import GRPCError, Status

from siderolink.client.config import MachineSettings
from siderolink.client.config.sources import needing_extra
from siderolink.client.link.supervisor import Verdict
from siderolink.client.maintenance.hooks import ApplyAnswer, ApplyMode, ApplyRequest
from siderolink.client.maintenance.resources.definitions import MACHINE_CONFIG
from siderolink.client.maintenance.resources.specs import MACHINE_CONFIG_ANNOTATIONS, machine_config
from siderolink.client.maintenance.resources.store import ResourceStore
from siderolink.common.errors import ConfigurationError
from siderolink.common.pb.machine import ConfigLoadErrorEvent
from siderolink.common.private_files import read_private, replace_private
from siderolink.common.tasks import in_thread
from siderolink.common.text import one_line

if TYPE_CHECKING:
    from siderolink.client.config.strict import Configuration

log = logging.getLogger("siderolink")

ACTIVE, PERSISTENT = "v1alpha1", "persistent"
"""Ids of the active configuration and of the one for the next start."""
DEFAULT_TRY = timedelta(minutes=1)
LONGEST_TRY = timedelta(days=1)
_BUSY_SECONDS = 0.5
"""A trial that ends while another configuration is being applied waits for that."""
_MAX_BYTES = 512 * 1024
_LONGEST_TEXT = 2000
"""Longest text of a refusal, which is sent as a header."""
_LONGEST_DIFF = 64 * 1024
_DIFF_LINES = 400
_DETAILS: dict[ApplyMode, str] = {
    "no-reboot": "Applied configuration without a reboot",
    "try": "Applied configuration without a reboot",
    "staged": "Staged configuration to be applied after the next reboot",
}


@dataclass(frozen=True, slots=True)
class _Trial:
    """A running trial and the configuration to return to."""

    before: "Configuration | None"
    ends_at: float


class ConfigurationKeeper:
    """Applies configurations. A refused one changes nothing.

    A configuration without a SideroLinkConfig keeps the one that was applied before, so a machine does not lose its manager by
    omission.
    """

    def __init__(
        self,
        resources: ResourceStore,
        use: Callable[[MachineSettings], Awaitable[Verdict]],
        *,
        path: Path | None = None,
        on_refusal: Callable[[ConfigLoadErrorEvent], None] = lambda _: None,
        revert_again: float = 30.0,
    ) -> None:
        """`use` applies settings and returns the verdict. `path` is the file of the persistent configuration.

        `revert_again` is the pause in seconds before a failed reversal of a trial is retried.
        """
        self._revert_again = revert_again
        self._resources = resources
        self._use = use
        self._path = path
        self._on_refusal = on_refusal
        self._active: Configuration | None = None
        self._persistent: Configuration | None = None
        self._trial: _Trial | None = None
        self._trial_changed = anyio.Event()
        self._is_busy = False

    @property
    def has_join(self) -> bool:
        """Whether the active configuration contains a join URL."""
        return self._active is not None and self._active.has_join

    async def load(self) -> None:
        """Apply the kept configuration. An invalid one is logged and skipped. Raises ConfigurationError."""
        data = None if self._path is None else read_private(self._path, _MAX_BYTES)
        if not data:
            return
        try:
            kept = await _decode(data)
        except ConfigurationError as error:
            log.warning("the saved configuration %s is ignored: %s", self._path, one_line(str(error)))
            return
        await self._use(kept.settings)
        self._active = self._persistent = kept
        self._show()

    async def run(self) -> None:
        """End trials in time. Never returns."""
        while True:
            self._trial_changed = anyio.Event()
            trial = self._trial
            with anyio.CancelScope(deadline=trial.ends_at if trial is not None else float("inf")) as scope:
                await self._trial_changed.wait()
            if scope.cancelled_caught and trial is not None and self._trial is trial:
                await self._end_trial(trial)

    async def apply(self, request: ApplyRequest) -> ApplyAnswer:
        """The hook of ApplyConfiguration. Raises GRPCError."""
        if self._is_busy:
            raise GRPCError(Status.FAILED_PRECONDITION, "another apply configuration is already in progress")
        self._is_busy = True
        try:
            return await self._apply(request)
        finally:
            self._is_busy = False

    async def _apply(self, request: ApplyRequest) -> ApplyAnswer:
        mode: ApplyMode = "no-reboot" if request.mode in ("auto", "reboot") else request.mode
        if mode != "try":
            self._set_trial(None)
        try:
            found = await _decode(request.data)
        except ConfigurationError as error:
            text = str(error)[:_LONGEST_TEXT]
            self._on_refusal(ConfigLoadErrorEvent(error=one_line(text.partition("\n")[0])))
            raise GRPCError(Status.INVALID_ARGUMENT, text) from None
        warnings = list(found.warnings)
        before = self._active
        if before is not None and before.has_join and not found.has_join:
            found = found.with_join_of(before)
            warnings.append("it has no SideroLinkConfig: the one applied before stays in force")
        timeout = _try_timeout(request.try_timeout)
        details = _DETAILS[mode]
        if mode == "try":
            details += f"\nThe config is applied in 'try' mode and will be automatically reverted back in {duration(timeout)}"
        if request.dry_run:
            changes = await _difference(before, found) if request.by_admin else "The configuration is shown only to admins."
            text = f"Dry run summary:\n{details} (skipped in dry-run).\nConfig diff:\n\n{changes}"
            return ApplyAnswer(warnings=tuple(warnings), mode=mode, details=text)
        warnings += await self._act(mode, found, timeout)
        return ApplyAnswer(warnings=tuple(warnings), mode=mode, details=details)

    async def _act(self, mode: ApplyMode, found: "Configuration", timeout: timedelta) -> list[str]:
        """Apply it in this mode; returns warnings. Raises GRPCError; then nothing has changed."""
        warnings: list[str] = []
        if mode != "staged":
            warnings += await self._activate(found)
        before, self._active = self._active, (self._active if mode == "staged" else found)
        if mode == "try":
            # a trial within a trial returns to the configuration before this call, as on existing machines
            self._set_trial(_Trial(before, anyio.current_time() + timeout.total_seconds()))
        else:
            warnings += await self._keep(found)
        self._show()
        return warnings

    async def _activate(self, found: "Configuration") -> tuple[str, ...]:
        try:
            verdict = await self._use(found.settings)
        except ConfigurationError as error:
            raise GRPCError(Status.INVALID_ARGUMENT, one_line(str(error))) from None
        if verdict.is_refused:
            raise GRPCError(Status.FAILED_PRECONDITION, f"nothing was changed: {verdict.reason}")
        pending = (f"not in force yet: {verdict.reason}",) if verdict.outcome == "pending" and verdict.reason else ()
        return (*verdict.warnings, *pending)

    async def _keep(self, found: "Configuration") -> list[str]:
        """Make it the configuration for the next start; returns warnings."""
        self._persistent = found
        if self._path is None:
            return ["it is kept only in memory: this program has no file for it"]
        try:
            await in_thread(replace_private, self._path, found.data)
        except OSError as error:
            log.warning("the configuration cannot be saved to %s: %s", self._path, error.strerror)
            return [f"it is kept only in memory: its file cannot be written: {error.strerror}"]
        return []

    async def _end_trial(self, trial: _Trial) -> None:
        """Return to the configuration before a trial; retried if that fails."""
        if self._is_busy:
            self._set_trial(replace(trial, ends_at=anyio.current_time() + _BUSY_SECONDS))
            return
        self._set_trial(None)
        settings = MachineSettings() if trial.before is None else trial.before.settings
        log.info("the trial configuration was reverted")
        self._is_busy = True
        try:
            verdict = await self._use(settings)
        except ConfigurationError as error:
            verdict = Verdict(outcome="refused", reason=str(error))
        finally:
            self._is_busy = False
        if verdict.is_refused:
            log.warning("the configuration before the trial cannot be applied yet: %s", verdict.reason)
            self._set_trial(replace(trial, ends_at=anyio.current_time() + self._revert_again))
            return
        self._active = trial.before
        self._show()

    def _set_trial(self, trial: _Trial | None) -> None:
        self._trial = trial
        self._trial_changed.set()

    def _show(self) -> None:
        found = {ACTIVE: self._active, PERSISTENT: self._persistent}
        for name, configuration in found.items():
            if configuration is None:
                self._resources.remove(MACHINE_CONFIG, name)
            else:
                spec = machine_config(configuration.data)
                self._resources.put(MACHINE_CONFIG, name, spec, annotations=MACHINE_CONFIG_ANNOTATIONS)


async def _decode(data: bytes) -> "Configuration":
    with needing_extra():
        from siderolink.client.config.strict import decode
    return await in_thread(decode, data)


async def _difference(before: "Configuration | None", after: "Configuration") -> str:
    old = b"" if before is None else before.data
    return await in_thread(difference, old.decode(errors="replace"), after.data.decode(errors="replace"))


def difference(old: str, new: str) -> str:
    """A unified diff of bounded length, computed in bounded time."""
    if old == new:
        return "No changes."
    before, after = old.splitlines(keepends=True), new.splitlines(keepends=True)
    if max(len(before), len(after)) <= _DIFF_LINES:
        text = "".join(line if line.endswith("\n") else f"{line}\n" for line in unified_diff(before, after, "a", "b"))
    else:
        removed, added = (f"-{line.rstrip()}\n" for line in before), (f"+{line.rstrip()}\n" for line in after)
        text = "".join(("--- a\n", "+++ b\n", f"@@ -1,{len(before)} +1,{len(after)} @@\n", *removed, *added))
    return text if len(text) <= _LONGEST_DIFF else text[:_LONGEST_DIFF] + "\n(the rest is omitted)\n"


def _try_timeout(asked: timedelta | None) -> timedelta:
    if asked is None or not asked:
        return DEFAULT_TRY
    if asked < timedelta(0):
        raise GRPCError(Status.INVALID_ARGUMENT, "the timeout of a try must not be negative")
    return min(asked, LONGEST_TRY)


def duration(length: timedelta) -> str:
    """A duration as existing machines write it: ``1m0s``, ``1h0m0s``, ``2.5s``."""
    minutes, seconds = divmod(length.total_seconds(), 60)
    hours, minutes = divmod(int(minutes), 60)
    text = f"{seconds:.9f}".rstrip("0").rstrip(".") + "s"
    if hours:
        return f"{hours}h{minutes}m{text}"
    return f"{minutes}m{text}" if minutes else text
