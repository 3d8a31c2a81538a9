"""Header fields of requests: those with which requests begin are checked once, with the same result as each time."""

from hypothesis import given
from hypothesis import strategies as st

from siderolink.common.grpc.header_fields import MOST_BEGINNINGS, Beginning, RequestFields, read_request
from siderolink.common.grpc.refusals import Refused

Raw = list[tuple[bytes, bytes]]
PLAIN: Raw = [
    (b":method", b"POST"),
    (b":scheme", b"http"),
    (b":path", b"/a/B"),
    (b":authority", b"x"),
    (b"content-type", b"application/grpc"),
    (b"user-agent", b"one"),
    (b"te", b"trailers"),
]
OTHERS: Raw = [
    (b":path", b""),
    (b":other", b"x"),
    (b"te", b"gzip"),
    (b"host", b"x"),
    (b"host", b"y"),
    (b"connection", b"close"),
    (b"grpc-timeout", b"1S"),
    (b"authorization", b"secret"),
    (b"user-agent", b"\xff"),
    (b"x", b" padded "),
    (b"X", b"upper"),
]


def outcome(raw: Raw, beginnings: list[Beginning]) -> RequestFields | str:
    try:
        return read_request(raw, beginnings)
    except Refused as refused:
        return refused.message


@st.composite
def requests(draw: st.DrawFn) -> Raw:
    """Mostly valid ones with many of the same beginnings."""
    found = PLAIN[: draw(st.integers(3, len(PLAIN)))]
    for _ in range(draw(st.integers(0, 2))):
        found.insert(draw(st.integers(0, len(found))), draw(st.sampled_from(PLAIN + OTHERS)))
    return found + draw(st.lists(st.sampled_from(OTHERS), max_size=2))


@given(st.lists(requests(), max_size=40))
def test_known_beginnings_change_no_result(all_requests: list[Raw]) -> None:
    beginnings: list[Beginning] = []
    for request in all_requests:
        assert outcome(request, beginnings) == outcome(request, [])


def test_few_beginnings_are_kept_and_no_secret() -> None:
    beginnings: list[Beginning] = []
    for number in range(100):
        read_request([*PLAIN[:2], (b":path", b"/%d" % number), *PLAIN[3:], (b"authorization", b"secret")], beginnings)
    read_request([*PLAIN[:2], (b":path", b"/" + bytes(600).replace(b"\0", b"x")), *PLAIN[3:]], beginnings)
    assert [known.by_name[":path"] for known in beginnings] == [f"/{number}" for number in range(99, 99 - MOST_BEGINNINGS, -1)]
    assert not any("authorization" in known.by_name for known in beginnings)
