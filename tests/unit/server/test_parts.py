"""The small parts: deadlines, locks, options, refusals."""

import ssl
from typing import Any

import anyio
import pytest
from hypothesis import given
from hypothesis import strategies as st

from siderolink.common.errors import ConfigurationError
from siderolink.server.admission.rules import source_key
from siderolink.server.admission.tokens import unique_token_digest
from siderolink.server.api.provision import STATUSES
from siderolink.server.api.tunnel import ENDINGS
from siderolink.server.clock import Deadlines
from siderolink.server.fleet.locks import KeyedLocks
from siderolink.server.options import AdminOptions, ServerOptions
from siderolink.server.refusals import JoinRefusal, StreamRefusal

STEPS = st.lists(
    st.tuples(st.sampled_from(["set", "discard", "pop"]), st.integers(0, 5), st.floats(0, 100)),
    max_size=300,
)


@given(STEPS)
def test_deadlines_behave_like_a_dictionary(steps: list[tuple[str, int, float]]) -> None:
    deadlines: Deadlines[int] = Deadlines()
    model: dict[int, float] = {}
    for step, key, at in steps:
        if step == "set":
            deadlines.set(key, at)
            model[key] = at
        elif step == "discard":
            deadlines.discard(key)
            model.pop(key, None)
        else:
            due = deadlines.pop_due(at)
            earliest = min(model.values(), default=None)
            assert (due is not None) == (earliest is not None and earliest <= at)
            if due is not None:
                assert model.pop(due) == earliest
        assert deadlines.next_at == (min(model.values()) if model else None)
        assert len(deadlines) == len(model)
        assert (key in deadlines) == (key in model)


class Moment(float):
    """A time that counts how often it is compared."""

    compared = 0

    def __lt__(self, other: object) -> bool:
        Moment.compared += 1
        return float(self) < float(other)  # type: ignore[arg-type]

    def __eq__(self, other: object) -> bool:
        Moment.compared += 1
        return float(self) == float(other)  # type: ignore[arg-type]

    __hash__ = float.__hash__


def test_no_step_touches_all_deadlines() -> None:
    """Those that were replaced are not kept, to be removed all at once."""
    deadlines: Deadlines[int] = Deadlines()
    keys = 1000
    most = 0
    for step in range(4 * keys):
        Moment.compared = 0
        deadlines.set(step % keys, Moment(step))
        most = max(most, Moment.compared)
    for key in range(keys - 1):
        Moment.compared = 0
        deadlines.discard(key)
        assert deadlines.next_at is not None
        most = max(most, Moment.compared)
    assert 0 < most < 100
    assert deadlines.take_due(1e9, 2) == [keys - 1]


@pytest.mark.anyio
async def test_a_lock_is_held_by_one_at_a_time_in_turn_and_leaves_nothing() -> None:
    locks = KeyedLocks()
    order: list[str] = []

    async def hold(name: str) -> None:
        async with locks.hold("b", "a"):
            order.append(f"{name} in")
            await anyio.lowlevel.checkpoint()
            order.append(f"{name} out")

    async with anyio.create_task_group() as tasks, locks.hold("a"):
        for name in ("one", "two", "three"):
            tasks.start_soon(hold, name)
        await anyio.wait_all_tasks_blocked()
        assert len(locks) == 2
        assert order == []
    assert order == [f"{name} {what}" for name in ("one", "two", "three") for what in ("in", "out")]
    assert len(locks) == 0


@pytest.mark.anyio
async def test_a_cancelled_wait_for_a_lock_holds_none() -> None:
    locks = KeyedLocks()
    async with locks.hold("a"):
        with anyio.move_on_after(0):
            async with locks.hold("b", "a"):
                raise AssertionError
        assert len(locks) == 1
    async with locks.hold("a", "b"):
        assert len(locks) == 2
    assert len(locks) == 0


