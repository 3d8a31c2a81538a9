"""Firewall rules, written to the kernel by netlink, without the program `nft`.

A table is created, replaced and removed in one transaction each, so that no packet sees a part of it. It is owned by the socket
that created it: the kernel removes it when the program ends for any reason, and lets no other program change it. A table for
something that outlives the program has no owner. Only tables with our comment are ever replaced or removed.
"""

import errno
import itertools
import os
import re
import socket
import struct
import threading
from collections.abc import AsyncIterator, Callable, Iterator, Sequence
from contextlib import asynccontextmanager
from dataclasses import dataclass
from functools import partial
from typing import Any, Literal

import anyio
from pyroute2.netlink import NETLINK_NETFILTER, NLM_F_ACK, NLM_F_APPEND, NLM_F_CREATE, NLM_F_EXCL, NLM_F_REQUEST
from pyroute2.netlink.nfnetlink import NFNL_SUBSYS_NFTABLES, nfgen_msg
from pyroute2.netlink.nfnetlink.nftsocket import (
    NFPROTO_INET,
    NFT_MSG_DELTABLE,
    NFT_MSG_NEWCHAIN,
    NFT_MSG_NEWRULE,
    NFT_MSG_NEWTABLE,
    Regs,
    nft_chain_msg,
    nft_rule_msg,
)
from pyroute2.nftables.expressions import genex

from siderolink.common.errors import SideroLinkError
from siderolink.common.netlink import NetlinkRefusal, RequestSocket, call_in
from siderolink.common.netlink.messages import ERROR, attribute, attributes, encode, error_of, parse, text, values
from siderolink.common.netlink.sockets import NETFILTER
from siderolink.common.nft_matches import Match
from siderolink.common.tasks import in_thread

OUR_PREFIX = "siderolink"
"""Prefix of the names of this package's tables."""

Hook = Literal["prerouting", "input", "forward", "output", "postrouting"]
Verdict = Literal["accept", "drop", "return"]

_HOOKS: dict[Hook, int] = {"prerouting": 0, "input": 1, "forward": 2, "output": 3, "postrouting": 4}
_VERDICTS: dict[str, int] = {"drop": 0, "accept": 1, "return": -5}
_JUMP = -3
_BATCH_BEGIN, _BATCH_END = 0x10, 0x11
_OWNED = 2
_NEW = NLM_F_CREATE | NLM_F_EXCL
_RECEIVE_BYTES = 64 * 1024
_FLAGS_AT = 6  # in nlmsghdr; followed by the message's number
_GET_TABLE = NFNL_SUBSYS_NFTABLES << 8 | 1
_GET_RULES = NFNL_SUBSYS_NFTABLES << 8 | 7
_CHAIN, _EXPRESSIONS, _NAME, _DATA, _PACKETS = 2, 4, 1, 2, 2
_TABLE_NAME, _TABLE_FLAGS, _USERDATA = 1, 2, 6
_NFGENMSG_BYTES = 4
_COMMENT = b"made by siderolink\0"
"""The comment that marks tables as ours; `nft` shows it."""
_KEEPS_COMMENTS = tuple(map(int, re.findall(r"[0-9]+", os.uname().release)[:2])) >= (5, 10)
_SO_SNDBUFFORCE = 32
_SOL_NETLINK, _CAP_ACK = 270, 10


@dataclass(frozen=True, slots=True)
class Rule:
    """The action for packets that match all of `matches`: a verdict, or a jump to the rules named `jump`."""

    matches: Sequence[Match]
    action: Verdict | None = None
    jump: str | None = None


@dataclass(frozen=True, slots=True)
class Chain:
    """Rules at one hook, in order; `policy` applies to packets that no rule decides."""

    hook: Hook
    rules: Sequence[Rule]
    policy: Literal["accept", "drop"] = "accept"
    priority: int = 0


