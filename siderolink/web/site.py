"""The ASGI application: routes, sign-in, and error pages."""

import logging
from collections.abc import Awaitable, Callable, Mapping, Sequence
from importlib.metadata import version
from pathlib import Path
from typing import Any, Final
from urllib.parse import parse_qsl, quote, urlencode, urlsplit

import anyio
from starlette.applications import Starlette
from starlette.requests import ClientDisconnect, Request
from starlette.responses import HTMLResponse, PlainTextResponse, RedirectResponse, Response
from starlette.routing import Mount, Route
from starlette.staticfiles import StaticFiles
from starlette.types import ASGIApp

from siderolink.common.grpc import TrustedProxies, source_of
from siderolink.common.grpc.accounts import CallBudget
from siderolink.common.text import one_line
from siderolink.web.actions import ACTIONS, Do, Done, Download, Shown, Submission
from siderolink.web.api import Api, ApiError, Caller, ServerAwayError, SignedOutError
from siderolink.web.fleet import MachineRows, Row
from siderolink.web.guard import BODY_SECONDS, LIMITS, LIVE, MAX_BODY, Guard, Origins
from siderolink.web.live import LiveStream, Rendering, event
from siderolink.web.sampling import Sampler
from siderolink.web.sessions import COOKIE, LIFETIME, Session, Sessions, TooManyError
from siderolink.web.templating import make_environment
from siderolink.web.views import VIEWS, PageRequest, View

log = logging.getLogger(__name__)

_STATIC: Final = Path(__file__).parent / "static"
_TITLES: Final[Mapping[int, str]] = {
    400: "That cannot be done",
    403: "Not allowed",
    404: "Not found",
    409: "Not possible now",
    429: "Too many requests",
    503: "The server does not answer",
}
Endpoint = Callable[[Request], Awaitable[ASGIApp]]


class SignInNeededError(Exception):
    """Raised if nobody is signed in."""


