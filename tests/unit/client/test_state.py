from siderolink.client.watch import HandshakeWatch


def test_a_way_without_a_handshake_is_down_after_its_attempt() -> None:
    watch = HandshakeWatch(0.0)
    assert watch.check(7.999) is None
    assert watch.check(8.0) == "no handshake"
    assert not watch.is_up
