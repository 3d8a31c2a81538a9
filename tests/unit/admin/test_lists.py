"""Lists: every page together is everything once, in order; long answers are encoded in parts; hostile arguments are refused."""

import asyncio
from collections.abc import AsyncIterator
from ipaddress import IPv6Address
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from siderolink.common.errors import ConfigurationError
from siderolink.common.grpc import GRPCError, Status
from siderolink.common.keys import PublicKey
from siderolink.common.machine_events import pack_event
from siderolink.common.pb.machine import AddressEvent
from siderolink.common.pb.siderolink.admin import v1 as pb
from siderolink.common.selection import Selector, changed_labels
from siderolink.server.admin.lists import page_of
from siderolink.server.admin.machines import SORTS
from siderolink.server.admin.names import check_name, check_note
from siderolink.server.reporting import MachineEvent
from siderolink.server.store import Machine, Transaction
from tests.support.admin_server import AdminServer, open_admin_server
from tests.support.stores import KINDS, opened

pytestmark = pytest.mark.anyio

COUNT = 60


def machine(number: int) -> Machine:
    return Machine(
        id=f"{number:016x}",
        node_uuid=f"00000000-0000-4000-8000-{number:012x}",
        public_key=PublicKey(number.to_bytes(32)),
        overlay_address=IPv6Address(number + 2),
        talos_version=f"v1.{number % 11}.0",
        created_at=float(number % 7),
        joined_at=float(number % 5),
        labels={"rack": str(number % 4)},
        note="n" * 4000 if number % 2 else "",
        was_linked=True,
        linked_at=1.0,
    )


async def fill(admin_server: AdminServer, count: int = COUNT) -> None:
    async def work(transaction: Transaction) -> None:
        for number in range(count):
            await transaction.insert(machine(number))

    await admin_server.manager.store.transact(work)
    await admin_server.manager.reconciler.load()


@pytest.fixture(params=KINDS)
async def admin_server(request: pytest.FixtureRequest, tmp_path: Path) -> AsyncIterator[AdminServer]:
    async with opened(request.param) as store, open_admin_server(tmp_path, store) as admin_server:
        await fill(admin_server)
        yield admin_server


@pytest.mark.parametrize("sort", ["", *SORTS, *(f"-{name}" for name in SORTS)])
async def test_all_pages_together_contain_each_item_once(admin_server: AdminServer, sort: str) -> None:
    async with admin_server.local() as local:
        stub = pb.MachineServiceStub(local)
        whole = await stub.list_machines(pb.ListMachinesRequest(page_size=1000, sort=sort))
        found, token = list[str](), ""
        while True:
            page = await stub.list_machines(pb.ListMachinesRequest(page_size=7, page_token=token, sort=sort))
            assert page.total == COUNT
            found += [one.id for one in page.machines]
            token = page.next_page_token
            if not token:
                break
    assert found == [one.id for one in whole.machines]
    assert sorted(found) == [f"{number:016x}" for number in range(COUNT)]


async def test_versions_are_sorted_as_numbers(admin_server: AdminServer) -> None:
    async with admin_server.local() as local:
        page = await pb.MachineServiceStub(local).list_machines(pb.ListMachinesRequest(sort="-version", page_size=1))
    assert page.machines[0].talos_version == "v1.10.0"


async def test_a_long_answer_is_cut_into_pages_and_encoded_in_parts(
    admin_server: AdminServer, monkeypatch: pytest.MonkeyPatch
) -> None:
    await admin_server.manager.store.transact(lambda transaction: more(transaction))
    await admin_server.manager.reconciler.load()
    encode = pb.Machine.__bytes__
    counts: list[int] = []
    turn = 0

    def counted(self: pb.Machine) -> bytes:
        counts.append(turn)
        return encode(self)

    async def turning() -> None:
        nonlocal turn
        while True:
            turn += 1
            await asyncio.sleep(0)

    monkeypatch.setattr(pb.Machine, "__bytes__", counted)
    async with admin_server.local() as channel:
        task = asyncio.create_task(turning())
        page = await pb.MachineServiceStub(channel).list_machines(pb.ListMachinesRequest(page_size=1000))
        task.cancel()
    assert page.total == 460
    assert 0 < len(page.machines) < page.total, "a page has about a megabyte"
    assert page.next_page_token
    assert max(counts.count(at) for at in set(counts)) <= 40, "encoded in one turn of the loop"


async def more(transaction: Transaction) -> None:
    for number in range(1000, 1400):
        await transaction.insert(machine(2 * number + 1))


