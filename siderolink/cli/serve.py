"""`siderolink serve`: the server in the foreground."""

import logging
import time
from collections.abc import AsyncIterator, Callable, Iterator
from contextlib import asynccontextmanager
from functools import partial
from pathlib import Path

from siderolink.cli.control import (
    ControlService,
    control_socket,
    data_plane,
    peer_message,
)
from siderolink.cli.describe import log_server_event
from siderolink.cli.logs import hide, log_event, lost_records
from siderolink.cli.machine_reports import log_reports, report_counts
from siderolink.cli.memory import FreeMemory
from siderolink.cli.options import metrics_options
from siderolink.cli.output import show
from siderolink.cli.running import allow_descriptors, calm_collector, feed_watchdog, notify, run_until_stopped
from siderolink.cli.secret import read_secret
from siderolink.cli.serve_config import DAY, ServeConfig
from siderolink.cli.serve_layers import Layer, describe_settings
from siderolink.cli.serving import Serving, StoreAddress, chosen_state, key_of_database, state_key
from siderolink.cli.state_service import StateCommands
from siderolink.cli.watching import watch_files
from siderolink.cli.web_child import check_page, keep_page
from siderolink.common.errors import ConfigurationError, SideroLinkError
from siderolink.common.grpc import GRPCError, Servable, ServerCertificate, Status
from siderolink.common.pb.siderolink.control import Event, Peer, StatusResponse
from siderolink.common.tasks import background_tasks, keep_running
from siderolink.common.wireguard.device import PeerStatus
from siderolink.server import AdminOptions, EventStream, JoinPolicy, JoinTokensMode, MachineStatus, Server, Store
from siderolink.server.admin.services import ADMIN_LIMITS, GROUP, LocalAccess, admin_services, group_id, guarded
from siderolink.server.events import describe_event
from siderolink.server.peers import relayed
from siderolink.server.store import Role

_MOST_DESCRIPTORS = 1 << 20


class ServerSource:
    """A server, as the source of the control socket."""

    def __init__(self, serving: Serving, interface: str, *, has_reports: bool) -> None:
        self._serving = serving
        self._interface = interface
        self._has_reports = has_reports

    async def status(self) -> AsyncIterator[StatusResponse]:
        if not self._serving.is_running:
            yield StatusResponse(role="server", interface=self._interface, state="starting")
            return
        server = self._serving.server
        reports = server.reports if self._has_reports else None

        def describe_peer(peer: PeerStatus, status: MachineStatus | None) -> Peer:
            if status is None:
                return peer_message(peer)
            machine, limits = status.machine, status.limits_biting
            report_drops = {} if reports is None else reports.drops(machine.id)
            return peer_message(peer, machine.node_uuid, report_drops, name=machine.shown_name, limits_biting=limits)

        yield StatusResponse(
            role="server",
            interface=server.device.name,
            device_kind=server.device.kind,
            data_plane=data_plane(server.device.kind),
            transport="udp,tunnel" if server.wireguard_port is not None else "tunnel",
            addresses=[f"{server.address}/64"],
            public_key=str(server.public_key),
            listen_port=server.wireguard_port or 0,
            drops=server.drops() | lost_records(),
            refusals=server.refusals(),
            state="serving",
            reports=None if reports is None else report_counts(reports),
        )
        async for part in server.links():
            yield StatusResponse(peers=[describe_peer(peer, status) for peer, status in part])

    async def events(self) -> AsyncIterator[Event]:
        async for event in self._serving.server.events():
            found = describe_event(event)
            yield Event(time=time.time(), kind=found.name, subject=found.subject, detail=found.text)


