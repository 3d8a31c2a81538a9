"""The machine's API on the loopback, called by another implementation of gRPC, by TLS of old, and by bad callers."""

import logging
import ssl
import uuid
from collections.abc import AsyncIterator, Awaitable, Callable
from contextlib import asynccontextmanager
from datetime import UTC, datetime, timedelta
from functools import partial
from ipaddress import IPv6Address, IPv6Interface
from typing import Any

import anyio
import anyio.to_thread
import grpc
import pytest
from grpclib import GRPCError, Status

from siderolink import JoinURL
from siderolink.client import InterfaceConfigured, Joined, Left
from siderolink.client.maintenance import (
    ApplyAnswer,
    ApplyRequest,
    Everywhere,
    LinkFollower,
    MachineHooks,
    MachineVersion,
    MaintenanceApi,
    Nowhere,
    OnOverlay,
    ResourceSpec,
    ResourceType,
    serve_maintenance,
)
from siderolink.client.maintenance.certificate import MaintenanceCertificates
from siderolink.client.maintenance.roles import Admittance, CallerRole
from siderolink.common.errors import ConfigurationError
from siderolink.common.keys import PrivateKey
from siderolink.common.pb.cosi import resource as cosi
from siderolink.common.pb.machine import (
    ApplyConfigurationRequest,
    ApplyConfigurationRequestMode,
    ApplyConfigurationResponse,
    VersionResponse,
)
from tests.support.machine_api import MACHINE, STATE, MachineClient, fetch_certificate, machine_client, status_of

pytestmark = pytest.mark.anyio

APPLY = f"{MACHINE}ApplyConfiguration"
WIDGET = ResourceType(name="Widgets.example.org", singular="Widget", namespace="things", aliases=("w",))
SERVER = "fdae:41e4:649b:9303::1"


@asynccontextmanager
async def serving(hooks: MachineHooks | None = None, **options: Any) -> AsyncIterator[MaintenanceApi]:
    async with serve_maintenance(hooks, node_uuid=str(uuid.uuid4()), port=0, **options) as api:
        yield api


async def ask(api: MaintenanceApi, work: Callable[[MachineClient], Any]) -> Any:
    """Do something with a client, in a thread."""
    port = api.port
    assert port is not None

    def call() -> Any:
        with machine_client("127.0.0.1", port) as client:
            return work(client)

    return await anyio.to_thread.run_sync(call)


async def refusal(api: MaintenanceApi, work: Callable[[MachineClient], Any]) -> tuple[str, str]:
    with pytest.raises(grpc.RpcError) as caught:
        await ask(api, work)
    return status_of(caught.value)


def apply(data: bytes = b"kind: A", mode: int = 1) -> Callable[[MachineClient], Any]:
    request = ApplyConfigurationRequest(data=data, mode=ApplyConfigurationRequestMode(mode))
    return lambda client: client.call(APPLY, request, ApplyConfigurationResponse)


def applying(hook: Callable[[ApplyRequest], Awaitable[ApplyAnswer]]) -> MachineHooks:
    return MachineHooks(apply_configuration=hook)


async def test_the_version_is_set_by_the_embedder() -> None:
    async with serving(MachineHooks(version=MachineVersion(tag="v1.2.3", platform="cloud"))) as api:
        [answer] = (await ask(api, MachineClient.version)).messages
        assert (answer.version.tag, answer.version.os, answer.platform.name) == ("v1.2.3", "linux", "cloud")


async def test_methods_without_a_hook_are_unimplemented() -> None:
    async with serving() as api:
        assert (await refusal(api, apply()))[0] == "UNIMPLEMENTED"
        for name in ("Upgrade", "Bootstrap", "NoSuchMethod"):  # the role comes first
            call = partial(MachineClient.call, path=f"{MACHINE}{name}", request=b"", answer=VersionResponse)
            assert await refusal(api, call) == ("PERMISSION_DENIED", "not authorized")
        for name in ("Create", "Update", "Destroy"):
            call = partial(MachineClient.call, path=f"{STATE}{name}", request=b"", answer=VersionResponse)
            assert await refusal(api, call) == ("PERMISSION_DENIED", "write access is not allowed")


