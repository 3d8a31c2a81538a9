"""The web UI's copy of the machines: updates from the server, searches, and updates of browsers."""

import re
from collections import Counter
from collections.abc import Callable
from ipaddress import IPv6Address
from pathlib import Path
from typing import Any

import anyio
import pytest
from anyio.lowlevel import checkpoint

from siderolink.common.keys import PublicKey
from siderolink.common.pb.siderolink.admin import v1 as pb
from siderolink.server import Role
from siderolink.server.admin.following import MAX_FOLLOWERS, Follower
from siderolink.server.admin.machines import MachineQuery
from siderolink.server.admin.services.access import actor
from siderolink.server.admin.services.machines import MachineService, machine_messages
from siderolink.server.admin.services.server import ServerService
from siderolink.server.fleet.directory import LinkState
from siderolink.server.fleet.limit_watch import QUIET_SECONDS
from siderolink.server.store import Machine, MachineAdmission, Transaction
from siderolink.web.api import ServerAwayError
from siderolink.web.fleet import ORDERS, PAGE_SIZE, Found, MachineRows, Query
from siderolink.web.live import ROW_BYTES, SentRows
from tests.support.admin_server import AdminServer, open_admin_server
from tests.support.turns import counting_turns
from tests.unit.web.test_site import page

pytestmark = pytest.mark.anyio

COUNT = 230


def machine(number: int) -> Machine:
    return Machine(
        id=f"{number * 7919 % 65536:016x}",
        node_uuid=f"00000000-0000-4000-8000-{number:012x}",
        public_key=PublicKey((number + 1).to_bytes(32)),
        overlay_address=IPv6Address((0xFD << 120) + number + 2),
        name=f"node-{number}",
        labels={"rack": str(number % 10), "site": "north" if number % 2 else "south"},
        talos_version=f"v1.{number % 12}.3",
        tunnel=number % 3 == 0,
        admission=MachineAdmission.PENDING if number % 50 == 7 else MachineAdmission.ACCEPTED,
        created_at=float(number),
        joined_at=float(number * 31 % 101),
        linked_at=float(number),
        seen_at=float(number * 17 % 97) + 1,
        was_linked=True,
    )


async def fill(admin_server: AdminServer) -> None:
    async def work(transaction: Transaction) -> None:
        for number in range(COUNT):
            await transaction.insert(machine(number))

    await admin_server.manager.store.transact(work)
    await admin_server.manager.reconciler.load()


async def look(admin_server: AdminServer, follower: Follower) -> pb.MachinesPart:
    """All parts of one poll, merged."""
    whole = pb.MachinesPart()
    async for part in follower.changes():
        assert len(part.machines) <= 20
        whole.machines += await machine_messages(admin_server.administration, part.machines)
        whole.links += [
            pb.LinkChange(id=one.machine.id, link=str(one.state), limits_biting=list(one.limits_biting)) for one in part.links
        ]
        whole.gone += part.gone
        assert not whole.is_last
        whole.is_last = part.is_last
    assert whole.is_last
    return whole


async def test_a_follower_gets_everything_and_then_changes(tmp_path: Path) -> None:
    async with open_admin_server(tmp_path) as admin_server:
        await fill(admin_server)
        with admin_server.administration.followers.register() as follower:
            assert follower is not None
            assert len((await look(admin_server, follower)).machines) == COUNT
            assert await look(admin_server, follower) == pb.MachinesPart(is_last=True)
            await admin_server.administration.machines.rename("node-3", "other")
            (link,) = [one for one in admin_server.manager.links if one.machine.name == "node-5"]
            link.state = LinkState.UP
            await admin_server.administration.machines.remove("node-4")
            told = await look(admin_server, follower)
            assert [one.name for one in told.machines] == ["other"]
            assert [(one.id, one.link) for one in told.links] == [(machine(5).id, "up")]
            assert told.gone == [machine(4).id]


