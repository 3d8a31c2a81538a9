"""The machine's identity: its UUID, and its unique token for each server."""

import hashlib
import json
import logging
import re
import uuid
from contextlib import suppress
from pathlib import Path

import anyio
from pyroute2 import AsyncIPRoute
from pyroute2.netlink.exceptions import NetlinkError

from siderolink.common.errors import ConfigurationError
from siderolink.common.netlink import run_netlink
from siderolink.common.node_uuid import is_placeholder, parse_uuid
from siderolink.common.private_files import create_private

log = logging.getLogger("siderolink")

TALOS_VERSION = "v1.14.0"
"""The release a machine claims by default, in Provision and in its own API: servers and clients choose features by it, and warn
or refuse below 1.6.0."""
SMBIOS_UUID = Path("/sys/class/dmi/id/product_uuid")
MACHINE_ID = Path("/etc/machine-id")
_LARGEST_FILE = 4096
_ETHER = 1


def machine_identity(text: str) -> str:
    """A given UUID in canonical form. Raises ConfigurationError if it is malformed or a vendor's placeholder."""
    node_uuid = parse_uuid(text.strip())
    if is_placeholder(node_uuid):
        raise ConfigurationError(
            f"{node_uuid} is a vendor placeholder that many machines share: give this machine its own UUID"
        )
    return node_uuid


def machine_uuid(smbios: Path = SMBIOS_UUID, machine_id: Path = MACHINE_ID, folder: Path | None = None) -> str:
    """The firmware's UUID, else a stable one made from the operating system's machine id, else a random one.

    A random UUID is stored in `folder`, if there is one, and reused.
    """
    try:
        found = str(uuid.UUID(_first_line(smbios)))
        if not is_placeholder(found):
            return found
    except (OSError, ValueError):
        pass
    try:
        name = bytes.fromhex(_first_line(machine_id))
        if len(name) == 16:
            # machine-id(5) asks to keep the id itself confidential: only its hash leaves the machine.
            return str(uuid.UUID(bytes=hashlib.sha256(b"siderolink machine uuid" + name).digest()[:16], version=4))
    except (OSError, ValueError):
        pass
    drawn = str(uuid.uuid4())
    if folder is None:
        return drawn
    kept = _kept(folder / "machine-uuid", drawn)
    with suppress(ValueError):
        return str(uuid.UUID(kept))
    return drawn


class UniqueTokens:
    """This machine's unique tokens, one for each server and UUID, generated on first use and stored in private files.

    A token is the value of ``node_unique_token``: ``{"Fingerprint": <64 hex digits>, "Token": <UUIDv4>}``. Without a writable
    folder, tokens last only as long as this object.
    """

    def __init__(self, folder: Path | None) -> None:
        self._folder = folder
        self._tokens: dict[tuple[str, int, str], str] = {}

    async def token(self, server: tuple[str, int], node_uuid: str) -> str:
        """The token for a server (API host and port) and this UUID."""
        name = (*server, node_uuid)
        if name not in self._tokens:
            made = _encode(await _fingerprint())
            if self._folder is not None:
                made = await anyio.to_thread.run_sync(_kept, self._folder / _file_name(name), made)
            self._tokens[name] = made
        return self._tokens[name]


def _encode(fingerprint: str) -> str:
    return json.dumps({"Fingerprint": fingerprint, "Token": str(uuid.uuid4())}, separators=(",", ":"))


def _file_name(name: tuple[str, int, str]) -> str:
    host, port, node_uuid = name
    readable = re.sub(r"[^a-z0-9.-]", "_", f"{host[:80]}_{port}")
    digest = hashlib.sha256(f"{host}\0{port}\0{node_uuid}".encode()).hexdigest()[:16]
    return f"unique-token-{readable}-{digest}.json"


async def _fingerprint() -> str:
    """SHA-256 of the sorted hardware addresses of the physical Ethernet links, as existing machines compute it."""
    try:
        addresses = await run_netlink(_physical_addresses, None)
    except (OSError, NetlinkError):
        addresses = []
    return hashlib.sha256(b"".join(sorted(addresses))).hexdigest()


async def _physical_addresses() -> list[bytes]:
    found = []
    async with AsyncIPRoute() as ipr:
        async for link in await ipr.link("dump"):
            information = link.get_attr("IFLA_LINKINFO")
            kind = information.get_attr("IFLA_INFO_KIND") if information is not None else None
            address = link.get_attr("IFLA_PERM_ADDRESS") or link.get_attr("IFLA_ADDRESS")
            if link["ifi_type"] == _ETHER and not kind and address:
                with suppress(ValueError):
                    found.append(bytes.fromhex(address.replace(":", "")))
    return found


def _kept(file: Path, made: str) -> str:
    """The file's text; a missing file is created with `made`. Two processes get the same text."""
    try:
        if (text := _first_line(file, _LARGEST_FILE)) != "":
            return text
        file.unlink()  # truncated by a crash
    except FileNotFoundError:
        pass
    except (OSError, ValueError) as error:
        log.warning("%s cannot be read; using newly generated values for this run: %s", file, error)
        return made
    try:
        file.parent.mkdir(mode=0o700, parents=True, exist_ok=True)
        create_private(file, made.encode() + b"\n")
    except FileExistsError:
        return _first_line(file, _LARGEST_FILE) or made
    except OSError as error:
        log.warning("%s cannot be written; the identity will change at the next start: %s", file, error.strerror or error)
    return made


def _first_line(path: Path, limit: int = 128) -> str:
    with path.open("rb") as file:
        return file.readline(limit).decode("ascii").strip()