@dataclass(frozen=True, slots=True)
class Part:
    """Rules to jump to; a packet that none of them decides continues after the jump."""

    name: str
    rules: Sequence[Rule]


def is_our_table(name: str) -> bool:
    """Whether a table with this name is created by this package."""
    return name == OUR_PREFIX or name.startswith(f"{OUR_PREFIX}-")


class Table:
    """One table (family inet). It exists in the kernel only while it has rules."""

    def __init__(self, name: str, *, owned: bool = True) -> None:
        """Uses the calling thread's network namespace. Without an owner, it replaces a table left by an earlier process."""
        self._name = name
        self._flags = _OWNED if owned else 0
        self._exists = not owned
        """Whether the table may exist: created by us, or without an owner left by an earlier process."""
        self._is_ours = False
        """Whether we created the existing table."""
        self._turns = anyio.Lock()
        self._lock = threading.Lock()
        self._socket = socket.socket(socket.AF_NETLINK, socket.SOCK_RAW | socket.SOCK_CLOEXEC, NETLINK_NETFILTER)
        self._socket.setsockopt(_SOL_NETLINK, _CAP_ACK, 1)
        self._socket.bind((0, 0))
        self._requests = RequestSocket(NETFILTER)

    async def replace(self, chains: Sequence[Chain], parts: Sequence[Part] = (), named: Sequence[bytes] = ()) -> None:
        """Replace the table's content by these rules; `named` are messages that create named objects (nft_limits).

        Raises SideroLinkError if the kernel refuses them; the previous rules then stay.
        """
        # A transaction waits until no packet uses the old rules, so it runs outside the event loop.
        with anyio.CancelScope(shield=True):
            async with self._turns:
                await in_thread(self._replace, chains, parts, named)

    async def change(self, messages: Callable[[], Sequence[bytes]]) -> None:
        """Send the messages that the function, called in a thread, returns, in one transaction.

        Raises SideroLinkError if the kernel refuses any of them; then nothing has changed.
        """
        with anyio.CancelScope(shield=True):
            async with self._turns:
                await in_thread(self._change, messages)

    async def close(self) -> None:
        """Remove the table."""
        try:
            await self.replace(())
        finally:
            self.leave()

    def leave(self) -> None:
        """Close the socket; the rules of a table without an owner stay."""
        with self._lock:
            self._socket.close()
            self._requests.close()

    def _change(self, messages: Callable[[], Sequence[bytes]]) -> None:
        with self._lock:
            problem = self._try(messages())
        if problem:
            raise SideroLinkError(f"the kernel refused the change of the firewall table {self._name!r}: {os.strerror(problem)}")

    def _replace(self, chains: Sequence[Chain], parts: Sequence[Part], named: Sequence[bytes]) -> None:
        with self._lock:
            if not chains:
                problem = self._remove() if self._exists else 0
                self._exists = self._is_ours = False
            else:
                problem = self._put([*named, *_content(self._name, chains, parts)])
                self._exists = self._exists or not problem
                self._is_ours = self._is_ours or not problem
        if problem == errno.EPERM and os.geteuid() == 0:
            raise SideroLinkError(f"another program on this host owns the firewall table {self._name!r}")
        if problem:
            raise SideroLinkError(f"the kernel refused the firewall rules: {os.strerror(problem)}")

    def _remove(self) -> int:
        if not self._may_replace():
            return 0  # another program's table, which does not matter without rules
        problem = self._try([_delete(self._name)])
        return 0 if problem == errno.ENOENT else problem

    def _put(self, content: list[bytes]) -> int:
        fresh = [_table(self._name, self._flags), *content]
        if self._exists:
            self._check_may_replace()
            problem = self._try([_delete(self._name), *fresh])
            if problem != errno.ENOENT:
                return problem
            # another program removed the table; create it again
        problem = self._try(fresh)
        if problem == errno.EOPNOTSUPP:  # kernels before 5.12 have no table owners
            problem = self._try([_table(self._name, 0), *content])
        if problem == errno.EEXIST:  # on such a kernel, a table left by a killed program
            self._check_may_replace()
            problem = self._try([_delete(self._name), *fresh])
        return problem

    def _check_may_replace(self) -> None:
        if not self._may_replace():
            raise SideroLinkError(
                f"the firewall table {self._name!r} was not created by this program: "
                f"remove it (nft delete table inet {self._name})"
            )

    def _may_replace(self) -> bool:
        """Whether an existing table of this name, if any, was created by this package."""
        if self._is_ours or not _KEEPS_COMMENTS:
            return True
        try:
            found = self._requests.request(_GET_TABLE, _table_payload(self._name))
        except NetlinkRefusal:  # it does not exist or is unreadable; the transaction then reports the error
            return True
        return all(_COMMENT in message.values(_NFGENMSG_BYTES).get(_USERDATA, b"") for message in found)

    def _try(self, messages: Sequence[bytes]) -> int:
        """Send the messages in one transaction; returns the first error number, 0 for none."""
        data = _batch(messages)
        try:
            if len(data) > self._socket.getsockopt(socket.SOL_SOCKET, socket.SO_SNDBUF) // 2:
                self._socket.setsockopt(socket.SOL_SOCKET, _SO_SNDBUFFORCE, 2 * len(data))
            self._socket.sendto(data, (0, 0))
        except OSError as error:
            return error.errno or errno.EIO
        # The kernel is done when the call returns, and its answers are waiting: one per error, and one for the last message.
        codes = list(self._answers())
        return next((code for code in codes if code), 0 if codes else errno.EIO)

    def _answers(self) -> Iterator[int]:
        while True:
            try:
                data = self._socket.recv(_RECEIVE_BYTES, socket.MSG_DONTWAIT)
            except BlockingIOError:
                return
            except OSError as error:  # more errors than fit into the buffer
                yield error.errno or errno.EIO
                if error.errno != errno.ENOBUFS:
                    return
                continue
            yield from (error_of(message)[0] for message in parse(data) if message.kind == ERROR)


