from siderolink.client.state import HandshakeWatch


def test_a_way_without_a_handshake_is_down_after_its_attempt() -> None:
    watch = HandshakeWatch(0.0)
    assert watch.deadline == 10.0
    assert watch.check(9.999) is None
    assert watch.check(10.0) == "no handshake"
    assert not watch.is_up


def test_each_handshake_moves_the_deadline_to_275_seconds_later() -> None:
    watch = HandshakeWatch(0.0)
    assert watch.handshake_completed(3.0)
    assert watch.is_up
    assert watch.deadline == 278.0
    assert not watch.handshake_completed(123.0)
    assert watch.deadline == 398.0
    assert watch.check(397.999) is None
    assert watch.check(398.0) == "no handshake for 275 s"


def test_an_older_handshake_changes_nothing() -> None:
    watch = HandshakeWatch(0.0)
    watch.handshake_completed(100.0)
    watch.handshake_completed(50.0)
    assert watch.deadline == 375.0


def test_a_healthy_night_is_never_down() -> None:
    watch = HandshakeWatch(0.0)
    for second in range(1, 8 * 3600, 120):
        assert watch.check(float(second)) is None
        watch.handshake_completed(float(second))
