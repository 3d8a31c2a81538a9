"""The commands and their options."""

import sys
from pathlib import Path
from typing import Annotated

import typer

from siderolink.cli.machine_app import machine_app
from siderolink.cli.metrics.options import metrics_options
from siderolink.cli.options import (
    BareLogLevel,
    CaFile,
    Config,
    ConnectionsPerAddress,
    Device,
    DeviceChoice,
    EventSinkPort,
    ForgetAfter,
    ForwardedFrom,
    IdentityFolder,
    InstallationId,
    Interface,
    JoinToken,
    JoinTokensModeOption,
    Json,
    KeepInterface,
    KeptConfig,
    KernelCmdline,
    KernelCmdlineCommand,
    LogFormat,
    LogFormatOption,
    LogLevel,
    LogLevelOption,
    LogPort,
    MaintenanceApi,
    MaintenancePort,
    MetaFile,
    MetricsListen,
    MetricsMachines,
    NetNs,
    NoDial,
    OrderChoice,
    OverlayPorts,
    PrintMachineLogs,
    ProxyProtocolFrom,
    ServedEventSinkPort,
    ServedLogPort,
    ServerInterface,
    ServerUrl,
    Sources,
    StateFile,
    StorePasswordFile,
    StoreUrl,
    TalosVersion,
    TlsCert,
    TlsKey,
    TokenFile,
    UniqueToken,
    UniqueTokenFile,
    Url,
    WireguardEndpoints,
    overlay_ports,
    state_folder,
)
from siderolink.cli.output import fail
from siderolink.common.errors import SideroLinkError

app = typer.Typer(
    name="siderolink",
    help="SideroLink client and server: a point-to-point WireGuard management overlay.",
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
)


state_app = typer.Typer(help="Back up, restore and change a server's state.", no_args_is_help=True)
app.add_typer(state_app, name="state")

app.add_typer(machine_app, name="machine")

config_app = typer.Typer(help="Inspect configuration documents and kernel arguments.", no_args_is_help=True)
app.add_typer(config_app, name="config")


@app.command()
def serve(
    api_listen: Annotated[str, typer.Option(help="Address for the API to listen on.", metavar="HOST:PORT")],
    wireguard_endpoint: WireguardEndpoints,
    join_token: JoinToken = None,
    join_token_file: TokenFile = None,
    interface: Annotated[str, typer.Option(help="Interface name.")] = "siderolink",
    device: Device = DeviceChoice.AUTO,
    state: StateFile = None,
    store: StoreUrl = None,
    store_password_file: StorePasswordFile = None,
    no_state: Annotated[bool, typer.Option("--no-state", help="Keep the state in memory only.")] = False,
    no_dial: NoDial = False,
    keep_interface: KeepInterface = False,
    netns: NetNs = None,
    tls_cert: TlsCert = None,
    tls_key: TlsKey = None,
    connections_per_address: ConnectionsPerAddress = 1024,
    proxy_protocol_from: ProxyProtocolFrom = None,
    forwarded_from: ForwardedFrom = None,
    event_sink_port: ServedEventSinkPort = None,
    log_port: ServedLogPort = None,
    overlay_port: OverlayPorts = None,
    metrics_listen: MetricsListen = None,
    metrics_machines: MetricsMachines = 0,
    print_machine_logs: PrintMachineLogs = False,
    join_tokens_mode: JoinTokensModeOption = None,
    forget_after: ForgetAfter = None,
    log_format: LogFormatOption = LogFormat.TEXT,
    log_level: LogLevelOption = LogLevel.INFO,
) -> None:
    """Run a server until stopped. Reloads the join token file and the certificate when they change, and on SIGHUP."""
    from siderolink.cli.serve import ServeOptions, join_policy, run_serve
    from siderolink.cli.serving import chosen_state

    start_log(log_format, log_level)
    options = ServeOptions(
        api_listen=api_listen,
        wireguard_endpoints=tuple(wireguard_endpoint),
        join_token=join_token,
        join_token_file=join_token_file,
        interface=interface,
        device=device.value,
        state=chosen_state(interface, state, no_state, store, store_password_file),
        dial=not no_dial,
        keep_interface=keep_interface,
        netns=netns,
        tls_cert=tls_cert,
        tls_key=tls_key,
        connections_per_address=connections_per_address,
        proxy_protocol_from=tuple(proxy_protocol_from or ()),
        forwarded_from=tuple(forwarded_from or ()),
        event_sink_port=event_sink_port,
        log_port=log_port,
        overlay_ports=overlay_ports(overlay_port),
        metrics=metrics_options(metrics_listen, metrics_machines),
        print_machine_logs=print_machine_logs,
        policy=join_policy(join_tokens_mode, forget_after),
    )
    run_serve(options)