@asynccontextmanager
async def firewall(
    table: str, chains: Sequence[Chain], parts: Sequence[Part] = (), *, namespace: str | None = None
) -> AsyncIterator[Table]:
    """Apply the rules, in a table of their own (family inet), while the body runs.

    Raises SideroLinkError if the kernel refuses them, or another program has a table of this name.
    """
    held = call_in(namespace, partial(Table, table))
    try:
        await held.replace(chains, parts)
        yield held
    finally:
        await held.close()


def read_rule_counters(requests: RequestSocket, table: str) -> list[tuple[str, int]]:
    """Chain and packets of each counter in a table's rules; none if it cannot be read."""
    found: list[tuple[str, int]] = []
    try:
        for part in requests.dump(_GET_RULES, bytes([NFPROTO_INET, 0, 0, 0]) + attribute(1, table.encode() + b"\0")):
            for message in part.messages:
                fields = message.values(_NFGENMSG_BYTES)
                found += [(text(fields.get(_CHAIN, b"")), count) for count in _packets(fields.get(_EXPRESSIONS, b""))]
    except NetlinkRefusal:
        pass
    return found


def _packets(expressions: bytes) -> Iterator[int]:
    """The counters of one rule."""
    for _, start, end in attributes(expressions):
        fields = values(expressions, start, end)
        if text(fields.get(_NAME, b"")) == "counter":
            yield int.from_bytes(values(fields.get(_DATA, b"")).get(_PACKETS, b""), "big")


# netlink messages


def _batch(messages: Sequence[bytes]) -> bytes:
    """One transaction: numbered messages between a begin and an end message; the last one is acknowledged."""
    batch = bytearray()
    for number, message in enumerate((_bound(_BATCH_BEGIN), *messages, _bound(_BATCH_END)), 1):
        start = len(batch)
        batch += message
        (flags,) = struct.unpack_from("=H", message, _FLAGS_AT)
        if number == len(messages) + 1:
            flags |= NLM_F_ACK
        struct.pack_into("=HI", batch, start + _FLAGS_AT, flags, number)
    return bytes(batch)


