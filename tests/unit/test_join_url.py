import traceback

import pytest
from hypothesis import given
from hypothesis import strategies as st

from siderolink.common.errors import ConfigurationError, JoinURLError, SideroLinkError
from siderolink.common.join_url import MAX_LENGTH, JoinURL

TOKEN = "s3cr3t-t0k3n"


@pytest.mark.parametrize(
    ("text", "host", "port", "tls"),
    [
        ("grpc://a.example", "a.example", 443, False),
        ("grpc://a.example:8090", "a.example", 8090, False),
        ("GRPC://a.example", "a.example", 443, False),
        ("https://a.example", "a.example", 443, True),
        ("http://a.example", "a.example", 443, True),
        ("http://a.example:80", "a.example", 80, True),
        ("grpcs://a.example", "a.example", 443, True),
        ("a.example", "a.example", 443, False),
        ("a.example:8090", "a.example", 8090, False),
        ("a.example:", "a.example", 443, False),
        ("a.example/", "a.example", 443, False),
        ("a.example?x=://", "a.example", 443, False),
        ("grpc://192.0.2.1:1", "192.0.2.1", 1, False),
        ("grpc://[fd00::1]", "fd00::1", 443, False),
        ("https://[fd00::1]:65535/", "fd00::1", 65535, True),
        ("[fd00::1]:4000", "fd00::1", 4000, False),
        ("grpc://[fe80::1%25eth0]:4000", "fe80::1%eth0", 4000, False),
    ],
)
def test_scheme_host_and_port(text: str, host: str, port: int, tls: bool) -> None:
    assert JoinURL.parse(text) == JoinURL(host=host, port=port, tls=tls)


@pytest.mark.parametrize(
    ("query", "token"),
    [
        ("", None),
        ("jointoken", None),
        ("jointoken=", None),
        ("jointoken=a", "a"),
        ("jointoken=a&jointoken=b", "a"),
        ("jointoken=&jointoken=b", None),
        ("other=x&jointoken=a&more", "a"),
        ("jointoken=a+b", "a b"),
        ("jointoken=a%2Bb%20c", "a+b c"),
        ("jointoken=v1:eyJ9%3D%3D", "v1:eyJ9=="),
        ("jointoken=a==", "a=="),
        ("join%74oken=a", "a"),
        ("JoinToken=a", None),
        ("bad=%zz&jointoken=%C3%A4", "ä"),
    ],
)
def test_the_token(query: str, token: str | None) -> None:
    assert JoinURL.parse(f"grpc://h?{query}").join_token == token


@pytest.mark.parametrize(
    ("query", "tunnel"),
    [
        ("grpc_tunnel=true", True),
        ("grpc_tunnel=y", True),
        ("grpc_tunnel=True", False),
        ("grpc_tunnel=Y", False),
        ("grpc_tunnel=yes", False),
        ("grpc_tunnel=1", False),
        ("grpc_tunnel", False),
        ("grpc_tunnel=false&grpc_tunnel=true", False),
        ("grpc_tunnel=true&grpc_tunnel=false", True),
    ],
)
def test_which_values_ask_for_the_tunnel(query: str, tunnel: bool) -> None:
    assert JoinURL.parse(f"grpc://h/?jointoken={TOKEN}&{query}").tunnel is tunnel


