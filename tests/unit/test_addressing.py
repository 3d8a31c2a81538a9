from ipaddress import IPv6Address, IPv6Network

import pytest
from hypothesis import given
from hypothesis import strategies as st

from siderolink.common.addressing import (
    TUNNEL_PORT,
    VIRTUAL_PREFIX,
    format_peer_addr_port,
    overlay_prefix,
    parse_peer_addr_port,
    random_address,
    server_address,
    swap_endpoints,
)
from siderolink.common.errors import ConfigurationError


def test_the_prefixes_in_common_use() -> None:
    assert overlay_prefix() == IPv6Network("fdae:41e4:649b:9303::/64")
    assert IPv6Network("fdae:41e4:649b:9304::/64") == VIRTUAL_PREFIX
    assert server_address(overlay_prefix()) == IPv6Address("fdae:41e4:649b:9303::1")


@given(st.text(max_size=100).filter(lambda text: text.isprintable()))
def test_prefixes_of_all_installations_have_the_same_form(installation_id: str) -> None:
    prefix = overlay_prefix(installation_id)
    packed = prefix.network_address.packed
    assert (prefix.prefixlen, packed[0], packed[7], packed[8:]) == (64, 0xFD, 0x03, bytes(8))


def test_installations_have_different_prefixes() -> None:
    assert overlay_prefix("one") != overlay_prefix("two")


@given(st.binary(min_size=8, max_size=8))
def test_a_random_address_holds_the_64_bits_it_was_given(host: bytes) -> None:
    draws = iter([host, b"\x00\x00\x00\x00\x00\x00\x00\x02"])
    address = random_address(VIRTUAL_PREFIX, lambda count: next(draws))
    assert address in VIRTUAL_PREFIX
    assert address not in (VIRTUAL_PREFIX.network_address, server_address(VIRTUAL_PREFIX))
    assert int.from_bytes(host, "big") < 2 or address.packed[8:] == host


def test_a_random_source_of_zeros_is_an_error_and_no_endless_loop() -> None:
    with pytest.raises(ConfigurationError, match="random source"):
        random_address(VIRTUAL_PREFIX, bytes)


def test_a_prefix_other_than_64_bits_is_refused() -> None:
    with pytest.raises(ConfigurationError, match="/64"):
        random_address(IPv6Network("fd00::/80"))


@pytest.mark.parametrize(
    ("preferred", "wire"),
    [([], []), (["a"], ["a"]), (["a", "b"], ["b", "a"]), (["a", "b", "c", "d"], ["d", "b", "c", "a"])],
)
def test_first_and_last_endpoint_are_swapped(preferred: list[str], wire: list[str]) -> None:
    assert swap_endpoints(preferred) == wire
    assert swap_endpoints(wire) == preferred


@given(st.ip_addresses(v=6), st.integers(1, 65535))
def test_a_written_peer_address_reads_back(address: IPv6Address, port: int) -> None:
    assert parse_peer_addr_port(format_peer_addr_port(address, port)) == (address, port)


def test_the_canonical_form() -> None:
    assert format_peer_addr_port(IPv6Address("fdae:41e4:649b:9304:0:0:0:7")) == f"[fdae:41e4:649b:9304::7]:{TUNNEL_PORT}"


@pytest.mark.parametrize(
    "text",
    ["", "[]:1", "[::1]", "[::1]:", "[::1]:0", "[::1]:65536", "[::1]:-1", "[::1]:1 ", "::1:1", "1.2.3.4:1", "[1.2.3.4]:1",
     "[::1%lo]:1", "[::1]:١", "[:::]:1", "[::1]:1\n", "[" + ":" * 1_000_000 + "]:1"],
)  # fmt: skip
def test_malformed_addresses_are_refused(text: str) -> None:
    with pytest.raises(ConfigurationError):
        parse_peer_addr_port(text)


@given(st.text(max_size=80))
def test_any_text_is_read_or_refused(text: str) -> None:
    try:
        address, port = parse_peer_addr_port(text)
    except ConfigurationError:
        return
    assert parse_peer_addr_port(format_peer_addr_port(address, port)) == (address, port)
