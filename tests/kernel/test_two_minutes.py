"""Sessions are renewed as they should be. The last file: what it judges was begun with the second one."""

import pytest

from tests.kernel.conftest import PINGS, Ageing


@pytest.mark.timeout(200)
@pytest.mark.parametrize("dialled_by", ["us", "the kernel"])
def test_a_session_is_renewed_without_a_loss(ageing: dict[str, Ageing], dialled_by: str) -> None:
    """Its initiator renews it after 120 s: our engine here, the kernel there."""
    link = ageing[dialled_by]
    output, _ = link.pings.communicate(timeout=180)
    assert f"{PINGS} packets transmitted, {PINGS} received" in output
    peer = link.pair.peer()
    assert link.first is not None
    assert peer.last_handshake is not None
    assert 110 < peer.last_handshake - link.first < 180
    theirs = link.pair.other.latest_handshake(link.pair.device.public_key)
    assert abs(theirs - peer.last_handshake) < 5
