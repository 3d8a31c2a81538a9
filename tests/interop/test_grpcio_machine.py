"""grpcio as a foreign machine at our server: the answer's fields, the statuses and their exact texts."""

import json
import sys
from ipaddress import IPv6Interface
from pathlib import Path

from siderolink.common.addressing import VIRTUAL_PREFIX, overlay_prefix, parse_peer_addr_port
from siderolink.server import Server
from tests.support.topology import SERVER_V4, direct

PROGRAM = Path(__file__).with_name("grpcio_machine.py")


def test_another_implementations_client_gets_the_expected_answers() -> None:
    with direct() as net, net.server.portal() as portal:
        server = Server(
            api_listen=f"{SERVER_V4}:4000",
            wireguard_endpoints=[f"{SERVER_V4}:51820"],
            join_token="the-join-token",
            device="userspace",
        )
        with portal.wrap_async_context_manager(server):
            seen = json.loads(net.machine.run([sys.executable, str(PROGRAM), f"{SERVER_V4}:4000"]))
            key = server.public_key.encode()
    answer = seen["answer"]
    address, _ = parse_peer_addr_port(answer["6"][0])
    assert address in VIRTUAL_PREFIX
    assert answer["1"] == answer["6"]
    assert answer["3"] == [key]
    assert IPv6Interface(answer["4"][0]).network == overlay_prefix()
    assert answer["5"] == ["fdae:41e4:649b:9303::1"]
    assert seen["again"]
    assert seen["wrong token"] == ["PERMISSION_DENIED", "invalid join token"]
    assert seen["bad key"][0] == "INVALID_ARGUMENT"
    assert seen["bad key"][1].startswith("error parsing Wireguard key: ")
    assert seen["no protobuf"][0] == "INVALID_ARGUMENT"
    assert seen["unknown address"] == ["PERMISSION_DENIED", "peer not allowed"]
    assert seen["no address"][0] == "UNKNOWN"
    assert seen["own address"][0] == "OK"
