"""The pages: the data each loads from the server, and the parts that may change while it is shown."""

import time
from collections.abc import Awaitable, Callable, Mapping
from dataclasses import asdict, dataclass, field
from typing import Any, Final

from siderolink.common.errors import ConfigurationError
from siderolink.common.pb.siderolink.admin.v1 import (
    AuditFilter,
    AuditServiceStub,
    BanServiceStub,
    GetInfoRequest,
    GetRetentionRequest,
    GetStatusRequest,
    HistoryServiceStub,
    ListAuditRequest,
    ListBansRequest,
    ListBansResponse,
    ListHistoryRequest,
    ListServersRequest,
    ListTokensRequest,
    ListTokensResponse,
    ListTokenUsersRequest,
    MachineRequest,
    MachineServiceStub,
    ServerLimits,
    ServerServiceStub,
    ServerStatus,
    TokenRequest,
    TokenServiceStub,
)
from siderolink.web.api import Caller, explained
from siderolink.web.fleet import ORDERS, Found, MachineRows, Query
from siderolink.web.plots import Line, plot
from siderolink.web.sampling import Sampler, rates
from siderolink.web.templating import bit_rate, number, rate

PAGE_SIZE: Final = 100
STATES: Final = ("up", "down", "limited", "pending", "denied", "accepted")
TOKEN_STATES: Final = ("active", "revoked", "expired", "used up")
_TIMELINE: Final = 50
_USERS: Final = 20


@dataclass(frozen=True, slots=True, kw_only=True)
class PageRequest:
    """A request for a page."""

    caller: Caller
    sampler: Sampler
    fleet: MachineRows
    query: Mapping[str, str]
    path: Mapping[str, str]
    is_live: bool = False
    """Whether it is for a page that is already shown, which may wait."""

    def text(self, name: str, *, among: tuple[str, ...] | None = None) -> str:
        """A parameter; empty if it is absent or not in `among`."""
        found = self.query.get(name, "")[:500]
        return found if among is None or found in among else ""


Load = Callable[[PageRequest], Awaitable[dict[str, Any]]]


@dataclass(frozen=True, slots=True, kw_only=True)
class View:
    """One page."""

    name: str
    path: str
    load: Load
    regions: Mapping[str, str] = field(default_factory=dict)
    """The parts that may change, by their ids, each with its template."""
    rows: Mapping[str, str] = field(default_factory=dict)
    """Parts with many rows, of which only changed ones are sent: by their ids, each with a row's template. Their rows are the
    value of that name: see `fleet.Row`."""
    role: str = "viewer"
    title: str = ""
    """Title in the navigation; empty for pages that are not in it."""

    @property
    def template(self) -> str:
        return f"{self.name}.html"


async def overview(request: PageRequest) -> dict[str, Any]:
    with explained():
        status = await request.caller.stub(ServerServiceStub).get_status(GetStatusRequest())
    samples = list(request.sampler.samples)
    times = [one.at for one in samples]
    machines = plot(
        "machines-plot",
        "Machines by state",
        times,
        [
            Line("up", [one.up for one in samples]),
            Line("down", [one.down for one in samples]),
            Line("never up yet", [one.waiting for one in samples]),
            Line("pending or denied", [one.kept_out for one in samples]),
        ],
        number,
    )
    joins = plot(
        "joins-plot",
        "Joins and refusals each minute",
        times,
        [
            Line("joins", _minutely(rates(times, [one.joins for one in samples]))),
            Line("refusals", _minutely(rates(times, [one.refusals for one in samples]))),
        ],
        number,
    )
    traffic = plot(
        "traffic-plot",
        "Traffic of all machines",
        times,
        [
            Line("received", rates(times, [one.received_bytes for one in samples])),
            Line("sent", rates(times, [one.sent_bytes for one in samples])),
        ],
        rate,
    )
    return {"status": status, "plots": (machines, joins, traffic)}


def _minutely(found: list[float | None]) -> list[float | None]:
    return [None if value is None else 60 * value for value in found]


