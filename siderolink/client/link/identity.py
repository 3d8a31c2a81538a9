"""Which machine this is: the UUID it joins with when none is given."""

import hashlib
import uuid
from pathlib import Path

TALOS_VERSION = "v1.13.0"
"""The release a machine claims by default, in Provision and in its own API: servers and clients choose features by it, and warn
or refuse below 1.6.0."""
SMBIOS_UUID = Path("/sys/class/dmi/id/product_uuid")
MACHINE_ID = Path("/etc/machine-id")

# Firmware that was never given a UUID says one of these.
_PLACEHOLDERS = frozenset(
    {
        uuid.UUID(int=0),
        uuid.UUID(int=2**128 - 1),
        uuid.UUID("03000200-0400-0500-0006-000700080009"),
    }
)


def machine_uuid(smbios: Path = SMBIOS_UUID, machine_id: Path = MACHINE_ID) -> str:
    """The firmware's UUID, else a stable one made from the operating system's machine id, else a random one."""
    try:
        found = uuid.UUID(_first_line(smbios))
        if found not in _PLACEHOLDERS:
            return str(found)
    except (OSError, ValueError):
        pass
    try:
        name = bytes.fromhex(_first_line(machine_id))
        if len(name) == 16:
            # The machine id itself is not for strangers (machine-id(5)): only its hash leaves the machine.
            return str(uuid.UUID(bytes=hashlib.sha256(b"siderolink machine uuid" + name).digest()[:16], version=4))
    except (OSError, ValueError):
        pass
    return str(uuid.uuid4())


def _first_line(path: Path) -> str:
    with path.open("rb") as file:
        return file.readline(128).decode("ascii").strip()