@pytest.mark.parametrize(
    "wrong",
    [
        {"join_token": None},
        {"join_token": ""},
        {"allow_any_token": True},
        {"api_listen": "localhost"},
        {"api_listen": ("127.0.0.1", 70_000)},
        {"wireguard_endpoints": ()},
        {"wireguard_endpoints": ("192.0.2.1",)},
        {"wireguard_endpoints": ("192.0.2.1:51820",) * 33},
        {"wireguard_listen_port": -1},
        {"persistent_keepalive": 65_536},
        {"installation_id": "x" * 1025},
        {"proxy_protocol_from": ("proxy.example",)},
        {"forwarded_from": ("10.0.0.1/8",)},
    ],
)
def test_options_that_cannot_be_used_are_refused_in_one_line(wrong: dict[str, object]) -> None:
    right: dict[str, object] = {"api_listen": "[::1]:0", "wireguard_endpoints": ("192.0.2.1:51820",), "join_token": "the token"}
    ServerOptions(**right)  # type: ignore[arg-type]
    with pytest.raises(ConfigurationError) as caught:
        ServerOptions(**right | wrong)  # type: ignore[arg-type]
    assert "\n" not in str(caught.value)
    assert "the token" not in str(caught.value)


def test_options_print_no_token_and_give_the_listen_addresses() -> None:
    options = ServerOptions(api_listen="[::1]:4000", wireguard_endpoints=("a.example:1", "b.example:2"), join_token="secret")
    assert "secret" not in repr(options)
    assert (options.api_address.host, options.api_address.port, options.device_listen_port) == ("::1", 4000, 1)
    tunnel_only = ServerOptions(api_listen=("::1", 4000), force_tunnel=True, allow_any_token=True)
    assert tunnel_only.device_listen_port is None


def test_every_refusal_has_its_status() -> None:
    assert set(STATUSES) == set(JoinRefusal)
    assert set(ENDINGS) == set(StreamRefusal)


@given(st.text(max_size=1024))
def test_any_text_is_accepted_as_unique_token(text: str) -> None:
    digest = unique_token_digest(text)
    assert (digest is None) == (not text)
    assert digest == unique_token_digest(text)


@pytest.mark.parametrize(
    ("source", "key"),
    [
        ("198.51.100.7", "198.51.100.7"),
        ("198.51.100.7:1234", "198.51.100.7"),
        ("[2001:db8:1:2:3::7]:1234", "2001:db8:1:2::/64"),
        ("2001:db8:1:2:3::7", "2001:db8:1:2::/64"),
        ("fe80::7%eth0", "fe80::/64"),
        ("[fe80::7%eth0]:9", "fe80::/64"),
        ("::ffff:198.51.100.7", "198.51.100.7"),
        ("[::ffff:198.51.100.7]:9", "198.51.100.7"),
        ("a local socket", None),
        ("", None),
        (None, None),
    ],
)
def test_sources_are_counted_by_address_or_network(source: str | None, key: str | None) -> None:
    assert source_key(source) == key


@pytest.mark.parametrize(
    ("options", "url"),
    [
        ({"api_listen": "[::]:8090"}, ""),
        ({"api_listen": "0.0.0.0:8090"}, ""),
        ({"api_listen": "192.0.2.1:0"}, "grpc://192.0.2.1:4000?jointoken=a%26b"),
        ({"api_listen": ("2001:db8::1", 1)}, "grpc://[2001:db8::1]:4000?jointoken=a%26b"),
        ({"api_listen": "192.0.2.1:0", "forwarded_from": ("192.0.2.0/24",)}, ""),
        (
            {"api_listen": "192.0.2.1:0", "tls": ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)},
            "https://192.0.2.1:4000?jointoken=a%26b",
        ),
        ({"api_listen": "192.0.2.1:0", "force_tunnel": True}, "grpc://192.0.2.1:4000?grpc_tunnel=true&jointoken=a%26b"),
        (
            {"api_listen": "[::]:8090", "admin": AdminOptions(api_url="https://omni.example.com")},
            "https://omni.example.com:443?jointoken=a%26b",
        ),
    ],
)
def test_the_join_url_is_shown_if_it_is_known(options: dict[str, Any], url: str) -> None:
    made = ServerOptions(join_token="t", wireguard_endpoints=("192.0.2.1:1",), **options)
    assert made.join_url("a&b", 4000) == url


@pytest.mark.parametrize("url", ["https://a.example.com?jointoken=t", "https://a.example.com/path", "", "https://:443"])
def test_an_api_url_is_one_without_a_token(url: str) -> None:
    with pytest.raises(ConfigurationError):
        AdminOptions(api_url=url)
