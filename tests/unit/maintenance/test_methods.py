"""Every method of a machine's API, by clients that were made from the .proto files: roles, answers, refusals."""

import os
import socket
import threading
from contextlib import suppress
from ipaddress import IPv6Address
from pathlib import Path
from typing import Any

import anyio
import anyio.lowlevel
import anyio.to_thread
import grpc
import pytest
from grpclib.encoding.proto import ProtoCodec

from siderolink.client.maintenance.dispatch import CallCounter, MethodTable
from siderolink.client.maintenance.roles import APPLY, METHODS, Admittance, CallerRole
from siderolink.common.pb.machine import AddressEvent
from siderolink.common.protobuf_wire import count_fields
from siderolink.common.protobuf_wire import encode_varint as varint
from tests.support.machine_api import MACHINE, STATE, status_of
from tests.support.machine_stubs import Stubs, ask, methods, outcome, refusal, serving

pytestmark = pytest.mark.anyio

DENIED = ("PERMISSION_DENIED", "not authorized")


# the rights of existing machines' methods, written out independently
READERS = [
    "ApplyConfiguration",
    "Containers",
    "CPUFreqStats",
    "CPUInfo",
    "DiskStats",
    "DiskUsage",
    "Dmesg",
    "Events",
    "Hostname",
    "ImageList",
    "List",
    "LoadAvg",
    "Logs",
    "LogsContainers",
    "Memory",
    "Mounts",
    "NetworkDeviceStats",
    "Netstat",
    "Processes",
    "ServiceList",
    "Stats",
    "SystemStat",
    "Version",
    "EtcdAlarmList",
    "EtcdMemberList",
    "EtcdStatus",
]
ADMINS = [
    "Copy",
    "ImagePull",
    "MetaDelete",
    "MetaWrite",
    "PacketCapture",
    "Read",
    "Reboot",
    "Reset",
    "Restart",
    "Rollback",
    "ServiceRestart",
    "ServiceStart",
    "ServiceStop",
    "Shutdown",
    "Upgrade",
    "Bootstrap",
    "GenerateClientConfiguration",
    "Kubeconfig",
    "EtcdRecover",
    "EtcdSnapshot",
    "EtcdDefragment",
    "EtcdLeaveCluster",
    "EtcdForfeitLeadership",
    "EtcdRemoveMemberByID",
    "EtcdAlarmDisarm",
]
OTHER_READERS = [
    "/storage.StorageService/Disks",
    "/storage.StorageService/BlockDeviceWipe",
    "/machine.StorageService/Statfs",
    "/machine.LVMService/LogicalVolumeRemove",
    "/machine.LVMService/VolumeGroupRemove",
    "/machine.LVMService/PhysicalVolumeRemove",
    "/machine.MDService/Destroy",
    "/machine.ImageService/List",
    "/machine.ImageService/Verify",
    "/time.TimeService/Time",
    "/time.TimeService/TimeCheck",
    "/inspect.InspectService/ControllerRuntimeDependencies",
    "/cluster.ClusterService/HealthCheck",
]
OTHER_ADMINS = [
    "/machine.LifecycleService/Install",
    "/machine.LifecycleService/Upgrade",
    "/machine.DebugService/ContainerRun",
    "/machine.ImageService/Import",
    "/machine.ImageService/Pull",
    "/machine.ImageService/Remove",
]


async def test_readers_have_the_rights_of_existing_machines(monkeypatch: pytest.MonkeyPatch) -> None:
    def look(stubs: Stubs) -> None:
        for path in [f"{MACHINE}{name}" for name in READERS] + OTHER_READERS:
            status, text = outcome(stubs, path)
            assert (status, text) != DENIED, path
            assert status not in ("UNKNOWN", "INTERNAL"), path
        for path in [f"{MACHINE}{name}" for name in ADMINS] + OTHER_ADMINS:
            assert outcome(stubs, path) == DENIED, path
        # methods that no machine has: the role is checked first
        for path in (f"{MACHINE}Nothing", "/no.Service/Method", "/", "/*", "/machine.MachineService/"):
            assert outcome(stubs, path) == DENIED, path

    async with serving(monkeypatch, CallerRole.READER) as api:
        await ask(api, look)


