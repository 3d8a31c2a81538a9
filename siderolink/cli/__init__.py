"""The `siderolink` command: a thin shell over the same public API an embedder uses (extra: ``siderolink[cli]``)."""

import sys

__all__ = ["main", "wireguard"]

_EXTRA = frozenset(
    {
        *("aiosqlite", "alembic", "platformdirs", "prometheus_client", "pydantic", "rich", "sqlalchemy", "structlog", "typer"),
        *("watchfiles", "yaml"),
    }
)


def main() -> None:
    """Run the command line. An error prints one line and gives a non-zero exit status."""
    from siderolink.cli.output import open_standard_descriptors

    open_standard_descriptors()
    try:
        from siderolink.cli.app import run
    except ModuleNotFoundError as error:
        if error.name not in _EXTRA:
            raise
        print(f"siderolink: the command needs {error.name}: pip install 'siderolink[cli]'", file=sys.stderr)
        sys.exit(1)
    sys.exit(run())


def wireguard() -> None:
    """`siderolink-wireguard IFNAME`, for scripts that run a program with an interface's name: `wireguard --background`."""
    sys.argv[1:] = ["wireguard", "--background", *sys.argv[1:]]
    main()
