"""`siderolink web`: the web UI of a server."""

from pathlib import Path
from typing import Annotated

import typer

from siderolink.cli.admin.commands import Call, command
from siderolink.cli.options import LogFormat, LogFormatOption, LogLevel, LogLevelOption, begin_log
from siderolink.common.errors import ConfigurationError

app = typer.Typer(add_completion=False)

DEFAULT_LISTEN = "127.0.0.1:8096"


@command(app, "web")
def web(
    call: Call,
    listen: Annotated[
        str,
        typer.Option(
            help="Address of the web UI; the host defaults to the loopback. Other addresses need TLS.",
            metavar="[HOST:]PORT",
        ),
    ] = DEFAULT_LISTEN,
    tls_cert: Annotated[
        Path | None, typer.Option(help="Certificate chain (PEM) of the web UI.", metavar="FILE", show_default="no TLS")
    ] = None,
    tls_key: Annotated[
        Path | None,
        typer.Option(
            help="Private key (PEM) of the certificate.", metavar="FILE", show_default="read from the --tls-cert file"
        ),
    ] = None,
    origin: Annotated[
        list[str] | None,
        typer.Option(
            help="Name under which browsers reach the web UI if neither --listen nor the certificate has it, such as a "
            "proxy's: https://HOST[:PORT]. Repeatable.",
            metavar="ORIGIN",
        ),
    ] = None,
    forwarded_from: Annotated[
        list[str] | None,
        typer.Option(
            help="Trust X-Forwarded-For from proxies in this network. The visitor is the rightmost address that is not a "
            "proxy. Repeatable.",
            metavar="NETWORK",
        ),
    ] = None,
    with_parent: Annotated[bool, typer.Option("--with-parent", help="Exit when standard input ends.", hidden=True)] = False,
    log_format: LogFormatOption = LogFormat.TEXT,
    log_level: LogLevelOption = LogLevel.INFO,
) -> None:
    """Serve the web UI of a server. Users sign in with an API key.

    `serve --web-listen` starts it, too.
    """
    begin_log(log_format, log_level)
    try:
        from siderolink.cli.web import run_web
    except ModuleNotFoundError as error:
        if error.name not in ("jinja2", "markupsafe", "starlette", "uvicorn"):
            raise
        raise ConfigurationError("the web UI needs more packages: pip install 'siderolink[web]'") from None
    run_web(
        call.options,
        listen=listen,
        tls_cert=tls_cert,
        tls_key=tls_key,
        origins=tuple(origin or ()),
        forwarded_from=tuple(forwarded_from or ()),
        with_parent=with_parent,
    )