REFUSED = [
    "grpc://a..b:1",
    f"grpc://{'a' * 64}.example",
    "",
    "grpc://",
    "://h",
    "grpc:///",
    "grpc://?jointoken=a",
    "grpc://h/path",
    "grpc://h//",
    "grpc://h:0",
    "grpc://h:65536",
    "grpc://h:99999999999999999999",
    "grpc://h:-1",
    "grpc://h:1x",
    "grpc://h:١",
    "grpc://h h",
    "grpc://-h",
    "grpc://h\\",
    "grpc://h%20h",
    "grpc://fd00::1",
    "grpc://fd00::1:443",
    "grpc://[fd00::1",
    "grpc://[fd00::1]443",
    "grpc://[fd00::1]x:443",
    "grpc://[192.0.2.1]",
    "grpc://[h]",
    "grpc://[fd00::zz]",
    "grpc://[fe80::1%25]",
    "grpc://[fe80::1%25" + "z" * 16 + "]",
    "grpc://user@h",
    "grpc://" + "h" * 254,
    f"grpc://user:{TOKEN}@h",
    f"grpc://h/{TOKEN}",
    f"grpc://{TOKEN}:{TOKEN}",
    f"grpc://h?jointoken={TOKEN}#x",
    f"grpc://h?jointoken={TOKEN};x",
    f"grpc://h?jointoken={TOKEN}%",
    f"grpc://h?jointoken={TOKEN}%4",
    f"grpc://h?jointoken={TOKEN}%FF",
    f"grpc://h?jointoken={TOKEN}%00",
    f"grpc://h?jointoken={TOKEN}%0A",
    f"grpc://h?jointoken={TOKEN}\n",
    f"grpc://h?jointoken={TOKEN}\r\nx: y",
    f"\tgrpc://h?jointoken={TOKEN}",
    f"grpc://h\x7f?jointoken={TOKEN}",
    f"grpc://h?jointoken={TOKEN}\x85",
    f"grpc://h?jointoken={TOKEN}\ud800",
    f"grpc://h?jointoken={TOKEN}" + "x" * MAX_LENGTH,
    "grpc://h?jointoken=" + "x" * 1_000_000,
]


@pytest.mark.parametrize("text", REFUSED, ids=range(len(REFUSED)))
def test_refused_in_one_line_without_the_token(text: str) -> None:
    with pytest.raises(JoinURLError) as caught:
        JoinURL.parse(text)
    said = "".join(traceback.format_exception_only(caught.value))
    assert TOKEN not in said
    assert len(said) < 200
    assert said.count("\n") == 1


def test_a_refusal_is_a_configuration_error() -> None:
    assert issubclass(JoinURLError, ConfigurationError)
    assert issubclass(JoinURLError, SideroLinkError)


@pytest.mark.parametrize("token", ["", "a\0", "a\n", "\ud800", "x" * MAX_LENGTH])
def test_tokens_that_no_url_can_carry_are_refused(token: str) -> None:
    with pytest.raises(JoinURLError):
        JoinURL(host="h", join_token=token)


def test_printing_hides_the_token() -> None:
    url = JoinURL(host="h", join_token=TOKEN, tunnel=True)
    assert TOKEN not in f"{url} {url!r} {[url]}"
    assert str(url) == "https://h:443?grpc_tunnel=true&jointoken=…"
    assert url.encode() == f"https://h:443?grpc_tunnel=true&jointoken={TOKEN}"


@pytest.mark.parametrize(
    ("url", "authority"),
    [
        (JoinURL(host="h", port=1), "h:1"),
        (JoinURL(host="fd00::1"), "[fd00::1]:443"),
        (JoinURL(host="192.0.2.1"), "192.0.2.1:443"),
    ],
)
def test_the_authority(url: JoinURL, authority: str) -> None:
    assert url.authority == authority


hosts = st.one_of(
    st.from_regex(r"[a-z0-9]([a-z0-9-]{0,20}[a-z0-9])?(\.[a-z0-9]{1,9}){0,3}", fullmatch=True),
    st.ip_addresses().map(str),
    st.ip_addresses(v=6, network="fe80::/64").map(lambda address: f"{address}%eth0"),
)
tokens = st.none() | st.text(st.characters(exclude_categories=("Cc", "Cs", "Zl", "Zp")), min_size=1, max_size=200)


@given(hosts, st.integers(1, 65535), st.booleans(), tokens, st.booleans())
def test_what_is_written_reads_back(host: str, port: int, tls: bool, token: str | None, tunnel: bool) -> None:
    url = JoinURL(host=host, port=port, tls=tls, join_token=token, tunnel=tunnel)
    text = url.encode()
    assert text.isascii()
    assert " " not in text
    assert JoinURL.parse(text) == url


@given(st.text(max_size=200) | st.text("abc:/?#[]@%&=+;. 0123456789", max_size=60).map("grpc://".__add__))
def test_any_text_is_read_or_refused(text: str) -> None:
    try:
        url = JoinURL.parse(text)
    except JoinURLError:
        return
    assert JoinURL.parse(url.encode()) == url
