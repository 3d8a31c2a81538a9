"""`siderolink join`: one machine in the foreground."""

import logging
import ssl
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from dataclasses import dataclass
from pathlib import Path

import anyio

from siderolink.cli.control import (
    ControlService,
    control_socket,
    data_plane,
    peer_message,
)
from siderolink.cli.describe import link_event, log_link_event
from siderolink.cli.logs import hide, log_event, lost_records, name_machine
from siderolink.cli.maintenance import Maintenance, MaintenanceOptions
from siderolink.cli.options import MetricsOptions
from siderolink.cli.reporting import Reporting, report_part
from siderolink.cli.running import calm_collector, feed_watchdog, notify, run_until_stopped
from siderolink.cli.settings import FollowedSettings, SettingsOptions, SettingsReader
from siderolink.cli.trial import JoinSettings, SettingsTrial
from siderolink.client import Connected, InterfaceConfigured, Link, LinkEvent, ProvisionFailed, SettingsApplied, StateChanged
from siderolink.client.config import HOST_DOCUMENTS, PROC_CMDLINE, Ingress, MachineSettings
from siderolink.client.firewall import ingress_firewall
from siderolink.client.link.identity import TALOS_VERSION, UniqueTokens, machine_uuid
from siderolink.client.link.link import open_link
from siderolink.client.link.provisioning import NodeInfo
from siderolink.client.link.runner import LinkOptions, ServerKeys
from siderolink.client.link.supervisor import Verdict, try_first
from siderolink.client.maintenance import LinkFollower
from siderolink.common.backoff import Backoff
from siderolink.common.errors import ConfigurationError, HostError
from siderolink.common.grpc import client_tls
from siderolink.common.join_url import JoinURL
from siderolink.common.pb.siderolink.control import Event, StatusResponse
from siderolink.common.tasks import background_tasks, keep_running
from siderolink.common.wireguard.device import DeviceKind

_RETURN_SECONDS = 10.0
"""How long the settings from before an interrupted trial are used exclusively before the new ones are tested again."""


@dataclass(frozen=True, slots=True, kw_only=True)
class JoinOptions:
    """Options as given on the command line."""

    settings: SettingsOptions
    talos_version: str = TALOS_VERSION
    """Release tag to report to the server."""
    identity: Path | None = None
    """The folder for values that the machine keeps between starts; None keeps none."""
    interface: str | None
    device: DeviceKind
    netns: str | None = None
    """The interface's network namespace; reports are then not delivered."""
    ca: Path | None = None
    """Roots (PEM) for the server's certificate, instead of the system's."""
    fallback_tunnel: bool = False
    """Use the tunnel while UDP is blocked."""
    maintenance: MaintenanceOptions | None = None
    """Serve the machine's own API."""
    metrics: MetricsOptions | None = None


class LinkSource:
    """A link, as the source of the control socket."""

    def __init__(self, link: Link, name: str, reporting: Reporting) -> None:
        """`name` is the present or last name of the interface."""
        self._link = link
        self._name = name
        self._reporting = reporting

    async def status(self) -> AsyncIterator[StatusResponse]:
        status = await self._link.status()
        last_refused = f"the last new settings were refused: {status.last_refused}" if status.last_refused else ""
        yield StatusResponse(
            role="machine",
            interface=status.interface or self._name,
            device_kind=status.device or "",
            data_plane=data_plane(status.device),
            transport=status.transport or "",
            addresses=[str(status.address)] if status.address else [],
            public_key=str(status.public_key),
            listen_port=status.listen_port or 0,
            peers=[peer_message(status.server)] if status.server else [],
            drops=status.drops | lost_records(),
            state=status.state,
            reason="; ".join(filter(None, (status.reason, status.refused_settings, last_refused))),
            since=status.since,
            reports=self._reporting.counts(),
        )

    async def events(self) -> AsyncIterator[Event]:
        async for event in self._link.events():
            name, text = link_event(event)
            yield Event(time=event.time, kind=name, subject=str(self._link.public_key), detail=text)


