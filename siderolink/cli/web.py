"""The web UI's process."""

import os
from functools import partial
from pathlib import Path

import anyio

from siderolink.cli.admin.connection import Target, TargetOptions, find_target
from siderolink.cli.logs import hide, log_event
from siderolink.cli.running import run_until_stopped
from siderolink.cli.serve_values import full_listen
from siderolink.cli.watching import watch_files
from siderolink.common.errors import ConfigurationError, SideroLinkError
from siderolink.common.grpc import ServerCertificate
from siderolink.common.hostport import HostPort
from siderolink.common.tasks import background_tasks, keep_running
from siderolink.web.run import WebOptions, serve_page


def run_web(
    target: TargetOptions,
    *,
    listen: str,
    tls_cert: Path | None,
    tls_key: Path | None,
    origins: tuple[str, ...],
    forwarded_from: tuple[str, ...],
    with_parent: bool,
) -> None:
    """Serve until stopped. Raises SideroLinkError."""
    if tls_key is not None and tls_cert is None:
        raise ConfigurationError("--tls-key needs --tls-cert")
    found = find_target(target, needs_key=False)
    hide(found.api_key)
    certificate = None if tls_cert is None else ServerCertificate(tls_cert, tls_key)
    options = WebOptions(
        listen=HostPort.parse(full_listen(listen), port_zero=True),
        server=found.address,
        api_key=found.api_key,
        ca_file=found.ca_file,
        certificate=certificate,
        origins=origins,
        forwarded_from=forwarded_from,
    )
    run_until_stopped(partial(_serve, options, found, with_parent))


async def _serve(options: WebOptions, target: Target, with_parent: bool) -> None:
    async with background_tasks() as tasks:
        if with_parent:
            tasks.start_soon(_end_with_parent, tasks.cancel_scope)
        if (certificate := options.certificate) is not None:
            watch = partial(watch_files, certificate.files, partial(_reload, certificate))
            tasks.start_soon(keep_running, "watching the certificate's files", watch)

        def listening(address: HostPort) -> None:
            scheme = "http" if certificate is None else "https"
            log_event("page", f"on {scheme}://{address}, of the server at {target}")

        await serve_page(options, listening)


def _reload(certificate: ServerCertificate) -> None:
    try:
        if certificate.reload():
            log_event("reloaded", "the TLS certificate")
    except SideroLinkError as error:
        log_event("not reloaded", str(error), level=30)


async def _end_with_parent(scope: anyio.CancelScope) -> None:
    """Standard input is a pipe from the parent process, which closes when the parent exits."""
    reading = os.dup(0)
    try:
        os.set_blocking(reading, False)
        while True:
            await anyio.wait_readable(reading)
            if not os.read(reading, 4096):
                break
    finally:
        os.close(reading)
    scope.cancel()
