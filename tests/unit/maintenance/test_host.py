"""Information about the host: the firmware's table, the kernel's files, and notified changes of both."""

import errno
import json
import os
import select
import struct
import subprocess
import sys
from functools import partial
from pathlib import Path

import anyio
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from siderolink.client.maintenance.host import disks, proc, smbios
from siderolink.client.maintenance.resources import ResourceStore, host
from siderolink.client.maintenance.resources.definitions import HOSTNAME_STATUS, LINK_STATUS, SECURITY_STATE
from siderolink.client.maintenance.resources.network import RouteFacts, route_status
from siderolink.common.pb import storage
from siderolink.common.tasks import background_tasks


def structure(kind: int, area: bytes, *strings: str) -> bytes:
    """One structure of the firmware's table; the area begins behind its header."""
    texts = b"".join(text.encode() + b"\0" for text in strings) or b"\0"
    return struct.pack("<BBH", kind, 4 + len(area), 0) + area + texts + b"\0"


def processor(status: int = 0x41, cores: int = 8, wide: int = 0) -> bytes:
    area = bytearray(0x30 - 4)
    for offset, value in {0x04: 1, 0x07: 2, 0x10: 3, 0x18: status, 0x20: 4, 0x23: cores, 0x24: cores, 0x25: cores}.items():
        area[offset - 4] = value
    struct.pack_into("<HH", area, 0x14 - 4, 4200, 3600)
    struct.pack_into("<HHH", area, 0x2A - 4, wide, wide, wide)
    return structure(4, bytes(area), "CPU 0", "Maker", "A Processor", "serial")


def memory(size: int, extended: int = 0) -> bytes:
    area = bytearray(0x20 - 4)
    struct.pack_into("<H", area, 0x0C - 4, size)
    area[0x10 - 4], area[0x11 - 4], area[0x17 - 4] = 1, 2, 3
    struct.pack_into("<H", area, 0x15 - 4, 3200)
    struct.pack_into("<I", area, 0x1C - 4, extended)
    return structure(17, bytes(area), "DIMM A1", "BANK 0", "Maker")


END = structure(127, b"")


def test_the_firmwares_table_gives_processors_and_memory(tmp_path: Path) -> None:
    table = tmp_path / "DMI"
    table.write_bytes(
        processor()
        + processor(cores=0xFF, wide=300)
        + processor(status=0)
        + memory(0x4000)
        + memory(0x7FFF, 65536)
        + memory(0)
        + END
    )
    processors, modules = smbios.inventory(table)
    first = processors["CPU-0"]
    assert (first.socket, first.manufacturer, first.product_name, first.serial_number) == (
        *("CPU 0", "Maker", "A Processor", "serial"),
    )
    assert (first.max_speed, first.boot_speed, first.core_count, first.thread_count) == (4200, 3600, 8, 8)
    assert processors["CPU-0-2"].core_count == 300
    assert processors["CPU-0-3"].core_count == 0  # an empty socket
    assert [modules[name].size for name in ("DIMM-A1-BANK-0", "DIMM-A1-BANK-0-2", "DIMM-A1-BANK-0-3")] == [16384, 65536, 0]
    assert modules["DIMM-A1-BANK-0"].speed == 3200


def test_without_a_firmware_table_the_kernel_gives_both(tmp_path: Path) -> None:
    blocks = [
        f"processor\t: {number}\nvendor_id\t: Maker\nmodel name\t: A Model\ncpu MHz\t\t: 2400.5\n"
        f"physical id\t: {number // 4}\ncore id\t\t: {number // 2 % 2}\n"
        for number in range(8)
    ]
    (tmp_path / "cpuinfo").write_text("\n".join(blocks))
    (tmp_path / "meminfo").write_text("MemTotal:        2097152 kB\n")
    processors, modules = smbios.inventory(tmp_path / "none", tmp_path)
    assert {name: (spec.core_count, spec.thread_count, spec.max_speed) for name, spec in processors.items()} == {
        "CPU-0": (2, 4, 2400),
        "CPU-1": (2, 4, 2400),
    }
    assert [(name, spec.size) for name, spec in modules.items()] == [("memory", 2048)]


@settings(max_examples=200)
@given(st.binary(max_size=300), st.integers(0, 200))
def test_a_malformed_table_ends_where_it_is_malformed(noise: bytes, cut: int) -> None:
    table = (processor() + memory(0x4000) + noise)[: max(cut, 1) + 60]
    for found in smbios.read_structures(table):
        assert len(found.area) >= 4
        found.text(0x10)