class JoinedMachine:
    """Keeps a link up by settings that may change. Each server knows the machine by one key and one unique token."""

    def __init__(self, options: JoinOptions, settings: FollowedSettings) -> None:
        self._options = options
        self._settings = settings
        self._node_uuid = machine_uuid(folder=options.identity)
        self._unique_tokens = UniqueTokens(options.identity)
        self._host_failures = Backoff(first=1.0, cap=60.0, floor=0.5)
        self._trial = SettingsTrial(options.identity, f"{self._own_uuid} {options.interface}")
        self._keys: ServerKeys = {}
        self._roots: dict[str | None, ssl.SSLContext] = {}
        self._reporting = Reporting()
        self._follower: LinkFollower | None = None
        self._maintenance: Maintenance | None = None
        self._link: Link | None = None
        self._in_force = anyio.Event()
        self._wanted: LinkOptions | None = None
        self._proved: LinkOptions | None = None
        self._link_changed = anyio.Event()
        self._is_calm = False

    @property
    def _own_uuid(self) -> str:
        """The UUID apart from META and files; identifies the machine's own unique tokens."""
        return self._settings.uuid_argument or self._node_uuid

    async def run(self) -> None:
        """Never returns. Raises SideroLinkError if the interface cannot be created."""
        if self._options.netns is not None and self._options.maintenance is not None:
            raise ConfigurationError(
                "--maintenance-api serves the current network namespace: omit --netns, or run the command inside that namespace"
            )
        if self._options.maintenance is not None:
            self._maintenance = Maintenance(self._settings, self._reporting, self._options.maintenance)
            await self._maintenance.load()
        uuid = self._settings.current.uuid
        name_machine(uuid.value if uuid is not None else self._node_uuid)
        own = (self._options.interface,) if self._options.interface is not None else ()
        async with ingress_firewall(Ingress(), own) as firewall, background_tasks() as tasks:

            async def hold_firewall(ingress: Ingress) -> None:
                await firewall.replace(ingress)
                if ingress.is_needed:
                    log_event("firewall", f"{ingress.default} by default, {len(ingress.rules)} rules")
                await anyio.sleep_forever()

            # before the link, so that no port is open in between
            await firewall.replace(self._settings.current.ingress)
            tasks.start_soon(keep_running, "feeding the watchdog", feed_watchdog)
            tasks.start_soon(keep_running, "watching the settings' files", self._settings.watch)
            tasks.start_soon(self._settings.follow, lambda settings: settings.ingress, hold_firewall)
            tasks.start_soon(self._settings.follow, report_part, self._reporting.collect)
            async with self._serve_metrics(), self._serve_maintenance() as self._follower:
                self._settings.link = self
                notify("READY=1\nSTATUS=not linked yet")
                await self._keep_linked()

    @asynccontextmanager
    async def _serve_maintenance(self) -> AsyncIterator[LinkFollower | None]:
        """Serve the machine's own API if it is enabled."""
        if self._maintenance is None:
            yield None
            return
        uuid = self._settings.current.uuid
        node_uuid = uuid.value if uuid is not None else self._node_uuid
        async with self._maintenance.serve(node_uuid=node_uuid) as follower:
            yield follower

    @asynccontextmanager
    async def _serve_metrics(self) -> AsyncIterator[None]:
        """Serve metrics, if enabled."""
        if (options := self._options.metrics) is None:
            yield
            return
        from siderolink.cli.metrics import endpoint, sources

        async with endpoint.serve_metrics(options, sources.LinkMetrics(lambda: self._link, self._reporting.counts)):
            yield

    # The link and its settings

    async def _keep_linked(self) -> None:
        """Keep a link up while there is a join URL. Raises ConfigurationError if roots are unusable at the start."""
        has_joined = False
        while True:
            url = _join_url(self._settings.current)
            if url is None:
                log_event("waiting", "there is no join URL")
                if self._follower is not None:
                    self._follower.removed()
                await self._settings.changed()
                continue
            try:
                options, is_interrupted = await self._first_options(self._settings.current)
            except ConfigurationError as error:
                if not has_joined:
                    raise
                log_event("settings refused", f"{error}; no link until they change")
                await self._settings.changed()
                continue
            except HostError as error:
                await self._retry_later(error)
                continue
            has_joined = True
            self._host_failures.reset()
            self._show_settings(options)
            async with open_link(options, self._on_event, keys=self._keys) as self._link:
                try:
                    await self._follow_settings(self._link, is_interrupted)
                finally:
                    self._link = None

    async def _first_options(self, settings: MachineSettings) -> tuple[LinkOptions, bool]:
        """The settings of a new link, and whether they are those from before an interrupted trial.

        Raises ConfigurationError.
        """
        join = await self._join_settings(settings)
        before = await self._trial.interrupted(join)
        if before is not None:
            try:
                options = self._link_options(before)
            except ConfigurationError as error:
                log_event("settings refused", f"cannot use those from before an interrupted trial: {error}")
            else:
                log_event("settings", "a trial was interrupted; starting with the settings that worked before")
                return options, True
        return self._link_options(join), False

    async def _follow_settings(self, link: Link, is_interrupted: bool) -> None:
        """Apply changes until there is no join URL."""
        async with background_tasks() as tasks:
            tasks.start_soon(self._serve_control, link)
            tasks.start_soon(self._report, link)
            tasks.start_soon(self._end_trials, link)
            if is_interrupted:
                with anyio.move_on_after(_RETURN_SECONDS):
                    await _first_outcome(link)
            while True:
                settings = self._settings.current
                if _join_url(settings) is None:
                    await self._trial.end()
                    return
                try:
                    options = await self._note_options(settings)
                    await link.apply(options, timeout=0.0, keep=True, prove_first=is_interrupted)
                except ConfigurationError as error:
                    log_event("settings refused", f"{error}; the previous ones stay in force")
                except HostError as error:
                    await self._retry_later(error)
                    continue
                if self._settings.current == settings:
                    await self._settings.changed()

    async def _retry_later(self, error: HostError) -> None:
        """Wait before the settings are used again, which need a file that cannot be read at the moment."""
        delay = self._host_failures.next()
        log_event("settings", f"{error}; again in {delay:.0f} s", level=logging.WARNING)
        with anyio.move_on_after(delay):
            await self._settings.changed()

    async def try_settings(self, settings: MachineSettings, *, timeout: float, keep: bool) -> Verdict:
        """Test the settings and adopt them if they work; see `LinkSupervisor.apply`."""
        if _join_url(settings) is None:
            return Verdict(outcome="applied")
        is_noted = self._link is not None and keep
        try:
            options = await (self._note_options(settings) if is_noted else self._prepare(settings))
        except HostError as error:
            return Verdict(outcome="refused", reason=str(error))
        if is_noted and self._link is not None:
            return await self._link.apply(options, timeout=timeout, keep=True)
        if self._link is not None:
            verdict = await self._link.apply(options, timeout=timeout)
            self._proved = None if verdict.is_refused else options
            return verdict
        if keep:
            return Verdict(outcome="pending", reason="there is no link yet")
        return await try_first(options, self._keys, timeout=timeout)

    async def _prepare(self, settings: MachineSettings) -> LinkOptions:
        return self._link_options(await self._join_settings(settings))

    async def note_trial(self, settings: MachineSettings) -> None:
        """After a crash from now on, return to the present settings instead of these; see `SettingsTrial`."""
        if self._link is not None and _join_url(settings) is not None:
            await self._note_options(settings)

    async def _note_options(self, settings: MachineSettings) -> LinkOptions:
        """The options of these settings, which are the wanted ones from now on. Raises ConfigurationError or HostError."""
        join = await self._join_settings(settings)
        options = self._link_options(join)
        self._wanted, link = options, self._link
        if link is None or link.runs_by(options):
            await self._trial.end()
        elif link.has_worked and options != self._proved:
            await self._trial.begin(join, self._joined_by(link.options))
        return options

    async def _end_trials(self, link: Link) -> None:
        """Remove a trial's note once the link is up with the wanted settings. Never returns."""
        while True:
            changed = self._link_changed
            if self._wanted is not None and link.runs_by(self._wanted):
                await self._trial.end()
            await changed.wait()

    async def _join_settings(self, settings: MachineSettings) -> JoinSettings:
        """The join settings, completed by the machine's own UUID and unique token.

        Raises HostError if the token's file cannot be read at the moment, and ConfigurationError if it is unusable.
        """
        url = _join_url(settings)
        assert url is not None
        own_uuid = self._own_uuid
        if settings.unique_token is not None:
            token = settings.unique_token.value
        else:
            token = await self._unique_tokens.token((url.host.lower(), url.port), own_uuid)
        node_uuid = settings.uuid.value if settings.uuid is not None else own_uuid
        return JoinSettings(url=url, uuid=node_uuid, unique_token=token, roots=settings.roots_pem if url.tls else None)

    def _link_options(self, join: JoinSettings) -> LinkOptions:
        """Raises ConfigurationError if the roots are unusable."""
        hide(join.url.join_token)
        hide(join.unique_token)
        options = self._options
        return LinkOptions(
            url=join.url,
            machine=NodeInfo(uuid=join.uuid, unique_token=join.unique_token, version=options.talos_version),
            interface=options.interface,
            device=options.device,
            namespace=options.netns,
            tls=self._tls(join.roots) if join.url.tls else None,
            fallback_tunnel=options.fallback_tunnel,
            retry_first=True,
        )

    def _joined_by(self, options: LinkOptions) -> JoinSettings:
        roots = next((roots for roots, tls in self._roots.items() if tls is options.tls), None)
        machine = options.machine
        return JoinSettings(url=options.url, uuid=machine.uuid, unique_token=machine.unique_token, roots=roots)

    def _tls(self, roots: str | None) -> ssl.SSLContext:
        """The same context object for the same roots, so that settings can be compared."""
        if roots not in self._roots:
            self._roots[roots] = client_tls(self._options.ca, extra_roots=roots)
        return self._roots[roots]

    # Services that accompany a link

    async def _serve_control(self, link: Link) -> None:
        """Serve the control socket under the name of the configured interface."""
        while True:
            name = self._options.interface or ("siderolinktun" if link.options.url.tunnel else "siderolink")
            async with control_socket(name, [ControlService(LinkSource(link, name, self._reporting))]):
                while name == (self._options.interface or ("siderolinktun" if link.options.url.tunnel else "siderolink")):
                    await self._in_force.wait()

    async def _report(self, link: Link) -> None:
        await link.wait_connected()
        if self._options.netns is not None:  # reports would have to be sent from another namespace
            await anyio.sleep_forever()
        await self._settings.follow(report_part, self._reporting.deliver)

    def _on_event(self, event: LinkEvent) -> None:
        log_link_event(event)
        if isinstance(event, InterfaceConfigured) and not self._is_calm:
            self._is_calm = True
            calm_collector()  # by now all modules are loaded
        if isinstance(event, StateChanged):
            notify(f"STATUS={link_event(event)[1]}")
        self._reporting.on_link_event(event)
        link = self._link
        if self._follower is not None and link is not None:
            self._follower.private_key = link.private_key
        if self._follower is not None:
            self._follower.on_event(event)
        if isinstance(event, SettingsApplied) and link is not None:
            self._show_settings(link.options)
            self._in_force.set()
            self._in_force = anyio.Event()
        self._link_changed.set()
        self._link_changed = anyio.Event()

    def _show_settings(self, options: LinkOptions) -> None:
        """Log the link's current settings and publish them in the machine's API."""
        name_machine(options.machine.uuid)
        if self._follower is not None:
            self._follower.configured(options.url, unique_token=options.machine.unique_token)


async def _first_outcome(link: Link) -> None:
    """Return once the link is up or its first Provision call has failed."""
    async for event in link.events():
        if isinstance(event, Connected | ProvisionFailed):
            return


def _join_url(settings: MachineSettings) -> JoinURL | None:
    return settings.url.value if settings.url is not None else None


def run_join(options: JoinOptions) -> None:
    """Join and stay joined. Raises SideroLinkError."""
    settings = FollowedSettings(SettingsReader(options.settings))
    for note in settings.current.notes:
        log_event("note", note)
    settings.log_problems()
    url = settings.current.url
    if url is None and options.maintenance is None:
        raise ConfigurationError(
            "no join URL found: give one, or --config, or siderolink.api= on the kernel command line; looked in "
            + ", ".join(
                map(str, (*(options.settings.config or HOST_DOCUMENTS), options.settings.kernel_cmdline or PROC_CMDLINE))
            )
        )
    if url is not None and url.source != "argument":
        log_event("settings", f"join URL {url.value} from {url.source}")
    run_until_stopped(JoinedMachine(options, settings).run, leaves=True)
