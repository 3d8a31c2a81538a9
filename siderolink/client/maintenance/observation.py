"""Read-only methods: statistics of the kernel, logs, events, services."""

import asyncio
import contextlib
from collections import Counter, defaultdict
from collections.abc import AsyncIterator, Callable
from datetime import UTC, datetime
from functools import partial
from pathlib import Path
from typing import Any, TypeVar

import anyio
from grpclib import GRPCError, Status

from siderolink.client.maintenance.dispatch import Answer, Implementation, closed_after
from siderolink.client.maintenance.history import EventHistory, LogBuffer
from siderolink.client.maintenance.hooks import LogRequest, MachineHooks
from siderolink.client.maintenance.host import disks, proc
from siderolink.client.maintenance.host.kernel_log import kernel_log
from siderolink.client.maintenance.roles import CallerRole
from siderolink.common.pb import machine as pb
from siderolink.common.pb import storage
from siderolink.common.pb import time as pb_time
from siderolink.common.pb.common import Data
from siderolink.common.pb.google.protobuf import Empty
from siderolink.common.tasks import in_thread
from siderolink.common.text import host_name, one_line

T = TypeVar("T")

_READ_SECONDS = 10.0
_FRESH_SECONDS = 1.0
"""Callers within this time share one reading."""
_READABLE = (
    "/proc/sys/kernel/random/boot_id",
    "/proc/version",
    "/proc/uptime",
    "/proc/loadavg",
    "/proc/meminfo",
    "/proc/cpuinfo",
    "/proc/stat",
    "/etc/os-release",
    "/etc/hostname",
)
_PART = 32 * 1024
_MAX_KERNEL_READERS = 8
_MAX_THREADS = 4
_MAX_FILE = 1024 * 1024
OWN_LOG, KERNEL_LOG = "siderolink", "kernel"

_processes = partial(proc.processes, with_arguments=False)
_all_of_processes = partial(proc.processes, with_arguments=True)


