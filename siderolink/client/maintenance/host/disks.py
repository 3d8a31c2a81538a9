"""The host's disks, from sysfs (the kernel's Documentation/ABI/stable/sysfs-block)."""

import os
import re
from pathlib import Path

from siderolink.client.maintenance.host.proc import number, read_text
from siderolink.common.pb import storage
from siderolink.common.pb.talos.resource.definitions.block import DiskSpec

BLOCK = Path("/sys/block")
_MAX_DISKS = 512
_SKIPPED = re.compile(r"(?:ram|zram|nbd|fd)\d+\Z")
_SECTOR = 512
_UNITS = ("B", "kB", "MB", "GB", "TB", "PB", "EB")
_TYPES = storage.DiskDiskType


def read_disks(block: Path = BLOCK) -> dict[str, DiskSpec]:
    """Disks with a size, by name."""
    try:
        names = sorted(os.listdir(block))[:_MAX_DISKS]
    except OSError:
        return {}
    found = {name: _disk(block / name, name) for name in names if not _SKIPPED.match(name)}
    return {name: disk for name, disk in found.items() if disk.size or disk.cdrom}


def _disk(folder: Path, name: str) -> DiskSpec:
    def read(path: str) -> str:
        return " ".join(read_text(folder / path, 512).replace("\0", " ").split())

    real = os.path.realpath(folder)
    size = number(read("size")) * _SECTOR
    cdrom = name.startswith("sr")
    return DiskSpec(
        size=size,
        io_size=number(read("queue/optimal_io_size")) or number(read("queue/minimum_io_size")) or _SECTOR,
        sector_size=number(read("queue/logical_block_size")) or _SECTOR,
        readonly=read("ro") == "1",
        model=read("device/model"),
        serial=read("device/serial") or read("serial"),
        modalias=read("device/modalias"),
        wwid=read("wwid") or read("device/wwid"),
        bus_path=_bus_path(real),
        sub_system=os.path.realpath(folder / "subsystem"),
        transport=_transport(name, real),
        rotational=read("queue/rotational") == "1" and not cdrom,
        cdrom=cdrom,
        dev_path=f"/dev/{name}",
        pretty_size=pretty_size(size),
        secondary_disks=_secondary(folder),
        uuid=read("uuid") or read("device/uuid"),
        firmware_version=read("device/firmware_rev") or read("device/rev"),
    )


def _bus_path(real: str) -> str:
    """The part of a device's path between the devices' folder and the block device."""
    return real.partition("/devices")[2].partition("/block/")[0]


def _transport(name: str, real: str) -> str:
    for mark, transport in (("/virtio", "virtio"), ("/usb", "usb"), ("/ata", "sata"), ("/mmc", "mmc"), ("/nvme", "nvme")):
        if mark in real:
            return transport
    if name.startswith("xvd"):
        return "xen"
    return "scsi" if "/host" in real and "/target" in real else ""


def _secondary(folder: Path) -> list[str]:
    """The disks that underlie a device of the device mapper or MD."""
    try:
        return sorted(os.listdir(folder / "slaves"))[:_MAX_DISKS]
    except OSError:
        return []


def pretty_size(size: int) -> str:
    """A size in powers of 1,000 with two digits, for display."""
    value, unit = float(size), 0
    while value >= 1000 and unit < len(_UNITS) - 1:
        value, unit = value / 1000, unit + 1
    return f"{value:.1f} {_UNITS[unit]}" if unit and value < 10 else f"{value:.0f} {_UNITS[unit]}"


def legacy_disks(found: dict[str, DiskSpec]) -> list[storage.Disk]:
    """The disks in the form of StorageService/Disks: without loop devices, and none marked as the system disk."""
    return [
        storage.Disk(
            size=disk.size,
            model=disk.model,
            device_name=disk.dev_path,
            serial=disk.serial,
            modalias=disk.modalias,
            uuid=disk.uuid,
            wwid=disk.wwid,
            type=_type(name, disk),
            bus_path=disk.bus_path,
            subsystem=disk.sub_system,
            readonly=disk.readonly,
        )
        for name, disk in found.items()
        if not name.startswith("loop")
    ]


def _type(name: str, disk: DiskSpec) -> storage.DiskDiskType:
    if disk.cdrom:
        return _TYPES.CD
    if disk.transport == "nvme" or name.startswith("nvme"):
        return _TYPES.NVME
    if disk.transport == "mmc":
        return _TYPES.SD
    return _TYPES.HDD if disk.rotational else _TYPES.SSD
