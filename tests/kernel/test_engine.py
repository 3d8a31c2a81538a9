"""Our userspace device against the kernel's own WireGuard, in both roles: the tests against wireguard-go, and more."""

from collections.abc import Iterator

import pytest

from tests.interop import test_wireguard_go as suite
from tests.interop.test_wireguard_go import (
    test_a_preshared_key,
    test_a_stranger_is_counted_and_gets_no_answer,
    test_another_preshared_key_makes_no_session,
    test_bulk_traffic_in_both_directions,
    test_keepalives_alone_make_the_session,
    test_the_other_end_begins_the_handshake,
    test_the_other_end_follows_us_to_another_address,
    test_we_begin_the_handshake,
    test_we_follow_the_other_end_to_another_address_and_port,
)
from tests.support.kernel_wireguard import kernel_wireguard
from tests.support.pings import ping
from tests.support.wireguard_pair import OUR_PORT, OURS, THEIR_ADDRESSES, THEIR_PORT, Pair, pair_with_the_kernel

__all__ = [
    "test_a_preshared_key",
    "test_a_stranger_is_counted_and_gets_no_answer",
    "test_another_preshared_key_makes_no_session",
    "test_bulk_traffic_in_both_directions",
    "test_keepalives_alone_make_the_session",
    "test_the_other_end_begins_the_handshake",
    "test_the_other_end_follows_us_to_another_address",
    "test_we_begin_the_handshake",
    "test_we_follow_the_other_end_to_another_address_and_port",
]


@pytest.fixture(autouse=True)
def _less_data(monkeypatch: pytest.MonkeyPatch) -> None:
    """Under emulation a megabyte takes seconds."""
    monkeypatch.setattr(suite, "BULK", 256 << 10)


@pytest.fixture
def pair() -> Iterator[Pair]:
    with pair_with_the_kernel() as pair:
        yield pair


def test_packets_of_any_size(pair: Pair) -> None:
    pair.know_each_other(we_dial=True)
    for size in (0, 1, 16, 17, 1232):
        ping(pair.net.server, "fd00::2", f"-s{size}")
        ping(pair.net.machine, "fd00::1", f"-s{size}")


@pytest.mark.parametrize("we_dial", [True, False])
def test_ipv6_outside(pair: Pair, we_dial: bool) -> None:
    pair.know_each_other_by_ipv6(we_dial=we_dial)
    if we_dial:
        ping(pair.net.server, "fd00::2")
    else:
        ping(pair.net.machine, "fd00::1")
    assert pair.peer().path == f"[2001:db8::2]:{THEIR_PORT}"


def test_the_kernel_reconnects_after_its_interface_was_recreated(pair: Pair) -> None:
    pair.know_each_other(they_dial=True)
    ping(pair.net.machine, "fd00::1")
    first = pair.peer().last_handshake
    pair.net.machine.run(["ip", "link", "del", "wg0"])
    with kernel_wireguard(pair.net.machine, pair.their_key, port=THEIR_PORT, addresses=THEIR_ADDRESSES) as again:
        again.set_peer(pair.device.public_key, OURS, endpoint=f"192.0.2.1:{OUR_PORT}")
        ping(pair.net.machine, "fd00::1")
        ping(pair.net.server, "fd00::2")
    assert pair.peer().last_handshake != first
