"""Limits on gRPC's length-prefixed messages (gRPC over HTTP/2, "Length-Prefixed-Message"), and the codec of ordinary calls."""

from collections.abc import Callable
from typing import Any, TypeVar, cast

import betterproto2
from grpclib import GRPCError, Status
from grpclib.encoding.proto import ProtoCodec
from grpclib.protocol import Buffer

from siderolink.common.errors import InvalidAnswerError
from siderolink.common.grpc.accounts import Account
from siderolink.common.grpc.refusals import Refusal, Refused
from siderolink.common.grpc.timers import Timers
from siderolink.common.protobuf_wire import MalformedWireError, count_fields, has_declared_types, refuse_strings_as_numbers

T = TypeVar("T")

PREFIX_BYTES = 5
"""One byte for the compressed flag and four for the length."""
MAX_MESSAGES_AT_ONCE = 2_048
"""Maximum messages in one DATA frame; they take about a millisecond, and a frame has room for 13,000 empty ones."""

OnRefusal = Callable[[Refusal, str], None]
"""Called with the reason and a one-line description."""


def framed(message: bytes) -> bytes:
    """The message with its prefix, uncompressed."""
    return bytes(1) + len(message).to_bytes(4) + message


def check_prefix(compressed: int, length: int, max_bytes: int) -> None:
    """Raises Refused if a message with this prefix is not acceptable."""
    if compressed:
        raise Refused(Refusal.MESSAGE_COMPRESSED, "the message is compressed, but no compression was negotiated")
    if length > max_bytes:
        raise Refused(Refusal.MESSAGE_TOO_LARGE, f"the message has {length} bytes, more than {max_bytes}")


class PrefixGuard:
    """Checks the prefixes of messages that arrive in pieces of any size."""

    def __init__(self, max_bytes: int) -> None:
        self.messages = 0
        """Number of complete messages."""
        self.is_single = False
        """Whether there should be only one message; checking ends after a second one."""
        self.max_bytes = max_bytes
        self._prefix = b""
        self._remaining = 0

    @property
    def is_between(self) -> bool:
        """Whether no incomplete message has begun."""
        return not self._remaining and not self._prefix

    def feed(self, data: bytes) -> None:
        """Check the next bytes. Raises Refused at the first invalid prefix, and for too many messages at once."""
        pos, end, most = 0, len(data), self.messages + MAX_MESSAGES_AT_ONCE
        while pos < end and not (self.is_single and self.messages > 1):
            if not self._remaining:
                prefix = self._prefix + data[pos : pos + PREFIX_BYTES - len(self._prefix)]
                if len(prefix) < PREFIX_BYTES:
                    self._prefix = prefix
                    return
                pos += PREFIX_BYTES - len(self._prefix)
                self._prefix, self._remaining = b"", int.from_bytes(prefix[1:])
                check_prefix(prefix[0], self._remaining, self.max_bytes)
            taken = min(self._remaining, end - pos)
            self._remaining -= taken
            pos += taken
            if not self._remaining:
                self.messages += 1
                if self.messages > most:
                    raise Refused(Refusal.SMALL_FRAME_FLOOD, f"more than {MAX_MESSAGES_AT_ONCE} messages in one frame")


class MessageSplitter:
    """Splits a stream's bytes into small messages."""

    def __init__(self, max_bytes: int) -> None:
        self._guard = PrefixGuard(max_bytes)
        self._kept = b""

    def feed(self, data: bytes) -> list[bytes]:
        """The messages that are complete with the next bytes. Raises Refused at the first invalid prefix."""
        self._guard.feed(data)
        self._kept += data
        found, pos, size = [], 0, len(self._kept)
        while size - pos >= PREFIX_BYTES:
            start = pos + PREFIX_BYTES
            end = start + int.from_bytes(self._kept[pos + 1 : start])
            if end > size:
                break
            found.append(self._kept[start:end])
            pos = end
        self._kept = self._kept[pos:]
        return found


