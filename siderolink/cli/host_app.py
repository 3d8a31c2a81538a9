"""Commands about this host: status, checks, a bare interface, a demonstration, a load test."""

from pathlib import Path
from typing import Annotated

import typer

from siderolink.cli.options import (
    BareLogLevel,
    Device,
    DeviceChoice,
    Json,
    LogFormat,
    LogFormatOption,
    LogLevel,
    LogLevelOption,
    MetricsListen,
    OrderChoice,
    ServerUrl,
    Sources,
    Url,
    begin_log,
    metrics_options,
)

app = typer.Typer(add_completion=False)


@app.command()
def status(as_json: Json = False) -> None:
    """Show the links and peers on this host. Exits with 1 if a running server or machine does not respond."""
    from siderolink.cli.status import run_status

    raise typer.Exit(run_status(as_json=as_json))


@app.command()
def top(
    interval: Annotated[float, typer.Option(help="Seconds between updates.", min=0.2, max=3600)] = 2.0,
    sort: Annotated[OrderChoice, typer.Option(help="Sort by traffic, by time since the last handshake, or by name.")] = (
        OrderChoice.RATE
    ),
    containing: Annotated[
        str, typer.Option("--filter", help="Only peers whose name or path contains this text.", metavar="TEXT")
    ] = "",
    once: Annotated[bool, typer.Option("--once", help="Print all peers once and exit.")] = False,
) -> None:
    """Show the links and peers on this host live: state, path, last handshake, rates; and, at a server, a machine's timeline.

    Keys: s changes the sorting, / filters, up and down select, enter shows the selected machine's timeline, q quits.
    """
    from siderolink.cli.top import run_top
    from siderolink.cli.top_keys import Order

    run_top(seconds=interval, order=Order(sort.value), containing=containing, once=once)


@app.command()
def support_bundle(
    output: Annotated[Path, typer.Argument(help="The archive to write; it must not exist.", metavar="FILE.tar.gz")],
    unit: Annotated[str, typer.Option(help="The systemd unit whose last log lines to include.")] = "siderolink",
    log: Annotated[Path | None, typer.Option(help="Include the last lines of this file instead.", metavar="FILE")] = None,
    metrics: Annotated[
        str | None, typer.Option(help="Include the metrics served at this address.", metavar="[HOST:]PORT")
    ] = None,
    secret_file: Annotated[
        list[Path] | None, typer.Option(help="Mask the contents of this file. Repeatable.", metavar="FILE")
    ] = None,
) -> None:
    """Write versions, status, doctor's findings, settings and the last log lines into one archive, without secrets."""
    from siderolink.cli.support import run_support_bundle

    run_support_bundle(output, unit=unit, log=log, metrics_at=metrics, secret_files=tuple(secret_file or ()))


@app.command()
def doctor(
    url: Url = None,
    ca_file: Annotated[
        Path | None, typer.Option(help="CA certificates (PEM) to trust for an https URL.", metavar="FILE")
    ] = None,
    as_json: Json = False,
) -> None:
    """Check this host. With a join URL, also join the server as a test machine, up to a WireGuard handshake."""
    from siderolink.cli.doctor.run import run_doctor

    raise typer.Exit(run_doctor(url, ca_file=ca_file, as_json=as_json))


@app.command()
def demo(
    as_json: Json = False,
    device: Device = DeviceChoice.AUTO,
    seconds: Annotated[float, typer.Option(help="Duration of each of the four bulk transfers.", min=0.1, max=60)] = 2.0,
    several: Annotated[
        bool,
        typer.Option(
            "--several-servers", help="Three servers over a Postgres of their own, one killed and one drained. Needs root."
        ),
    ] = False,
) -> None:
    """Demonstrate a server and machines in temporary network namespaces."""
    from siderolink.cli.demo.run import run_demo, run_fleet_demo

    if several:
        raise typer.Exit(run_fleet_demo(as_json=as_json, device=device.value))
    raise typer.Exit(run_demo(as_json=as_json, device=device.value, seconds=seconds))


@app.command()
def wireguard(
    name: Annotated[str, typer.Argument(help="Interface name.", metavar="IFNAME")],
    background: Annotated[
        bool,
        typer.Option("--background/--foreground", "-b/-f", help="Continue in the background once the interface exists."),
    ] = False,
    metrics_listen: MetricsListen = None,
    log_format: LogFormatOption = LogFormat.TEXT,
    log_level: BareLogLevel = None,
) -> None:
    """Run a userspace WireGuard interface that `wg` can configure."""
    from siderolink.cli.wireguard import run_wireguard

    metrics = metrics_options(metrics_listen)
    run_wireguard(name, background=background, as_json=log_format is LogFormat.JSON, level=log_level, metrics=metrics)


@app.command()
def simulate(
    url: ServerUrl,
    machines: Annotated[int, typer.Option(help="Number of machines.", min=1, max=100_000)] = 100,
    tunnel_share: Annotated[float, typer.Option(help="Fraction of machines that use the gRPC tunnel.", min=0, max=1)] = 0.0,
    at_once: Annotated[int, typer.Option(help="Maximum concurrent joins and connects.", min=1, max=4096)] = 32,
    sources: Sources = None,
    churn: Annotated[float, typer.Option(help="Machines to replace with new ones per second.", min=0)] = 0.0,
    reconnects: Annotated[
        int, typer.Option(help="Times to reconnect all machines together, on SIGUSR1 or after --hold.", min=0)
    ] = 0,
    hold: Annotated[
        float | None, typer.Option(help="Seconds to stay connected before exiting.", min=0, show_default="until stopped")
    ] = None,
    timeout: Annotated[float, typer.Option(help="Seconds for all machines to connect.", min=1)] = 60.0,
    as_json: Json = False,
    log_format: LogFormatOption = LogFormat.TEXT,
    log_level: LogLevelOption = LogLevel.INFO,
) -> None:
    """Load-test a server with many machines that make real calls and send real datagrams but need no interface."""
    from siderolink.cli.simulate.run import SimulateOptions, run_simulate
    from siderolink.cli.simulate.swarm import Load

    begin_log(log_format, log_level, descriptor=2)
    run_simulate(
        SimulateOptions(
            url=url,
            load=Load(machines=machines, tunnel_share=tunnel_share, at_once=at_once, sources=sources),
            hold=hold,
            reconnects=reconnects,
            churn=churn,
            timeout=timeout,
            as_json=as_json,
        )
    )
