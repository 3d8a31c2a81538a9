"""The machine's own API beside a `join`: what is applied by it counts like documents that were found."""

import uuid
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from dataclasses import replace

from grpclib import GRPCError, Status

from siderolink.cli.reporting import Reporting
from siderolink.cli.running import say
from siderolink.cli.settings import FollowedSettings
from siderolink.client.config import MachineSettings, Setting
from siderolink.client.config.extra import needing_extra
from siderolink.client.maintenance import (
    ApplyAnswer,
    ApplyRequest,
    Everywhere,
    LinkPresence,
    MachineHooks,
    MachineVersion,
    MaintenanceApi,
    Nowhere,
    serve_maintenance,
)
from siderolink.client.maintenance.resources.definitions import MACHINE_CONFIG
from siderolink.client.maintenance.resources.specs import MACHINE_CONFIG_ANNOTATIONS, machine_config
from siderolink.common.errors import ConfigurationError
from siderolink.common.keys import PrivateKey
from siderolink.common.pb.machine import ConfigLoadErrorEvent
from siderolink.common.text import one_line

_META_UUID, _META_UNIQUE_TOKEN = 15, 16
"""META keys by which a server gives a machine its identity."""
_LONGEST_META = 1024
_MODES = ("auto", "reboot", "no-reboot")
CONFIG_ID = "v1alpha1"


class Maintenance:
    """Serves the API, and applies configurations."""

    def __init__(self, settings: FollowedSettings, reporting: Reporting, key: PrivateKey, *, version: str = "") -> None:
        """`version` is a release's tag; the package's by default."""
        self._settings = settings
        self._reporting = reporting
        self._key = key
        self._version = MachineVersion(tag=version) if version else MachineVersion()
        self._api: MaintenanceApi | None = None

    @asynccontextmanager
    async def serve(self, *, node_uuid: str, port: int) -> AsyncIterator[LinkPresence]:
        """Serve while the body runs; what is yielded wants to know of the link."""
        place = Everywhere() if self._settings.current.url is None else Nowhere()
        hooks = MachineHooks(
            version=self._version,
            apply_configuration=self._apply,
            meta_write=self._write_meta,
            meta_delete=self._delete_meta,
        )
        async with serve_maintenance(hooks, node_uuid=node_uuid, place=place, port=port) as self._api:
            say("maintenance API", f"on port {port}, {'every address' if place == Everywhere() else 'the overlay alone'}")
            yield LinkPresence(self._api, private_key=self._key)

    async def _apply(self, request: ApplyRequest) -> ApplyAnswer:
        if request.mode not in _MODES:
            raise GRPCError(
                Status.UNIMPLEMENTED, f"apply configuration --mode='{request.mode}' is not supported in maintenance mode"
            )
        try:
            with needing_extra():
                from siderolink.client.config.documents import parse_documents
            documents = parse_documents([(request.data, "the configuration")])
        except ConfigurationError as error:
            self._reporting.events.publish(ConfigLoadErrorEvent(error=one_line(str(error))))
            raise
        settings = documents.settings
        warnings = list(settings.notes)
        if settings.url is not None and self._settings.has_url_argument:
            warnings.append("the join URL that was given as an argument counts, not the one of this configuration")
        if request.dry_run:
            return ApplyAnswer(warnings=tuple(warnings), details="Dry run: the configuration could be applied.")
        verdict = await self._settings.apply(settings)
        if verdict.is_refused:
            raise GRPCError(Status.FAILED_PRECONDITION, f"nothing was changed: {verdict.reason}")
        warnings += verdict.warnings
        if self._api is not None:
            spec = machine_config(request.data)
            self._api.resources.put(MACHINE_CONFIG, CONFIG_ID, spec, annotations=MACHINE_CONFIG_ANNOTATIONS)
        say("configuration", "applied by the maintenance API")
        return ApplyAnswer(warnings=tuple(warnings), details="Applied configuration without a reboot")

    async def _write_meta(self, key: int, value: bytes) -> None:
        """Join anew by what the server has written; it is known for as long as the program runs."""
        _check_key(key)
        verdict = await self._settings.write_meta(_with_meta(self._settings.meta, key, Setting(_read_meta(key, value), "META")))
        if verdict.is_refused:
            raise GRPCError(Status.FAILED_PRECONDITION, f"META key {key} was not kept: {verdict.reason}")
        say("META", f"key {key} was written by the maintenance API")

    async def _delete_meta(self, key: int) -> bool:
        _check_key(key)
        before = self._settings.meta
        await self._settings.write_meta(_with_meta(before, key, None))
        return self._settings.meta != before


def _check_key(key: int) -> None:
    if key not in (_META_UUID, _META_UNIQUE_TOKEN):
        raise GRPCError(
            Status.UNIMPLEMENTED,
            f"META key {key} is not kept here, but {_META_UUID} (UUID) and {_META_UNIQUE_TOKEN} (unique token) are",
        )


def _with_meta(meta: MachineSettings, key: int, setting: Setting[str] | None) -> MachineSettings:
    return replace(meta, uuid=setting) if key == _META_UUID else replace(meta, unique_token=setting)


def _read_meta(key: int, value: bytes) -> str:
    """Raises ConfigurationError, which repeats nothing of the value."""
    try:
        text = value.decode()
        if key == _META_UUID:
            return str(uuid.UUID(text))
    except ValueError:
        raise ConfigurationError(f"META key {key} must hold {'a UUID' if key == _META_UUID else 'text'}") from None
    if not text.isprintable() or not 0 < len(text) <= _LONGEST_META:
        raise ConfigurationError(f"META key {key} must hold one line of at most {_LONGEST_META} characters")
    return text