class _Held:
    """Bytes that a call has received but not read. Separate from the buffer, whose own callback would form a cycle."""

    __slots__ = ("account", "acknowledge", "size")

    def __init__(self, account: Account, acknowledge: Callable[[int], None]) -> None:
        self.account = account
        self.acknowledge = acknowledge
        self.size = 0

    def consumed(self, size: int) -> None:
        """The call has read these bytes; bytes no longer held are only returned to the windows."""
        self.release(min(size, self.size))
        self.acknowledge(size)

    def release(self, size: int) -> None:
        self.size -= size
        self.account.consumed(size)


class MessageBuffer(Buffer):
    """The unread messages of a call, limited in size and by a deadline."""

    def __init__(
        self,
        acknowledge: Callable[[int], None],
        max_bytes: int,
        on_refusal: OnRefusal,
        account: Account,
        timers: Timers,
        *,
        server: bool = True,
    ) -> None:
        """A `server` refuses a request with a status; a client's call fails with InvalidAnswerError."""
        self._server = server
        self._held = _Held(account, acknowledge)
        super().__init__(self._held.consumed)
        self._acknowledge = acknowledge
        self._guard = PrefixGuard(max_bytes)
        self._on_refusal = on_refusal
        self._error: tuple[Status, str] | None = None
        self._timers = timers
        self._message_seconds: float | None = None
        self._is_expecting = False
        self._single = False
        self._is_read = False
        """Whether reading has begun; before that, a single message is kept whole."""
        self._is_eof_kept = False
        self._partial = bytearray()
        self._partial_size = 0

    def limit(self, max_bytes: int) -> None:
        """Lower the maximum message size; only before data arrives."""
        self._guard.max_bytes = max_bytes

    def charge(self, account: Account) -> None:
        """Charge this account instead of the connection's; only before data arrives."""
        self._held.account = account

    def expect_message(self, seconds: float) -> None:
        """Refuse the call unless its only message completes within `seconds`. Drops data after it."""
        self._single = self._guard.is_single = True
        self._expect(seconds)

    def expect_messages(self, seconds: float) -> None:
        """Refuse the call if any next message does not complete within `seconds`, until the peer half-closes."""
        self._message_seconds = seconds
        self._expect(seconds)

    def _expect(self, seconds: float) -> None:
        self._is_expecting = True
        self._timers.after(self, seconds, self._late, seconds)

    def settle(self) -> None:
        """Stop waiting for a message."""
        if self._is_expecting:
            self._is_expecting = False
            self._timers.stop(self)

    def release(self) -> None:
        """Release everything that the ended call still held."""
        self.settle()
        if self._held.size:
            self._held.release(self._held.size)
        if self._partial_size:
            self._acknowledge(self._partial_size)
            self._partial.clear()
            self._partial_size = 0

    def add(self, data: bytes, ack_size: int) -> None:
        """Add one DATA frame. Ignores empty ones, which grpclib would treat as the end.

        Frames are joined until a message is complete, so that many small ones cost no more than a few large ones.
        """
        if not ack_size:
            return
        if self._single and self._guard.messages:
            self._acknowledge(ack_size)
            return
        if self._error is None:
            try:
                self._guard.feed(data)
            except Refused as refused:
                self._fail(refused.refusal, Status.RESOURCE_EXHAUSTED, refused.message)
        if self._error is None and not self._held.account.receive(ack_size):
            self._fail(
                Refusal.CALL_MEMORY,
                Status.RESOURCE_EXHAUSTED,
                "too much data is queued for this connection's or address's calls",
            )
        if self._error is not None:
            self._acknowledge(ack_size)
            return
        self._held.size += ack_size
        self._partial += data
        self._partial_size += ack_size
        if self._guard.is_between:
            self.settle()
            if self._message_seconds is not None:
                self._expect(self._message_seconds)
            if not self._is_whole:
                self._pass_on()

    def eof(self) -> None:
        """Handle the half-close of the stream by the peer."""
        self.settle()
        if self._is_whole:
            self._is_eof_kept = True
        else:
            self._pass_on()
            super().eof()

    @property
    def _is_whole(self) -> bool:
        """Whether the only message is complete and reading has not begun."""
        return self._single and not self._is_read and self._guard.messages == 1 and self._error is None

    def take_message(self) -> bytes | None:
        """The only message if it is complete, bypassing grpclib's queue; None if it must be read."""
        if not self._is_whole:
            return None
        self._is_read = True
        message, size = bytes(memoryview(self._partial)[PREFIX_BYTES:]), self._partial_size
        self._partial.clear()
        self._partial_size = 0
        self._held.consumed(size)
        return message

    async def read(self, size: int) -> bytes:
        """The next `size` bytes, or none at the end. Raises GRPCError for a refused call, or InvalidAnswerError."""
        if self._is_whole:
            self._is_read = True
            self._pass_on()
            if self._is_eof_kept:
                super().eof()
        self._is_read = True
        try:
            data = await super().read(size)
            is_cut = size > 0 and not data and not self._guard.is_between
        except AssertionError:
            data, is_cut = b"", True
        if is_cut and self._error is None:
            self._fail(Refusal.MESSAGE_MALFORMED, Status.INVALID_ARGUMENT, "the message was cut short")
        if self._error is not None:  # a new exception each time: a stored one would refer back here by its traceback
            status, message = self._error
            raise GRPCError(status, message) if self._server else InvalidAnswerError(f"the answer is invalid: {message}")
        return data

    def _pass_on(self) -> None:
        if self._partial_size and self._error is None:
            super().add(bytes(self._partial), self._partial_size)
        self._partial.clear()
        self._partial_size = 0

    def _late(self, seconds: float) -> None:
        self._fail(Refusal.REQUEST_TIMEOUT, Status.DEADLINE_EXCEEDED, f"the request did not end within {seconds:g} s")

    def _fail(self, refusal: Refusal, status: Status, message: str) -> None:
        if self._error is None:
            if refusal is Refusal.MESSAGE_COMPRESSED:
                status = Status.UNIMPLEMENTED
            self._error = status, message
            self._on_refusal(refusal, message)
            super().eof()


