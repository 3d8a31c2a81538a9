"""Methods that change the machine: each calls an embedder's hook or is refused."""

import uuid
from collections.abc import AsyncIterator, Callable, Mapping
from typing import Any, NoReturn, TypeVar

from grpclib import GRPCError, Status

from siderolink.client.maintenance import hooks
from siderolink.client.maintenance.dispatch import Answer, Implementation, closed_after
from siderolink.client.maintenance.hooks import MachineHooks
from siderolink.client.maintenance.roles import INSTALL_REFUSAL, CallerRole
from siderolink.common.errors import ConfigurationError
from siderolink.common.pb import machine as pb
from siderolink.common.pb.google.protobuf import Empty
from siderolink.common.text import one_line

A = TypeVar("A")

_MODES: Mapping[int, hooks.ApplyMode] = {0: "reboot", 1: "auto", 2: "no-reboot", 3: "staged", 4: "try"}
_MODE_NUMBERS = {mode: number for number, mode in _MODES.items()}
_WIPE_MODES: Mapping[int, hooks.WipeMode] = {0: "all", 1: "system-disk", 2: "user-disks"}
_LARGEST_KEY = 255
_LONGEST_NAME = 1024


class MachineActions:
    """Calls the hooks."""

    def __init__(self, machine_hooks: MachineHooks) -> None:
        self._hooks = machine_hooks

    def implementations(self) -> dict[str, Implementation]:
        """By the paths of their methods."""
        machine, lifecycle = "/machine.MachineService/", "/machine.LifecycleService/"
        unary: dict[str, tuple[Callable[[Any, CallerRole], Answer], type[Any], type[Any]]] = {
            "ApplyConfiguration": (self._apply, pb.ApplyConfigurationRequest, pb.ApplyConfigurationResponse),
            "MetaDelete": (self._meta_delete, pb.MetaDeleteRequest, pb.MetaDeleteResponse),
            "MetaWrite": (self._meta_write, pb.MetaWriteRequest, pb.MetaWriteResponse),
            "Reboot": (self._reboot, pb.RebootRequest, pb.RebootResponse),
            "Reset": (self._reset, pb.ResetRequest, pb.ResetResponse),
            "ServiceRestart": (self._service_restart, pb.ServiceRestartRequest, pb.ServiceRestartResponse),
            "ServiceStart": (self._service_start, pb.ServiceStartRequest, pb.ServiceStartResponse),
            "ServiceStop": (self._service_stop, pb.ServiceStopRequest, pb.ServiceStopResponse),
            "Shutdown": (self._shutdown, pb.ShutdownRequest, pb.ShutdownResponse),
            "Upgrade": (self._upgrade, pb.UpgradeRequest, pb.UpgradeResponse),
            "Version": (self._version, Empty, pb.VersionResponse),
        }
        streams = {
            f"{lifecycle}Install": Implementation(
                self._install, pb.LifecycleServiceInstallRequest, pb.LifecycleServiceInstallResponse, is_stream=True
            ),
            f"{lifecycle}Upgrade": Implementation(
                self._install_upgrade, pb.LifecycleServiceUpgradeRequest, pb.LifecycleServiceUpgradeResponse, is_stream=True
            ),
            "/machine.ImageService/Pull": Implementation(
                self._pull, pb.ImageServicePullRequest, pb.ImageServicePullResponse, is_stream=True
            ),
        }
        return streams | {
            f"{machine}{name}": Implementation(function, request, answer, is_action=name != "Version")
            for name, (function, request, answer) in unary.items()
        }

    async def _version(self, _: Empty, role: CallerRole) -> pb.VersionResponse:
        found = self._hooks.version
        information = pb.VersionInfo(tag=found.tag, sha=found.sha, built=found.built, os=found.os, arch=found.arch)
        platform = pb.PlatformInfo(name=found.platform, mode=found.mode)
        return pb.VersionResponse(messages=[pb.Version(version=information, platform=platform)])

    async def _apply(self, request: pb.ApplyConfigurationRequest, role: CallerRole) -> pb.ApplyConfigurationResponse:
        hook = _needed(self._hooks.apply_configuration, "ApplyConfiguration")
        mode = _MODES.get(int(request.mode))
        if mode is None:
            raise ConfigurationError(f"incorrect mode '{int(request.mode)}' specified for the apply config call")
        answer = await hook(
            hooks.ApplyRequest(
                data=request.data,
                mode=mode,
                dry_run=request.dry_run,
                try_timeout=request.try_mode_timeout,
                by_admin=role is CallerRole.ADMIN,
            )
        )
        applied = pb.ApplyConfiguration(
            warnings=list(answer.warnings),
            mode=pb.ApplyConfigurationRequestMode(_MODE_NUMBERS[answer.mode]),
            mode_details=answer.details,
        )
        return pb.ApplyConfigurationResponse(messages=[applied])

    async def _reboot(self, request: pb.RebootRequest, role: CallerRole) -> pb.RebootResponse:
        hook, actor = _needed(self._hooks.reboot, "Reboot"), str(uuid.uuid4())
        power_cycle = request.mode == pb.RebootRequestMode.POWERCYCLE
        await hook(hooks.RebootRequest(power_cycle=power_cycle, actor_id=actor))
        return pb.RebootResponse(messages=[pb.Reboot(actor_id=actor)])

    async def _shutdown(self, request: pb.ShutdownRequest, role: CallerRole) -> pb.ShutdownResponse:
        hook, actor = _needed(self._hooks.shutdown, "Shutdown"), str(uuid.uuid4())
        await hook(hooks.ShutdownRequest(force=request.force, actor_id=actor))
        return pb.ShutdownResponse(messages=[pb.Shutdown(actor_id=actor)])

    async def _reset(self, request: pb.ResetRequest, role: CallerRole) -> pb.ResetResponse:
        hook, actor = _needed(self._hooks.reset, "Reset"), str(uuid.uuid4())
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

    async def _meta_write(self, request: pb.MetaWriteRequest, role: CallerRole) -> pb.MetaWriteResponse:
        hook = _needed(self._hooks.meta_write, "MetaWrite")
        await hook(_key(request.key), request.value)
        return pb.MetaWriteResponse(messages=[pb.MetaWrite()])

    async def _meta_delete(self, request: pb.MetaDeleteRequest, role: CallerRole) -> pb.MetaDeleteResponse:
        hook = _needed(self._hooks.meta_delete, "MetaDelete")
        if not await hook(_key(request.key)):
            raise GRPCError(Status.NOT_FOUND, "meta key not found")
        return pb.MetaDeleteResponse(messages=[pb.MetaDelete()])

    async def _control(self, action: hooks.ServiceAction, service: str) -> str:
        hook = _needed(self._hooks.control_service, f"Service{action.capitalize()}")
        return await hook(action, one_line(service, limit=_LONGEST_NAME))

    async def _service_start(self, request: pb.ServiceStartRequest, role: CallerRole) -> pb.ServiceStartResponse:
        return pb.ServiceStartResponse(messages=[pb.ServiceStart(resp=await self._control("start", request.id))])

    async def _service_stop(self, request: pb.ServiceStopRequest, role: CallerRole) -> pb.ServiceStopResponse:
        return pb.ServiceStopResponse(messages=[pb.ServiceStop(resp=await self._control("stop", request.id))])

    async def _service_restart(self, request: pb.ServiceRestartRequest, role: CallerRole) -> pb.ServiceRestartResponse:
        return pb.ServiceRestartResponse(messages=[pb.ServiceRestart(resp=await self._control("restart", request.id))])

    async def _upgrade(self, request: pb.UpgradeRequest, role: CallerRole) -> pb.UpgradeResponse:
        hook = self._hooks.install
        if hook is None:
            raise GRPCError(Status.FAILED_PRECONDITION, f"Talos is not installed: {INSTALL_REFUSAL}")
        actor = str(uuid.uuid4())
        async with closed_after(hook(hooks.InstallRequest(image=request.image, is_upgrade=True))) as lines:
            async for _line in lines:
                pass
        return pb.UpgradeResponse(messages=[pb.Upgrade(ack="Upgrade request received", actor_id=actor)])

    async def _pull(self, request: pb.ImageServicePullRequest, role: CallerRole) -> AsyncIterator[pb.ImageServicePullResponse]:
        if self._hooks.pull_image is None:
            _refuse_install("ImageService/Pull")
        if not 0 < len(request.image_ref) <= _LONGEST_NAME:
            raise ConfigurationError(f"an image reference has 1 to {_LONGEST_NAME} characters")
        yield pb.ImageServicePullResponse(name=await self._hooks.pull_image(request.image_ref))

    async def _install(
        self, request: pb.LifecycleServiceInstallRequest, role: CallerRole
    ) -> AsyncIterator[pb.LifecycleServiceInstallResponse]:
        image = request.source.image_name if request.source is not None else ""
        disk = request.destination.disk if request.destination is not None else ""
        async for progress in self._progress("Install", hooks.InstallRequest(image=image, disk=disk)):
            yield pb.LifecycleServiceInstallResponse(progress=progress)

    async def _install_upgrade(
        self, request: pb.LifecycleServiceUpgradeRequest, role: CallerRole
    ) -> AsyncIterator[pb.LifecycleServiceUpgradeResponse]:
        image = request.source.image_name if request.source is not None else ""
        async for progress in self._progress("Upgrade", hooks.InstallRequest(image=image, is_upgrade=True)):
            yield pb.LifecycleServiceUpgradeResponse(progress=progress)

    async def _progress(self, name: str, request: hooks.InstallRequest) -> AsyncIterator[pb.LifecycleServiceInstallProgress]:
        if self._hooks.install is None:
            _refuse_install(f"LifecycleService/{name}")
        async with closed_after(self._hooks.install(request)) as lines:
            async for line in lines:
                yield pb.LifecycleServiceInstallProgress(message=line)
        yield pb.LifecycleServiceInstallProgress(exit_code=0)


def _refuse_install(name: str) -> NoReturn:
    raise GRPCError(Status.FAILED_PRECONDITION, f"{name}: {INSTALL_REFUSAL}")


def _needed(hook: A | None, name: str) -> A:
    if hook is None:
        raise GRPCError(Status.UNIMPLEMENTED, f"{name}: API is not implemented in maintenance mode on this machine")
    return hook


def _key(number: int) -> int:
    if number > _LARGEST_KEY:
        raise ConfigurationError("key must be a uint8")
    return number
