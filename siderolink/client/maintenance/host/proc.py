"""Statistics of the kernel (proc(5)) as messages of the machine's API. Malformed numbers read as zero; reads are bounded."""

import os
import re
from collections.abc import Iterator
from pathlib import Path

from siderolink.common.pb import machine as pb

PROC = Path("/proc")
CPU = Path("/sys/devices/system/cpu")
_MAX_BYTES = 4 * 1024 * 1024
_MAX_ROWS = 4096
"""Rows of one table: processors, devices, mounts, processes."""
_MAX_ARGUMENTS = 512
_MAX_TEXT = 4096
_TICKS = os.sysconf("SC_CLK_TCK")
_PAGE = os.sysconf("SC_PAGE_SIZE")
_REMOTE = frozenset({"nfs", "nfs4", "cifs", "smb3", "9p", "ceph", "afs", "fuse", "autofs"})
"""File systems that may hang; their sizes are not queried."""
_SOFT_IRQS = {
    "hi": "HI",
    "timer": "TIMER",
    "net_tx": "NET_TX",
    "net_rx": "NET_RX",
    "block": "BLOCK",
    "block_io_poll": "IRQ_POLL",
    "tasklet": "TASKLET",
    "sched": "SCHED",
    "hrtimer": "HRTIMER",
    "rcu": "RCU",
}
_CPU_FIELDS = {
    "vendor_id": "vendor_id",
    "cpu family": "cpu_family",
    "model": "model",
    "model name": "model_name",
    "stepping": "stepping",
    "microcode": "microcode",
    "cache size": "cache_size",
    "physical id": "physical_id",
    "core id": "core_id",
    "apicid": "apic_id",
    "initial apicid": "initial_apic_id",
    "fpu": "fpu",
    "fpu_exception": "fpu_exception",
    "wp": "wp",
    "address sizes": "address_sizes",
    "power management": "power_management",
}
_CPU_NUMBERS = {
    "processor": "processor",
    "siblings": "siblings",
    "cpu cores": "cpu_cores",
    "cpuid level": "cpu_id_level",
    "clflush size": "cl_flush_size",
    "cache_alignment": "cache_alignment",
}
_SECRET = re.compile(r"(?i)((?:join_?token|unique-?token|password|secret)[=: ])[^\s&]+")


def read_text(path: Path, limit: int = _MAX_BYTES) -> str:
    """The beginning of a file; empty if it cannot be read."""
    try:
        with path.open("rb", buffering=0) as file:
            parts = []
            while limit > 0 and (part := file.read(min(limit, 1 << 16))):
                parts.append(part)
                limit -= len(part)
    except OSError:
        return ""
    return b"".join(parts).decode(errors="replace")


def number(text: str) -> int:
    """A whole number; 0 if the text is not a number."""
    return int(text) if text.isascii() and text.isdigit() and len(text) < 20 else 0


def _decimal(text: str) -> float:
    try:
        return float(text)
    except ValueError:
        return 0.0


def load_average(proc: Path = PROC) -> pb.LoadAvg:
    first, second, third = (*map(_decimal, read_text(proc / "loadavg").split()[:3]), 0.0, 0.0, 0.0)[:3]
    return pb.LoadAvg(load1=first, load5=second, load15=third)


def memory_info(proc: Path = PROC) -> pb.MemInfo:
    known = set(pb.MemInfo.__dataclass_fields__)
    found: dict[str, int] = {}
    for line in read_text(proc / "meminfo").splitlines():
        key, _, rest = line.partition(":")
        name = re.sub(r"[^a-z0-9]", "", key.lower())
        if name in known and rest.split():
            found[name] = number(rest.split()[0])
    return pb.MemInfo(**found)


def system_stat(proc: Path = PROC) -> pb.SystemStat:
    stat = pb.SystemStat()
    for line in read_text(proc / "stat").splitlines():
        key, *values = line.split() or [""]
        numbers = [number(value) for value in values]
        if key == "cpu":
            stat.cpu_total = _cpu_stat(numbers)
        elif key.startswith("cpu"):
            stat.cpu.append(_cpu_stat(numbers))
        elif key == "intr" and numbers:
            stat.irq_total, stat.irq = numbers[0], numbers[1:_MAX_ROWS]
        elif key == "softirq" and numbers:
            stat.soft_irq_total = numbers[0]
            stat.soft_irq = pb.SoftIrqStat(**dict(zip(_SOFT_IRQS, numbers[1:], strict=False)))
        elif key in _STAT_FIELDS and numbers:
            setattr(stat, _STAT_FIELDS[key], numbers[0])
    return stat


_STAT_FIELDS = {
    "btime": "boot_time",
    "ctxt": "context_switches",
    "processes": "process_created",
    "procs_running": "process_running",
    "procs_blocked": "process_blocked",
}
_CPU_TIMES = ("user", "nice", "system", "idle", "iowait", "irq", "soft_irq", "steal", "guest", "guest_nice")


def _cpu_stat(ticks: list[int]) -> pb.CpuStat:
    return pb.CpuStat(**{name: value / _TICKS for name, value in zip(_CPU_TIMES, ticks, strict=False)})


def cpu_info(proc: Path = PROC) -> list[pb.CpuInfo]:
    found: list[pb.CpuInfo] = []
    for block in read_text(proc / "cpuinfo").split("\n\n")[:_MAX_ROWS]:
        fields = {key.strip(): value.strip() for key, _, value in (line.partition(":") for line in block.splitlines())}
        if "processor" not in fields:
            continue
        info = pb.CpuInfo()
        for key, name in _CPU_FIELDS.items():
            setattr(info, name, fields.get(key, ""))
        for key, name in _CPU_NUMBERS.items():
            setattr(info, name, number(fields.get(key, "")) & 0xFFFFFFFF)
        info.cpu_mhz, info.bogo_mips = _decimal(fields.get("cpu MHz", "")), _decimal(fields.get("bogomips", ""))
        info.flags, info.bugs = fields.get("flags", "").split(), fields.get("bugs", "").split()
        found.append(info)
    return found


