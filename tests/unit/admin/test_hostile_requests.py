"""Requests that no client makes: each is refused with a clear status, and none is an error of the server."""

import dataclasses
from collections.abc import AsyncIterator, Iterator
from pathlib import Path
from typing import Any, get_args, get_type_hints

import betterproto2
import pytest
from grpclib.const import Handler

from siderolink.common.grpc import ByteStream, GrpcChannel, GRPCError, Status
from siderolink.common.protobuf_wire import BYTES, VARINT, encode_varint
from siderolink.server.admin.services.access import CALL_LIMITS
from tests.support.admin_server import AdminServer, open_admin_server
from tests.support.api import Raw
from tests.support.stores import opened

pytestmark = pytest.mark.anyio

NUL = "a\0b"


@pytest.fixture(params=["sql", "postgres"])
async def admin_server(request: pytest.FixtureRequest, tmp_path: Path) -> AsyncIterator[AdminServer]:
    async with opened(request.param) as store, open_admin_server(tmp_path, store) as admin_server:
        yield admin_server


def field(number: int, value: int | bytes) -> bytes:
    """A field with this value, as a number or as bytes."""
    if isinstance(value, int):
        return encode_varint(number << 3 | VARINT) + encode_varint(value)
    return encode_varint(number << 3 | BYTES) + encode_varint(len(value)) + value


def fields(kind: Any) -> Iterator[tuple[Any, type | None]]:
    """Each field of a model, with the model of what is in it."""
    hints = get_type_hints(kind)
    for each in dataclasses.fields(kind):
        models = (one for one in get_args(hints[each.name]) if isinstance(one, type) and issubclass(one, betterproto2.Message))
        yield each.metadata["betterproto"], next(models, None)


def of_another_type(kind: Any) -> Iterator[bytes]:
    """Each field with a value of another wire type, those of messages within, too."""
    for declared, within in fields(kind):
        is_text = declared.proto_type in ("string", "bytes", "map", "message")
        yield field(declared.number, 5) if is_text else field(declared.number, b"\x01\x01\x01")
        if within is not None:
            yield from (field(declared.number, value) for value in of_another_type(within))
        if declared.proto_type == "map":
            yield field(declared.number, field(1, 5) + field(2, 5))


def with_nul(kind: Any) -> Iterator[bytes]:
    """Each text with a NUL."""
    text = NUL.encode()
    for declared, within in fields(kind):
        if declared.proto_type == "string":
            yield field(declared.number, text)
        if declared.proto_type == "map":
            yield field(declared.number, field(1, text) + field(2, b"x"))
            yield field(declared.number, field(1, b"x") + field(2, text))
        if within is not None:
            yield from (field(declared.number, value) for value in with_nul(within))


async def status_of(channel: GrpcChannel, path: str, handler: Handler, data: bytes) -> Status:
    try:
        request = channel.request(path, handler.cardinality, Raw, handler.reply_type, timeout=20)
        async with request as stream:
            await stream.send_message(Raw(data), end=True)
            await stream.recv_message()
            await stream.recv_trailing_metadata()
    except GRPCError as error:
        return error.status
    return Status.OK


@pytest.mark.parametrize("hostile", [of_another_type, with_nul])
async def test_every_method_refuses_invalid_requests(
    admin_server: AdminServer, caplog: pytest.LogCaptureFixture, hostile: Any
) -> None:
    count = 0
    async with admin_server.local() as channel:
        for service in admin_server.services:
            for path, handler in service.__mapping__().items():
                for data in () if handler.request_type is ByteStream else hostile(handler.request_type):
                    assert await status_of(channel, path, handler, data) is Status.INVALID_ARGUMENT, (path, data)
                    count += 1
    assert count > 50
    assert not [record for record in caplog.records if record.exc_info]


async def test_a_request_of_many_fields_is_not_decoded(admin_server: AdminServer, monkeypatch: pytest.MonkeyPatch) -> None:
    most = CALL_LIMITS.max_fields
    assert most is not None
    decoded: list[object] = []
    monkeypatch.setattr("siderolink.common.grpc.messages.refuse_strings_as_numbers", lambda *args: decoded.append(args))
    async with admin_server.local() as channel:
        for service in admin_server.services:
            for path, handler in service.__mapping__().items():
                if handler.request_type is not ByteStream:
                    found = await status_of(channel, path, handler, b"\x98\x06\x01" * (most + 1))
                    assert found is Status.INVALID_ARGUMENT, path
    assert decoded == []
