"""A machine's calls by grpcio, which shares no code with the product; run as a program, it prints what it saw as JSON."""

import base64
import json
import os
import sys

import grpc

KEY = base64.b64encode(os.urandom(32)).decode()
UUID = "11111111-2222-4333-8444-555555555555"


def field(number: int, value: str | bytes) -> bytes:
    """One length-delimited protobuf field, by hand."""
    data = value.encode() if isinstance(value, str) else value
    assert len(data) < 128
    return bytes([number << 3 | 2, len(data)]) + data


def request(token: str, key: str = KEY, *, tunnel: bool = True) -> bytes:
    return field(1, UUID) + field(2, key) + field(3, token) + field(4, "") + field(5, "v1.13.0") + bytes([6 << 3, tunnel])


def fields(message: bytes) -> dict[int, list[str]]:
    found: dict[int, list[str]] = {}
    while message:
        number, length = message[0] >> 3, message[1]
        found.setdefault(number, []).append(message[2 : 2 + length].decode())
        message = message[2 + length :]
    return found


def status_of(error: grpc.RpcError) -> list[str]:
    assert isinstance(error, grpc.Call)
    return [error.code().name, error.details() or ""]


def main(target: str) -> None:
    seen: dict[str, object] = {}
    with grpc.insecure_channel(target) as channel:
        provision = channel.unary_unary("/sidero.link.ProvisionService/Provision")
        stream = channel.stream_stream("/sidero.link.WireGuardOverGRPCService/CreateStream")

        def refused(call: object) -> list[str]:
            try:
                list(call) if hasattr(call, "__next__") else call  # type: ignore[call-overload]
            except grpc.RpcError as error:
                return status_of(error)
            return ["OK", ""]

        def provision_status(message: bytes) -> list[str]:
            try:
                provision(message, timeout=5)
            except grpc.RpcError as error:
                return status_of(error)
            return ["OK", ""]

        def claim(address: str) -> list[str]:
            packets = (field(2, bytes(100)) for _ in range(3))
            return refused(stream(packets, metadata=[("x-siderolink-ipv6-addr", address)], timeout=5))

        answer = fields(provision(request("the-join-token"), timeout=5))
        seen["answer"] = {str(number): values for number, values in answer.items()}
        seen["again"] = fields(provision(request("the-join-token"), timeout=5)) == answer
        seen["wrong token"] = provision_status(request("wrong"))
        seen["bad key"] = provision_status(request("the-join-token", "no key"))
        seen["no protobuf"] = provision_status(b"\x0a\x03\xff\xfe\xfd")
        seen["unknown address"] = claim("[fdae:41e4:649b:9304::7]:50888")
        seen["no address"] = claim("nonsense")
        seen["own address"] = claim(answer[6][0])
    json.dump(seen, sys.stdout)


if __name__ == "__main__":
    main(sys.argv[1])