async def test_a_hook_answers_refuses_and_fails(caplog: pytest.LogCaptureFixture) -> None:
    requests: list[ApplyRequest] = []

    async def hook(request: ApplyRequest) -> ApplyAnswer:
        requests.append(request)
        if request.data == b"bad":
            raise ConfigurationError("line 1:\nno such kind")
        if request.data == b"later":
            raise GRPCError(Status.FAILED_PRECONDITION, "not now")
        if request.data == b"broken":
            raise ZeroDivisionError("a secret detail")
        return ApplyAnswer(warnings=("careful",), mode="staged", details="done")

    async with serving(applying(hook)) as api:
        [answer] = (await ask(api, apply())).messages
        assert (answer.warnings, int(answer.mode), answer.mode_details) == (["careful"], 3, "done")
        assert requests == [ApplyRequest(data=b"kind: A", mode="auto", dry_run=False, try_timeout=None, by_admin=False)]
        assert await refusal(api, apply(b"bad")) == ("INVALID_ARGUMENT", "line 1: no such kind")
        assert await refusal(api, apply(b"later")) == ("FAILED_PRECONDITION", "not now")
        assert (await refusal(api, apply(mode=99)))[0] == "INVALID_ARGUMENT"
        with caplog.at_level(logging.CRITICAL, "siderolink"):
            status, text = await refusal(api, apply(b"broken"))
        assert status == "INTERNAL"
        assert "secret" not in text


@pytest.mark.parametrize(
    "message",
    [b"\x0a\xff", b"\x08\x01", b"\x0a\x02\xff\xfe", b"\x20\xff\xff", b"\x32\x03abc", b"\xff" * 20, b"\x0b"],
)
async def test_malformed_messages_are_refused_and_reach_no_hook(message: bytes) -> None:
    async def hook(request: ApplyRequest) -> ApplyAnswer:
        assert isinstance(request.data, bytes)
        return ApplyAnswer()

    async with serving(applying(hook)) as api:
        await ask(api, lambda client: attempt(partial(client.call, APPLY, message, ApplyConfigurationResponse)))
        for method, answer in (("Get", cosi.GetResponse), ("List", cosi.ListResponse)):
            status, _ = await refusal(api, partial(MachineClient.call, path=f"{STATE}{method}", request=message, answer=answer))
            assert status in ("INVALID_ARGUMENT", "PERMISSION_DENIED")
        assert await ask(api, MachineClient.version)


async def test_an_oversized_configuration_is_refused_by_its_length() -> None:
    async def hook(_: ApplyRequest) -> ApplyAnswer:
        raise AssertionError

    async with serving(applying(hook)) as api:
        assert (await refusal(api, apply(bytes(2 * 1024 * 1024))))[0] == "RESOURCE_EXHAUSTED"
        assert await ask(api, MachineClient.version)
        assert api.refusals["message_too_large"] == 1


async def test_resources_are_found_by_alias_and_an_embedders_own_among_them() -> None:
    async with serving() as api:
        api.resources.define(WIDGET)
        api.resources.put(WIDGET, "one", ResourceSpec(b"\x08\x01", {"size": 1}))
        [found] = await ask(api, lambda client: client.get_all("W"))
        assert (found.metadata.id, found.metadata.version, found.metadata.phase) == ("one", "1", "running")
        assert (found.spec.proto_spec, found.spec.yaml_spec) == (b"\x08\x01", "size: 1\n")
        assert await ask(api, lambda client: client.get(WIDGET.name, "one", "")) == found
        assert await refusal(api, lambda client: client.get(WIDGET.name, "two", "things")) == (
            "NOT_FOUND",
            "resource Widgets.example.org(things/two@undefined) doesn't exist",
        )
        assert await ask(api, lambda client: client.list_all(WIDGET.name, "network")) == []
        assert await refusal(api, lambda client: client.list_all(WIDGET.name, "elsewhere")) == (
            "PERMISSION_DENIED",
            'namespace "elsewhere" is not supported',
        )
        assert await refusal(api, lambda client: client.list_all("Nothings.example.org", "elsewhere")) == (
            "PERMISSION_DENIED",
            'resource type "Nothings.example.org" is not supported',
        )
        assert (await refusal(api, lambda client: client.list_all("x" * 5000, "")))[0] == "INVALID_ARGUMENT"


def attempt(call: Callable[[], object]) -> None:
    """A message is decoded or refused; nothing else happens."""
    try:
        call()
    except grpc.RpcError as error:
        if status_of(error)[0] not in ("INVALID_ARGUMENT", "UNIMPLEMENTED"):
            raise


