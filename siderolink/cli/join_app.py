"""The commands of machines: `join`, `config show`, `kernel-args` and `machine-config`."""

import inspect
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Annotated, Any

import typer
from typer.core import TyperCommand

from siderolink.cli.options import (
    DEFAULT_EVENT_SINK_PORT,
    DEFAULT_LOG_PORT,
    CaFile,
    Config,
    Device,
    DeviceChoice,
    EventSinkPort,
    IdentityFolder,
    InstallationId,
    Interface,
    Json,
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
    NetNs,
    ServerUrl,
    TalosVersion,
    TokenFile,
    UniqueToken,
    UniqueTokenFile,
    Url,
    begin_log,
    metrics_options,
    state_folder,
    with_parameters,
)

app = typer.Typer(add_completion=False)
config_app = typer.Typer(help="Inspect configuration documents and kernel arguments.", no_args_is_help=True)
app.add_typer(config_app, name="config")


_SETTINGS: dict[str, tuple[Any, Any]] = {
    "url": (Url, None),
    "config": (Config, None),
    "kernel_cmdline": (KernelCmdline, None),
    "unique_token": (UniqueToken, None),
    "unique_token_file": (UniqueTokenFile, None),
    "join_token_file": (TokenFile, None),
}
"""The source of a machine's settings: type and default of each option."""
_FOR_MACHINES: dict[str, tuple[Any, Any]] = {
    "url": (ServerUrl, inspect.Parameter.empty),
    "join_token_file": (TokenFile, None),
    "event_sink_port": (EventSinkPort, DEFAULT_EVENT_SINK_PORT),
    "log_port": (LogPort, DEFAULT_LOG_PORT),
    "installation_id": (InstallationId, ""),
}
"""A server's parameters for machines: type and default of each option."""


def _command(
    app: typer.Typer, shared: Mapping[str, tuple[Any, Any]], cls: type[TyperCommand] | None = None
) -> Callable[[Callable[..., None]], Callable[..., None]]:
    """Add a command with shared options and its own. Its first parameter is a dictionary of the shared ones."""

    def add(function: Callable[..., None]) -> Callable[..., None]:
        _, *own = inspect.signature(function).parameters.values()

        def run(**given: Any) -> None:
            function({name: given.pop(name) for name in shared}, **given)

        run.__doc__ = function.__doc__
        options = [
            inspect.Parameter(name, inspect.Parameter.KEYWORD_ONLY, default=default, annotation=kind)
            for name, (kind, default) in shared.items()
        ]
        app.command(function.__name__.replace("_", "-"), cls=cls)(with_parameters(run, [*options, *own]))
        return function

    return add


@_command(app, _SETTINGS, KernelCmdlineCommand)
def join(
    given: dict[str, Any],
    uuid: Annotated[str | None, typer.Option(help="The machine's UUID.", show_default="the firmware's")] = None,
    talos_version: TalosVersion = None,
    identity: IdentityFolder = None,
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

    begin_log(log_format, log_level)
    release = TALOS_VERSION if talos_version is None else talos_version
    maintenance = MaintenanceOptions(port=maintenance_port, version=release, meta=meta, configuration=keep_config)
    settings = SettingsOptions(**_as_options(given), uuid=uuid)
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


@_command(config_app, _SETTINGS, KernelCmdlineCommand)
def show(given: dict[str, Any], as_json: Json = False) -> None:
    """Show the settings that `siderolink join` would use with the same options, and where each comes from. Hides secrets.

    Exits with 1 if any input was ignored.
    """
    from siderolink.cli.config import run_show
    from siderolink.cli.settings import SettingsOptions

    if not run_show(SettingsOptions(**_as_options(given)), as_json=as_json):
        raise typer.Exit(1)


def _as_options(given: dict[str, Any]) -> dict[str, Any]:
    """The shared options in the form of SettingsOptions."""
    return given | {"config": tuple(given["config"] or ())}


@_command(app, _FOR_MACHINES)
def kernel_args(given: dict[str, Any]) -> None:
    """Print kernel arguments that make a machine join a server. They include the join token."""
    from siderolink.cli.config import ForMachinesOptions, run_kernel_args

    run_kernel_args(ForMachinesOptions(**given))


@_command(app, _FOR_MACHINES)
def machine_config(
    given: dict[str, Any],
    ca_file: Annotated[
        Path | None, typer.Option(help="Additional CA certificates for the machine to trust.", metavar="FILE")
    ] = None,
) -> None:
    """Print configuration documents that make a machine join a server. They include the join token."""
    from siderolink.cli.config import ForMachinesOptions, run_machine_config

    run_machine_config(ForMachinesOptions(**given, ca_file=ca_file))