async def test_admins_get_through_to_every_method_and_are_told_which_one_is_not_served(monkeypatch: pytest.MonkeyPatch) -> None:
    def look(stubs: Stubs) -> None:
        for path in METHODS:
            status, text = outcome(stubs, path)
            assert (status, text) != DENIED, path
            assert status in (
                "OK",
                "UNIMPLEMENTED",
                "FAILED_PRECONDITION",
                "INVALID_ARGUMENT",
                "NOT_FOUND",
                "PERMISSION_DENIED",
            )
            if status == "UNIMPLEMENTED" and "control plane" not in text:
                assert METHODS[path].name in text, path
        assert outcome(stubs, f"{MACHINE}Nothing") == (
            "UNIMPLEMENTED",
            "unknown method Nothing for service machine.MachineService",
        )
        assert outcome(stubs, "/no.Service/Method") == ("UNIMPLEMENTED", "unknown service no.Service")
        assert outcome(stubs, f"{MACHINE}Kubeconfig") == (
            "UNIMPLEMENTED",
            "kubeconfig is only available on control plane nodes",
        )
        assert outcome(stubs, f"{MACHINE}EtcdMemberList")[1] == "member list is only available on control plane nodes"
        assert outcome(stubs, f"{MACHINE}Bootstrap") == ("FAILED_PRECONDITION", "bootstrap is not available yet")

    async with serving(monkeypatch, CallerRole.ADMIN) as api:
        await ask(api, look)


async def test_an_installation_is_refused_politely_at_its_first_call_and_at_all_others(monkeypatch: pytest.MonkeyPatch) -> None:
    def look(stubs: Stubs) -> None:
        status, text = refusal(stubs, "/machine.ImageService/Pull", image_ref="registry.example/installer:v1.14.0")
        assert status == "FAILED_PRECONDITION"
        assert "ImageService/Pull" in text
        assert "cannot be installed" in text
        for name in ("Install", "Upgrade"):
            status, text = refusal(stubs, f"/machine.LifecycleService/{name}")
            assert (status, "cannot be installed" in text) == ("FAILED_PRECONDITION", True)
        status, text = refusal(stubs, f"{MACHINE}Upgrade", image="registry.example/installer:v1.14.0")
        assert status == "FAILED_PRECONDITION"
        assert text.startswith("Talos is not installed")

    async with serving(monkeypatch, CallerRole.ADMIN) as api:
        before = sorted(resource.id for kind in api.resources for resource in api.resources.list(kind))
        await ask(api, look)
        assert sorted(resource.id for kind in api.resources for resource in api.resources.list(kind)) == before


async def test_the_hosts_figures_are_those_of_its_kernel(monkeypatch: pytest.MonkeyPatch) -> None:
    def look(stubs: Stubs) -> None:
        assert stubs.call(f"{MACHINE}Hostname").messages[0].hostname == socket.gethostname()
        [memory] = stubs.call(f"{MACHINE}Memory").messages
        total = int(Path("/proc/meminfo").read_text().split()[1])
        assert memory.meminfo.memtotal == total
        assert 0 < memory.meminfo.memavailable <= total
        [cpus] = stubs.call(f"{MACHINE}CPUInfo").messages
        assert len(cpus.cpu_info) == Path("/proc/cpuinfo").read_text().count("processor\t:")
        assert cpus.cpu_info[0].model_name
        [load] = stubs.call(f"{MACHINE}LoadAvg").messages
        assert load.load15 >= 0
        [stat] = stubs.call(f"{MACHINE}SystemStat").messages
        assert stat.boot_time > 1_000_000_000
        assert len(stat.cpu) == len(cpus.cpu_info)
        assert stat.cpu_total.user > 0
        mounts = {found.mounted_on: found for found in stubs.call(f"{MACHINE}Mounts").messages[0].stats}
        assert mounts["/"].size >= mounts["/"].available
        devices = {found.name: found for found in stubs.call(f"{MACHINE}NetworkDeviceStats").messages[0].devices}
        assert devices["lo"].rx_bytes > 0
        assert stubs.call(f"{MACHINE}DiskStats").messages[0].total.name == "Total"
        processes = {found.pid: found for found in stubs.call(f"{MACHINE}Processes").messages[0].processes}
        own = processes[os.getpid()]
        assert own.threads >= 1
        assert own.resident_memory > 0
        assert "python" in own.args
        [boot] = stubs.call(f"{MACHINE}Read", path="/proc/sys/kernel/random/boot_id")
        assert boot.bytes == Path("/proc/sys/kernel/random/boot_id").read_bytes()
        assert refusal(stubs, f"{MACHINE}Read", path="/etc/shadow")[0] == "PERMISSION_DENIED"
        assert stubs.call("/machine.StorageService/Statfs", path="/").size == mounts["/"].size
        assert refusal(stubs, "/machine.StorageService/Statfs", path="/no/such")[0] == "NOT_FOUND"
        assert abs(stubs.call("/time.TimeService/Time").messages[0].localtime.seconds - os.stat("/proc/self").st_ctime) < 86400
        for name in ("Containers", "Stats"):
            assert len(stubs.call(f"{MACHINE}{name}").messages) == 1
        assert stubs.call(f"{MACHINE}ImageList") == stubs.call("/machine.ImageService/List") == []
        [services] = stubs.call(f"{MACHINE}ServiceList").messages
        assert [(found.id, found.state, found.health.healthy) for found in services.services] == [
            ("siderolink", "Running", True)
        ]

    async with serving(monkeypatch, CallerRole.ADMIN) as api:
        await ask(api, look)


