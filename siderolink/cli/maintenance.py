"""The machine API of `join`. A configuration applied through it acts like a local document."""

import uuid
from collections.abc import AsyncIterator, Mapping
from contextlib import asynccontextmanager
from dataclasses import dataclass
from pathlib import Path

import anyio
from grpclib import GRPCError, Status

from siderolink.cli.logs import log_event
from siderolink.cli.reporting import Reporting
from siderolink.cli.settings import FollowedSettings
from siderolink.client.config import MachineSettings, Setting
from siderolink.client.maintenance import (
    API_PORT,
    ApplyAnswer,
    ApplyRequest,
    ConfigurationKeeper,
    Everywhere,
    LinkFollower,
    MachineHooks,
    MachineVersion,
    MetaStore,
    Nowhere,
    ResourceStore,
    serve_maintenance,
)
from siderolink.client.maintenance.meta import UNIQUE_TOKEN_KEY, UUID_KEY
from siderolink.common.machine_events import MachineEventPayload
from siderolink.common.pb.machine import (
    ConfigLoadErrorEvent,
    MachineStatusEvent,
    MachineStatusEventMachineStage,
    MachineStatusEventMachineStatus,
)
from siderolink.common.tasks import background_tasks

_LONGEST_TOKEN = 1024


@dataclass(frozen=True, slots=True, kw_only=True)
class MaintenanceOptions:
    """Options as given on the command line."""

    port: int = API_PORT
    version: str = ""
    """A release tag."""
    meta: Path | None = None
    """The file that stores META."""
    configuration: Path | None = None
    """The file that stores an applied configuration."""


class Maintenance:
    """Serves the API, and applies configurations."""

    def __init__(self, settings: FollowedSettings, reporting: Reporting, options: MaintenanceOptions) -> None:
        """Reads META from its file. Raises ConfigurationError."""
        self._settings = settings
        self._reporting = reporting
        self._options = options
        self._version = MachineVersion(tag=options.version) if options.version else MachineVersion()
        self._resources = ResourceStore()
        self._meta = MetaStore(self._resources, options.meta)
        self._changing_meta = anyio.Lock()
        self._configuration = ConfigurationKeeper(
            self._resources, settings.apply, path=options.configuration, on_refusal=self._on_refusal
        )

    async def load(self) -> None:
        """Apply the stored configuration before there is a link. Raises ConfigurationError."""
        await self._configuration.load()
        if self._meta.values:
            await self._settings.write_meta(_identity(self._meta.values))

    @asynccontextmanager
    async def serve(self, *, node_uuid: str) -> AsyncIterator[LinkFollower]:
        """Serve while the body runs. The yielded object must receive the link's events."""
        place = Everywhere() if self._settings.current.url is None else Nowhere()
        hooks = MachineHooks(
            version=self._version,
            apply_configuration=self._apply,
            meta_write=self._write_meta,
            meta_delete=self._delete_meta,
        )
        port = self._options.port
        async with (
            background_tasks() as tasks,
            serve_maintenance(hooks, node_uuid=node_uuid, place=place, port=port, resources=self._resources) as api,
        ):
            tasks.start_soon(self._configuration.run)
            log_event("maintenance API", f"on port {port}, {'every address' if place == Everywhere() else 'the overlay alone'}")
            self._reporting.also_to(api.events.publish)
            self._reporting.publish(_in_maintenance())
            yield LinkFollower(api)

    def _on_refusal(self, event: ConfigLoadErrorEvent) -> None:
        self._reporting.publish(event)

    async def _apply(self, request: ApplyRequest) -> ApplyAnswer:
        answer = await self._configuration.apply(request)
        if request.dry_run:
            return answer
        log_event("configuration", f"applied by the maintenance API ({request.mode})")
        warnings = answer.warnings
        if self._settings.has_url_argument and self._configuration.has_join:
            warnings += ("the join URL given as an argument overrides the one of this configuration",)
        return ApplyAnswer(warnings=warnings, mode=answer.mode, details=answer.details)

    async def _write_meta(self, key: int, value: bytes) -> None:
        async with self._changing_meta:
            await self._change_meta(key, value)
        log_event("META", f"key {key} was written by the maintenance API")

    async def _delete_meta(self, key: int) -> bool:
        async with self._changing_meta:
            if key not in self._meta.values:
                return False
            await self._change_meta(key, None)
        log_event("META", f"key {key} was deleted by the maintenance API")
        return True

    async def _change_meta(self, key: int, value: bytes | None) -> None:
        """Set or remove a key. Raises GRPCError, with nothing changed.

        The two keys of the machine's identity are tested alongside the link, and kept unless they are refused.
        """
        if key not in (UUID_KEY, UNIQUE_TOKEN_KEY):
            await self._meta.set(key, value)
            return
        values, identity = dict(self._meta.values), self._settings.meta
        wanted = _identity(values | {key: value})
        await self._settings.announce_meta(wanted)
        try:
            await self._meta.set(key, value)
            verdict = await self._settings.write_meta(wanted)
            if verdict.is_refused:
                await self._meta.set(key, values.get(key))
                raise GRPCError(Status.FAILED_PRECONDITION, f"META key {key} was not changed: {verdict.reason}")
        except GRPCError:
            await self._settings.write_meta(identity)
            raise


def _identity(values: Mapping[int, bytes | None]) -> MachineSettings:
    """The machine's identity from META. Values that cannot be used for joining are stored but ignored."""
    node_uuid = _read_uuid(values.get(UUID_KEY) or b"")
    token = _read_token(values.get(UNIQUE_TOKEN_KEY))
    return MachineSettings(
        uuid=None if node_uuid is None else Setting(node_uuid, "META"),
        unique_token=None if token is None else Setting(token, "META"),
    )


def _in_maintenance() -> MachineEventPayload:
    return MachineStatusEvent(
        stage=MachineStatusEventMachineStage.MAINTENANCE, status=MachineStatusEventMachineStatus(ready=True)
    )


def _read_uuid(value: bytes) -> str | None:
    """An empty value means none, as on existing machines."""
    if not value:
        return None
    try:
        return str(uuid.UUID(value.decode()))
    except ValueError:
        log_event("META", f"key {UUID_KEY} is not a UUID; the machine keeps its present one")
        return None


def _read_token(value: bytes | None) -> str | None:
    """An empty value disables the token of the settings, as on existing machines."""
    if value is None:
        return None
    text = value.decode(errors="replace")
    if len(text) > _LONGEST_TOKEN or not (text.isprintable() and value == text.encode()):
        log_event("META", f"key {UNIQUE_TOKEN_KEY} is not one line of at most {_LONGEST_TOKEN} characters; it is not used")
        return None
    return text