async def machines(request: PageRequest) -> dict[str, Any]:
    """Data kept by this process: it asks the server nothing."""
    sort = request.text("sort")
    query = Query(
        text=request.text("text"),
        state=request.text("state", among=STATES),
        transport=request.text("transport", among=("udp", "tunnel")),
        selector=request.text("selector"),
        version=request.text("version"),
        sort=sort if sort.removeprefix("-") in ORDERS else "name",
    )
    number, problem = request.text("page"), ""
    try:
        found = await request.fleet.find(query, int(number) if number.isascii() and number.isdigit() and len(number) < 9 else 1)
    except ConfigurationError as error:  # an incomplete selector while typing
        found, problem = Found(rows=(), total=0, number=1, pages=1), str(error)
    wanted = {name: value for name, value in asdict(query).items() if value and (name, value) != ("sort", "name")}
    return {
        "found": found,
        "machines": found.rows,
        "problem": problem,
        "query": query,
        "wanted": wanted,
        "states": STATES,
        "orders": tuple(ORDERS),
    }


def _page(request: PageRequest, found: ListTokensResponse | ListBansResponse) -> dict[str, Any]:
    """The paging data of a list for the templates."""
    return {"total": found.total, "next_page": found.next_page_token, "is_first": not request.text("page")}


async def machine(request: PageRequest) -> dict[str, Any]:
    name = request.path["machine"]
    with explained():
        found = await request.caller.stub(MachineServiceStub).get_machine(MachineRequest(name=name))
        listing = ListHistoryRequest(machine=found.id, page_size=_TIMELINE)
        history = await request.caller.stub(HistoryServiceStub).list_history(listing)
    samples = request.sampler.machines.note(found, time.time())
    times = [at for at, _, _ in samples]
    traffic = plot(
        "machine-plot",
        "Traffic of this machine",
        times,
        [
            Line("received", rates(times, [received for _, received, _ in samples])),
            Line("sent", rates(times, [sent for _, _, sent in samples])),
        ],
        rate,
    )
    said = request.sampler.answers.of(found.id)
    if request.is_live and found.link == "up":
        said = await request.sampler.answers.renewed(request.caller, found.id)
    return {"machine": found, "history": history.entries, "plot": traffic, "said": said}


async def tokens(request: PageRequest) -> dict[str, Any]:
    state = request.text("state", among=TOKEN_STATES)
    listing = ListTokensRequest(
        page_size=PAGE_SIZE, page_token=request.text("page"), states=[state] if state else [], text=request.text("text")
    )
    with explained():
        found = await request.caller.stub(TokenServiceStub).list_tokens(listing)
    return {
        **_page(request, found),
        "tokens": found.tokens,
        "wanted": {"text": request.text("text"), "state": state},
        "states": TOKEN_STATES,
    }


async def token(request: PageRequest) -> dict[str, Any]:
    stub = request.caller.stub(TokenServiceStub)
    with explained():
        found = await stub.get_token(TokenRequest(name=request.path["token"]))
        users = await stub.list_token_users(ListTokenUsersRequest(name=found.id, page_size=_USERS))
    return {"token": found, "users": users.users, "user_total": users.total}


async def bans(request: PageRequest) -> dict[str, Any]:
    with explained():
        found = await request.caller.stub(BanServiceStub).list_bans(
            ListBansRequest(page_size=PAGE_SIZE, page_token=request.text("page"))
        )
    return {"bans": found.bans, **_page(request, found)}


async def limits(request: PageRequest) -> dict[str, Any]:
    with explained():
        status = await request.caller.stub(ServerServiceStub).get_status(GetStatusRequest())
        refused = await request.caller.stub(HistoryServiceStub).list_history(
            ListHistoryRequest(kinds=["refused", "lost"], page_size=_TIMELINE)
        )
        kept = await request.caller.stub(HistoryServiceStub).get_retention(GetRetentionRequest())
    return {
        "limits": _limits(status),
        "kept": kept,
        "refusals": _by_count(status.refusals),
        "drops": _by_count(status.drops),
        "history": refused.entries,
    }


@dataclass(frozen=True, slots=True, kw_only=True)
class Limit:
    """A limit of the server, and its effects."""

    name: str
    value: str
    now: str = ""
    hits: int = 0
    """How often it refused or dropped something."""