class Observation:
    """Reads the kernel's files in a few separate threads, so that a read that hangs delays nothing else."""

    def __init__(self, hooks: MachineHooks, events: EventHistory, log: LogBuffer) -> None:
        self._hooks = hooks
        self._events = events
        self._log = log
        self._started = datetime.now(UTC)
        self._threads = _Threads(_MAX_THREADS)
        self._kernel_readers: Counter[CallerRole] = Counter()
        self._locks: defaultdict[object, anyio.Lock] = defaultdict(anyio.Lock)
        self._results: dict[object, tuple[float, Any]] = {}

    def implementations(self) -> dict[str, Implementation]:
        """By the paths of their methods."""
        machine = "/machine.MachineService/"
        unary: dict[str, tuple[Callable[[Any, CallerRole], Answer], type[Any], type[Any]]] = {
            "Containers": (_containers, pb.ContainersRequest, pb.ContainersResponse),
            "CPUFreqStats": (self._cpu_frequencies, Empty, pb.CpuFreqStatsResponse),
            "CPUInfo": (self._cpu_info, Empty, pb.CpuInfoResponse),
            "DiskStats": (self._disk_stats, Empty, pb.DiskStatsResponse),
            "Hostname": (_hostname, Empty, pb.HostnameResponse),
            "LoadAvg": (self._load_average, Empty, pb.LoadAvgResponse),
            "LogsContainers": (self._log_names, Empty, pb.LogsContainersResponse),
            "Memory": (self._memory, Empty, pb.MemoryResponse),
            "Mounts": (self._mounts, Empty, pb.MountsResponse),
            "NetworkDeviceStats": (self._network_devices, Empty, pb.NetworkDeviceStatsResponse),
            "Processes": (self._processes, Empty, pb.ProcessesResponse),
            "ServiceList": (self._services, Empty, pb.ServiceListResponse),
            "Stats": (_stats, pb.StatsRequest, pb.StatsResponse),
            "SystemStat": (self._system_stat, Empty, pb.SystemStatResponse),
        }
        streams: dict[str, tuple[Callable[[Any, CallerRole], Answer], type[Any], type[Any]]] = {
            f"{machine}Dmesg": (self._dmesg, pb.DmesgRequest, Data),
            f"{machine}Events": (self._follow_events, pb.EventsRequest, pb.Event),
            f"{machine}ImageList": (_nothing, pb.ImageListRequest, pb.ImageListResponse),
            f"{machine}Logs": (self._logs, pb.LogsRequest, Data),
            f"{machine}Read": (self._serve_file, pb.ReadRequest, Data),
            "/machine.ImageService/List": (_nothing, pb.ImageServiceListRequest, pb.ImageServiceListResponse),
        }
        others = {
            "/storage.StorageService/Disks": Implementation(self._disks, Empty, storage.DisksResponse),
            "/machine.StorageService/Statfs": Implementation(
                self._statfs, pb.StorageServiceStatfsRequest, pb.StorageServiceStatfsResponse
            ),
            "/time.TimeService/Time": Implementation(_time, Empty, pb_time.TimeResponse),
        }
        return (
            {f"{machine}{name}": Implementation(*found) for name, found in unary.items()}
            | {path: Implementation(*found, is_stream=True) for path, found in streams.items()}
            | others
        )

    async def _cached(self, function: Callable[[], T]) -> T:
        """The result of a function that reads files, at most `_FRESH_SECONDS` old. Raises GRPCError."""
        try:
            with anyio.fail_after(_READ_SECONDS):
                async with self._locks[function]:
                    known = self._results.get(function)
                    if known is None or anyio.current_time() - known[0] > _FRESH_SECONDS:
                        found = await self._read_in_thread(function)
                        known = self._results[function] = anyio.current_time(), found
                    result: T = known[1]
                    return result
        except TimeoutError:
            raise GRPCError(Status.DEADLINE_EXCEEDED, "the kernel did not answer in time") from None

    async def _read_in_thread(self, function: Callable[[], T]) -> T:
        """The result of a function that reads files. Raises GRPCError."""
        try:
            with anyio.fail_after(_READ_SECONDS):
                return await self._threads.run(function)
        except TimeoutError:
            raise GRPCError(Status.DEADLINE_EXCEEDED, "the kernel did not answer in time") from None
        except OSError as error:
            raise GRPCError(Status.UNAVAILABLE, f"the kernel query failed: {error.strerror}") from None

    async def _cpu_info(self, _: Empty, role: CallerRole) -> pb.CpuInfoResponse:
        return pb.CpuInfoResponse(messages=[pb.CpUsInfo(cpu_info=await self._cached(proc.cpu_info))])

    async def _cpu_frequencies(self, _: Empty, role: CallerRole) -> pb.CpuFreqStatsResponse:
        found = await self._cached(proc.cpu_frequencies)
        return pb.CpuFreqStatsResponse(messages=[pb.CpUsFreqStats(cpu_freq_stats=found)])

    async def _disk_stats(self, _: Empty, role: CallerRole) -> pb.DiskStatsResponse:
        return pb.DiskStatsResponse(messages=[await self._cached(proc.disk_stats)])

    async def _load_average(self, _: Empty, role: CallerRole) -> pb.LoadAvgResponse:
        return pb.LoadAvgResponse(messages=[await self._cached(proc.load_average)])

    async def _memory(self, _: Empty, role: CallerRole) -> pb.MemoryResponse:
        return pb.MemoryResponse(messages=[pb.Memory(meminfo=await self._cached(proc.memory_info))])

    async def _mounts(self, _: Empty, role: CallerRole) -> pb.MountsResponse:
        return pb.MountsResponse(messages=[pb.Mounts(stats=await self._cached(proc.mounts))])

    async def _network_devices(self, _: Empty, role: CallerRole) -> pb.NetworkDeviceStatsResponse:
        return pb.NetworkDeviceStatsResponse(messages=[await self._cached(proc.network_devices)])

    async def _processes(self, _: Empty, role: CallerRole) -> pb.ProcessesResponse:
        found = await self._cached(_all_of_processes if role is CallerRole.ADMIN else _processes)
        return pb.ProcessesResponse(messages=[pb.Process(processes=found)])

    async def _system_stat(self, _: Empty, role: CallerRole) -> pb.SystemStatResponse:
        return pb.SystemStatResponse(messages=[await self._cached(proc.system_stat)])

    async def _disks(self, _: Empty, role: CallerRole) -> storage.DisksResponse:
        found = await self._cached(disks.read_disks)
        return storage.DisksResponse(messages=[storage.Disks(disks=disks.legacy_disks(found))])

    async def _statfs(self, request: pb.StorageServiceStatfsRequest, role: CallerRole) -> pb.StorageServiceStatfsResponse:
        found = await self._read_in_thread(partial(proc.file_system, request.path))
        if found is None:
            raise GRPCError(Status.NOT_FOUND, f"no file system is mounted at {one_line(request.path, limit=200)!r}")
        return found

    async def _services(self, _: Empty, role: CallerRole) -> pb.ServiceListResponse:
        if self._hooks.services is not None:
            return pb.ServiceListResponse(messages=[pb.ServiceList(services=await self._hooks.services())])
        event = pb.ServiceEvent(msg="Started", state="Running", ts=self._started)
        own = pb.ServiceInfo(
            id=OWN_LOG,
            state="Running",
            events=pb.ServiceEvents(events=[event]),
            health=pb.ServiceHealth(healthy=True, last_change=self._started),
        )
        return pb.ServiceListResponse(messages=[pb.ServiceList(services=[own])])

    async def _log_names(self, _: Empty, role: CallerRole) -> pb.LogsContainersResponse:
        names = self._hooks.log_names if self._hooks.logs is not None else (OWN_LOG, KERNEL_LOG)
        return pb.LogsContainersResponse(messages=[pb.LogsContainer(ids=list(names))])

    async def _kernel_log(self, role: CallerRole, *, follow: bool, only_new: bool) -> AsyncIterator[bytes]:
        """Lines of the kernel's log. Each reader holds a descriptor, so the number of readers is limited per role."""
        if self._kernel_readers[role] >= _MAX_KERNEL_READERS:
            raise GRPCError(Status.RESOURCE_EXHAUSTED, "too many callers are reading the kernel log; stop some first")
        self._kernel_readers[role] += 1
        try:
            hook = self._hooks.dmesg
            lines = hook(follow, only_new) if hook is not None else kernel_log(follow=follow, only_new=only_new)
            async with closed_after(lines):
                async for line in lines:
                    yield line
        finally:
            self._kernel_readers[role] -= 1

    async def _dmesg(self, request: pb.DmesgRequest, role: CallerRole) -> AsyncIterator[Data]:
        async for part in _parts(self._kernel_log(role, follow=request.follow, only_new=request.follow and request.tail)):
            yield part

    async def _logs(self, request: pb.LogsRequest, role: CallerRole) -> AsyncIterator[Data]:
        name = request.id
        lines: AsyncIterator[bytes]
        if self._hooks.logs is not None and name in self._hooks.log_names:
            lines = self._hooks.logs(LogRequest(id=name, follow=request.follow, tail_lines=request.tail_lines))
        elif self._hooks.logs is None and name == OWN_LOG:
            lines = self._log.lines(follow=request.follow, tail_lines=request.tail_lines)
        elif self._hooks.logs is None and name == KERNEL_LOG:
            lines = self._kernel_log(role, follow=request.follow, only_new=False)
        else:
            raise GRPCError(Status.NOT_FOUND, f'log "{one_line(name, limit=100)}" was not registered')
        async for part in _parts(lines):
            yield part

    async def _follow_events(self, request: pb.EventsRequest, role: CallerRole) -> AsyncIterator[pb.Event]:
        if request.tail_seconds < 0:
            raise GRPCError(Status.INVALID_ARGUMENT, "tail_seconds must not be negative")
        async with closed_after(self._events.follow(request)) as events:
            async for event in events:
                yield event

    async def _serve_file(self, request: pb.ReadRequest, role: CallerRole) -> AsyncIterator[Data]:
        if request.path not in _READABLE:
            allowed = ", ".join(_READABLE)
            raise GRPCError(Status.PERMISSION_DENIED, f"this machine only serves the files {allowed}")
        text = (await self._read_in_thread(partial(proc.read_text, Path(request.path), _MAX_FILE))).encode()
        if not text:
            raise GRPCError(Status.NOT_FOUND, f"{request.path} cannot be read on this machine")
        for start in range(0, len(text), _PART):
            yield Data(bytes=text[start : start + _PART])


