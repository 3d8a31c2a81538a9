"""Sessions of the web UI: their lifetime, and what ends them."""

import pytest

from siderolink.web.sessions import IDLE, LIFETIME, MAX_SESSIONS, MAX_SIGN_INS_PER_SOURCE, Sessions, TooManyError


class Clock:
    now = 1000.0

    def __call__(self) -> float:
        return self.now


def test_a_session_ends_when_it_is_idle_and_when_it_is_old() -> None:
    clock = Clock()
    sessions = Sessions(clock)
    cookie, session = sessions.begin("slk_x", "alice", "viewer", "192.0.2.1")
    clock.now += IDLE - 1
    assert sessions.find(cookie, "192.0.2.1") is session
    clock.now += IDLE - 1
    assert sessions.find(cookie, "192.0.2.1", is_use=False) is session, "a page that is open alone is no use"
    clock.now += 1
    assert sessions.find(cookie, "192.0.2.1") is None
    assert (session.is_over, session.key, len(sessions)) == (True, "", 0)
    cookie, session = sessions.begin("slk_x", "alice", "viewer", "192.0.2.1")
    began = clock.now
    while clock.now < began + LIFETIME - 60:
        clock.now += 60
        assert sessions.find(cookie, "192.0.2.1") is session
    clock.now += 60
    assert sessions.find(cookie, "192.0.2.1") is None


def test_a_cookie_used_from_another_address_ends_its_session() -> None:
    sessions = Sessions()
    cookie, _ = sessions.begin("slk_x", "alice", "viewer", "192.0.2.1")
    assert sessions.find(cookie, "192.0.2.2") is None
    assert sessions.find(cookie, "192.0.2.1") is None
    cookie, session = sessions.begin("slk_x", "alice", "viewer", "2001:db8::1")
    assert sessions.find(cookie, "2001:db8::2") is session, "the same /64"
    assert sessions.find("", "2001:db8::1") is sessions.find(None, "2001:db8::1") is sessions.find("x" * 10_000, "::1") is None


def test_the_number_of_sessions_is_limited() -> None:
    clock = Clock()
    sessions = Sessions(clock)
    first, _ = sessions.begin("slk_x", "alice", "viewer", "192.0.2.1")
    for number in range(MAX_SESSIONS):
        clock.now += 0.001
        sessions.begin("slk_x", f"user-{number}", "viewer", "192.0.2.1")
    assert (len(sessions), sessions.find(first, "192.0.2.1")) == (MAX_SESSIONS, None)
    with pytest.raises(TooManyError):
        _nested(sessions, MAX_SIGN_INS_PER_SOURCE + 1)
    with sessions.signing_in("192.0.2.9"):
        pass


def _nested(sessions: Sessions, depth: int) -> None:
    if depth:
        with sessions.signing_in("192.0.2.9"):
            _nested(sessions, depth - 1)


def test_roles_include_those_below_them() -> None:
    sessions = Sessions()
    for role, may in (("viewer", 1), ("operator", 2), ("admin", 3), ("unknown", 0)):
        _, session = sessions.begin("slk_x", "alice", role, "192.0.2.1")
        assert sum(session.may(one) for one in ("viewer", "operator", "admin")) == may