@pytest.mark.parametrize(
    "request_",
    [
        pb.ListMachinesRequest(page_size=1001),
        pb.ListMachinesRequest(page_token="x"),
        pb.ListMachinesRequest(page_token="eyJhIjoxfQ=="),
        pb.ListMachinesRequest(page_token="A" * 3000),
        pb.ListMachinesRequest(page_token="WyIiLCAxLCAiMCJd"),
        pb.ListMachinesRequest(sort="password"),
        pb.ListMachinesRequest(sort="--name"),
        pb.ListMachinesRequest(filter=pb.MachineFilter(states=["lost"])),
        pb.ListMachinesRequest(filter=pb.MachineFilter(transport="pigeon")),
        pb.ListMachinesRequest(filter=pb.MachineFilter(selector="a=b," * 100)),
        pb.ListMachinesRequest(filter=pb.MachineFilter(selector="a in (b")),
        pb.ListMachinesRequest(filter=pb.MachineFilter(selector="a" * 5000)),
        pb.ListMachinesRequest(filter=pb.MachineFilter(selector="\0=\n")),
    ],
)
async def test_invalid_requests_are_refused_in_one_line(admin_server: AdminServer, request_: pb.ListMachinesRequest) -> None:
    async with admin_server.local() as local:
        with pytest.raises(GRPCError) as caught:
            await pb.MachineServiceStub(local).list_machines(request_)
    assert caught.value.status is Status.INVALID_ARGUMENT
    assert caught.value.message
    assert caught.value.message.isprintable()


@given(st.text(max_size=80))
def test_parsers_accept_or_refuse_any_text(text: str) -> None:
    said: list[str] = []
    for parse in (Selector, check_name, check_note, lambda text: changed_labels({}, {text: text}, ())):
        try:
            parse(text)
        except ConfigurationError as error:
            said.append(str(error))
    assert all(one.isprintable() for one in said)


@given(st.lists(st.tuples(st.integers(0, 3), st.text("ab", max_size=2)), unique=True), st.integers(1, 5), st.booleans())
def test_pages_of_any_size_contain_each_item_once(items: list[tuple[int, str]], size: int, descending: bool) -> None:
    ordered = sorted(items, reverse=descending)
    found, token = list[tuple[int, str]](), ""
    while True:
        page = page_of(ordered, lambda item: item, size, token, descending=descending)
        found += page.items
        token = page.next_page_token
        if not token:
            break
    assert found == ordered


@pytest.mark.parametrize(
    ("selector", "labels", "matches"),
    [
        ("", {}, True),
        ("a=b", {"a": "b"}, True),
        ("a==b", {"a": "c"}, False),
        ("a!=b", {}, True),
        ("a", {"a": ""}, True),
        ("!a", {"a": ""}, False),
        ("a in (b, c),d", {"a": "c", "d": "x"}, True),
        ("a notin (b,c)", {"a": "c"}, False),
        ("example.com/a=b", {"example.com/a": "b"}, True),
    ],
)
def test_selectors_have_kubectls_syntax(selector: str, labels: dict[str, str], matches: bool) -> None:
    assert Selector(selector).matches(labels) == matches


@pytest.mark.parametrize(
    "name", ["", "-a", "a-", "a b", "ä", "0" * 16, "3e1d4b52-0f8b-4d4d-9a34-1d4e3b7c6a51", "a" * 64, "a\n"]
)
def test_invalid_names_are_refused(name: str) -> None:
    with pytest.raises(ConfigurationError):
        check_name(name)


async def test_a_machine_is_found_by_its_reported_hostname(admin_server: AdminServer) -> None:
    told = ["Edge-7.example.com", "bad name", "", "x" * 300, "\u202eevil"]
    link = admin_server.manager.links.get(machine(3).id)
    assert link is not None
    for name in told:
        packed = pack_event(AddressEvent(hostname=name))
        event = MachineEvent(
            machine=link.machine, received_at=1.0, id="e", actor_id="", type_url=packed.type_url, data=packed.value
        )
        admin_server.administration.hostnames.note(event)
    async with admin_server.local() as local:
        stub = pb.MachineServiceStub(local)
        page = await stub.list_machines(pb.ListMachinesRequest(filter=pb.MachineFilter(text="EDGE-7.ex")))
        assert [(one.id, one.hostname, one.name) for one in page.machines] == [
            (machine(3).id, "edge-7.example.com", machine(3).node_uuid)
        ]
        with pytest.raises(GRPCError) as caught:
            await stub.get_machine(pb.MachineRequest(name="edge-7.example.com"))
        assert caught.value.status is Status.NOT_FOUND
