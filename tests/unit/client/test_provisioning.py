import socket
from dataclasses import replace

import anyio
import pytest
from grpclib import GRPCError, Status
from grpclib.const import Cardinality, Handler
from grpclib.server import Stream
from hypothesis import given
from hypothesis import strategies as st

from siderolink.client.link.provisioning import MAX_FIELDS, NodeInfo, make_request, provision, read_response
from siderolink.common.errors import InvalidAnswerError, JoinRefusedError, ServerUnreachableError
from siderolink.common.grpc import decode_answer, serve
from siderolink.common.join_url import JoinURL
from siderolink.common.keys import PublicKey
from siderolink.common.pb.sidero.link import ProvisionRequest, ProvisionResponse
from tests.support.provision import new_key, provision_api, response

SERVER, OWN = new_key(), new_key()
URL = JoinURL("server.example", 443, join_token="s3cret-token")
MACHINE = NodeInfo(uuid="4c4c4544-0000-4000-8000-000000000001", unique_token="unique-s3cret", version="v1.13.0")
VIRTUAL = "[fdae:41e4:649b:9304::5]:50888"


def test_a_request_has_all_fields() -> None:
    request = make_request(replace(URL, tunnel=True), MACHINE, OWN)
    assert request == ProvisionRequest(
        node_uuid=MACHINE.uuid,
        node_public_key=OWN.encode(),
        join_token="s3cret-token",
        node_unique_token="unique-s3cret",
        talos_version="v1.13.0",
        wireguard_over_grpc=True,
    )


def test_a_request_omits_missing_fields_except_the_unique_token() -> None:
    request = make_request(replace(URL, join_token=None), NodeInfo(uuid="u"), OWN)
    assert request.join_token is None
    assert request.node_unique_token == ""
    assert request.talos_version is None
    assert request.wireguard_over_grpc is None


def test_secrets_are_in_no_repr() -> None:
    assert "s3cret" not in repr(MACHINE) + repr(URL)


def test_endpoints_are_read_with_first_and_last_swapped_back() -> None:
    answer = read_response(response(SERVER, "c:3", "b:2", "[2001:db8::1]:1"), OWN)
    assert [str(endpoint) for endpoint in answer.endpoints] == ["[2001:db8::1]:1", "b:2", "c:3"]
    assert answer.virtual_address is None
    assert (answer.server_key, str(answer.address)) == (SERVER, "fdae:41e4:649b:9303::42/64")


def test_a_tunnel_answer_names_no_endpoint() -> None:
    answer = read_response(response(SERVER, VIRTUAL, virtual=VIRTUAL), OWN)
    assert answer.endpoints == ()
    assert answer.virtual_address is not None
    assert str(answer.virtual_address[0]) == "fdae:41e4:649b:9304::5"


@pytest.mark.parametrize(
    ("field", "value"),
    [
        ("server_public_key", ""),
        ("server_public_key", "A" * 44),
        ("server_public_key", str(OWN)),
        ("server_public_key", str(PublicKey(bytes(32)))),
        ("server_public_key", str(PublicKey(bytes([1]) + bytes(31)))),
        ("node_address_prefix", ""),
        ("node_address_prefix", "192.0.2.1/24"),
        ("node_address_prefix", "fdae:41e4:649b:9303::42"),
        ("node_address_prefix", "fdae:41e4:649b:9303::42/0"),
        ("node_address_prefix", "::1/64"),
        ("node_address_prefix", "2001:db8::42/64"),
        ("node_address_prefix", "fe80::42/64"),
        ("node_address_prefix", "fdae:41e4:649b:9303::42%eth0/64"),
        ("node_address_prefix", "fdae:41e4:649b:9303::1/64"),
        ("server_address", ""),
        ("server_address", "192.0.2.1"),
        ("server_address", "fdae:41e4:649b:9304::1"),
        ("server_address", "fdae:41e4:649b:9303::1/64"),
        ("server_address", "fdae:41e4:649b:9303::1%eth0"),
        ("server_endpoint", []),
        ("server_endpoint", ["192.0.2.1"]),
        ("server_endpoint", ["192.0.2.1:0"]),
        ("server_endpoint", ["a b:1"]),
        ("server_endpoint", ["x" * 10_000 + ":1"]),
        ("server_endpoint", ["192.0.2.1:1"] * 33),
        ("grpc_peer_addr_port", "fdae:41e4:649b:9304::5:50888"),
        ("grpc_peer_addr_port", "[fdae:41e4:649b:9304::5]:0"),
    ],
)
def test_an_answer_that_breaks_the_protocol_is_refused(field: str, value: object) -> None:
    answer = response(SERVER, "192.0.2.1:51820")
    setattr(answer, field, value)
    with pytest.raises(InvalidAnswerError, match="the server's answer is invalid: ") as refused:
        read_response(answer, OWN)
    assert len(str(refused.value)) < 1000


