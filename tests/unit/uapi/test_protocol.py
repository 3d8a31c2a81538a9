import errno
from ipaddress import ip_address, ip_network

import pytest
from hypothesis import given
from hypothesis import strategies as st

from siderolink.common.keys import PresharedKey, PrivateKey, PublicKey
from siderolink.common.wireguard.device import DeviceChange, PeerChange
from siderolink.common.wireguard.uapi.protocol import (
    DeviceReport,
    PeerReport,
    UapiError,
    parse_endpoint,
    parse_set,
    write_get,
)

KEY = "e84b5a6d2717c1003a13b431570353dbaca9146cf150c5f8575680feba52027a"
OTHER = "b85996fecc9c7f1fc6d2572a76eda11d59bcd20be8e543b15ce4bd85a8e75a33"


def test_a_whole_request() -> None:
    text = f"""private_key={KEY}
listen_port=12912
fwmark=51
replace_peers=true
public_key={OTHER}
preshared_key={KEY}
replace_allowed_ips=true
allowed_ip=192.168.4.4/32
allowed_ip=-10.0.0.0/8
allowed_ip=2001:db8::1/64
endpoint=[abcd:23::33%2]:51820
persistent_keepalive_interval=111
public_key={KEY}
remove=true
public_key={KEY}
update_only=true
preshared_key={"0" * 64}"""
    change = parse_set(text.split("\n"))
    assert change == DeviceChange(
        private_key=PrivateKey(bytes.fromhex(KEY)).clamped(),
        listen_port=12912,
        fwmark=51,
        replace_peers=True,
        peers=[
            PeerChange(
                public_key=PublicKey(bytes.fromhex(OTHER)),
                preshared_key=PresharedKey(bytes.fromhex(KEY)),
                replace_allowed_ips=True,
                allowed_ips=[
                    (True, ip_network("192.168.4.4/32")),
                    (False, ip_network("10.0.0.0/8")),
                    (True, ip_network("2001:db8::/64")),
                ],
                endpoint=(ip_address("abcd:23::33%2"), 51820),
                persistent_keepalive=111,
            ),
            PeerChange(public_key=PublicKey(bytes.fromhex(KEY)), remove=True),
            PeerChange(public_key=PublicKey(bytes.fromhex(KEY)), update_only=True, clear_preshared_key=True),
        ],
    )


def test_a_zero_private_key_removes_the_key() -> None:
    change = parse_set([f"private_key={'0' * 64}"])
    assert change.clear_private_key
    assert change.private_key is None


@pytest.mark.parametrize(
    ("line", "number"),
    [
        ("private_key=xyz", errno.EINVAL),
        (f"private_key={KEY}00", errno.EINVAL),
        ("listen_port=65536", errno.EINVAL),
        ("listen_port=-1", errno.EINVAL),
        ("listen_port=٣", errno.EINVAL),
        ("fwmark=4294967296", errno.EINVAL),
        ("replace_peers=maybe", errno.EINVAL),
        ("replace_peers=false", errno.EINVAL),
        ("fwmark=0x1ffffffff", errno.EINVAL),
        ("private_key=" + " ".join([KEY[:31], KEY[31:62]]), errno.EINVAL),
        ("last_handshake_time_sec=1", errno.EINVAL),
        (f"public_key={OTHER}\nremove=1", errno.EINVAL),
        (f"public_key={OTHER}\nallowed_ip=10.0.0.1", errno.EINVAL),
        (f"public_key={OTHER}\nallowed_ip=10.0.0.0/255.0.0.0", errno.EINVAL),
        (f"public_key={OTHER}\nallowed_ip=fe80::1%eth0/64", errno.EINVAL),
        (f"public_key={OTHER}\nrx_bytes=1", errno.EINVAL),
        ("nonsense=1", errno.EINVAL),
        ("allowed_ip=10.0.0.0/8", errno.EINVAL),
        ("no separator", errno.EPROTO),
        (f"public_key={OTHER}\nallowed_ip=10.0.0.0/33", errno.EINVAL),
        (f"public_key={OTHER}\nendpoint=example.org:1", errno.EINVAL),
        (f"public_key={OTHER}\nendpoint=::1:1", errno.EINVAL),
        (f"public_key={OTHER}\nendpoint=[10.0.0.1]:1", errno.EINVAL),
        (f"public_key={OTHER}\npersistent_keepalive_interval=65536", errno.EINVAL),
        (f"public_key={OTHER}\nprotocol_version=2", errno.EPROTONOSUPPORT),
        (f"public_key={OTHER}\nlisten_port=1", errno.EINVAL),
    ],
)
def test_each_mistake_has_its_errno(line: str, number: int) -> None:
    with pytest.raises(UapiError) as caught:
        parse_set(line.split("\n"))
    assert caught.value.errno == number
    assert KEY not in str(caught.value)


@pytest.mark.parametrize(("text", "mark"), [("0", 0), ("51820", 51820), ("0xCa6c", 51820), ("4294967295", 2**32 - 1)])
def test_marks_are_decimal_or_hexadecimal(text: str, mark: int) -> None:
    assert parse_set([f"fwmark={text}"]).fwmark == mark


@given(st.lists(st.text(max_size=80), max_size=20))
def test_any_text_is_parsed_or_refused(lines: list[str]) -> None:
    try:
        parse_set(lines)
    except UapiError:
        pass


networks = st.builds(
    lambda a, n: ip_network((a, n if a.version == 6 else n % 33), strict=False), st.ip_addresses(), st.integers(0, 128)
)
keys = st.binary(min_size=32, max_size=32)


@given(keys, keys, st.lists(networks, max_size=5), st.ip_addresses(), st.integers(1, 65535))
def test_what_is_reported_can_be_set_again(public: bytes, preshared: bytes, allowed: list, address: object, port: int) -> None:  # type: ignore[type-arg]
    endpoint = f"[{address}]:{port}" if ":" in str(address) else f"{address}:{port}"
    peer = PeerReport(
        public_key=PublicKey(public),
        preshared_key=PresharedKey(preshared),
        endpoint=endpoint,
        last_handshake_ns=1_700_000_000_123_456_789,
        received_bytes=1,
        sent_bytes=2,
        persistent_keepalive=25,
        allowed_ips=tuple(allowed),
    )
    lines = list(write_get(DeviceReport(private_key=None, listen_port=51820, fwmark=0, peers=[peer])))
    assert "last_handshake_time_sec=1700000000" in lines
    assert "last_handshake_time_nsec=123456789" in lines
    settable = [line for line in lines if not line.startswith(("last_handshake", "rx_", "tx_"))]
    change = parse_set(settable)
    assert change.listen_port == 51820
    assert change.peers[0].public_key == PublicKey(public)
    assert [network for _, network in change.peers[0].allowed_ips] == allowed
    assert change.peers[0].endpoint == parse_endpoint(endpoint)
    assert change.peers[0].persistent_keepalive == 25
