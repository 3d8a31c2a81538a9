"""machine.MachineService, as far as a machine serves it over SideroLink."""

import uuid
from collections.abc import Awaitable, Callable
from typing import Any, TypeVar

import betterproto2
from grpclib import GRPCError, Status
from grpclib.const import Cardinality, Handler
from grpclib.server import Stream

from siderolink.client.maintenance import hooks
from siderolink.client.maintenance.callers import Admittance
from siderolink.client.maintenance.hooks import MachineHooks
from siderolink.common.errors import ConfigurationError
from siderolink.common.pb import machine as pb
from siderolink.common.pb.google.protobuf import Empty
from siderolink.common.protobuf_wire import has_declared_types
from siderolink.common.text import one_line

Q = TypeVar("Q", bound=betterproto2.Message)
A = TypeVar("A")
Method = Callable[[Any], Awaitable[betterproto2.Message]]

SERVICE = "machine.MachineService"
_MODES: dict[int, hooks.ApplyMode] = {0: "reboot", 1: "auto", 2: "no-reboot", 3: "staged", 4: "try"}
_MODE_NUMBERS = {mode: number for number, mode in _MODES.items()}
_WIPE_MODES: dict[int, hooks.WipeMode] = {0: "all", 1: "system-disk", 2: "user-disks"}
_LARGEST_KEY = 255


class CallCounter:
    """How many calls that may move the API are under way: they are answered before it moves."""

    def __init__(self, on_idle: Callable[[], None]) -> None:
        self._on_idle = on_idle
        self.count = 0

    def __enter__(self) -> None:
        self.count += 1

    def __exit__(self, *_: object) -> None:
        self.count -= 1
        if not self.count:
            self._on_idle()


class MachineService:
    """Serves the machine's own methods to the callers of one socket."""

    def __init__(self, machine_hooks: MachineHooks, admittance: Admittance, calls: CallCounter) -> None:
        self._hooks = machine_hooks
        self._admittance = admittance
        self._calls = calls

    def __mapping__(self) -> dict[str, Handler]:
        guarded = not self._admittance.readers_apply
        methods: dict[str, tuple[Method, type, type, bool]] = {
            "Version": (self._version, Empty, pb.VersionResponse, False),
            "ApplyConfiguration": (self._apply, pb.ApplyConfigurationRequest, pb.ApplyConfigurationResponse, guarded),
            "Reboot": (self._reboot, pb.RebootRequest, pb.RebootResponse, True),
            "Reset": (self._reset, pb.ResetRequest, pb.ResetResponse, True),
            "MetaWrite": (self._meta_write, pb.MetaWriteRequest, pb.MetaWriteResponse, True),
            "MetaDelete": (self._meta_delete, pb.MetaDeleteRequest, pb.MetaDeleteResponse, True),
        }
        return {
            f"/{SERVICE}/{name}": Handler(self._serving(method, admin), Cardinality.UNARY_UNARY, question, answer)
            for name, (method, question, answer, admin) in methods.items()
        }

    def _serving(self, method: Method, admin: bool) -> Callable[[Stream[Any, Any]], Awaitable[None]]:
        async def serve(stream: Stream[Any, Any]) -> None:
            if admin:
                self._admittance.require_admin(stream)
            request = await stream.recv_message()
            if request is None or not has_declared_types(request):
                raise GRPCError(Status.INVALID_ARGUMENT, "the message could not be read")
            with self._calls:
                try:
                    answer = await method(request)
                except ConfigurationError as error:
                    raise GRPCError(Status.INVALID_ARGUMENT, one_line(str(error))) from None
                await stream.send_message(answer)

        return serve

    async def _version(self, _: Empty) -> pb.VersionResponse:
        found = self._hooks.version
        information = pb.VersionInfo(tag=found.tag, sha=found.sha, built=found.built, os=found.os, arch=found.arch)
        platform = pb.PlatformInfo(name=found.platform, mode=found.mode)
        return pb.VersionResponse(messages=[pb.Version(version=information, platform=platform)])

    async def _apply(self, request: pb.ApplyConfigurationRequest) -> pb.ApplyConfigurationResponse:
        hook = _needed(self._hooks.apply_configuration)
        mode = _MODES.get(int(request.mode))
        if mode is None:
            raise ConfigurationError(f"there is no mode {int(request.mode)}")
        answer = await hook(
            hooks.ApplyRequest(data=request.data, mode=mode, dry_run=request.dry_run, try_timeout=request.try_mode_timeout)
        )
        applied = pb.ApplyConfiguration(
            warnings=list(answer.warnings),
            mode=pb.ApplyConfigurationRequestMode(_MODE_NUMBERS[answer.mode]),
            mode_details=answer.details,
        )
        return pb.ApplyConfigurationResponse(messages=[applied])

    async def _reboot(self, request: pb.RebootRequest) -> pb.RebootResponse:
        hook, actor = _needed(self._hooks.reboot), str(uuid.uuid4())
        power_cycle = request.mode == pb.RebootRequestMode.POWERCYCLE
        await hook(hooks.RebootRequest(power_cycle=power_cycle, actor_id=actor))
        return pb.RebootResponse(messages=[pb.Reboot(actor_id=actor)])

    async def _reset(self, request: pb.ResetRequest) -> pb.ResetResponse:
        hook, actor = _needed(self._hooks.reset), str(uuid.uuid4())
        mode = _WIPE_MODES.get(int(request.mode))
        if mode is None:
            raise ConfigurationError(f"there is no wipe mode {int(request.mode)}")
        partitions = (hooks.ResetPartition(label=spec.label, wipe=spec.wipe) for spec in request.system_partitions_to_wipe)
        await hook(
            hooks.ResetRequest(
                graceful=request.graceful,
                reboot=request.reboot,
                system_partitions=tuple(partitions),
                user_disks=tuple(request.user_disks_to_wipe),
                mode=mode,
                actor_id=actor,
            )
        )
        return pb.ResetResponse(messages=[pb.Reset(actor_id=actor)])

    async def _meta_write(self, request: pb.MetaWriteRequest) -> pb.MetaWriteResponse:
        hook = _needed(self._hooks.meta_write)
        await hook(_key(request.key), request.value)
        return pb.MetaWriteResponse(messages=[pb.MetaWrite()])

    async def _meta_delete(self, request: pb.MetaDeleteRequest) -> pb.MetaDeleteResponse:
        hook = _needed(self._hooks.meta_delete)
        if not await hook(_key(request.key)):
            raise GRPCError(Status.NOT_FOUND, "meta key not found")
        return pb.MetaDeleteResponse(messages=[pb.MetaDelete()])


def _needed(hook: A | None) -> A:
    if hook is None:
        raise GRPCError(Status.UNIMPLEMENTED, "API is not implemented in maintenance mode")
    return hook


def _key(number: int) -> int:
    if number > _LARGEST_KEY:
        raise ConfigurationError("key must be a uint8")
    return number
