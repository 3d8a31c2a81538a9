"""`siderolink join`: one machine in the foreground."""

from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from dataclasses import dataclass, field
from pathlib import Path

import anyio

from siderolink.cli.control import control_socket, peer_message
from siderolink.cli.describe import link_event, log_link_event
from siderolink.cli.logs import hide, lost_records, name_machine, say
from siderolink.cli.maintenance import Maintenance, MaintenanceOptions
from siderolink.cli.reporting import Reporting, report_part
from siderolink.cli.running import run_until_stopped
from siderolink.cli.settings import FollowedSettings, SettingsOptions, SettingsReader
from siderolink.client import Link, LinkEvent, connect
from siderolink.client.config import HOST_DOCUMENTS, PROC_CMDLINE, Ingress, MachineSettings
from siderolink.client.firewall import ingress_firewall
from siderolink.client.link.identity import machine_uuid
from siderolink.client.maintenance import LinkFollower
from siderolink.common.errors import ConfigurationError
from siderolink.common.grpc import client_tls
from siderolink.common.join_url import JoinURL
from siderolink.common.keys import PrivateKey
from siderolink.common.pb.siderolink.control import Event, StatusResponse
from siderolink.common.tasks import background_tasks
from siderolink.common.wireguard.device import DeviceKind


@dataclass(frozen=True, slots=True, kw_only=True)
class JoinOptions:
    """As given on the command line."""

    settings: SettingsOptions
    talos_version: str = ""
    """The release's tag that the server is told."""
    interface: str | None
    device: DeviceKind
    netns: str | None = None
    """Where the interface lives; reports are then not delivered."""
    ca: Path | None = None
    """Roots (PEM) that the server's certificate is checked against, in place of the system's."""
    fallback_tunnel: bool = False
    """Use the tunnel while UDP does not pass."""
    maintenance: MaintenanceOptions | None = None
    """Serve the machine's own API."""


class LinkSource:
    """A link, as the control socket shows it."""

    def __init__(self, link: Link, name: str, reporting: Reporting) -> None:
        """`name` is what the interface will be called, or was."""
        self._link = link
        self._name = name
        self._reporting = reporting

    async def status(self) -> StatusResponse:
        status = await self._link.status()
        return StatusResponse(
            role="machine",
            interface=status.interface or self._name,
            device_kind=status.device or "",
            transport=status.transport or "",
            addresses=[str(status.address)] if status.address else [],
            public_key=str(status.public_key),
            listen_port=status.listen_port or 0,
            peers=[peer_message(status.server)] if status.server else [],
            drops=status.drops | lost_records(),
            state=status.state,
            reason=status.reason,
            since=status.since,
            reports=self._reporting.counts(),
        )

    async def events(self) -> AsyncIterator[Event]:
        async for event in self._link.events():
            name, text = link_event(event)
            yield Event(time=event.time, kind=name, subject=str(self._link.public_key), detail=text)


