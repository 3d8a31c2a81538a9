"""The sources of a machine's settings, and notification of their changes."""

from collections.abc import Callable, Iterator
from contextlib import aclosing, contextmanager
from dataclasses import dataclass, field
from pathlib import Path

import anyio
import anyio.lowlevel

from siderolink.client.config.files import Reading
from siderolink.client.config.kernel_args import INLINE_ARGUMENT, inline_configuration, parse_kernel_arguments, read_kernel_line
from siderolink.client.config.settings import MachineSettings, merge
from siderolink.common.errors import ConfigurationError, host_error, require_threads
from siderolink.common.tasks import background_tasks

HOST_DOCUMENTS = (Path("/etc/siderolink.yaml"), Path("/etc/siderolink"))
"""Default locations of documents: a file, a directory."""
_EXTRA = frozenset({"pydantic", "pydantic_core", "watchfiles", "yaml"})


@contextmanager
def needing_extra() -> Iterator[None]:
    """Wrap an import of a package of the extra `config`; a missing one is a ConfigurationError that says what to install."""
    try:
        yield
    except ModuleNotFoundError as error:
        if error.name not in _EXTRA:
            raise
        raise ConfigurationError(f"configuration documents need {error.name}: pip install 'siderolink[config]'") from None


@dataclass(frozen=True, slots=True, kw_only=True)
class Sources:
    """The sources of settings."""

    explicit: MachineSettings = field(default_factory=MachineSettings)
    """Overrides all other sources."""
    documents: tuple[Path, ...] = ()
    """Files and directories; each must exist."""
    kernel_cmdline: Path | None = None
    """A file in the form of ``/proc/cmdline``; read in a container, too."""
    host_documents: bool = True
    """Whether to read the host's default documents if none are named."""
    host_kernel: bool = True
    """Whether to read the host's kernel command line if no file is named."""
    _reading: Reading = field(default_factory=Reading, init=False, repr=False, compare=False)

    def read(self) -> MachineSettings:
        """All settings found, merged. Unusable parts are skipped and listed in `problems`.

        Raises ConfigurationError if a named file cannot be read.
        """
        present = [path for path in self._paths if self.documents or path.exists()]
        found = inline = kernel = MachineSettings()
        if present:
            with needing_extra():
                from siderolink.client.config.documents import load_documents
            found = load_documents(*present, read=self._reading.read).settings
        if self.kernel_cmdline is not None or self.host_kernel:
            line, source, passed_over = read_kernel_line(self.kernel_cmdline, read=self._reading.read)
            kernel = parse_kernel_arguments(line, source) if passed_over is None else MachineSettings(notes=(passed_over,))
            inline = _read_inline(line, f"{source}: {INLINE_ARGUMENT}")
        return merge(self.explicit, found, inline, kernel)

    async def watch(self, on_change: Callable[[], None]) -> None:
        """Call `on_change` initially and whenever something changes in the documents' folders.

        Never returns. The change may not concern the documents, so read and compare them. Raises ConfigurationError.
        """
        if not self._paths and self.kernel_cmdline is None:
            await anyio.sleep_forever()
        while True:
            await self._watch_folders(sorted(self._folders()), on_change)

    @property
    def _paths(self) -> tuple[Path, ...]:
        return self.documents or (HOST_DOCUMENTS if self.host_documents else ())

    def _folders(self) -> set[Path]:
        """The folders to watch: those of the files, because a file may be replaced instead of written."""
        files = (*self._paths, *((self.kernel_cmdline,) if self.kernel_cmdline is not None else ()))
        folders: set[Path] = set()
        for path in files:
            for found in (path.absolute(), path.resolve()):
                folders |= {found, found.parent}
        return {folder for folder in folders if folder.is_dir()}

    async def _watch_folders(self, folders: list[Path], on_change: Callable[[], None]) -> None:
        """Returns when the set of folders to watch has changed."""
        with needing_extra():
            from watchfiles import awatch
        stop = anyio.Event()
        changes = awatch(*folders, recursive=False, stop_event=stop, watch_filter=None, rust_timeout=0)

        async def follow() -> None:
            async with aclosing(changes):
                async for _ in changes:
                    on_change()
                    if sorted(self._folders()) != folders:
                        break
            tasks.cancel_scope.cancel()

        try:
            require_threads(2)  # watchfiles panics without one of its own; the other one waits for it
            async with background_tasks() as tasks:
                tasks.start_soon(follow)
                tasks.start_soon(_set_when_cancelled, stop)
                # The watch is active after one turn of the loop; an additional read catches earlier changes.
                await anyio.lowlevel.checkpoint()
                on_change()
                await anyio.sleep_forever()
        except Exception as error:
            if (failure := host_error(error)) is None:
                raise
            raise ConfigurationError(f"{folders[0]} cannot be watched for changes: {failure}") from None


def _read_inline(line: str, source: str) -> MachineSettings:
    """The settings of the documents in a command line."""
    try:
        data = inline_configuration(line)
        if data is None:
            return MachineSettings()
        with needing_extra():
            from siderolink.client.config.documents import salvage_documents
        return salvage_documents(data, source).settings
    except ConfigurationError as error:
        return MachineSettings(problems=(f"{source}: {error}; it is ignored",))


async def _set_when_cancelled(stop: anyio.Event) -> None:
    """Stop the thread that waits for changes: it ends only when this event is set."""
    try:
        await anyio.sleep_forever()
    finally:
        stop.set()
