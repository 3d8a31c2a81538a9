"""The tests of `--netns` once more, with the kernel's WireGuard at both ends."""

import pytest

from tests.netns import test_other_namespace as suite
from tests.netns.test_other_namespace import (
    test_an_interface_is_repaired_where_it_is,
    test_an_invalid_namespace_is_refused,
    test_interfaces_of_links_can_be_in_other_namespaces,
)

__all__ = [
    "test_an_interface_is_repaired_where_it_is",
    "test_an_invalid_namespace_is_refused",
    "test_interfaces_of_links_can_be_in_other_namespaces",
]


@pytest.fixture(autouse=True)
def _by_the_kernel(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(suite, "DEVICE", "kernel")