class ServerCodec(ProtoCodec):
    """Decodes requests; malformed ones raise INVALID_ARGUMENT.

    A model may have a static method `read_plain`, which parses an ordinary message in one pass within its own limits and
    returns None for any other message. The service then checks the fields itself.
    """

    def __init__(self, on_refusal: OnRefusal, max_fields: int | None = None) -> None:
        self._on_refusal = on_refusal
        self._max_fields = max_fields

    def encode(self, message: Any, message_type: Any) -> bytes:
        """The encoded message; bytes are encoded already."""
        return message if isinstance(message, bytes) else super().encode(message, message_type)

    def decode(self, data: bytes, message_type: Any) -> Any:
        try:
            read_plain = getattr(message_type, "read_plain", None)
            if read_plain is not None and (plain := read_plain(data)) is not None:
                return plain
            if self._max_fields is not None and count_fields(data, self._max_fields, message_type) > self._max_fields:
                raise ValueError(f"more than {self._max_fields} fields")
            refuse_strings_as_numbers(message_type, data)
            message = super().decode(data, message_type)
            return message if read_plain is not None else _declared(message)
        except Exception as error:
            self._on_refusal(Refusal.MESSAGE_MALFORMED, f"{type(error).__name__} on reading a {message_type.__name__}")
            raise GRPCError(Status.INVALID_ARGUMENT, "the message is malformed") from None


def _declared(message: Any) -> Any:
    """The message. Raises MalformedWireError if a field has another wire type, which the decoders do not check."""
    if isinstance(message, betterproto2.Message) and not has_declared_types(message):
        raise MalformedWireError("a field is of another type")
    return message


def decode_answer(data: bytes, kind: type[T], max_fields: int | None = None) -> T:
    """A message from an answer, or within one. Raises InvalidAnswerError if it is malformed or has more fields."""
    try:
        if max_fields is not None and count_fields(data, max_fields, kind) > max_fields:
            raise InvalidAnswerError(f"the answer has more than {max_fields} fields")
        refuse_strings_as_numbers(kind, data)
        message: T = _declared(ProtoCodec().decode(data, cast("Any", kind)))
    except InvalidAnswerError:
        raise
    except Exception as error:
        raise InvalidAnswerError(f"the server's answer is no {kind.__name__}") from error
    return message


class ClientCodec(ProtoCodec):
    """Decodes responses; malformed ones raise InvalidAnswerError."""

    def __init__(self, max_fields: int | None = None) -> None:
        self._max_fields = max_fields

    def decode(self, data: bytes, message_type: Any) -> Any:
        return decode_answer(data, message_type, self._max_fields)