class _Threads:
    """Runs reads in a few threads. One that hangs keeps its place after its caller has left, so there are never more."""

    def __init__(self, most: int) -> None:
        self._places = anyio.CapacityLimiter(most)

    async def run(self, function: Callable[[], T]) -> T:
        """The function's result; a cancelled caller does not wait for it."""
        place, loop, has_begun = object(), asyncio.get_running_loop(), False

        def release() -> None:
            with contextlib.suppress(RuntimeError):  # it was released before
                self._places.release_on_behalf_of(place)

        def read() -> T:
            nonlocal has_begun
            has_begun = True
            try:
                return function()
            finally:
                with contextlib.suppress(RuntimeError):  # the loop has ended
                    loop.call_soon_threadsafe(release)

        await self._places.acquire_on_behalf_of(place)
        try:
            return await in_thread(read, abandon_on_cancel=True)
        finally:
            if not has_begun:
                release()


async def _parts(lines: AsyncIterator[bytes]) -> AsyncIterator[Data]:
    """Convert lines to messages."""
    async with closed_after(lines):
        async for line in lines:
            yield Data(bytes=line)


async def _hostname(_: Empty, role: CallerRole) -> pb.HostnameResponse:
    return pb.HostnameResponse(messages=[pb.Hostname(hostname=host_name())])


async def _containers(_: pb.ContainersRequest, role: CallerRole) -> pb.ContainersResponse:
    return pb.ContainersResponse(messages=[pb.Container()])


async def _stats(_: pb.StatsRequest, role: CallerRole) -> pb.StatsResponse:
    return pb.StatsResponse(messages=[pb.Stats()])


async def _time(_: Empty, role: CallerRole) -> pb_time.TimeResponse:
    now = datetime.now(UTC)
    return pb_time.TimeResponse(messages=[pb_time.Time(localtime=now, remotetime=now)])


async def _nothing(_: object, role: CallerRole) -> AsyncIterator[Any]:
    nothing: tuple[Any, ...] = ()
    for one in nothing:
        yield one
