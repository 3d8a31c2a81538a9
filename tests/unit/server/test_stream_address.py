"""Stream addresses that are not a machine's, and malformed ones: existing machines distinguish the two."""

import pytest

from siderolink.server.api.tunnel import is_other_address


@pytest.mark.parametrize("value", ["192.0.2.1:50888", "0.0.0.0:0"])
def test_an_unknown_address_is_refused(value: str) -> None:
    assert is_other_address(value)


@pytest.mark.parametrize(
    "value", ["", "192.0.2.1", "192.0.2.1:", "192.0.2.1:99999", "[192.0.2.1]:1", "fd00::1:1", "[]:1", "x:1", "[fe80::1%eth0]:1"]
)
def test_a_malformed_address_is_refused(value: str) -> None:
    assert not is_other_address(value)