class Site:
    """The web UI of one server."""

    def __init__(self, api: Api, origins: Origins, proxies: TrustedProxies | None = None) -> None:
        self._api = api
        self._environment = make_environment()
        self._environment.globals |= {"version": version("siderolink"), "views": VIEWS, "server": str(api.address)}
        self.sessions = Sessions()
        self.sampler = Sampler(self._sampling_caller, self._may_go_on)
        self.fleet = MachineRows(lambda: self._sampling_caller() if self.sessions.live() else None, self._may_go_on)
        self.costs = CallBudget(LIMITS, has_tokens=True)
        """The processor time of visitors; those who are signed in are known."""
        self.app = Guard(Starlette(routes=self._routes()), origins, self.costs, proxies)

    def _sampling_caller(self) -> Caller | None:
        """This process's own credentials, or those of somebody who is signed in."""
        own, sessions = self._api.own(), self.sessions.live()
        return own if own is not None or not sessions else self._api.caller(sessions[0].key, sessions[0].source)

    def _may_go_on(self, caller: Caller) -> bool:
        """Whether calls begun with these credentials may continue; they end when the user signs out."""
        return caller == self._api.own() or any(
            caller == self._api.caller(session.key, session.source) for session in self.sessions.live()
        )

    def _routes(self) -> list[Route | Mount]:
        routes: list[Route | Mount] = [
            Route("/sign-in", self._explained(self._sign_in), methods=["GET", "POST"]),
            Route("/sign-out", self._explained(self._sign_out), methods=["POST"]),
            Mount("/static", _Static(directory=_STATIC)),
        ]
        for path, do in ACTIONS.items():
            routes.append(Route(path, self._explained(self._action(do)), methods=["POST"]))
        for view in VIEWS:
            routes.append(Route(view.path, self._explained(self._page(view)), methods=["GET"]))
            routes.append(Route(LIVE.rstrip("/") + view.path, self._live(view), methods=["GET"]))
        routes.append(Route("/{rest:path}", self._explained(self._unknown), methods=["GET", "POST"]))
        return routes

    # --- signing in and out

    async def _sign_in(self, request: Request) -> Response:
        if request.method == "GET":
            wanted = request.query_params.get("next", "/")
            return self._show("sign_in.html", {"next": _local(wanted), "error": ""})
        form = await _read_form(request)
        location, key = _local(form.get("next", "/")), form.get("key", "").strip()
        source = _source(request)
        try:
            if not (key.isascii() and key.isprintable() and " " not in key and 0 < len(key) <= 128):
                raise SignedOutError("this is not an API key; a key begins with slk_", 401)
            with self.sessions.signing_in(source):
                who = await self._api.caller(key, source).who()
        except SignedOutError as error:
            return self._show("sign_in.html", {"next": location, "error": str(error)}, status=401)
        except TooManyError as error:
            return self._show("sign_in.html", {"next": location, "error": str(error)}, status=429)
        if (before := self.sessions.find(request.cookies.get(COOKIE), source)) is not None:
            self.sessions.end(before)
        cookie, _ = self.sessions.begin(key, who.actor, who.role, source)
        self.fleet.wake()
        response = RedirectResponse(location, status_code=303)
        response.set_cookie(COOKIE, cookie, max_age=int(LIFETIME), path="/", secure=True, httponly=True, samesite="strict")
        return response

    async def _sign_out(self, request: Request) -> Response:
        session = self.sessions.find(request.cookies.get(COOKIE), _source(request))
        if session is not None:
            self.sessions.end(session)
        return _without_cookie(RedirectResponse("/sign-in", status_code=303))

    async def _enter(self, request: Request, role: str = "viewer", *, is_use: bool = True) -> tuple[Session, Caller]:
        """The caller, as just confirmed by the server. Raises SignInNeededError or ApiError."""
        session = self.sessions.find(request.cookies.get(COOKIE), _source(request), is_use=is_use)
        if session is None:
            raise SignInNeededError
        self.costs.know(source_of(session.source, 64))
        caller = self._api.caller(session.key, session.source)
        await self._confirm(session, caller)
        if not session.may(role):
            raise ApiError(f"this needs the role {role}; {session.actor} has {session.role}", 403)
        return session, caller

    async def _confirm(self, session: Session, caller: Caller) -> None:
        """Ask the server whether the key still counts, with the same role; ends the session if not. Raises ApiError."""
        try:
            who = await caller.who()
        except SignedOutError:
            self.sessions.end(session)
            raise
        if (who.actor, who.role) != (session.actor, session.role):
            self.sessions.end(session)
            raise SignedOutError("the role of this key has changed", 401)

    # --- pages and actions

    def _page(self, view: View) -> Endpoint:
        async def show(request: Request) -> Response:
            session, caller = await self._enter(request, view.role)
            values = await view.load(self._page_request(request, caller))
            notice, is_error = session.take_notice()
            query = urlencode(request.query_params.multi_items())
            more = {"view": view, "notice": notice, "is_error": is_error}
            more["live"] = f"{LIVE.rstrip('/')}{request.url.path}" + (f"?{query}" if query else "")
            return self._show(view.template, values | more, session=session)

        return show

    def _live(self, view: View) -> Endpoint:
        """A stream is always answered with a stream, because its script cannot read another status."""

        async def follow(request: Request) -> ASGIApp:
            try:
                session, caller = await self._enter(request, view.role, is_use=False)
            except (SignInNeededError, SignedOutError):
                return Response(event("signed-out", ""), media_type="text/event-stream")
            except ServerAwayError as error:  # the browser retries by itself
                return Response(event("away", str(error)), media_type="text/event-stream")
            except ApiError as error:
                return Response(event("stopped", str(error)), media_type="text/event-stream")
            asked = self._page_request(request, caller, is_live=True)

            rendered: dict[str, tuple[int, str]] = {}

            async def render() -> Rendering:
                await self._confirm(session, caller)
                values = await view.load(asked) | {"session": session, "view": view}
                regions = {
                    name: self._environment.get_template(template).render(values) for name, template in view.regions.items()
                }
                rows = {name: self._rows(template, values[name], rendered) for name, template in view.rows.items()}
                return Rendering(regions, rows)

            stream = LiveStream(self.sessions, session, render)
            if view.name == "machine":
                stream.with_log(caller, asked.path["machine"])
            return stream

        return follow

    def _rows(self, template: str, rows: Sequence[Row], rendered: dict[str, tuple[int, str]]) -> dict[str, str]:
        """Each row's HTML by its machine's id. Unchanged rows that were `rendered` before are reused."""
        found: dict[str, tuple[int, str]] = {}
        for row in rows:
            machine_id = row.machine.id
            known = rendered.get(machine_id)
            if known is None or known[0] != row.stamp:
                known = row.stamp, self._environment.get_template(template).render(row=row)
            found[machine_id] = known
        rendered.clear()
        rendered.update(found)
        return {machine_id: html for machine_id, (_, html) in found.items()}

    def _page_request(self, request: Request, caller: Caller, *, is_live: bool = False) -> PageRequest:
        path = {name: str(value) for name, value in request.path_params.items()}
        query = dict(request.query_params)
        return PageRequest(caller=caller, sampler=self.sampler, fleet=self.fleet, query=query, path=path, is_live=is_live)

    def _action(self, do: Do) -> Endpoint:
        async def act(request: Request) -> Response:
            session, caller = await self._enter(request)
            form = await _read_form(request)
            path = {name: str(value) for name, value in request.path_params.items()}
            try:
                outcome = await do(Submission(caller, form, path, request.url.hostname or "localhost"))
            except SignedOutError:
                self.sessions.end(session)
                raise
            except ApiError as error:
                if error.status not in (400, 403, 404, 409):
                    raise
                session.set_notice(f"{str(error)[:1].upper()}{str(error)[1:]}.", is_error=True)
                return RedirectResponse(_back(request), status_code=303)
            match outcome:
                case Done(text=text, location=location):
                    session.set_notice(text)
                    return RedirectResponse(location, status_code=303)
                case Download(name=name, text=text):
                    headers = {"content-disposition": f'attachment; filename="{name}"'}
                    return PlainTextResponse(text, headers=headers, media_type="application/yaml")
                case Shown(template=template, values=values):
                    return self._show(template, values, session=session)

        return act

    async def _unknown(self, request: Request) -> Response:
        raise ApiError("there is no such page", 404)

    def _explained(self, endpoint: Endpoint) -> Endpoint:
        async def run(request: Request) -> ASGIApp:
            try:
                return await endpoint(request)
            except (SignInNeededError, SignedOutError):
                wanted = request.url.path if request.method == "GET" else "/"
                return _without_cookie(RedirectResponse(f"/sign-in?next={quote(wanted)}", status_code=303))
            except ApiError as error:
                return self._failure(str(error), error.status)
            except TimeoutError:
                return self._failure("the form did not arrive in time", 408)
            except ClientDisconnect:
                return Response(status_code=400)

        return run

    def _failure(self, text: str, status: int) -> Response:
        return self._show("error.html", {"title": _TITLES.get(status, "That failed"), "text": text}, status=status)

    def _show(self, template: str, values: Mapping[str, Any], *, session: Session | None = None, status: int = 200) -> Response:
        known: dict[str, Any] = {"session": session, "view": None, "notice": "", "is_error": False, "live": ""}
        return HTMLResponse(self._environment.get_template(template).render(known | dict(values)), status_code=status)


