"""What joins are measured against: grpclib's own server with a handler that answers a constant."""

import grpclib.server
import uvloop

from siderolink.common.pb.sidero.link import ProvisionRequest, ProvisionResponse, ProvisionServiceBase

ANSWER = ProvisionResponse(
    server_endpoint=["192.0.2.1:51820"],
    server_public_key="x" * 44,
    node_address_prefix="fdae:41e4:649b:9303:7e8f:da5e:3a2c:6984/64",
    server_address="fdae:41e4:649b:9303::1",
)


class Constant(ProvisionServiceBase):
    async def provision(self, message: ProvisionRequest) -> ProvisionResponse:
        return ANSWER


async def main() -> None:
    server = grpclib.server.Server([Constant()])
    await server.start("192.0.2.1", 4000)
    print("serving", flush=True)
    await server.wait_closed()


if __name__ == "__main__":
    uvloop.run(main())
