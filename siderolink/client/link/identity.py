"""The machine's identity: its UUID, and its unique token for each server."""

import errno
import hashlib
import logging
import re
import uuid
from contextlib import suppress
from pathlib import Path

from pyroute2 import AsyncIPRoute
from pyroute2.netlink.exceptions import NetlinkError

from siderolink.common.errors import ConfigurationError, HostError, host_error
from siderolink.common.netlink import run_netlink
from siderolink.common.node_uuid import is_placeholder, parse_uuid
from siderolink.common.private_files import create_private
from siderolink.common.tasks import in_thread
from siderolink.common.unique_token import hardware_fingerprint, new_unique_token

log = logging.getLogger("siderolink")

TALOS_VERSION = "v1.14.0"
"""The release a machine claims by default, in Provision and in its own API: servers and clients choose features by it, and warn
or refuse below 1.6.0."""
SMBIOS_UUID = Path("/sys/class/dmi/id/product_uuid")
MACHINE_ID = Path("/etc/machine-id")
_LARGEST_FILE = 4096
_ETHER = 1
_MISSING = (FileNotFoundError, NotADirectoryError)
_LASTING = (FileNotFoundError, NotADirectoryError, IsADirectoryError, PermissionError)
"""Errors that the next start will meet, too; a container has a folder in the place of a file that its host lacks. After others,
such as too many open files, a file may well be there."""
_NOT_WRITABLE = {errno.EROFS, errno.EACCES, errno.EPERM, errno.ENOENT, errno.ENOTDIR, errno.ENOSPC, errno.EDQUOT}
"""Errors of a folder that keeps nothing."""


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

    A random UUID is stored in `folder`, if there is one, and reused. Raises HostError if one of these cannot be read at the
    moment, because the next one would make another machine of this one, and ConfigurationError if the stored one is damaged.
    """
    with suppress(ValueError):
        found = str(uuid.UUID(_source(smbios)))
        if not is_placeholder(found):
            return found
    with suppress(ValueError):
        name = bytes.fromhex(_source(machine_id))
        if len(name) == 16:
            # machine-id(5) asks to keep the id itself confidential: only its hash leaves the machine.
            return str(uuid.UUID(bytes=hashlib.sha256(b"siderolink machine uuid" + name).digest()[:16], version=4))
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
        """The token for a server (API host and port) and this UUID.

        A server that knows a token refuses another one. So raises HostError if the file cannot be read or written at the
        moment, and ConfigurationError if it may not be read or is damaged.
        """
        name = (*server, node_uuid)
        if name not in self._tokens:
            made = new_unique_token(await _fingerprint())
            if self._folder is not None:
                made = await in_thread(_kept, self._folder / _file_name(name), made)
            self._tokens[name] = made
        return self._tokens[name]


def _file_name(name: tuple[str, int, str]) -> str:
    host, port, node_uuid = name
    readable = re.sub(r"[^a-z0-9.-]", "_", f"{host[:80]}_{port}")
    digest = hashlib.sha256(f"{host}\0{port}\0{node_uuid}".encode()).hexdigest()[:16]
    return f"unique-token-{readable}-{digest}.json"


async def _fingerprint() -> str:
    """The fingerprint of this host."""
    try:
        addresses = await run_netlink(_physical_addresses, None)
    except (OSError, NetlinkError):
        addresses = []
    return hardware_fingerprint(addresses)


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


def _source(path: Path) -> str:
    """A line of the host's own files; empty if the host has none for us. Raises HostError or ValueError."""
    try:
        return _first_line(path)
    except _LASTING:
        return ""
    except OSError as error:
        raise _passing(path, "read", error) from error


def _kept(file: Path, made: str) -> str:
    """The file's text; a missing file is created with `made`. Two processes get the same text.

    Raises HostError or ConfigurationError.
    """
    try:
        return _stored(file) or _store(file, made)
    except FileExistsError:
        return _stored(file) or made


def _stored(file: Path) -> str:
    """Empty if there is no file, or if a crash truncated it; then it is removed."""
    try:
        if (text := _first_line(file, _LARGEST_FILE)) == "":
            file.unlink()
        return text
    except _MISSING:
        return ""
    except PermissionError as error:
        raise ConfigurationError(f"{file} cannot be read: {error.strerror}") from None
    except OSError as error:
        raise _passing(file, "read", error) from error
    except ValueError:
        raise ConfigurationError(
            f"{file}, by which servers recognise this machine, is damaged; restore it, or remove it: servers that know this "
            "machine then refuse it until they forget it"
        ) from None


def _store(file: Path, made: str) -> str:
    """Create the file. Raises FileExistsError or HostError; a folder that cannot keep it is only logged."""
    try:
        file.parent.mkdir(mode=0o700, parents=True, exist_ok=True)
        create_private(file, made.encode() + b"\n")
    except FileExistsError:
        raise
    except OSError as error:
        if error.errno not in _NOT_WRITABLE:
            raise _passing(file, "written", error) from error
        log.warning("%s cannot be written; the identity will change at the next start: %s", file, error.strerror or error)
    return made


def _passing(file: Path, what: str, error: OSError) -> HostError:
    reason = host_error(error)
    found = HostError(f"{file} cannot be {what}: {error.strerror if reason is None else reason.strerror}")
    found.errno = error.errno
    return found


def _first_line(path: Path, limit: int = 128) -> str:
    with path.open("rb") as file:
        return file.readline(limit).decode("ascii").strip()