class _Static(StaticFiles):
    """The static files. Browsers may cache them, and revalidate them."""

    def file_response(self, *args: Any, **kwargs: Any) -> Response:
        response = super().file_response(*args, **kwargs)
        response.headers["cache-control"] = "no-cache"
        return response


async def _read_form(request: Request) -> dict[str, str]:
    """The fields of a form; the first one of each name. Raises ApiError and TimeoutError."""
    body = bytearray()
    with anyio.fail_after(BODY_SECONDS):
        async for part in request.stream():
            body += part
            if len(body) > MAX_BODY:
                raise ApiError("the form is too long", 413)
    try:
        found = parse_qsl(body.decode("ascii"), keep_blank_values=True, max_num_fields=100, errors="strict")
    except ValueError:
        raise ApiError("the form is malformed", 400) from None
    return {name: value for name, value in reversed(found)}


def _source(request: Request) -> str:
    """The browser's address."""
    return "unknown" if request.client is None else one_line(request.client.host, limit=64)


def _local(location: str) -> str:
    """A path of the web UI, or the first page."""
    is_ours = location.startswith("/") and not location.startswith(("//", "/\\")) and location.isprintable()
    return location if is_ours and len(location) <= 500 else "/"


def _back(request: Request) -> str:
    """The page that the form was on."""
    try:
        return _local(urlsplit(request.headers.get("referer", "/")).path or "/")
    except ValueError:  # browsers never send these
        return "/"


def _without_cookie(response: Response) -> Response:
    response.delete_cookie(COOKIE, path="/", secure=True, httponly=True, samesite="strict")
    return response