@app.command(cls=KernelCmdlineCommand)
def join(
    url: Url = None,
    config: Config = None,
    kernel_cmdline: KernelCmdline = None,
    uuid: Annotated[str | None, typer.Option(help="The machine's UUID.", show_default="the firmware's")] = None,
    talos_version: TalosVersion = None,
    unique_token: UniqueToken = None,
    unique_token_file: UniqueTokenFile = None,
    identity: IdentityFolder = None,
    join_token_file: TokenFile = None,
    interface: Interface = None,
    device: Device = DeviceChoice.AUTO,
    netns: NetNs = None,
    ca: CaFile = None,
    fallback_tunnel: Annotated[bool, typer.Option("--fallback-tunnel", help="Use the tunnel while UDP is blocked.")] = False,
    maintenance_api: MaintenanceApi = False,
    maintenance_port: MaintenancePort = 50000,
    meta: MetaFile = None,
    keep_config: KeptConfig = None,
    metrics_listen: MetricsListen = None,
    log_format: LogFormatOption = LogFormat.TEXT,
    log_level: LogLevelOption = LogLevel.INFO,
) -> None:
    """Join a server as a machine and run until stopped. Retries until the server accepts the join.

    Settings come from the URL, or from --config, or else from /etc/siderolink.yaml, /etc/siderolink/ and the kernel command
    line. When the files change, the new settings are tested alongside the running link and adopted only if they work.
    """
    from siderolink.cli.join import JoinOptions, run_join
    from siderolink.cli.maintenance import MaintenanceOptions
    from siderolink.cli.settings import SettingsOptions
    from siderolink.client.link.identity import TALOS_VERSION

    start_log(log_format, log_level)
    release = TALOS_VERSION if talos_version is None else talos_version
    maintenance = MaintenanceOptions(port=maintenance_port, version=release, meta=meta, configuration=keep_config)
    settings = SettingsOptions(
        url=url,
        config=tuple(config or ()),
        kernel_cmdline=kernel_cmdline,
        uuid=uuid,
        unique_token=unique_token,
        unique_token_file=unique_token_file,
        join_token_file=join_token_file,
    )
    run_join(
        JoinOptions(
            settings=settings,
            talos_version=release,
            identity=identity or state_folder() / "machine",
            interface=interface,
            device=device.value,
            netns=netns,
            ca=ca,
            fallback_tunnel=fallback_tunnel,
            maintenance=maintenance if maintenance_api else None,
            metrics=metrics_options(metrics_listen),
        )
    )


@config_app.command(cls=KernelCmdlineCommand)
def show(
    url: Url = None,
    config: Config = None,
    kernel_cmdline: KernelCmdline = None,
    unique_token: UniqueToken = None,
    unique_token_file: UniqueTokenFile = None,
    join_token_file: TokenFile = None,
    as_json: Json = False,
) -> None:
    """Show the settings that `siderolink join` would use with the same options, and where each comes from. Hides secrets.

    Exits with 1 if any input was ignored.
    """
    from siderolink.cli.config import run_show
    from siderolink.cli.settings import SettingsOptions

    settings = SettingsOptions(
        url=url,
        config=tuple(config or ()),
        kernel_cmdline=kernel_cmdline,
        unique_token=unique_token,
        unique_token_file=unique_token_file,
        join_token_file=join_token_file,
    )
    if not run_show(settings, as_json=as_json):
        raise typer.Exit(1)


@app.command()
def kernel_args(
    url: ServerUrl,
    join_token_file: TokenFile = None,
    event_sink_port: EventSinkPort = 8090,
    log_port: LogPort = 8092,
    installation_id: InstallationId = "",
) -> None:
    """Print kernel arguments that make a machine join a server. They include the join token."""
    from siderolink.cli.config import ForMachinesOptions, run_kernel_args

    run_kernel_args(
        ForMachinesOptions(
            url=url,
            join_token_file=join_token_file,
            event_sink_port=event_sink_port,
            log_port=log_port,
            installation_id=installation_id,
        )
    )