async def test_a_follower_learns_when_a_limit_takes_effect_and_when_it_ends(tmp_path: Path) -> None:
    async with open_admin_server(tmp_path) as admin_server:
        await fill(admin_server)
        limits, row = admin_server.administration.limits, machine(5)
        assert row.public_key is not None
        with admin_server.administration.followers.register() as follower:
            assert follower is not None
            await look(admin_server, follower)
            for count, expected in ((7, [(row.id, ["bandwidth_in"])]), (9, [])):
                admin_server.manager.device.beyond_limits[row.public_key] = (count, 0)
                await limits.poll()
                told = (await look(admin_server, follower)).links
                assert [(one.id, one.limits_biting) for one in told] == expected
            admin_server.manager.time.advance(QUIET_SECONDS)
            await limits.poll()
            assert [(one.id, one.limits_biting) for one in (await look(admin_server, follower)).links] == [(row.id, [])]


async def test_the_number_of_followers_is_limited(tmp_path: Path) -> None:
    async with open_admin_server(tmp_path) as admin_server:
        followers = [admin_server.administration.followers.register() for _ in range(MAX_FOLLOWERS + 1)]
        given = [one.__enter__() for one in followers]
        assert given.count(None) == 1
        followers[0].__exit__(None, None, None)
        with admin_server.administration.followers.register() as follower:
            assert follower is not None