def watched(client: MachineClient, count: int, **fields: Any) -> list[list[cosi.Event]]:
    request = cosi.WatchRequest(type=WIDGET.name, namespace="things", **fields)
    stream = client.stream(f"{STATE}Watch", request)
    try:
        return [cosi.WatchResponse.parse(next(stream)).event for _ in range(count)]
    finally:
        stream.cancel()


def kinds(events: list[cosi.Event]) -> list[tuple[str, str]]:
    """Names of what happened, each with the resource's version."""
    return [
        (str(event.event_type.name), event.resource.metadata.version if event.resource and event.resource.metadata else "")
        for event in events
    ]


async def test_a_watch_begins_with_an_empty_answer_and_then_the_requested_resources() -> None:
    async with serving() as api:
        api.resources.define(WIDGET)
        api.resources.put(WIDGET, "one", ResourceSpec(b"", {}))
        contents = cosi.WatchOptions(bootstrap_contents=True)
        first, *rest = await ask(api, partial(watched, count=3, options=contents, api_version=1))
        assert first == []
        assert [kinds(events) for events in rest] == [[("CREATED", "1")], [("BOOTSTRAPPED", "undefined")]]
        old = await ask(api, partial(watched, count=2, options=contents))
        assert [kinds(events) for events in old] == [[], [("CREATED", "1")]]
        aggregated = cosi.WatchOptions(bootstrap_contents=True, aggregated=True)
        _, both = await ask(api, partial(watched, count=2, options=aggregated, api_version=1))
        assert kinds(both) == [("CREATED", "1"), ("BOOTSTRAPPED", "undefined")]
        _, present = await ask(api, partial(watched, count=2, id="one", api_version=1))
        assert kinds(present) == [("CREATED", "1")]
        _, [absent] = await ask(api, partial(watched, count=2, id="two", api_version=1))
        assert kinds([absent]) == [("DESTROYED", "undefined")]
        assert absent.resource is not None
        assert absent.resource.spec is not None  # clients refuse a resource without one


@pytest.mark.parametrize(
    ("fields", "status"),
    [
        ({"options": cosi.WatchOptions(start_from_bookmark=b"x")}, "FAILED_PRECONDITION"),
        ({"options": cosi.WatchOptions(start_from_bookmark=bytes(16))}, "FAILED_PRECONDITION"),
        ({"options": cosi.WatchOptions(tail_events=1, bootstrap_contents=True)}, "INVALID_ARGUMENT"),
        ({"options": cosi.WatchOptions(tail_events=1, start_from_bookmark=bytes(16))}, "INVALID_ARGUMENT"),
        ({"options": cosi.WatchOptions(id_query=cosi.IdQuery(regexp="(a"))}, "INVALID_ARGUMENT"),
        ({"options": cosi.WatchOptions(id_query=cosi.IdQuery(regexp="a" * 2000))}, "INVALID_ARGUMENT"),
        ({"options": cosi.WatchOptions(label_query=[cosi.LabelQuery()] * 1000)}, "INVALID_ARGUMENT"),
        ({"id": "one", "options": cosi.WatchOptions(bootstrap_contents=True)}, "UNIMPLEMENTED"),
        ({"id": "one", "options": cosi.WatchOptions(id_query=cosi.IdQuery(regexp="a"))}, "UNIMPLEMENTED"),
    ],
)
async def test_unsupported_watch_options_are_refused(fields: dict[str, Any], status: str) -> None:
    async with serving() as api:
        api.resources.define(WIDGET)
        assert (await refusal(api, partial(watched, count=1, **fields)))[0] == status


async def test_tls_is_1_3_with_http2_and_a_leaf_of_a_day() -> None:
    async with serving() as api:
        port = api.port
        assert port is not None
        await anyio.to_thread.run_sync(fetch_certificate, "127.0.0.1", port)
        old = ssl.SSLContext(ssl.PROTOCOL_TLS_CLIENT)
        old.check_hostname, old.verify_mode = False, ssl.CERT_NONE
        old.maximum_version = ssl.TLSVersion.TLSv1_2
        with pytest.raises((ssl.SSLError, anyio.BrokenResourceError)):
            await anyio.connect_tcp("127.0.0.1", port, ssl_context=old, tls=True)
        # bytes that are not TLS
        async with await anyio.connect_tcp("127.0.0.1", port) as stream:
            await stream.send(b"PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n" + bytes(1000))
            with anyio.fail_after(30), pytest.raises((anyio.EndOfStream, anyio.BrokenResourceError)):
                while True:
                    await stream.receive()
        assert await ask(api, MachineClient.version)
    certificates = MaintenanceCertificates(["192.0.2.1", "name.example"])
    leaf = certificates.leaf
    assert leaf.issuer != leaf.subject
    assert leaf.not_valid_after_utc - datetime.now(UTC) <= timedelta(hours=24)
    certificates.renew()
    assert certificates.leaf.serial_number != leaf.serial_number


