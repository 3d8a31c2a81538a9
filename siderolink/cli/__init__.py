"""The `siderolink` command, built on the same public API as embedders use (extra: ``siderolink[cli]``)."""

import os
import signal
import sys

from siderolink.common import errors as _errors

__all__ = ["main", "wireguard"]

_EXTRA = frozenset(
    {
        *("aiosqlite", "alembic", "platformdirs", "prometheus_client", "pydantic", "rich", "sqlalchemy", "structlog", "typer"),
        *("watchfiles", "yaml"),
    }
)
_DESCRIPTORS = 16
"""File descriptors that every command needs, most of them for its event loop."""


def main() -> None:
    """Run the command line. An error prints one line and exits with a non-zero status."""
    try:
        sys.exit(_run())
    except KeyboardInterrupt:  # during an import: a running command handles the signal itself
        sys.exit(128 + signal.SIGINT)
    except Exception as error:
        if (failure := _errors.host_error(error)) is None:
            raise
        print(f"siderolink: {failure}", file=sys.stderr)
        sys.exit(1)


def _run() -> int:
    from siderolink.cli.output import open_standard_descriptors

    # numpy's linear algebra is not used; its threads take memory and count towards limits, and it aborts where it gets none
    os.environ.setdefault("OPENBLAS_NUM_THREADS", "1")
    open_standard_descriptors()
    try:
        from siderolink.cli.app import run
    except ModuleNotFoundError as error:
        if error.name not in _EXTRA:
            raise
        print(f"siderolink: the command needs {error.name}: pip install 'siderolink[cli]'", file=sys.stderr)
        return 1
    _errors.require_descriptors(_DESCRIPTORS)
    return run()


def wireguard() -> None:
    """`siderolink-wireguard IFNAME` is `wireguard --background`, for scripts that run a program with an interface's name."""
    sys.argv[1:] = ["wireguard", "--background", *sys.argv[1:]]
    main()