class Serve:
    """One `serve`: its options, and the inputs that a reload reads again."""

    def __init__(self, options: ServeConfig) -> None:
        """Raises ConfigurationError."""
        self._options = options
        self._reports = options.reports
        self._metrics = metrics_options(options.metrics_listen, options.metrics_machines)
        self._state = chosen_state(
            options.interface, options.state, options.no_state, options.store, options.store_password_file
        )
        self._token = self._read_token()
        if options.web_listen is not None:
            check_page()
        self._certificate = _certificate(options.tls_cert, options.tls_key)
        self._admin_certificate = _certificate(options.admin_tls_cert, options.admin_tls_key)
        self._make(None)  # validates the options before anything is opened
        key = state_key(options.state_key_file)
        if isinstance(self._state, StoreAddress):
            key = key_of_database(key, unsealed_secrets=options.unsealed_secrets)
        self._serving = Serving(self._make, self._state, self._run_beside, key)

    async def run(self) -> None:
        """Serve until cancelled. Raises SideroLinkError."""
        source = ServerSource(self._serving, self._options.interface, has_reports=self._reports is not None)
        async with (
            control_socket(
                self._options.interface, self._services(source), group=group_id(GROUP), limits=ADMIN_LIMITS
            ) as socket,
            self._serve_metrics(),
            background_tasks() as tasks,
        ):
            tasks.start_soon(keep_running, "feeding the watchdog", feed_watchdog)
            for certificate, reload in self._certificates():
                tasks.start_soon(
                    keep_running, "watching the certificate's files", partial(watch_files, certificate.files, reload)
                )
            if self._options.web_listen is not None:
                tasks.start_soon(keep_running, "the page", partial(keep_page, self._options, socket.absolute()))
            if self._options.join_token_file is not None:
                watch = partial(watch_files, [self._options.join_token_file], self._reload_token)
                tasks.start_soon(keep_running, "watching the join token's file", watch)
            await self._serving.run()

    def _services(self, source: ServerSource) -> list[Servable]:
        """The services of the control socket, with access control."""

        def server() -> Server:
            try:
                return self._serving.server
            except SideroLinkError as error:
                raise GRPCError(Status.UNAVAILABLE, str(error)) from None

        access = LocalAccess(administration=lambda: server().administration)
        administration = admin_services(lambda: server().administration, lambda: server().facts)
        passed_on = relayed(administration, lambda: server().peers)
        for_viewers = guarded([ControlService(source), *passed_on], access)
        return for_viewers + guarded([StateCommands(self._serving)], access, Role.ADMIN)

    @asynccontextmanager
    async def _serve_metrics(self) -> AsyncIterator[None]:
        """Serve metrics, if enabled."""
        if (options := self._metrics) is None:
            yield
            return
        from siderolink.cli.metrics import endpoint, sources

        source = sources.ServerMetrics(self._serving, options.machines, self._certificate)
        async with endpoint.serve_metrics(options, source):
            yield

    async def drain(self) -> None:
        """Move machines to other servers of the store, if there are any, within the configured time."""
        if self._options.drain_timeout and self._serving.is_running:
            try:
                left = await self._serving.server.drain(self._options.drain_timeout)
            except SideroLinkError as error:
                log_event("not drained", str(error), level=logging.WARNING)
                return
            if left:
                log_event("not drained", f"{left} machines are still here after {self._options.drain_timeout:g} s")

    def reload(self) -> None:
        """Reload the join token file and the certificates. Logs unusable ones and keeps the old ones in use."""
        notify(f"RELOADING=1\nMONOTONIC_USEC={time.clock_gettime_ns(time.CLOCK_MONOTONIC) // 1000}")
        self._reload_token()
        for _, reload in self._certificates():
            reload()
        notify("READY=1")

    def _reload_token(self) -> None:
        try:
            token = self._read_token()
            if token is None or token == self._token:
                log_event("unchanged", f"the join token{self._why_unchanged()}")
                return
            self._token = token
            self._serving.server.set_join_token(token)
            log_event("reloaded", "the join token")
        except SideroLinkError as error:
            log_event("not reloaded", str(error), level=logging.WARNING)

    def _why_unchanged(self) -> str:
        if self._options.stored_tokens_only:
            return ": this server uses only stored tokens"
        if self._options.join_token is not None:
            return ": it was given as an argument or by the environment, which a running server cannot read again"
        if self._options.join_token_file is None:
            return ": systemd copies a credential only when the service starts"
        return ""

    def _certificates(self) -> Iterator[tuple[ServerCertificate, Callable[[], None]]]:
        """The certificates in use, each with its description."""
        for certificate, name in (
            (self._certificate, "the TLS certificate"),
            (self._admin_certificate, "the administration's TLS certificate"),
        ):
            if certificate is not None:
                yield certificate, partial(_reload_certificate, certificate, name)

    def _read_token(self) -> str | None:
        if self._options.stored_tokens_only:
            return None
        token = read_secret("join-token", self._options.join_token, self._options.join_token_file)
        if token is None:
            raise ConfigurationError(
                "a server needs a join token: set --join-token-file, SIDEROLINK_JOIN_TOKEN "
                "or the systemd credential siderolink.join-token; or use only stored tokens: --stored-tokens-only"
            )
        hide(token)
        return token

    def _make(self, store: Store | None) -> Server:
        options = self._options
        certificate = self._admin_certificate or self._certificate
        return Server(
            api_listen=options.api_listen,
            wireguard_endpoints=options.wireguard_endpoint,
            wireguard_listen_port=options.wireguard_listen_port,
            force_tunnel=options.force_tunnel or options.tunnel_only,
            persistent_keepalive=options.persistent_keepalive,
            installation_id=options.installation_id,
            join_token=self._token,
            interface=options.interface,
            device=options.device.value,
            tls=None if self._certificate is None else self._certificate.context,
            admin=AdminOptions(
                listen=options.admin_listen,
                tls=None if certificate is None or options.admin_listen is None else certificate.context,
                audit_retention=options.audit_days * DAY,
                api_url=options.api_url,
            ),
            peers=options.peers,
            store=store,
            dial=not options.no_dial,
            keep_interface=options.keep_interface,
            namespace=options.netns,
            api_limits=options.api_limits,
            limits=options.machine_limits,
            reports=self._reports,
            history=options.history,
            overlay_ports=options.overlay_ports,
            policy=_join_policy(options),
            proxy_protocol_from=options.proxy_protocol_from,
            forwarded_from=options.forwarded_from,
        )

    async def _run_beside(self, server: Server, events: EventStream) -> None:
        tls = ", TLS" if self._certificate is not None else ""
        carrier = f"UDP port {server.wireguard_port}" if server.wireguard_port is not None else "the tunnel alone"
        log_event("serving", f"API on {self._options.api_listen}{tls}, WireGuard on {carrier}")
        if self._options.admin_listen is not None:
            log_event("administration", f"on TCP port {server.admin_port}, by API keys")
        log_event("overlay", f"{server.address} on {server.device.name} ({server.device.kind} device), key {server.public_key}")
        if self._state is not None:
            log_event("remembering", f"{(await server.counters()).accepted_machines} machines, in {self._state}")
        if self._reports is not None and (keep := self._reports.keep) is not None:
            log_event("keeping reports", f"for {keep.max_age / DAY:g} days, in {keep.folder}")
        calm_collector()
        notify("READY=1")
        async with background_tasks() as tasks:
            tasks.start_soon(keep_running, "returning free memory", FreeMemory().run)
            if self._reports is not None:
                show = partial(log_reports, server.reports, with_lines=self._options.print_machine_logs)
                tasks.start_soon(keep_running, "showing machines' reports", show)
            async for event in events:
                log_server_event(event)