async def test_a_file_system_that_hangs_holds_few_threads_however_often_it_is_asked(monkeypatch: pytest.MonkeyPatch) -> None:
    answers, begun = threading.Event(), list[str]()
    statfs, seconds = "/machine.StorageService/Statfs", "siderolink.client.maintenance.observation._READ_SECONDS"

    def hang(path: str) -> None:
        begun.append(path)
        answers.wait(120)

    def look(stubs: Stubs) -> None:
        try:
            assert {refusal(stubs, statfs, path="/")[0] for _ in range(12)} == {"DEADLINE_EXCEEDED"}
            assert len(begun) <= 4
            monkeypatch.setattr(seconds, 60.0)
        finally:
            answers.set()
        assert refusal(stubs, statfs, path="/")[0] == "NOT_FOUND", "they are free again"

    monkeypatch.setattr("siderolink.client.maintenance.host.proc.file_system", hang)
    monkeypatch.setattr(seconds, 0.05)
    async with serving(monkeypatch, CallerRole.READER) as api:
        await ask(api, look)


async def test_no_disk_is_marked_as_system_disk(monkeypatch: pytest.MonkeyPatch) -> None:
    def look(stubs: Stubs) -> None:
        [answer] = stubs.call("/storage.StorageService/Disks").messages
        for disk in answer.disks:
            assert disk.device_name.startswith("/dev/")
            assert (disk.system_disk, disk.name) == (False, "")
        [version] = stubs.call(f"{MACHINE}Version").messages
        assert version.version.tag == "v1.14.0"
        assert (version.platform.name, version.platform.mode, version.HasField("features")) == ("metal", "metal", False)

    async with serving(monkeypatch, CallerRole.READER) as api:
        await ask(api, look)


async def test_readers_are_shown_no_arguments_of_processes(monkeypatch: pytest.MonkeyPatch) -> None:
    def look(stubs: Stubs) -> None:
        [answer] = stubs.call(f"{MACHINE}Processes").messages
        assert answer.processes
        assert not any(found.args or found.executable for found in answer.processes)

    async with serving(monkeypatch, CallerRole.READER) as api:
        await ask(api, look)


async def test_events_are_remembered_and_followed(monkeypatch: pytest.MonkeyPatch) -> None:
    async with serving(monkeypatch, CallerRole.READER) as api:
        for number in range(300):
            api.events.publish(AddressEvent(hostname=f"host-{number}"), actor_id="one" if number % 2 else "two")

        def follow(stubs: Stubs) -> list[Any]:
            stream = stubs.stream(f"{MACHINE}Events", tail_events=3)
            found = [next(stream) for _ in range(3)]
            anyio.from_thread.run_sync(api.events.publish, AddressEvent(hostname="new"))
            found.append(next(stream))
            stream.cancel()
            every = stubs.stream(f"{MACHINE}Events", tail_events=-1, with_actor_id="one")
            assert next(every).data.type_url == "type.googleapis.com/machine.AddressEvent"
            every.cancel()
            after = stubs.stream(f"{MACHINE}Events", tail_id=found[1].id)
            assert next(after).id == found[2].id
            after.cancel()
            return found

        found = await ask(api, follow)
        assert [event.data.value for event in found] == [
            bytes(AddressEvent(hostname=name)) for name in ("host-297", "host-298", "host-299", "new")
        ]
        assert [event.id for event in found] == sorted(event.id for event in found)