class JoinedMachine:
    """Holds a link by settings that may change, with one key for as long as the program runs."""

    def __init__(self, options: JoinOptions, settings: FollowedSettings) -> None:
        self._options = options
        self._settings = settings
        self._key = PrivateKey.generate()
        self._reporting = Reporting()
        self._follower: LinkFollower | None = None
        self._maintenance: Maintenance | None = None

    async def run(self) -> None:
        """Never returns. Raises SideroLinkError where there can be no interface."""
        if self._options.netns is not None and self._options.maintenance is not None:
            raise ConfigurationError("--maintenance-api serves this network namespace: leave out --netns, or run it inside")
        if self._options.maintenance is not None:
            self._maintenance = Maintenance(self._settings, self._reporting, self._key, self._options.maintenance)
            await self._maintenance.load()
        uuid = self._settings.current.uuid
        name_machine(uuid.value if uuid is not None else machine_uuid())
        own = (self._options.interface,) if self._options.interface is not None else ()
        async with ingress_firewall(Ingress(), own) as firewall, background_tasks() as tasks:

            async def hold_firewall(ingress: Ingress) -> None:
                await firewall.replace(ingress)
                if ingress.is_needed:
                    say("firewall", f"{ingress.default} by default, {len(ingress.rules)} rules")
                await anyio.sleep_forever()

            # before the link, so that nothing is open for a moment
            await firewall.replace(self._settings.current.ingress)
            tasks.start_soon(self._settings.watch)
            tasks.start_soon(self._settings.follow, lambda settings: settings.ingress, hold_firewall)
            tasks.start_soon(self._settings.follow, report_part, self._reporting.collect)
            async with self._serve_maintenance() as self._follower:
                await self._settings.follow(_join_part, self._hold)

    @asynccontextmanager
    async def _serve_maintenance(self) -> AsyncIterator[LinkFollower | None]:
        """The machine's own API, where it was asked for."""
        if self._maintenance is None:
            yield None
            return
        uuid = self._settings.current.uuid
        node_uuid = uuid.value if uuid is not None else machine_uuid()
        async with self._maintenance.serve(node_uuid=node_uuid) as follower:
            yield follower

    async def _hold(self, settings: "_JoinPart") -> None:
        """Hold the link, whatever the server says at first: it is asked again until it answers."""
        if settings.url is None:
            say("waiting", "there is no join URL")
            if self._follower is not None:
                self._follower.removed()
            await anyio.sleep_forever()
            return
        if self._follower is not None:
            self._follower.configured(settings.url)
        await self._hold_link(settings.url, settings)

    async def _hold_link(self, url: JoinURL, settings: "_JoinPart") -> None:
        options = self._options
        hide(url.join_token)
        hide(settings.unique_token)
        if settings.uuid is not None:
            name_machine(settings.uuid)
        name = options.interface or ("siderolinktun" if url.tunnel else "siderolink")
        async with (
            connect(
                url,
                uuid=settings.uuid,
                unique_token=settings.unique_token,
                talos_version=options.talos_version,
                interface=options.interface,
                device=options.device,
                namespace=options.netns,
                private_key=self._key,
                tls=client_tls(options.ca, extra_roots=settings.roots_pem) if url.tls else None,
                fallback_tunnel=options.fallback_tunnel,
                wait=False,
                on_event=self._on_event,
            ) as link,
            control_socket(name, LinkSource(link, name, self._reporting)),
        ):
            await link.wait_connected()
            if options.netns is not None:  # reports would have to leave by a namespace that this program is not in
                await anyio.sleep_forever()
            await self._settings.follow(report_part, self._reporting.deliver)

    def _on_event(self, event: LinkEvent) -> None:
        log_link_event(event)
        self._reporting.on_link_event(event)
        if self._follower is not None:
            self._follower.on_event(event)


@dataclass(frozen=True, slots=True)
class _JoinPart:
    """The settings that a link is made from."""

    url: JoinURL | None
    uuid: str | None
    unique_token: str = field(repr=False)
    roots_pem: str | None = field(repr=False)


def _join_part(settings: MachineSettings) -> _JoinPart:
    return _JoinPart(
        url=settings.url.value if settings.url is not None else None,
        uuid=settings.uuid.value if settings.uuid is not None else None,
        unique_token=settings.unique_token.value if settings.unique_token is not None else "",
        roots_pem=settings.roots_pem,
    )


def run_join(options: JoinOptions) -> None:
    """Join and stay. Raises SideroLinkError."""
    settings = FollowedSettings(SettingsReader(options.settings))
    for note in settings.current.notes:
        say("note", note)
    settings.tell_problems()
    url = settings.current.url
    if url is None and options.maintenance is None:
        raise ConfigurationError(
            "there is no join URL: give one, or --config, or siderolink.api= on the kernel command line; looked at "
            + ", ".join(
                map(str, (*(options.settings.config or HOST_DOCUMENTS), options.settings.kernel_cmdline or PROC_CMDLINE))
            )
        )
    if url is not None and url.source != "argument":
        say("settings", f"join URL {url.value} from {url.source}")
    run_until_stopped(JoinedMachine(options, settings).run)
