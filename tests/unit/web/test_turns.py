"""What a visitor of the web UI can cost: input is parsed, pages are made and TLS handshakes begin in turns. All is counted."""

import asyncio
import contextlib
import ssl
from pathlib import Path

import anyio
import pytest
from uvicorn.protocols.http.h11_impl import H11Protocol

from siderolink.common.grpc import ServerCertificate, Turns
from siderolink.common.grpc.accounts import Account, CallBudget
from siderolink.common.grpc.limits import Limits
from siderolink.common.grpc.server import CONNECTION_SECONDS
from siderolink.common.grpc.turns import Work
from siderolink.server import Role
from siderolink.web.guard import LIMITS
from siderolink.web.run import PARSED_AT_ONCE
from tests.support.certificates import make_certificate
from tests.support.iterations import Iterations
from tests.unit.web.test_site import Browser, page

pytestmark = pytest.mark.anyio

CHUNKS = 20_000


@pytest.fixture
def queued(monkeypatch: pytest.MonkeyPatch) -> list[tuple[str, bool]]:
    """Who waited for a turn, and whether it was known."""
    found: list[tuple[str, bool]] = []
    queue = Turns.queue

    def recording(self: Turns, source: str, work: Work, *, is_known: bool) -> None:
        found.append((source, is_known))
        queue(self, source, work, is_known=is_known)

    monkeypatch.setattr(Turns, "queue", recording)
    return found


async def test_a_body_of_tiny_parts_is_parsed_a_few_at_a_time(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("siderolink.common.grpc.turns.TURN_SECONDS", -1.0)
    with Iterations() as iterations:
        data_received = H11Protocol.data_received

        def counting(self: H11Protocol, data: bytes) -> None:
            assert len(data) <= PARSED_AT_ONCE
            iterations.note()
            data_received(self, data)

        monkeypatch.setattr(H11Protocol, "data_received", counting)
        async with page(tmp_path) as stage, await anyio.connect_tcp("127.0.0.1", stage.port) as stream:
            head = f"POST /sign-in HTTP/1.1\r\nHost: 127.0.0.1:{stage.port}\r\nTransfer-Encoding: chunked\r\n\r\n"
            with contextlib.suppress(anyio.BrokenResourceError):
                await stream.send(head.encode() + b"1\r\na\r\n" * CHUNKS)
            with anyio.fail_after(60), contextlib.suppress(anyio.BrokenResourceError, anyio.EndOfStream):
                assert b" 403 " in await stream.receive()
    assert iterations.most == 1
    assert iterations.total > 1


async def test_a_visitors_requests_take_turns_and_those_of_users_before_them(
    tmp_path: Path, queued: list[tuple[str, bool]]
) -> None:
    async with page(tmp_path) as stage:
        queued.clear()
        await Browser(stage.port).get("/sign-in")
        assert queued.count(("127.0.0.1", False)) >= 2, "one to parse the request, one to answer it"
        browser = await stage.visitor(Role.VIEWER)
        await browser.get("/")
        queued.clear()
        await browser.get("/")
        assert ("127.0.0.1", True) in queued


async def test_tls_handshakes_of_visitors_take_turns(tmp_path: Path, queued: list[tuple[str, bool]]) -> None:
    (pem := tmp_path / "tls.pem").write_text(make_certificate("localhost").pem)
    context = ssl.create_default_context()
    context.check_hostname, context.verify_mode = False, ssl.CERT_NONE
    async with page(tmp_path, ServerCertificate(pem)) as stage:
        silent = await anyio.connect_tcp("127.0.0.1", stage.port)
        async with silent:
            queued.clear()
            with anyio.fail_after(60):
                stream = await anyio.connect_tcp(
                    "127.0.0.1", stage.port, tls=True, ssl_context=context, tls_standard_compatible=False
                )
            async with stream:
                assert queued == [("127.0.0.1", False)], "one connection began its handshake; the other sent no ClientHello"


async def test_processor_time_is_charged_to_its_visitor(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    charged: dict[str, float] = {}
    charge = CallBudget.charge

    def recording(self: CallBudget, source: str, seconds: float, now: float) -> float:
        charged[source] = charged.get(source, 0.0) + seconds
        return charge(self, source, seconds, now)

    monkeypatch.setattr(CallBudget, "charge", recording)
    async with page(tmp_path) as stage:
        charged.clear()
        await Browser(stage.port).get("/sign-in")
    assert charged["127.0.0.1"] > CONNECTION_SECONDS


async def test_input_that_waits_is_limited_by_source() -> None:
    costs = CallBudget(LIMITS, has_tokens=True)
    account = Account(LIMITS, costs, "192.0.2.7")
    most = Limits().max_unproven_call_bytes // 4
    assert account.take(most)
    assert not account.take(1)


async def test_a_connection_whose_input_fails_to_be_parsed_is_closed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(self: H11Protocol, data: bytes) -> None:
        raise MemoryError

    monkeypatch.setattr("siderolink.web.run.REQUEST_SECONDS", 3600.0)
    failures: list[object] = []
    async with page(tmp_path) as stage:
        asyncio.get_running_loop().set_exception_handler(lambda _, context: failures.append(context.get("exception")))
        async with await anyio.connect_tcp("127.0.0.1", stage.port) as stream:
            monkeypatch.setattr(H11Protocol, "data_received", fail)
            await stream.send(b"GET /sign-in HTTP/1.1\r\n\r\n")
            with anyio.fail_after(60), pytest.raises((anyio.EndOfStream, anyio.BrokenResourceError)):
                await stream.receive()
    assert [type(failure) for failure in failures] == [MemoryError]