@app.command()
def machine_config(
    url: ServerUrl,
    join_token_file: TokenFile = None,
    event_sink_port: EventSinkPort = 8090,
    log_port: LogPort = 8092,
    installation_id: InstallationId = "",
    ca_file: Annotated[
        Path | None, typer.Option(help="Additional CA certificates for the machine to trust.", metavar="FILE")
    ] = None,
) -> None:
    """Print configuration documents that make a machine join a server. They include the join token."""
    from siderolink.cli.config import ForMachinesOptions, run_machine_config

    run_machine_config(
        ForMachinesOptions(
            url=url,
            join_token_file=join_token_file,
            event_sink_port=event_sink_port,
            log_port=log_port,
            installation_id=installation_id,
            ca_file=ca_file,
        )
    )


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
def status(as_json: Json = False) -> None:
    """Show the links and peers on this host. Exits with 1 if a running server or machine does not respond."""
    from siderolink.cli.status import run_status

    raise typer.Exit(run_status(as_json=as_json))


@app.command()
def top(
    interval: Annotated[float, typer.Option(help="Seconds between two looks.", min=0.2, max=3600)] = 2.0,
    sort: Annotated[OrderChoice, typer.Option(help="What comes first: the busiest, the longest silent, or by name.")] = (
        OrderChoice.RATE
    ),
    containing: Annotated[str, typer.Option("--filter", help="Only peers whose name or path holds this.", metavar="TEXT")] = "",
    once: Annotated[bool, typer.Option("--once", help="Print all peers once, and end.")] = False,
) -> None:
    """Show the links and peers on this host live: state, path, last handshake, rates."""
    from siderolink.cli.top import Order, run_top

    run_top(seconds=interval, order=Order(sort.value), containing=containing, once=once)


@app.command()
def support_bundle(
    output: Annotated[Path, typer.Argument(help="The archive to write; it must not exist.", metavar="FILE.tar.gz")],
    unit: Annotated[str, typer.Option(help="The systemd unit whose last lines to take.")] = "siderolink",
    log: Annotated[Path | None, typer.Option(help="Take the last lines of this file instead.", metavar="FILE")] = None,
    metrics: Annotated[str | None, typer.Option(help="Take the metrics served there, too.", metavar="[HOST:]PORT")] = None,
    secret_file: Annotated[
        list[Path] | None, typer.Option(help="Mask what this file holds; may be given several times.", metavar="FILE")
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
) -> None:
    """Demonstrate a server and machines in temporary network namespaces."""
    from siderolink.cli.demo.run import run_demo

    raise typer.Exit(run_demo(as_json=as_json, device=device.value, seconds=seconds))


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

    start_log(log_format, log_level, descriptor=2)
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


@state_app.command()
def backup(
    file: Annotated[Path, typer.Argument(help="File to create. It will contain the server's private key.")],
    interface: ServerInterface = "siderolink",
) -> None:
    """Back up the state of a running server."""
    from siderolink.cli.state import run_backup

    run_backup(interface, file)


@state_app.command()
def restore(
    file: Annotated[Path, typer.Argument(help="File created by `backup`.")],
    interface: ServerInterface = "siderolink",
    state: Annotated[Path | None, typer.Option(help="State file to replace while no server is running.")] = None,
) -> None:
    """Replace the state with a backup. A running server restarts itself, and links recover."""
    from siderolink.cli.state import run_restore, run_restore_offline

    if state is not None:
        run_restore_offline(file, state)
    else:
        run_restore(interface, file)


@state_app.command()
def migrate(
    source: Annotated[str, typer.Argument(help="The state as it is: a file, or a postgresql:// URL.", metavar="SOURCE")],
    target: Annotated[str, typer.Argument(help="Where it shall be: a new file, or an empty database.", metavar="TARGET")],
    store_password_file: StorePasswordFile = None,
) -> None:
    """Copy the state of a stopped server from a file to Postgres, or back. Machines return without joining again."""
    from siderolink.cli.state_migration import run_migrate

    run_migrate(source, target, store_password_file)


@state_app.command()
def rotate_key(interface: ServerInterface = "siderolink") -> None:
    """Replace the server's WireGuard key. Every machine has to join again."""
    from siderolink.cli.state import run_rotate_key

    run_rotate_key(interface)


def start_log(log_format: LogFormat, log_level: LogLevel, *, descriptor: int = 1) -> None:
    """Log to a file descriptor. `simulate` reserves standard output for its results."""
    from siderolink.cli.logs import start_log

    start_log(log_level, as_json=log_format is LogFormat.JSON, descriptor=descriptor)


def run() -> int:
    """Run the command line. Returns the exit status."""
    try:
        app()
    except SideroLinkError as error:
        stop_log()  # flush the log lines that precede the error
        return fail(str(error))
    except BrokenPipeError:
        return 1
    finally:
        stop_log()
    return 0


def stop_log() -> None:
    """Flush the log, if the command started one."""
    if (logs := sys.modules.get("siderolink.cli.logs")) is not None:
        logs.stop_log()