async def test_logs_are_this_programs_and_the_kernels(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    import logging

    def look(stubs: Stubs) -> None:
        assert list(stubs.call(f"{MACHINE}LogsContainers").messages[0].ids) == ["siderolink", "kernel"]
        lines = stubs.call(f"{MACHINE}Logs", id="siderolink", tail_lines=2)
        assert [line.bytes.split()[-1] for line in lines] == [b"two", b"three"]
        assert refusal(stubs, f"{MACHINE}Logs", id="nothing") == ("NOT_FOUND", 'log "nothing" was not registered')
        if os.access("/dev/kmsg", os.R_OK):
            written = b"".join(part.bytes for part in stubs.call(f"{MACHINE}Dmesg"))
            assert written.count(b"\n") > 0

    async with serving(monkeypatch, CallerRole.READER) as api:
        for text in ("one", "two", "three"):
            logging.getLogger("siderolink").error("%s", text)
        await anyio.lowlevel.checkpoint()
        await ask(api, look)


async def test_a_message_of_very_many_fields_is_never_decoded(monkeypatch: pytest.MonkeyPatch) -> None:
    """Decoding it would hold the event loop, and with it the link, for seconds; readers may call, too."""
    decoded: list[int] = []
    decode = ProtoCodec.decode

    def count(codec: ProtoCodec, data: bytes, message_type: Any) -> Any:
        decoded.append(count_fields(data, 2000, message_type))
        return decode(codec, data, message_type)

    monkeypatch.setattr(ProtoCodec, "decode", count)
    empty = b"\x0a\x00" * 10_000
    terms = b"\x1a" + varint(len(empty) + 4) + b"\x0a" + varint(len(empty)) + empty  # of a label query, in the options

    def call(stubs: Stubs) -> None:
        for path in (*METHODS, f"{STATE}Get", f"{STATE}List", f"{STATE}Watch"):
            for data in (empty, terms):
                stream = stubs.channel.unary_stream(path)(data, timeout=10)
                with suppress(grpc.RpcError):
                    next(stream, None)
                stream.cancel()

    async with serving(monkeypatch, CallerRole.ADMIN) as api:
        await ask(api, call)
    assert decoded, "those that have one unknown field of many bytes"
    assert max(decoded) <= 1024


def test_every_method_of_the_proto_files_is_in_the_table() -> None:
    assert {path for path, _ in methods()} <= METHODS.keys()
    table = MethodTable({}, Admittance(), CallCounter(lambda: None)).__mapping__()
    assert METHODS.keys() - table.keys() == {f"/cosi.resource.State/{name}" for name in ("Get", "List", "Watch")}
    assert METHODS[APPLY].role is CallerRole.READER
    assert Admittance(admin=IPv6Address("fd00::1")).role(("fd00::1", 1, 0, 0)) is CallerRole.ADMIN


@pytest.mark.skipif(not os.access("/dev/kmsg", os.R_OK), reason="the kernel's log cannot be read here")
async def test_readers_of_the_kernels_log_are_bounded_and_give_their_descriptors_back(monkeypatch: pytest.MonkeyPatch) -> None:
    def follow(stubs: Stubs) -> None:
        held = [stubs.stream(f"{MACHINE}Dmesg", follow=True) for _ in range(8)]
        for stream in held:
            next(stream)
        with pytest.raises(grpc.RpcError) as caught:
            next(stubs.stream(f"{MACHINE}Dmesg", follow=True))
        assert status_of(caught.value)[0] == "RESOURCE_EXHAUSTED"
        for stream in held:
            stream.cancel()

    async with serving(monkeypatch, CallerRole.READER) as api:
        await ask(api, follow)
        with anyio.fail_after(30):
            while kernel_logs():
                await anyio.sleep(0.01)
        await ask(api, lambda stubs: next(stubs.stream(f"{MACHINE}Dmesg", follow=True)))


def kernel_logs() -> int:
    """How many descriptors of this process are of the kernel's log."""
    found = 0
    for name in os.listdir("/proc/self/fd"):
        with suppress(OSError):
            found += os.readlink(f"/proc/self/fd/{name}") == "/dev/kmsg"
    return found