FILES = ("loadavg", "meminfo", "stat", "cpuinfo", "net/dev", "diskstats", "mounts")


@settings(max_examples=100, deadline=None)
@given(st.text("cpu0123456789 :%()\n-kBMemTotal\\/", max_size=200))
def test_any_content_of_the_kernels_files_is_read(tmp_path_factory: pytest.TempPathFactory, text: str) -> None:
    folder = tmp_path_factory.mktemp("proc")
    (folder / "net").mkdir()
    (folder / "7").mkdir()
    for name in (*FILES, "7/stat", "7/cmdline"):
        (folder / name).write_text(text)
    for message in (
        proc.load_average(folder),
        proc.memory_info(folder),
        proc.system_stat(folder),
        *proc.cpu_info(folder),
        proc.network_devices(folder),
        proc.disk_stats(folder),
        *proc.processes(with_arguments=True, proc=folder),
    ):
        assert isinstance(bytes(message), bytes)


def test_a_process_may_be_called_anything_and_its_secrets_are_masked(tmp_path: Path) -> None:
    folder = tmp_path / "42"
    folder.mkdir()
    columns = ["S", "1", *["0"] * 9, "100", "200", *["0"] * 4, "3", "0", "5", "4096", "2"]
    (folder / "stat").write_text("42 (a) b (c) " + " ".join(columns))
    (folder / "cmdline").write_bytes(b"siderolink\0join\0grpc://h?jointoken=s3cret&grpc_tunnel=true\0--unique-token\0hidden\0")
    os.symlink(b"/home/any user/no text\xff", folder / "exe")
    [found] = proc.processes(with_arguments=True, proc=tmp_path)
    assert (found.executable, bool(bytes(found))) == ("/home/any user/no text\ufffd", True)
    assert (found.command, found.state, found.ppid, found.threads) == ("a) b (c", "S", 1, 3)
    assert found.args == "siderolink join grpc://h?jointoken=…&grpc_tunnel=true --unique-token …"


def test_disks_are_read_from_sysfs(tmp_path: Path) -> None:
    for name, files in {
        "nvme0n1": {"size": "2000409264", "queue/rotational": "0", "device/model": "A Model  ", "wwid": "eui.1", "ro": "0"},
        "sda": {"size": "7814037168", "queue/rotational": "1", "queue/logical_block_size": "4096"},
        "sr0": {"size": "0"},
        "loop0": {"size": "8"},
        "loop1": {"size": "0"},
        "zram0": {"size": "8"},
    }.items():
        for path, text in files.items():
            (tmp_path / name / path).parent.mkdir(parents=True, exist_ok=True)
            (tmp_path / name / path).write_text(text + "\n")
    found = disks.read_disks(tmp_path)
    assert set(found) == {"nvme0n1", "sda", "sr0", "loop0"}
    nvme = found["nvme0n1"]
    assert (nvme.dev_path, nvme.size, nvme.pretty_size, nvme.model) == ("/dev/nvme0n1", 1024209543168, "1.0 TB", "A Model")
    assert (found["sda"].rotational, found["sda"].sector_size, found["sr0"].cdrom) == (True, 4096, True)
    kinds = storage.DiskDiskType
    assert {disk.device_name: disk.type for disk in disks.legacy_disks(found)} == {
        "/dev/nvme0n1": kinds.NVME,
        "/dev/sda": kinds.HDD,
        "/dev/sr0": kinds.CD,
    }


def test_a_route_is_named_as_existing_machines_name_it() -> None:
    def named(**fields: object) -> str:
        facts = {"family": 2, "destination": "", "gateway": "", "source": "", "link_index": 2, "link": "eth0", "table": 254}
        facts |= {"priority": 0, "scope": 0, "type": 1, "flags": 0, "protocol": 3, **fields}
        route = RouteFacts(**facts)  # type: ignore[arg-type]
        assert route_status(route).proto
        return route.id

    assert named(gateway="192.0.2.1", priority=1024) == "inet4/192.0.2.1//1024"
    assert named(family=10, gateway="fe80::1") == "eth0/inet6/fe80::1//0"
    assert named(destination="192.0.2.0/24", table=255, link="lo") == "local/inet4//192.0.2.0/24/0"
    assert named(destination="192.0.2.0/24", table=77) == "77/inet4//192.0.2.0/24/0"


