"""The tests of `--netns` once more, with the kernel's WireGuard at both ends."""

import pytest

from tests.netns import test_other_namespace as suite
from tests.netns.test_other_namespace import (
    test_a_namespace_that_cannot_be_is_refused,
    test_an_interface_is_repaired_where_it_is,
    test_links_end_in_other_namespaces,
)

__all__ = [
    "test_a_namespace_that_cannot_be_is_refused",
    "test_an_interface_is_repaired_where_it_is",
    "test_links_end_in_other_namespaces",
]


@pytest.fixture(autouse=True)
def _by_the_kernel(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(suite, "DEVICE", "kernel")
