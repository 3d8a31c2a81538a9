"""Firewall rules, written to the kernel by netlink: no `nft` program is needed."""

import errno
import struct
from collections.abc import AsyncIterator, Sequence
from contextlib import asynccontextmanager
from dataclasses import dataclass
from functools import partial
from typing import Any, Literal

import anyio
from pyroute2.netlink.exceptions import NetlinkError
from pyroute2.netlink.nfnetlink.nftsocket import NFPROTO_INET, Cmp, Meta, Regs
from pyroute2.nftables.expressions import genex, verdict
from pyroute2.nftables.main import AsyncNFTables

from siderolink.common.errors import SideroLinkError
from siderolink.common.netlink import run_netlink

Hook = Literal["prerouting", "input", "forward", "output", "postrouting"]
Match = list[Any]
"""Expressions that let a packet go on to the rule's next part, or end the rule for it."""

_DROP, _ACCEPT = 0, 1
_IFNAMSIZ = 16


@dataclass(frozen=True, slots=True)
class Rule:
    """What becomes of the packets that match all of `matches`."""

    matches: Sequence[Match]
    action: Literal["accept", "drop"]


@dataclass(frozen=True, slots=True)
class Chain:
    """Rules at one hook, in order; a packet that none of them decides meets `policy`."""

    hook: Hook
    rules: Sequence[Rule]
    policy: Literal["accept", "drop"] = "accept"


def protocol(number: int) -> Match:
    """Packets of one transport protocol, such as ``socket.IPPROTO_UDP``, over IPv4 and IPv6."""
    return _meta_equals(Meta.NFT_META_L4PROTO, struct.pack("B", number))


def arriving_by(interface: str) -> Match:
    """Packets that came in by an interface."""
    return _meta_equals(Meta.NFT_META_IIFNAME, interface.encode().ljust(_IFNAMSIZ, b"\0"))


def _meta_equals(key: Meta, value: bytes) -> Match:
    register = int(Regs.NFT_REG_1)
    data = {"attrs": [("NFTA_DATA_VALUE", value)]}
    return [
        genex("meta", {"key": int(key), "dreg": register}),
        genex("cmp", {"sreg": register, "op": int(Cmp.NFT_CMP_EQ), "data": data}),
    ]


@asynccontextmanager
async def firewall(table: str, chains: Sequence[Chain]) -> AsyncIterator[None]:
    """Hold the rules, in a table of their own (family inet) that must not exist yet, for as long as the body runs.

    Raises SideroLinkError where the kernel refuses them.
    """
    await run_netlink(partial(_install, table, chains))
    try:
        yield
    finally:
        with anyio.CancelScope(shield=True):
            await run_netlink(partial(_remove, table))


async def _install(table: str, chains: Sequence[Chain]) -> None:
    nft = await _open()
    try:
        try:
            await nft.table("create", name=table)
        except NetlinkError as error:
            raise SideroLinkError(f"the firewall table {table!r} cannot be made: {error.args[-1]}") from error
        try:
            for chain in chains:
                await _add_chain(nft, table, chain)
        except BaseException:
            await nft.table("del", name=table)
            raise
    finally:
        nft.close()


async def _remove(table: str) -> None:
    nft = await _open()
    try:
        await nft.table("del", name=table)
    except NetlinkError as error:
        if error.code != errno.ENOENT:
            raise
    finally:
        nft.close()


async def _open() -> AsyncNFTables:
    nft = AsyncNFTables(nfgen_family=NFPROTO_INET)
    await nft.setup_endpoint()
    return nft


async def _add_chain(nft: Any, table: str, chain: Chain) -> None:
    policy = _ACCEPT if chain.policy == "accept" else _DROP
    try:
        await nft.chain("add", table=table, name=chain.hook, hook=chain.hook, type="filter", policy=policy)
        for rule in chain.rules:
            code = _ACCEPT if rule.action == "accept" else _DROP
            await nft.rule("add", table=table, chain=chain.hook, expressions=(*rule.matches, verdict(code)))
    except NetlinkError as error:
        raise SideroLinkError(f"a firewall rule at {chain.hook} was refused: {error.args[-1]}") from error