async def test_a_search_finds_what_the_servers_own_list_finds(tmp_path: Path) -> None:
    """In the same order for each query, one page of it."""
    async with open_admin_server(tmp_path) as admin_server:
        await fill(admin_server)
        for number in (5, 77):
            if (key := machine(number).public_key) is not None:
                admin_server.manager.device.beyond_limits[key] = (1, 0)
        await admin_server.administration.limits.poll()
        fleet = MachineRows(lambda: None)
        with admin_server.administration.followers.register() as follower:
            assert follower is not None
            fleet.apply(await look(admin_server, follower))
        queries = [Query(sort=sign + name) for name in ORDERS for sign in ("", "-")]
        queries += [
            Query(text="NODE-1"),
            Query(text="00000000-0000-4000-8000-0000000000"),
            Query(state="pending"),
            Query(state="limited", sort="-seen"),
            Query(state="down", transport="tunnel", sort="-seen"),
            Query(selector="site=north,rack notin (1,3)"),
            Query(version="1.1"),
            Query(text="<b>"),
        ]
        for query in queries:
            wanted = MachineQuery(
                states=[query.state] if query.state else [],
                text=query.text,
                transport=query.transport,
                selector=query.selector,
                version=query.version,
                sort=query.sort,
            )
            expected = [one.machine.id async for one in admin_server.administration.machines.all(wanted)]
            found = await fleet.find(query, 1)
            assert (found.total, found.pages) == (len(expected), max(1, -(-len(expected) // PAGE_SIZE)))
            rows: list[str] = []
            for number in range(1, found.pages + 1):
                rows += [row.machine.id for row in (await fleet.find(query, number)).rows]
            assert rows == expected, query
        assert (await fleet.find(Query(state="limited"), 1)).total > 0
        last = await fleet.find(Query(), 99)
        assert (last.number, last.first, len(last.rows)) == (3, 201, 30)


class CountedName(str):
    """A name that counts how often it is compared to sort it."""

    compare: Callable[[], None] = staticmethod(lambda: None)

    def __lt__(self, other: str) -> bool:
        self.compare()
        return str.__lt__(self, other)


@pytest.mark.parametrize("sort", ["name", "-name"])
async def test_rows_are_sorted_in_many_turns(sort: str, monkeypatch: pytest.MonkeyPatch) -> None:
    fleet, count = MachineRows(lambda: None), 6000
    names = [CountedName(f"{number * 7919 % count:04}") for number in range(count)]
    machines = [pb.Machine(id=str(number), name=name) for number, name in enumerate(names)]
    for start in range(0, count, 1000):
        fleet.apply(pb.MachinesPart(machines=machines[start : start + 1000], is_last=start + 1000 == count))
    async with counting_turns() as turns:
        monkeypatch.setattr(CountedName, "compare", staticmethod(turns.count))
        found = await fleet.find(Query(sort=sort), 1)
    assert [row.machine.name for row in found.rows] == sorted(map(str, names), reverse=sort != "name")[:PAGE_SIZE]
    assert turns.total > count
    assert turns.most < 20_000, "all at once takes 60,000 comparisons and more"


async def test_pages_that_ask_the_same_share_what_is_found_until_something_changes(monkeypatch: pytest.MonkeyPatch) -> None:
    steps = 0

    async def step() -> None:
        """Searches yield to other tasks: once each, with so few machines."""
        nonlocal steps
        steps += 1
        await (anyio.sleep_forever() if steps == 1 else checkpoint())

    monkeypatch.setattr("siderolink.web.fleet.checkpoint", step)
    fleet, same, found, leaving = MachineRows(lambda: None), Query(sort="-name"), list[Found](), anyio.CancelScope()
    fleet.apply(pb.MachinesPart(machines=[pb.Machine(id=str(one), name=str(one)) for one in range(250)], is_last=True))

    async def leave() -> None:
        with leaving:
            await fleet.find(same, 1)

    async def ask(number: int) -> None:
        found.append(await fleet.find(same, number))

    with anyio.fail_after(20):
        async with anyio.create_task_group() as tasks:
            tasks.start_soon(leave)  # the first one leaves before it has an answer
            for number in (1, 2, 3) * 30:
                tasks.start_soon(ask, number)
            while not steps:
                await checkpoint()
            leaving.cancel()
    assert steps == 1 + 1
    assert {(one.number, one.total, len(one.rows)) for one in found} == {(1, 250, 100), (2, 250, 100), (3, 250, 50)}
    await fleet.find(Query(text="7"), 1)
    await fleet.find(same, 2)
    assert steps == 1 + 2
    fleet.apply(pb.MachinesPart(gone=["7"], is_last=True))
    assert (await fleet.find(same, 1)).total == 249
    assert steps == 1 + 3
    for number in range(40):  # that many searches are not kept
        await fleet.find(Query(text=str(number)), 1)
    await fleet.find(same, 1)
    assert steps == 1 + (3 + 40 + 1)


async def test_nothing_is_found_while_the_server_is_away(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("siderolink.web.fleet._WAIT_SECONDS", 0.01)
    with pytest.raises(ServerAwayError):
        await MachineRows(lambda: None).find(Query(), 1)


async def test_what_changes_of_a_link_marks_its_row_alone() -> None:
    fleet = MachineRows(lambda: None)
    fleet.apply(pb.MachinesPart(machines=[pb.Machine(id=name, name=name, link="up") for name in "ab"], is_last=True))
    before = {row.machine.id: row.stamp for row in (await fleet.find(Query(), 1)).rows}
    fleet.apply(pb.MachinesPart(links=[pb.LinkChange(id="b", link="down"), pb.LinkChange(id="nobody")], is_last=True))
    after = {
        row.machine.id: (row.stamp != before[row.machine.id], row.machine.link) for row in (await fleet.find(Query(), 1)).rows
    }
    assert after == {"a": (False, "up"), "b": (True, "down")}
    for biting in (["bandwidth_out"], []):
        fleet.apply(pb.MachinesPart(links=[pb.LinkChange(id="b", link="down", limits_biting=biting)], is_last=True))
        assert [row.machine.limits_biting for row in (await fleet.find(Query(), 1)).rows] == [[], biting]


def test_a_browser_gets_updates_at_its_own_pace_and_all_rows_in_turn() -> None:
    told, size = SentRows(), 1500
    rows = {f"row-{number}": str(number).ljust(size) for number in range(100)}
    seen: Counter[str] = Counter()
    looks = 12
    for number in range(looks):
        news = told.changes({name: html + str(number) for name, html in rows.items()})  # every row is new each time
        assert news is not None
        assert news["order"] == list(rows)
        assert 0 < sum(map(len, news["rows"].values())) <= ROW_BYTES
        seen.update(news["rows"].keys())
    assert set(seen) == set(rows)
    assert max(seen.values()) - min(seen.values()) <= 1
    told = SentRows()
    assert told.changes({"a": "1", "b": "2"}) == {"order": ["a", "b"], "rows": {"a": "1", "b": "2"}}
    assert told.changes({"a": "1", "b": "2"}) is None
    assert told.changes({"b": "2", "a": "1"}) == {"order": ["b", "a"], "rows": {}}
    assert told.changes({"b": "3"}) == {"order": ["b"], "rows": {"b": "3"}}
    assert told.changes({"a": "x" * 2 * ROW_BYTES}) == {"order": ["a"], "rows": {"a": "x" * 2 * ROW_BYTES}}


def counting(monkeypatch: pytest.MonkeyPatch, calls: Counter[str], face: type, name: str) -> None:
    inner: Any = getattr(face, name)

    def counted(self: object, message: object) -> Any:
        calls[name] += 1
        return inner(self, message)

    monkeypatch.setattr(face, name, counted)


async def test_a_stream_ends_when_its_session_signs_out(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The list continues with the key of another signed-in session."""
    callers: list[str] = []
    inner: Any = MachineService.follow_machines

    def noted(self: object, message: pb.FollowMachinesRequest) -> Any:
        callers.append(actor().name)
        return inner(self, pb.FollowMachinesRequest(every=1.0))

    monkeypatch.setattr(MachineService, "follow_machines", noted)
    async with page(tmp_path) as stage:
        first, second = await stage.visitor(Role.VIEWER), await stage.visitor(Role.ADMIN)
        assert (await first.get("/machines")).status == 200
        (began,) = callers
        assert (await (first if began == "viewer" else second).post("/sign-out", {})).status == 303
        with anyio.fail_after(60):
            while len(callers) == 1:
                await anyio.sleep(0.05)
        assert sorted(callers) == ["admin", "viewer"]
        assert (await (second if began == "viewer" else first).get("/machines")).status == 200


async def test_a_page_of_machines_has_100_rows_and_makes_few_calls(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A search asks only whether the key still counts; a page has 100 rows; the list is followed once for all."""
    calls: Counter[str] = Counter()
    for name in ("list_machines", "watch_machines", "get_machine", "follow_machines"):
        counting(monkeypatch, calls, MachineService, name)
    counting(monkeypatch, calls, ServerService, "get_version")
    async with page(tmp_path) as stage:
        await fill(stage.admin_server)
        limited = machine(0)
        assert limited.public_key is not None
        stage.admin_server.manager.device.beyond_limits[limited.public_key] = (1, 1)
        await stage.admin_server.administration.limits.poll()
        browser, other = await stage.visitor(Role.VIEWER), await stage.visitor(Role.ADMIN)
        first = await browser.get("/machines")
        assert (first.text.count('<tr id="machine-'), first.status) == (PAGE_SIZE, 200)
        (row,) = re.findall(rf'<tr id="machine-{limited.id}">.*?</tr>', first.text, re.DOTALL)
        assert "limited" in row
        assert "bandwidth in, bandwidth out" in row
        assert first.text.count(">limited</span>") == 1
        only = await browser.get("/machines?state=limited")
        assert re.findall(r'<tr id="machine-(.*?)"', only.text) == [limited.id]
        calls["get_version"] = 0
        paths = ("/machines?page=3", "/machines?sort=-received", "/machines?text=node-22", "/machines?selector=site%3Dnorth")
        texts = [(await visitor.get(path)).text for visitor in (browser, other) for path in paths]
        assert [text.count('<tr id="machine-') for text in texts[:4]] == [30, 100, 11, 100]
        assert texts[0].count("aria-sort=") == 1
        assert "230 machines" in texts[0]
        assert "201 to 230 on this page" in texts[0]
        assert "No machine is like that" in (await browser.get("/machines?text=nobody")).text
        half = await browser.get("/machines?selector=site+in+(")  # while typing
        assert (half.status, half.text.count('<tr id="machine-')) == (200, 0)
        assert 'role="alert"' in half.text
        assert calls == {"get_version": 10, "follow_machines": 1}