@given(st.builds(ProvisionResponse, *[st.lists(st.text()), st.text(), st.text(), st.text(), st.text()]))
def test_any_answer_is_accepted_or_raises_the_one_error(answer: ProvisionResponse) -> None:
    with pytest.raises(InvalidAnswerError):
        read_response(answer, OWN)


@pytest.mark.parametrize("number", [1, 3, 4, 5, 6])
def test_an_answer_with_a_number_for_a_text_is_no_answer(number: int) -> None:
    with pytest.raises(InvalidAnswerError):
        decode_answer(bytes([number << 3, 5]), ProvisionResponse)


@pytest.mark.anyio
async def test_provision_over_the_wire() -> None:
    async with provision_api(response(SERVER, "192.0.2.1:51820")) as (service, url):
        answer = await provision(url, MACHINE, OWN)
    assert answer.server_key == SERVER
    assert service.requests == [make_request(url, MACHINE, OWN)]


@pytest.mark.anyio
async def test_a_refusal_carries_the_status_and_never_a_secret() -> None:
    hostile = GRPCError(Status.PERMISSION_DENIED, "no s3cret-token\n\x1b[31m with unique-s3cret " + "x" * 5000)
    async with provision_api(hostile) as (_, url):
        with pytest.raises(JoinRefusedError) as refused:
            await provision(url, MACHINE, OWN)
    assert refused.value.status == "PERMISSION_DENIED"
    text = str(refused.value)
    assert "s3cret" not in text
    assert text.isprintable()
    assert len(text) < 600


@pytest.mark.anyio
@pytest.mark.parametrize("status", [Status.UNAVAILABLE, Status.DEADLINE_EXCEEDED])
async def test_a_server_that_is_not_ready_counts_as_unreachable(status: Status) -> None:
    async with provision_api(GRPCError(status, "later")) as (_, url):
        with pytest.raises(ServerUnreachableError, match="later"):
            await provision(url, MACHINE, OWN)


@pytest.mark.anyio
async def test_a_server_that_never_answers_is_given_up() -> None:
    async with provision_api(response(SERVER, "192.0.2.1:51820")) as (service, url):
        service.hold = anyio.Event()
        with pytest.raises(ServerUnreachableError):
            await provision(url, MACHINE, OWN, timeout=0.1)


@pytest.mark.anyio
async def test_a_closed_port_is_unreachable() -> None:
    with socket.create_server(("127.0.0.1", 0)) as taken:
        port = taken.getsockname()[1]
    with pytest.raises(ServerUnreachableError):
        await provision(JoinURL("127.0.0.1", port, tls=False), MACHINE, OWN)


@pytest.mark.anyio
async def test_an_answer_of_too_many_fields_is_not_decoded() -> None:
    class Padded:
        """A server whose answer has many fields that the machine does not know."""

        def __init__(self, count: int) -> None:
            self._count = count

        async def provision(self, stream: Stream[ProvisionRequest, bytes]) -> None:
            await stream.recv_message()
            await stream.send_message(bytes(response(SERVER, "192.0.2.1:51820")) + b"\x7a\x00" * self._count)

        def __mapping__(self) -> dict[str, Handler]:
            path = "/sidero.link.ProvisionService/Provision"
            return {path: Handler(self.provision, Cardinality.UNARY_UNARY, ProvisionRequest, ProvisionResponse)}

    for count in (MAX_FIELDS // 2, MAX_FIELDS):
        async with serve([Padded(count)], host="127.0.0.1") as server:
            url = JoinURL("127.0.0.1", server.port, tls=False)
            if count < MAX_FIELDS - 4:
                assert (await provision(url, MACHINE, OWN)).server_key == SERVER
            else:
                with pytest.raises(InvalidAnswerError, match=f"more than {MAX_FIELDS} fields"):
                    await provision(url, MACHINE, OWN)
