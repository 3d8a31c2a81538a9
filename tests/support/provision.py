"""A server's API whose Provision answer a test sets, over real sockets on the loopback."""

from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager

import anyio
from grpclib import GRPCError

from siderolink.common.grpc import serve
from siderolink.common.join_url import JoinURL
from siderolink.common.keys import PrivateKey, PublicKey
from siderolink.common.pb.sidero.link import ProvisionRequest, ProvisionResponse, ProvisionServiceBase

ADDRESS = "fdae:41e4:649b:9303::42"
SERVER_ADDRESS = "fdae:41e4:649b:9303::1"


def new_key() -> PublicKey:
    return PrivateKey.generate().public_key()


def response(key: PublicKey, *endpoints: str, address: str = f"{ADDRESS}/64", virtual: str = "") -> ProvisionResponse:
    """An answer in wire form; the endpoints keep their order."""
    return ProvisionResponse(
        server_endpoint=list(endpoints),
        server_public_key=str(key),
        node_address_prefix=address,
        server_address=SERVER_ADDRESS,
        grpc_peer_addr_port=virtual,
    )


class FakeProvision(ProvisionServiceBase):
    """Answers with `answer`, or raises it; `asked` counts the calls and `requests` keeps them."""

    def __init__(self, answer: ProvisionResponse | GRPCError) -> None:
        self.answer = answer
        self.requests: list[ProvisionRequest] = []
        self.hold = anyio.Event()
        self.hold.set()
        self._asked = anyio.Event()

    async def provision(self, message: ProvisionRequest) -> ProvisionResponse:
        self.requests.append(message)
        self._asked.set()
        await self.hold.wait()
        if isinstance(self.answer, GRPCError):
            raise self.answer
        return self.answer

    async def wait_asked(self, condition: Callable[[int], bool]) -> None:
        """Wait until `condition` is true of the number of calls."""
        while not condition(len(self.requests)):
            self._asked = anyio.Event()
            await self._asked.wait()


@asynccontextmanager
async def provision_api(answer: ProvisionResponse | GRPCError) -> AsyncIterator[tuple[FakeProvision, JoinURL]]:
    """The service, and the URL to join it with."""
    service = FakeProvision(answer)
    async with serve([service], host="127.0.0.1") as server:
        yield service, JoinURL("127.0.0.1", server.port, tls=False, join_token="s3cret-token")
