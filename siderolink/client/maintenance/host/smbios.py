"""Processors and memory modules from the firmware's table (SMBIOS, DSP0134), or else from the kernel."""

from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import TypeVar

from siderolink.client.maintenance.host.proc import PROC, cpu_info, memory_info
from siderolink.common.pb.talos.resource.definitions.hardware import (
    MemoryModuleSpec,
    ProcessorSpec,
    SystemInformationSpec,
)

S = TypeVar("S")

TABLE = Path("/sys/firmware/dmi/tables/DMI")
DMI = Path("/sys/class/dmi/id")
_MAX_BYTES = 256 * 1024
_MAX_STRUCTURES = 4096
_PROCESSOR, _MEMORY_DEVICE, _END = 4, 17, 127
_POPULATED = 0x40


@dataclass(frozen=True, slots=True)
class Structure:
    """One structure of the table: its formatted area and its strings."""

    kind: int
    area: bytes
    strings: tuple[str, ...]

    def number(self, offset: int, size: int) -> int:
        """A little-endian number; 0 if the structure is of an older version and ends before it."""
        return int.from_bytes(self.area[offset : offset + size], "little") if offset + size <= len(self.area) else 0

    def text(self, offset: int) -> str:
        """The string whose number is at this offset."""
        index = self.number(offset, 1)
        return self.strings[index - 1] if 0 < index <= len(self.strings) else ""


def read_structures(table: bytes) -> Iterator[Structure]:
    """The structures of a table, up to its end or to the first that is malformed."""
    position = 0
    for _ in range(_MAX_STRUCTURES):
        if position + 4 > len(table):
            return
        kind, length = table[position], table[position + 1]
        end = table.find(b"\0\0", position + length)
        if length < 4 or end < 0:
            return
        texts = table[position + length : end].split(b"\0") if end > position + length else []
        yield Structure(
            kind, table[position : position + length], tuple(text.decode(errors="replace").strip() for text in texts)
        )
        if kind == _END:
            return
        position = end + 2


def inventory(table: Path = TABLE, proc: Path = PROC) -> tuple[dict[str, ProcessorSpec], dict[str, MemoryModuleSpec]]:
    """Processors and memory modules, by resource id."""
    try:
        with table.open("rb") as file:
            structures = list(read_structures(file.read(_MAX_BYTES)))
    except OSError:
        structures = []
    processors = _unique([_processor(found) for found in structures if found.kind == _PROCESSOR])
    modules = _unique([_module(found) for found in structures if found.kind == _MEMORY_DEVICE])
    usable = any(spec.core_count or spec.max_speed for spec in processors.values())
    sized = any(spec.size for spec in modules.values())
    return (processors if usable else _kernel_processors(proc)), (modules if sized else _kernel_memory(proc))


def _unique(found: list[tuple[str, S]]) -> dict[str, S]:
    named: dict[str, S] = {}
    for name, spec in found:
        key, count = name, 1
        while key in named:
            count += 1
            key = f"{name}-{count}"
        named[key] = spec
    return named


def _processor(found: Structure) -> tuple[str, ProcessorSpec]:
    def count(offset: int, wide_offset: int) -> int:
        short = found.number(offset, 1)
        return found.number(wide_offset, 2) if short == 0xFF and len(found.area) > wide_offset + 1 else short

    spec = ProcessorSpec(
        socket=found.text(0x04),
        manufacturer=found.text(0x07),
        product_name=found.text(0x10),
        max_speed=found.number(0x14, 2),
        boot_speed=found.number(0x16, 2),
        status=found.number(0x18, 1),
        serial_number=found.text(0x20),
        asset_tag=found.text(0x21),
        part_number=found.text(0x22),
    )
    if spec.status & _POPULATED:
        spec.core_count, spec.core_enabled, spec.thread_count = count(0x23, 0x2A), count(0x24, 0x2C), count(0x25, 0x2E)
    return spec.socket.replace(" ", "-") or "CPU", spec


def _module(found: Structure) -> tuple[str, MemoryModuleSpec]:
    size = found.number(0x0C, 2)
    if size == 0x7FFF:
        mebibytes = found.number(0x1C, 4) & 0x7FFFFFFF
    elif size == 0xFFFF:
        mebibytes = 0
    else:
        mebibytes = (size & 0x7FFF) // 1024 if size & 0x8000 else size
    spec = MemoryModuleSpec(
        size=mebibytes,
        device_locator=found.text(0x10),
        bank_locator=found.text(0x11),
        speed=found.number(0x15, 2),
        manufacturer=found.text(0x17),
        serial_number=found.text(0x18),
        asset_tag=found.text(0x19),
        product_name=found.text(0x1A),
    )
    name = "-".join(part for part in (spec.device_locator, spec.bank_locator) if part)
    return name.replace(" ", "-") or "DIMM", spec


def _kernel_processors(proc: Path) -> dict[str, ProcessorSpec]:
    """One processor for each socket that the kernel reports."""
    sockets: dict[str, ProcessorSpec] = {}
    cores: dict[str, set[str]] = {}
    for info in cpu_info(proc):
        socket = info.physical_id or "0"
        spec = sockets.setdefault(
            f"CPU-{socket}",
            ProcessorSpec(
                socket=f"CPU {socket}",
                manufacturer=info.vendor_id,
                product_name=info.model_name,
                max_speed=int(info.cpu_mhz),
                boot_speed=int(info.cpu_mhz),
                status=0x41,
            ),
        )
        spec.thread_count += 1
        cores.setdefault(f"CPU-{socket}", set()).add(info.core_id or str(info.processor))
    for name, spec in sockets.items():
        spec.core_count = spec.core_enabled = len(cores[name])
    return sockets


def _kernel_memory(proc: Path) -> dict[str, MemoryModuleSpec]:
    """All memory as one module."""
    size = memory_info(proc).memtotal // 1024
    return {"memory": MemoryModuleSpec(size=size, device_locator="memory")} if size else {}


def system_information(node_uuid: str, folder: Path = DMI) -> SystemInformationSpec:
    """The machine's description from the firmware; the UUID is the one it joins with."""

    def read(name: str) -> str:
        try:
            with (folder / name).open("rb") as file:
                return file.read(256).decode(errors="replace").strip()
        except OSError:
            return ""

    return SystemInformationSpec(
        manufacturer=read("sys_vendor"),
        product_name=read("product_name"),
        version=read("product_version"),
        serial_number=read("product_serial"),
        uuid=node_uuid,
        sku_number=read("product_sku"),
    )
