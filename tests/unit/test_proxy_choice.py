"""Which proxy the environment means for a dial."""

import pytest

from siderolink.common.errors import ConfigurationError
from siderolink.common.grpc.outgoing_proxies import Proxy, proxy_for

A, B, C = "http://a:1", "http://b:2", "socks5://c:3"


@pytest.mark.parametrize(
    ("environ", "plain", "tls"),
    [
        ({}, None, None),
        ({"HTTP_PROXY": A}, "http://a:1", None),
        ({"HTTPS_PROXY": B}, "http://b:2", "http://b:2"),
        ({"HTTP_PROXY": A, "https_proxy": B, "ALL_PROXY": C}, "http://a:1", "http://b:2"),
        ({"all_proxy": C}, "socks5://c:3", "socks5://c:3"),
        ({"HTTPS_PROXY": "", "ALL_PROXY": "socks5h://[2001:db8::9]"}, *["socks5://[2001:db8::9]:1080"] * 2),
        ({"https_proxy": "a", "HTTPS_PROXY": B}, "http://a:80", "http://a:80"),
        ({"HTTPS_PROXY": "https://a"}, "https://a:443", "https://a:443"),
    ],
)
def test_which_proxy(environ: dict[str, str], plain: str | None, tls: str | None) -> None:
    found = [proxy_for("siderolink.example", 443, tls=wants_tls, environ=environ) for wants_tls in (False, True)]
    assert [str(proxy) if proxy else None for proxy in found] == [plain, tls]


@pytest.mark.parametrize(
    ("host", "no_proxy"),
    [
        ("localhost", ""),
        ("127.0.0.7", ""),
        ("::1", ""),
        ("api.example", "*"),
        ("api.example", "other, api.example"),
        ("API.example.", "api.EXAMPLE"),
        ("api.example", "example"),
        ("api.example", ".example"),
        ("api.example", "*.example"),
        ("api.example", "api.example:443"),
        ("192.0.2.9", "192.0.2.9"),
        ("192.0.2.9", "192.0.2.0/24"),
        ("192.0.2.9", "192.0.2.0/24:443"),
        ("2001:db8::9", "2001:db8::/32"),
        ("2001:db8::9", "[2001:db8::9]:443"),
        ("::ffff:192.0.2.9", "192.0.2.0/24"),
    ],
)
def test_dialled_without_a_proxy(host: str, no_proxy: str) -> None:
    assert proxy_for(host, 443, tls=True, environ={"HTTPS_PROXY": A, "no_proxy": no_proxy}) is None


@pytest.mark.parametrize(
    ("host", "no_proxy"),
    [
        ("api.example", "api.example:80"),
        ("example", ".example"),
        ("notexample", "example"),
        ("192.0.2.9", "192.0.3.0/24, 2.9, .9, nonsense/99, [, [::"),
        ("2001:db8::9", "[2001:db8::9]:80"),
        ("api.example", "192.0.2.0/24"),
        ("api.example", ", ,"),
    ],
)
def test_dialled_by_the_proxy(host: str, no_proxy: str) -> None:
    assert proxy_for(host, 443, tls=True, environ={"HTTPS_PROXY": A, "NO_PROXY": no_proxy}) is not None


def test_credentials_are_decoded_and_never_shown() -> None:
    proxy = proxy_for("a.example", 1, tls=True, environ={"HTTPS_PROXY": "http://me:s%3Ac%C3%A9ret@p:8080"})
    assert proxy == Proxy(scheme="http", host="p", port=8080, username="me", password="s:céret")
    assert "céret" not in f"{proxy} {proxy!r}"


@pytest.mark.parametrize(
    "value", ["ftp://a", "http://", "http://a:99999", "http://a:b", "http://a%0d@b/", "http://[a", "x" * 3000]
)
def test_an_invalid_proxy_is_refused_in_one_line(value: str) -> None:
    value = value.replace("a%0d@", "a%0d%0a:secret@")
    with pytest.raises(ConfigurationError, match="HTTPS_PROXY is not a proxy URL") as caught:
        proxy_for("a.example", 1, tls=True, environ={"HTTPS_PROXY": value})
    assert "secret" not in str(caught.value)