async def test_a_call_that_moves_the_api_to_another_address_is_answered_first() -> None:
    moved = anyio.Event()
    place: list[MaintenanceApi] = []

    async def hook(_: ApplyRequest) -> ApplyAnswer:
        place[0].move(Nowhere())
        moved.set()
        await anyio.sleep(0.2)
        return ApplyAnswer(details="answered")

    async with serving(applying(hook)) as api:
        place.append(api)
        answer = await ask(api, apply())
        assert answer.messages[0].mode_details == "answered"
        with anyio.fail_after(30):
            await api.wait_listening()
        assert api.port is None
        api.move(Everywhere())
        with anyio.fail_after(30):
            await api.wait_listening()
        assert await ask(api, MachineClient.version)


async def test_a_used_port_is_reported_and_retried(caplog: pytest.LogCaptureFixture) -> None:
    async with serving() as first:
        assert first.port is not None
        async with serve_maintenance(node_uuid="", port=first.port) as second:
            assert second.port is None
            assert "in use" in caplog.text
            assert await ask(first, MachineClient.version)
            first.move(Nowhere())
            with anyio.fail_after(30):
                await second.wait_listening()
            assert await ask(second, MachineClient.version)


@pytest.mark.parametrize(
    ("admin", "source", "role"),
    [
        (SERVER, (SERVER, 1, 0, 0), CallerRole.ADMIN),
        (SERVER, ("fdae:41e4:649b:9303::2", 1, 0, 0), CallerRole.READER),
        (SERVER, ("192.0.2.1", 1), CallerRole.READER),
        (SERVER, "/a/local/socket", CallerRole.READER),
        (SERVER, None, CallerRole.READER),
        (SERVER, (), CallerRole.READER),
        (SERVER, (f"{SERVER}%eth0", 1, 0, 4), CallerRole.READER),
        (None, (SERVER, 1, 0, 0), CallerRole.READER),
    ],
)
def test_only_the_servers_own_address_by_its_own_socket_is_admin(admin: str | None, source: object, role: CallerRole) -> None:
    assert Admittance(admin=None if admin is None else IPv6Address(admin)).role(source) is role


def test_listen_addresses_are_compared_by_value() -> None:
    one, other = (OnOverlay(address=IPv6Address("fdae::1"), interface="a", server=IPv6Address("fdae::2")) for _ in range(2))
    assert one == other
    assert len({Everywhere(), Nowhere(), Everywhere(), one, other}) == 3


def place_of(api: MaintenanceApi) -> object:
    return api.place


async def test_a_recreated_interface_is_another_listen_address(monkeypatch: pytest.MonkeyPatch) -> None:
    numbers = {"siderolink": 7}
    monkeypatch.setattr("socket.if_nametoindex", numbers.__getitem__)
    async with serving(place=Nowhere()) as api:
        presence = LinkFollower(api)
        presence.configured(JoinURL.parse("grpc://192.0.2.1:4000"))
        assert place_of(api) == Nowhere()
        address, server = IPv6Interface("fdae::2/64"), IPv6Address("fdae::1")
        joined = Joined(
            server_key=PrivateKey.generate().public_key(), address=address, server_address=server, transport="udp", endpoints=()
        )
        presence.on_event(joined)
        assert place_of(api) == Nowhere()
        configured = InterfaceConfigured(interface="siderolink", kind="userspace", mtu=1280)
        presence.on_event(configured)
        assert place_of(api) == OnOverlay(address=address.ip, interface="siderolink", server=server, interface_index=7)
        numbers["siderolink"] = 9
        presence.on_event(configured)
        assert place_of(api) == OnOverlay(address=address.ip, interface="siderolink", server=server, interface_index=9)
        presence.on_event(Left())
        assert place_of(api) == Nowhere()
        presence.removed()
        assert place_of(api) == Everywhere()


async def test_leaving_closes_everything_although_connections_are_open(no_leaks: None) -> None:
    async with serving() as api:
        assert api.port is not None
        await anyio.to_thread.run_sync(fetch_certificate, "127.0.0.1", api.port)
        half_open = await anyio.connect_tcp("127.0.0.1", api.port)
    await half_open.aclose()
