"""A machine's unique token, as machines and servers write it: ``{"Fingerprint": <64 hex digits>, "Token": <UUIDv4>}``."""

import hashlib
import json
import uuid
from collections.abc import Iterable
from typing import Final


def hardware_fingerprint(addresses: Iterable[bytes]) -> str:
    """SHA-256 of the sorted hardware addresses of the physical Ethernet links, in hex, as existing machines compute it."""
    return hashlib.sha256(b"".join(sorted(addresses))).hexdigest()


def new_unique_token(fingerprint: str) -> str:
    """A random token with this fingerprint."""
    return json.dumps({"Fingerprint": fingerprint, "Token": str(uuid.uuid4())}, separators=(",", ":"))


NO_HARDWARE: Final = hardware_fingerprint(())
"""The fingerprint of every machine without a physical link; it distinguishes none of them."""