def _certificate(file: Path | None, key: Path | None) -> ServerCertificate | None:
    return None if file is None else ServerCertificate(file, key)


def _reload_certificate(certificate: ServerCertificate, name: str) -> None:
    try:
        if certificate.reload():
            log_event("reloaded", name)
    except SideroLinkError as error:
        log_event("not reloaded", str(error), level=logging.WARNING)


def _join_policy(options: ServeConfig) -> JoinPolicy:
    """Raises ConfigurationError."""
    mode, days = options.join_tokens_mode, options.forget_after
    return JoinPolicy(
        mode=None if mode is None else JoinTokensMode(mode.value),
        stored_tokens_only=options.stored_tokens_only,
        forget_after=None if days is None else days * DAY,
    )


def run_serve(options: ServeConfig) -> None:
    """Serve until stopped. Raises SideroLinkError."""
    allow_descriptors(_MOST_DESCRIPTORS)
    calm_collector()  # collections while rows are read would take a quarter of the time
    serve = Serve(options)
    run_until_stopped(serve.run, serve.reload, serve.drain, leaves=True)


def check_serve(options: ServeConfig, layers: tuple[Layer, ...]) -> None:
    """Validate the settings and the files they name, as far as possible without serving; print them. Raises SideroLinkError."""
    Serve(options)
    for line in describe_settings(options, layers):
        show(line)