def _limits(status: ServerStatus) -> list[Limit]:
    found = status.limits or ServerLimits()
    known, drops, refusals = sum(status.machines.values()), status.drops, status.refusals

    def bandwidth(whose: str, rate: int | None, reason: str) -> Limit:
        value = "no limit" if rate is None else bit_rate(rate)
        return Limit(name=f"Bandwidth {whose}", value=value, now=limited(reason), hits=drops.get(reason, 0))

    def limited(reason: str) -> str:
        count = found.limited.get(reason, 0)
        return f"slows down {number(count)} {'machine' if count == 1 else 'machines'}" if count else ""

    return [
        Limit(
            name="Machines in all",
            value=number(found.max_machines) if found.max_machines else "no limit",
            now=f"{number(known)} known",
            hits=refusals.get("too many machines", 0),
        ),
        bandwidth("of all machines together, from them", found.rate_rx, "bandwidth_all_in"),
        bandwidth("of all machines together, to them", found.rate_tx, "bandwidth_all_out"),
        bandwidth("of each machine, from it", found.machine_rate_rx, "bandwidth_in"),
        bandwidth("of each machine, to it", found.machine_rate_tx, "bandwidth_out"),
        Limit(
            name="Log lines of each machine",
            value=f"{number(found.lines_per_second)} a second" if found.lines_per_second else "no limit",
            now=limited("line rate limited"),
            hits=drops.get("line rate limited", 0),
        ),
        Limit(
            name="Events of each machine",
            value=f"{number(found.events_per_second)} a second" if found.events_per_second else "no limit",
            now=limited("event rate limited"),
            hits=drops.get("event rate limited", 0),
        ),
        Limit(
            name="Log connections of each machine",
            value=number(found.log_connections) if found.log_connections else "no limit",
            now=limited("too many connections"),
            hits=drops.get("too many connections", 0),
        ),
    ]


def _by_count(found: Mapping[str, int]) -> list[tuple[str, int]]:
    return sorted(((name, count) for name, count in found.items() if count), key=lambda one: (-one[1], one[0]))


async def audit(request: PageRequest) -> dict[str, Any]:
    wanted = {name: request.text(name) for name in ("actor", "action", "object")}
    listing = ListAuditRequest(
        page_size=PAGE_SIZE,
        page_token=request.text("page"),
        filter=AuditFilter(actor=wanted["actor"], action=wanted["action"], object=wanted["object"]),
    )
    with explained():
        found = await request.caller.stub(AuditServiceStub).list_audit(listing)
    return {
        "entries": found.entries,
        "next_page": found.next_page_token,
        "is_first": not request.text("page"),
        "wanted": wanted,
    }


async def servers(request: PageRequest) -> dict[str, Any]:
    stub = request.caller.stub(ServerServiceStub)
    with explained():
        info, status = await stub.get_info(GetInfoRequest()), await stub.get_status(GetStatusRequest())
        every = await stub.list_servers(ListServersRequest())
    return {"info": info, "status": status, "servers": every.servers}


VIEWS: Final = (
    View(name="overview", path="/", load=overview, regions={"figures": "overview_figures.html"}, title="Overview"),
    View(
        name="machines",
        path="/machines",
        load=machines,
        regions={"machines-count": "machines_count.html", "machines-pages": "machines_pages.html"},
        rows={"machines": "machines_row.html"},
        title="Machines",
    ),
    View(
        name="machine",
        path="/machines/{machine}",
        load=machine,
        regions={"state": "machine_state.html", "answer": "machine_answer.html", "timeline": "timeline.html"},
    ),
    View(name="tokens", path="/tokens", load=tokens, regions={"tokens": "tokens_rows.html"}, title="Join tokens"),
    View(name="token", path="/tokens/{token}", load=token, regions={"token": "token_state.html"}),
    View(name="bans", path="/bans", load=bans, regions={"bans": "bans_rows.html"}, title="Bans"),
    View(name="limits", path="/limits", load=limits, regions={"limits": "limits_rows.html"}, title="Limits"),
    View(name="audit", path="/audit", load=audit, regions={"audit": "audit_rows.html"}, role="admin", title="Audit"),
    View(name="servers", path="/servers", load=servers, regions={"servers": "servers_rows.html"}, title="Servers"),
)