@pytest.mark.anyio
async def test_an_unreadable_part_of_the_host_affects_nothing_else(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    calls = 0

    def broken() -> None:
        nonlocal calls
        calls += 1
        raise OSError(5, "no such luck")

    monkeypatch.setattr(host, "read_disks", broken)
    store = ResourceStore()
    async with anyio.create_task_group() as tasks:

        async def keep(*, task_status: "anyio.abc.TaskStatus[None]") -> None:
            await host.keep_host_resources(store, node_uuid="", task_status=task_status)

        await tasks.start(keep)
        assert calls == 1
        assert "cannot follow the disks" in caplog.text
        assert store.get(HOSTNAME_STATUS, "hostname") is not None
        assert store.list(LINK_STATUS)
        tasks.cancel_scope.cancel()


@pytest.mark.anyio
async def test_a_host_without_descriptors_loses_none_by_following_its_name(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    tried = 0

    def epoll() -> select.epoll:
        nonlocal tried
        tried += 1
        raise OSError(errno.EMFILE, "Too many open files")

    def held() -> int:
        """Files of the host's name that are open."""
        names = (f"/proc/self/fd/{name}" for name in os.listdir("/proc/self/fd"))
        return sum(os.path.realpath(name) == str(host.HOSTNAME) for name in names)

    monkeypatch.setattr(select, "epoll", epoll)
    monkeypatch.setattr(host, "_RETRY_SECONDS", 0.001)
    store = ResourceStore()
    async with background_tasks() as tasks:
        await tasks.start(partial(host.keep_host_resources, store, node_uuid=""))
        with anyio.fail_after(60):
            while tried < 5:
                await anyio.sleep(0.001)
        assert held() == 0
    assert "cannot follow the host's name" in caplog.text


@pytest.mark.anyio
async def test_slow_firmware_does_not_stop_the_loop(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    variable = tmp_path / "SecureBoot"
    os.mkfifo(variable)  # reading it waits for a writer
    monkeypatch.setattr(host, "SECURE_BOOT", variable)
    store = ResourceStore()
    async with anyio.create_task_group() as tasks:

        async def keep(*, task_status: "anyio.abc.TaskStatus[None]") -> None:
            await host.keep_host_resources(store, node_uuid="", task_status=task_status)

        async def answer() -> None:
            with anyio.fail_after(60):
                while True:
                    try:
                        descriptor = os.open(variable, os.O_WRONLY | os.O_NONBLOCK)
                    except OSError:  # nobody reads yet
                        await anyio.sleep(0.01)
                        continue
                    os.write(descriptor, b"\x06\0\0\0\x01")
                    os.close(descriptor)
                    return

        tasks.start_soon(answer)
        await tasks.start(keep)
        found = store.get(SECURITY_STATE, "securitystate")
        assert found is not None
        assert found.spec.fields["secureBoot"] is True
        tasks.cancel_scope.cancel()


HOSTNAME_PROGRAM = r"""
import anyio, json, socket
from siderolink.client.maintenance.resources import ResourceStore
from siderolink.client.maintenance.resources.definitions import HOSTNAME_STATUS
from siderolink.client.maintenance.resources.host import keep_host_resources

async def main():
    store = ResourceStore()
    async with anyio.create_task_group() as tasks:
        async def keep(*, task_status):
            await keep_host_resources(store, node_uuid="", task_status=task_status)
        await tasks.start(keep)
        watch = store.watch(HOSTNAME_STATUS, "hostname")
        names = []
        for name in ("one.example", "two", b"no text \xff"):
            socket.sethostname(name)
            with anyio.fail_after(30):
                names.append(dict((await watch.next()).resource.spec.fields))
        print(json.dumps(names))
        tasks.cancel_scope.cancel()

anyio.run(main, backend_options={"use_uvloop": %s})
"""


@pytest.mark.parametrize("uvloop", [False, True])
def test_a_changed_host_name_is_reported(uvloop: bool) -> None:
    command = ["unshare", "--uts", sys.executable, "-c", HOSTNAME_PROGRAM % uvloop]
    done = subprocess.run(command, capture_output=True, text=True, check=False, timeout=60)
    if "unshare failed" in done.stderr:
        pytest.skip("needs root")
    assert json.loads(done.stdout) == [
        {"hostname": "one", "domainname": "example"},
        {"hostname": "two", "domainname": ""},
        {"hostname": "no text \ufffd", "domainname": ""},
    ], done.stderr
