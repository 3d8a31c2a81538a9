"""The quick reading and writing of Provision's messages, beside the generated code."""

import pytest
from hypothesis import example, given
from hypothesis import strategies as st

from siderolink.common.pb.sidero.link import ProvisionRequest, ProvisionResponse
from siderolink.server.api.provision_codec import PlainRequest, encode_response

TEXT = st.text(st.characters(codec="utf-8"), max_size=20) | st.text("ab", min_size=126, max_size=130)
REQUESTS = st.builds(
    ProvisionRequest,
    node_uuid=TEXT,
    node_public_key=TEXT,
    join_token=st.none() | TEXT | st.just("x" * 4096) | st.just("x" * 20_000),
    node_unique_token=st.none() | TEXT,
    talos_version=st.none() | TEXT,
    wireguard_over_grpc=st.none() | st.booleans(),
)
RESPONSES = st.builds(
    ProvisionResponse,
    server_endpoint=st.lists(TEXT, max_size=3),
    server_public_key=TEXT,
    node_address_prefix=TEXT,
    server_address=TEXT,
    grpc_peer_addr_port=TEXT,
)


def same(data: bytes) -> None:
    """Both readers give the same message, or both refuse."""
    try:
        expected = ProvisionRequest.FromString(data)
    except Exception as error:
        with pytest.raises(type(error)):
            PlainRequest.FromString(data)
        return
    assert PlainRequest.FromString(data) == expected


@given(REQUESTS)
def test_any_request_is_decoded_like_by_the_generated_code(request: ProvisionRequest) -> None:
    read = PlainRequest.FromString(bytes(request))
    assert (read, type(read)) == (request, ProvisionRequest)


@given(st.binary(max_size=40))
@example(b"\x30\x01\x30\x00")
@example(b"\x30\x02")
@example(b"\x32\x01a")
@example(b"\x0a\x01a\x0a\x01b")
@example(b"\x0a\x81\x00a")
@example(b"\x0a\x02a")
@example(b"\x0a\x01\xff")
@example(b"\x0a")
@example(b"\x0a\x80")
@example(b"\x08\x01")
@example(b"\x3a\x01a")
def test_any_bytes_are_decoded_like_by_the_generated_code(data: bytes) -> None:
    same(data)


@given(REQUESTS, st.integers(min_value=0), st.binary(max_size=3))
def test_truncated_and_extended_messages(request: ProvisionRequest, cut: int, tail: bytes) -> None:
    whole = bytes(request)
    same(whole[: cut % (len(whole) + 1)] + tail)


@given(RESPONSES)
def test_any_response_is_encoded_like_by_the_generated_code(response: ProvisionResponse) -> None:
    assert encode_response(response) == bytes(response)