def _bound(kind: int) -> bytes:
    message = nfgen_msg()
    message["res_id"] = NFNL_SUBSYS_NFTABLES
    message["header"]["type"] = kind
    message["header"]["flags"] = NLM_F_REQUEST
    message.encode()
    return bytes(message.data)


def _message(message: Any, kind: int, flags: int, attributes: list[tuple[str, Any]]) -> bytes:
    message["nfgen_family"] = NFPROTO_INET
    message["header"]["type"] = NFNL_SUBSYS_NFTABLES << 8 | kind
    message["header"]["flags"] = NLM_F_REQUEST | flags
    message["attrs"] = attributes
    message.encode()
    return bytes(message.data)


def _table_payload(name: str, *attributes: bytes) -> bytes:
    return bytes([NFPROTO_INET, 0, 0, 0]) + attribute(_TABLE_NAME, name.encode() + b"\0") + b"".join(attributes)


def _table(name: str, flags: int) -> bytes:
    comment = bytes([0, len(_COMMENT)]) + _COMMENT
    payload = _table_payload(name, attribute(_TABLE_FLAGS, flags.to_bytes(4, "big")), attribute(_USERDATA, comment))
    return encode(NFNL_SUBSYS_NFTABLES << 8 | NFT_MSG_NEWTABLE, payload, NLM_F_REQUEST | _NEW)


def _delete(name: str) -> bytes:
    return encode(NFNL_SUBSYS_NFTABLES << 8 | NFT_MSG_DELTABLE, _table_payload(name))


def _content(table: str, chains: Sequence[Chain], parts: Sequence[Part]) -> Iterator[bytes]:
    """Every chain before the rules, which may jump to it."""
    for part in parts:
        yield _message(nft_chain_msg(), NFT_MSG_NEWCHAIN, _NEW, [("NFTA_CHAIN_TABLE", table), ("NFTA_CHAIN_NAME", part.name)])
    for chain in chains:
        hook = {"attrs": [("NFTA_HOOK_HOOKNUM", _HOOKS[chain.hook]), ("NFTA_HOOK_PRIORITY", chain.priority)]}
        attributes = [
            ("NFTA_CHAIN_TABLE", table),
            ("NFTA_CHAIN_NAME", chain.hook),
            ("NFTA_CHAIN_HOOK", hook),
            ("NFTA_CHAIN_POLICY", _VERDICTS[chain.policy]),
            ("NFTA_CHAIN_TYPE", "filter"),
        ]
        yield _message(nft_chain_msg(), NFT_MSG_NEWCHAIN, _NEW, attributes)
    for name, rules in (*((part.name, part.rules) for part in parts), *((chain.hook, chain.rules) for chain in chains)):
        for rule in rules:
            yield _rule(table, name, rule)


def _rule(table: str, chain: str, rule: Rule) -> bytes:
    code = _JUMP if rule.jump is not None else _VERDICTS[rule.action or "return"]
    verdict: list[tuple[str, Any]] = [("NFTA_VERDICT_CODE", code)]
    if rule.jump is not None:
        verdict.append(("NFTA_VERDICT_CHAIN", rule.jump))
    data = {"attrs": [("NFTA_DATA_VERDICT", {"attrs": verdict})]}
    expressions = [*itertools.chain(*rule.matches), genex("immediate", {"dreg": int(Regs.NFT_REG_VERDICT), "data": data})]
    attributes = [("NFTA_RULE_TABLE", table), ("NFTA_RULE_CHAIN", chain), ("NFTA_RULE_EXPRESSIONS", expressions)]
    return _message(nft_rule_msg(), NFT_MSG_NEWRULE, NLM_F_CREATE | NLM_F_APPEND, attributes)