def cpu_frequencies(cpu: Path = CPU) -> list[pb.CpuFreqStats]:
    found = []
    for folder in sorted(cpu.glob("cpu[0-9]*/cpufreq"), key=lambda path: number(path.parent.name[3:]))[:_MAX_ROWS]:

        def read(name: str, folder: Path = folder) -> str:
            return read_text(folder / name, 64).strip()

        found.append(
            pb.CpuFreqStats(
                current_frequency=number(read("scaling_cur_freq")),
                minimum_frequency=number(read("scaling_min_freq")),
                maximum_frequency=number(read("scaling_max_freq")),
                governor=read("scaling_governor"),
            )
        )
    return found


def _field_names(message: type) -> list[str]:
    return [name for name in message.__dataclass_fields__ if name != "name"]  # type: ignore[attr-defined]


def network_devices(proc: Path = PROC) -> pb.NetworkDeviceStats:
    names = _field_names(pb.NetDev)
    devices = []
    for line in read_text(proc / "net" / "dev").splitlines()[2 : 2 + _MAX_ROWS]:
        device, _, rest = line.rpartition(":")
        values = dict(zip(names, map(number, rest.split()), strict=False))
        devices.append(pb.NetDev(name=device.strip(), **values))
    total = pb.NetDev(name="Total", **{name: sum(getattr(one, name) for one in devices) for name in names})
    return pb.NetworkDeviceStats(total=total, devices=devices)


def disk_stats(proc: Path = PROC) -> pb.DiskStats:
    names = _field_names(pb.DiskStat)
    devices = []
    for line in read_text(proc / "diskstats").splitlines()[:_MAX_ROWS]:
        columns = line.split()
        if len(columns) > 3:
            values = dict(zip(names, map(number, columns[3:]), strict=False))
            devices.append(pb.DiskStat(name=columns[2], **values))
    total = pb.DiskStat(name="Total", **{name: sum(getattr(one, name) for one in devices) for name in names})
    return pb.DiskStats(total=total, devices=devices)


def _mount_table(proc: Path = PROC) -> Iterator[tuple[str, str, str]]:
    """Source, place and type of each mounted file system."""
    for line in read_text(proc / "mounts").splitlines()[:_MAX_ROWS]:
        columns = [re.sub(r"\\([0-7]{3})", lambda found: chr(int(found[1], 8)), column) for column in line.split(" ")]
        if len(columns) >= 3:
            yield columns[0], columns[1], columns[2]


def mounts(proc: Path = PROC) -> list[pb.MountStat]:
    found = []
    for source, place, kind in _mount_table(proc):
        size = available = 0
        if kind.partition(".")[0] not in _REMOTE:
            try:
                stat = os.statvfs(place)
                size, available = stat.f_blocks * stat.f_frsize, stat.f_bavail * stat.f_frsize
            except OSError:
                pass
        found.append(pb.MountStat(filesystem=source, size=size, available=available, mounted_on=place))
    return found


def file_system(path: str, proc: Path = PROC) -> pb.StorageServiceStatfsResponse | None:
    """Statistics of the file system mounted at a path; None if there is none, or if querying it may hang."""
    kinds = {place: kind for _, place, kind in _mount_table(proc)}
    if path not in kinds or kinds[path].partition(".")[0] in _REMOTE:
        return None
    try:
        stat = os.statvfs(path)
    except OSError:
        return None
    return pb.StorageServiceStatfsResponse(
        size=stat.f_blocks * stat.f_frsize,
        used=(stat.f_blocks - stat.f_bfree) * stat.f_frsize,
        available=stat.f_bavail * stat.f_frsize,
        inodes=stat.f_files,
        inodes_used=stat.f_files - stat.f_ffree,
        inodes_free=stat.f_ffree,
    )


def processes(*, with_arguments: bool, proc: Path = PROC) -> list[pb.ProcessInfo]:
    """The host's processes, lowest process ids first. Secrets in arguments are masked."""
    numbers = sorted(int(name) for name in os.listdir(proc) if name.isascii() and name.isdigit())
    found = (_process(proc / str(pid), pid, with_arguments) for pid in numbers[:_MAX_ROWS])
    return [process for process in found if process is not None]


def _process(folder: Path, pid: int, with_arguments: bool) -> pb.ProcessInfo | None:
    text = read_text(folder / "stat", _MAX_TEXT)
    name, _, rest = text.rpartition(")")
    columns = rest.split()
    if len(columns) < 22:
        return None  # the process has just ended
    info = pb.ProcessInfo(
        pid=pid,
        ppid=number(columns[1]),
        state=columns[0],
        threads=number(columns[17]),
        cpu_time=(number(columns[11]) + number(columns[12])) / _TICKS,
        virtual_memory=number(columns[20]),
        resident_memory=number(columns[21]) * _PAGE,
        command=name.partition("(")[2],
    )
    if with_arguments:
        arguments = read_text(folder / "cmdline", _MAX_ARGUMENTS).replace("\0", " ").strip()
        info.args = masked(arguments)
        try:
            info.executable = os.readlink(os.fsencode(folder / "exe")).decode(errors="replace")
        except OSError:
            pass
    return info


def masked(text: str) -> str:
    """A command line without the values of tokens and passwords."""
    return _SECRET.sub(r"\1…", text)
