"""Public keys that are no good."""

import pytest

from siderolink.common.keys import PrivateKey, PublicKey
from siderolink.common.wireguard.noise import Drop
from siderolink.common.wireguard.noise.primitives import dh, private_key
from tests.support.virtual import dropped, joined, pair


def test_keys_that_cannot_be_peers() -> None:
    a, b, wire = joined()
    with pytest.raises(ValueError, match="own peer"):
        a.engine.add_peer(a.engine.public_key)
    assert not PrivateKey.generate().public_key().is_low_order


@pytest.mark.parametrize("top_bit", [0, 1 << 255])
@pytest.mark.parametrize(
    "point",
    [
        *(0, 1, 2**255 - 20, 2**255 - 19, 2**255 - 18),
        325606250916557431795983626356110631294008115727848805560023387167927233504,
        39382357235489614581723060781553021112529911719440698176882885853963445705823,
    ],
)
def test_points_of_low_order_cannot_be_peers(point: int, top_bit: int) -> None:
    a, _, _ = pair()
    key = (point | top_bit).to_bytes(32, "little")
    assert PublicKey(key).is_low_order
    with pytest.raises(ValueError, match="low-order"):
        a.engine.add_peer(key)
    with pytest.raises(ValueError):  # noqa: PT011 (the library's own words)
        dh(private_key(bytes(range(32))), key)
    # `wg` may set such a peer; it is never written to
    peer = a.engine.add_peer(key, even_useless=True)
    peer.path = a.path
    a.engine.set_persistent_keepalive(peer, 1, 0.0)
    for now in range(200):
        a.engine.handle_timers(float(now))
    a.drain()
    assert a.take() == []
    assert set(dropped(a)) == {Drop.USELESS_KEY}
