"""What people read in tables: times and changes."""

import time

import pytest

from siderolink.cli.admin.formats import age, change, until


@pytest.mark.parametrize(
    ("seconds", "told"),
    [(7 * 86_400 - 5, "7d"), (2 * 86_400 - 5, "2d"), (86_400, "24h"), (7_200 - 5, "2h"), (90, "2m"), (45, "45s"), (-5, "0s")],
)
def test_a_new_expiry_is_shown_as_it_was_requested(seconds: float, told: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(time, "time", lambda: 1_800_000_000.0)
    assert until(1_800_000_000.0 + seconds) == told


def test_ages_are_rounded_down(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(time, "time", lambda: 1_800_000_000.0)
    assert age(1_800_000_000.0 - 3 * 86_400 + 5) == "2d"


@pytest.mark.parametrize(
    ("side", "other", "told"),
    [
        ('{"name": "first-rack", "note": "", "expires_at": 1796594534.9, "labels": {"rack": "first"}, "is_default": false}',
         "{}", "name=first-rack expires_at=2026-12-06T22:02:14Z labels=rack=first is_default=false"),
        ('{"revoked_at": null}', '{"revoked_at": 1795989770.6}', "revoked_at=none"),
        ('{"until": 8000000000.0, "note": "two words"}', '{"until": null}', 'until=2223-07-06T14:13:20Z note="two words"'),
        ("", "", ""),
        ("{}", '{"a": 1}', ""),
        ("no JSON", "", "no JSON"),
        ("[1]", "", "[1]"),
        ('{"expires_at": 1e400, "list": ["a"]}', "", 'expires_at=Infinity list=["a"]'),
    ],
)  # fmt: skip
def test_changes_are_formatted_for_people(side: str, other: str, told: str) -> None:
    assert change(side, other) == told
