"""Decides which call may act for which machine. Pure functions of the row, the call and the row's link.

Nothing in a Provision call proves possession of the private key; only a WireGuard handshake does. UUIDs and public keys are not
secret. So a call never changes a row that a handshake has proved: it makes a claim, and the rules are applied again when a
handshake proves the claim.
"""

import hmac
from dataclasses import dataclass
from enum import StrEnum
from functools import lru_cache
from ipaddress import IPv6Address, ip_address

from siderolink.server.store import Claim, Machine

ALIVE_SECONDS = 60.0
"""A link is alive for this time after its last authenticated packet: two keepalives (25 s each) may get lost."""
STALE_SECONDS = 180.0
"""After this time without one its sessions have ended (whitepaper, section 6.1: Reject-After-Time)."""
TRIAL_SECONDS = 20.0
"""How long a virtual address is tried. Existing machines call again after 30 s without a handshake; the first one may take
10 s, because the datagram that opens their stream is lost."""


@dataclass(frozen=True, slots=True, kw_only=True)
class LinkLiveness:
    """The state of a machine's link."""

    silence: float | None = None
    """Seconds since this server received an authenticated packet from it; None if never."""
    unheard: float | None = None
    """Minimum seconds since any server received one; None if the link was never proved."""
    said_goodbye: bool = False
    """It said goodbye, and nothing has arrived since."""
    source: str | None = None
    """The source address of its last authenticated packet."""
    is_unanswered: bool = False
    """Five probes just stayed unanswered."""


class Basis(StrEnum):
    """Why a call is granted what it requests."""

    NEW = "new machine"
    SAME_KEY = "same key"
    UNIQUE_TOKEN = "unique token"
    FINGERPRINT = "same fingerprint"
    NEVER_PROVED = "the row was never proved"
    GOODBYE = "goodbye"
    SILENCE = "silence"
    PROBES = "unanswered probes"
    ASSIGNED = "assigned by this server"
    ECHO = "an echo at its new address"


def same_token(machine: Machine, digest: bytes | None) -> bool:
    """Whether the digest is that of the row's unique token, bound or presented with its unproved key."""
    known = machine.unique_token_digest
    return known is not None and digest is not None and hmac.compare_digest(known, digest)


def may_take(
    row: Machine, digest: bytes | None, fingerprint: str, source: str, link: LinkLiveness, *, trust_fingerprints: bool = False
) -> Basis | None:
    """Why a call with another key may take the row once a handshake proves it; None if it may not."""
    if row.bound_digest is not None:
        if same_token(row, digest):
            return Basis.UNIQUE_TOKEN
        same_hardware = bool(fingerprint) and fingerprint == row.unique_fingerprint
        return Basis.FINGERPRINT if trust_fingerprints and same_hardware and not row.is_installed else None
    if not row.was_linked:
        return Basis.NEVER_PROVED
    if link.said_goodbye:
        return Basis.GOODBYE
    if link.unheard is None or link.unheard >= ALIVE_SECONDS:
        return Basis.SILENCE
    if link.is_unanswered and same_source(source, link.source):
        return Basis.PROBES
    return None


def may_probe(row: Machine, source: str, link: LinkLiveness) -> bool:
    """Whether unanswered probes would let the call take the row: no token is bound, and the call has the link's source."""
    return row.bound_digest is None and not link.is_unanswered and same_source(source, link.source)


def needs_virtual_address(machine: Machine | None, has_new_key: bool, link: LinkLiveness, now: float) -> bool:
    """Whether a tunnel answer needs a fresh virtual address.

    It does for a new key, and without a living link: existing machines restart a stuck tunnel only when the address changes.
    It does not for a call repeated within one link, or soon after a fresh address was given.
    """
    if machine is None or machine.virtual_address is None or has_new_key:
        return True
    just_issued = machine.virtual_issued_at is not None and 0 <= now - machine.virtual_issued_at < TRIAL_SECONDS
    return not just_issued and (link.unheard is None or link.unheard >= STALE_SECONDS)


def same_source(one: str | None, other: str | None) -> bool:
    """Whether two addresses belong to one host as far as that is visible: the same IPv4 address, or the same IPv6 /64."""
    a, b = source_key(one), source_key(other)
    return a is not None and a == b


def source_key(source: str | None) -> str | None:
    """The source that limits count: the IPv4 address or IPv6 /64 of an address or host:port; None for a local socket."""
    if not source:
        return None
    host, _, port = source.rpartition(":")
    # An IPv4 address with a port, or a bracketed IPv6 address with one; otherwise the whole text is the address.
    has_port = port.isdecimal() and ("." in host or host.endswith("]")) and not host.startswith("::ffff")
    return _host_key(host.strip("[]") if has_port else source)


@lru_cache(maxsize=4096)
def _host_key(host: str) -> str | None:
    try:
        address = ip_address(host)
    except ValueError:
        return None
    if isinstance(address, IPv6Address):
        if address.ipv4_mapped is not None:
            return str(address.ipv4_mapped)
        return f"{IPv6Address(int(address) >> 64 << 64)}/64"
    return str(address)


def still_stands(
    row: Machine, claim: Claim, link: LinkLiveness, now: float, *, trust_fingerprints: bool = False
) -> Basis | None:
    """Decide again once the claim's key is proved: the machine may have been heard since, or another claim was first."""
    basis = may_take(
        row,
        claim.unique_token_digest,
        claim.unique_fingerprint,
        claim.source,
        link,
        trust_fingerprints=trust_fingerprints,
    )
    if basis is not None or row.bound_digest is not None or claim.basis != Basis.PROBES.value:
        return basis
    # Probes of the row's key stayed unanswered when the claim was made; only later packets disprove that.
    is_same_key = row.linked_at is None or row.linked_at < claim.created_at
    return Basis.PROBES if is_same_key and (link.unheard is None or link.unheard > now - claim.created_at) else None
