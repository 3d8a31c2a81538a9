"""Runs the web UI as a child process of `serve`."""

import os
import sys
from collections.abc import Iterator, Mapping
from importlib.util import find_spec
from pathlib import Path
from subprocess import PIPE

import anyio

from siderolink.cli.secret import SECRET_VARIABLES
from siderolink.cli.serve_config import ServeConfig
from siderolink.common.errors import ConfigurationError, HostError, SideroLinkError

_NOT_PASSED_ON = frozenset({"CREDENTIALS_DIRECTORY", "NOTIFY_SOCKET", "WATCHDOG_USEC", *SECRET_VARIABLES})


def check_page() -> None:
    """Raises ConfigurationError if the web UI's packages are missing."""
    if any(find_spec(name) is None for name in ("jinja2", "starlette", "uvicorn")):
        raise ConfigurationError("--web-listen needs more packages: pip install 'siderolink[web]'")


def page_arguments(options: ServeConfig, socket: Path) -> Iterator[str]:
    """The options of `siderolink web` for a server with this local socket."""
    assert options.web_listen is not None
    yield from ("--server", f"unix://{socket}", "--listen", options.web_listen)
    if options.web_tls_cert is not None:
        yield from ("--tls-cert", str(options.web_tls_cert))
    if options.web_tls_key is not None:
        yield from ("--tls-key", str(options.web_tls_key))
    for origin in options.web_origin:
        yield from ("--origin", origin)
    for network in options.web_forwarded_from:
        yield from ("--forwarded-from", str(network))
    yield from ("--log-format", options.log_format.value, "--log-level", options.log_level.value)


def page_environment(environ: Mapping[str, str]) -> dict[str, str]:
    """The environment of `siderolink web`: without the server's secrets, because browsers talk to that process."""
    return {name: value for name, value in environ.items() if name not in _NOT_PASSED_ON}


async def keep_page(options: ServeConfig, socket: Path) -> None:
    """Run `siderolink web` as a child until cancelled. Raises SideroLinkError if it exits by itself."""
    command = [sys.executable, "-m", "siderolink", "web", "--with-parent", *page_arguments(options, socket)]
    environment = page_environment(os.environ)
    try:
        child = await anyio.open_process(command, stdin=PIPE, stdout=None, stderr=None, env=environment)
    except BlockingIOError:
        raise HostError(
            "this user may start no more processes; raise the limit: `ulimit -u`, or TasksMax= of the systemd unit"
        ) from None
    async with child as process:
        try:
            status = await process.wait()
        finally:
            with anyio.CancelScope(shield=True):
                if process.stdin is not None:
                    await process.stdin.aclose()
                with anyio.move_on_after(5):
                    await process.wait()
                if process.returncode is None:
                    process.kill()
                    await process.wait()
    raise SideroLinkError(f"the web UI exited with status {status}")
