"""What people change: each form of the page, as calls of the admin API."""

from collections.abc import Awaitable, Callable, Mapping
from dataclasses import dataclass
from ipaddress import IPv6Address
from typing import Any, Final
from urllib.parse import quote

from siderolink.client.config.write import kernel_arguments, machine_documents, on_overlay
from siderolink.common.errors import ConfigurationError
from siderolink.common.hostport import HostPort
from siderolink.common.join_url import JoinURL
from siderolink.common.pb.siderolink.admin.v1 import (
    BanRequest,
    BanServiceStub,
    CreateTokenRequest,
    DeleteHistoryRequest,
    GetInfoRequest,
    HistoryServiceStub,
    LabelMachineRequest,
    MachineRequest,
    MachineServiceStub,
    NoteMachineRequest,
    RenameMachineRequest,
    RenewTokenRequest,
    ServerInfo,
    ServerServiceStub,
    SetMachineTunnelRequest,
    Token,
    TokenRequest,
    TokenServiceStub,
    UnbanRequest,
)
from siderolink.web.api import ApiError, Caller, explained

_DAY: Final = 86_400.0


@dataclass(frozen=True, slots=True)
class Wanted:
    """A form that was sent."""

    caller: Caller
    form: Mapping[str, str]
    path: Mapping[str, str]
    host: str
    """Under which name the page is reached, without the port."""

    def text(self, name: str) -> str:
        return self.form.get(name, "").strip()

    def number(self, name: str) -> float | None:
        """None where nothing was given. Raises ApiError."""
        text = self.text(name)
        if not text:
            return None
        if not (text.isascii() and text.isdigit() and len(text) < 10):
            raise ApiError(f"{name} is a number", 400)
        return float(text)


@dataclass(frozen=True, slots=True)
class Shown:
    """What is shown in the place of a redirection: a template and its values."""

    template: str
    values: Mapping[str, Any]


@dataclass(frozen=True, slots=True)
class Done:
    """What the next page says, and which one that is."""

    text: str
    location: str


@dataclass(frozen=True, slots=True)
class Download:
    """A file."""

    name: str
    text: str


Outcome = Shown | Done | Download
Do = Callable[[Wanted], Awaitable[Outcome]]


def machine_path(machine_id: str) -> str:
    return f"/machines/{quote(machine_id, safe='')}"


def token_path(token_id: str) -> str:
    return f"/tokens/{quote(token_id, safe='')}"


# --- machines


def _on_machine(text: str, call: Callable[[MachineServiceStub, Wanted, str], Awaitable[Any]], *, stays: bool = True) -> Do:
    async def do(wanted: Wanted) -> Outcome:
        name = wanted.path["machine"]
        with explained():
            found = await call(wanted.caller.stub(MachineServiceStub), wanted, name)
        return Done(f"{found.name} {text}.", machine_path(name) if stays else "/machines")

    return do


async def _label(stub: MachineServiceStub, wanted: Wanted, name: str) -> Any:
    """The field holds all labels, ``key=value`` with commas or line ends between them."""
    parts = [part.strip() for part in wanted.text("labels").replace("\n", ",").split(",")]
    setting = {key.strip(): value.strip() for key, _, value in (part.partition("=") for part in parts if part)}
    before = await stub.get_machine(MachineRequest(name=name))
    removing = [key for key in before.labels if key not in setting]
    return await stub.label_machine(LabelMachineRequest(name=name, set=setting, remove=removing))


async def _ban_machine(wanted: Wanted) -> Outcome:
    request = BanRequest(name=wanted.path["machine"], kind=wanted.text("kind"), reason=wanted.text("reason"))
    with explained():
        await wanted.caller.stub(BanServiceStub).ban(request)
    return Done("The machine is banned.", "/bans")


async def _delete_history(wanted: Wanted) -> Outcome:
    name = wanted.path["machine"]
    with explained():
        found = await wanted.caller.stub(HistoryServiceStub).delete_history(DeleteHistoryRequest(machine=name))
    return Done(f"{found.entries} entries of its history are deleted.", machine_path(name))


# --- bans


async def _ban(wanted: Wanted) -> Outcome:
    if not wanted.text("name"):
        raise ApiError("name what is to be banned", 400)
    request = BanRequest(name=wanted.text("name"), kind=wanted.text("kind"), reason=wanted.text("reason"))
    with explained():
        found = await wanted.caller.stub(BanServiceStub).ban(request)
    return Done(f"{'' if found.ban is None else found.ban.value} is banned.", "/bans")


async def _lift(wanted: Wanted) -> Outcome:
    with explained():
        found = await wanted.caller.stub(BanServiceStub).unban(
            UnbanRequest(value=wanted.text("value"), kind=wanted.text("kind"))
        )
    return Done(f"The ban of {found.value} is lifted.", "/bans")


# --- join tokens


async def _create_token(wanted: Wanted) -> Outcome:
    days, uses = wanted.number("days"), wanted.number("uses")
    request = CreateTokenRequest(
        name=wanted.text("name"),
        note=wanted.text("note"),
        kind=wanted.text("kind"),
        ttl=None if days is None else days * _DAY,
        max_uses=None if uses is None else int(uses),
        bound_uuid=wanted.text("uuid"),
        tunnel=wanted.text("tunnel"),
    )
    with explained():
        made = await wanted.caller.stub(TokenServiceStub).create_token(request)
    return await _secret_page(wanted, made.token or Token(), made.secret)


async def _show_secret(wanted: Wanted) -> Outcome:
    with explained():
        told = await wanted.caller.stub(TokenServiceStub).show_token_secret(TokenRequest(name=wanted.path["token"]))
    return await _secret_page(wanted, told.token or Token(), told.secret, told.join_url)


async def _download_documents(wanted: Wanted) -> Outcome:
    with explained():
        told = await wanted.caller.stub(TokenServiceStub).show_token_secret(TokenRequest(name=wanted.path["token"]))
    info = await _info(wanted)
    texts = _texts(wanted, info, told.secret, _reach(wanted, info, told.join_url))
    return Download("siderolink.yaml", texts["documents"])


async def _info(wanted: Wanted) -> ServerInfo:
    with explained():
        return await wanted.caller.stub(ServerServiceStub).get_info(GetInfoRequest())


async def _secret_page(wanted: Wanted, token: Token, secret: str, join_url: str = "") -> Outcome:
    info = await _info(wanted)
    values = {"token": token, "secret": secret, "location": token_path(token.id), "reach": wanted.text("reach"), "problem": ""}
    try:
        reach = _reach(wanted, info, join_url)
        values |= {"reach": reach} | _texts(wanted, info, secret, reach)
    except ApiError as error:  # the token is there all the same
        values |= {"problem": str(error), "join_url": "", "kernel_arguments": "", "documents": ""}
    return Shown("token_secret.html", values)


def _reach(wanted: Wanted, info: ServerInfo, join_url: str) -> str:
    """Where machines reach the API: as the form or the server says, or its port on the first WireGuard endpoint's host, or this
    page's."""
    if given := wanted.text("reach"):
        return given
    if join_url:
        return JoinURL.parse(join_url).authority
    host = HostPort.parse(info.wireguard_endpoints[0]).host if info.wireguard_endpoints else wanted.host
    return str(HostPort(host, info.api_port or 443))


def _texts(wanted: Wanted, info: ServerInfo, secret: str, reach: str) -> dict[str, str]:
    """The join URL, kernel arguments and documents with a token. Raises ApiError."""
    try:
        reached = HostPort.parse(reach)
        url = JoinURL(
            host=reached.host, port=reached.port, tls=info.has_tls, join_token=secret, tunnel=bool(wanted.text("tunnelled"))
        )
        parameters = on_overlay(url, IPv6Address(info.overlay_address), info.event_sink_port, info.log_port)
        return {
            "join_url": url.encode(),
            "kernel_arguments": kernel_arguments(parameters),
            "documents": machine_documents(parameters),
        }
    except (ConfigurationError, ValueError) as error:
        raise ApiError(str(error), 400) from None


def _on_token(
    text: str, call: Callable[[TokenServiceStub, Wanted, TokenRequest], Awaitable[Token]], *, stays: bool = True
) -> Do:
    async def do(wanted: Wanted) -> Outcome:
        with explained():
            found = await call(wanted.caller.stub(TokenServiceStub), wanted, TokenRequest(name=wanted.path["token"]))
        return Done(f"The token {found.name} {text}.", token_path(found.id) if stays else "/tokens")

    return do


async def _renew(stub: TokenServiceStub, wanted: Wanted, request: TokenRequest) -> Token:
    days = wanted.number("days")
    return await stub.renew_token(RenewTokenRequest(name=request.name, ttl=None if days is None else days * _DAY))


ACTIONS: Final[Mapping[str, Do]] = {
    "/machines/{machine}/rename": _on_machine(
        "is its name now",
        lambda stub, wanted, name: stub.rename_machine(RenameMachineRequest(name=name, new_name=wanted.text("name"))),
    ),
    "/machines/{machine}/note": _on_machine(
        "has the note", lambda stub, wanted, name: stub.note_machine(NoteMachineRequest(name=name, note=wanted.text("note")))
    ),
    "/machines/{machine}/labels": _on_machine("has the labels", _label),
    "/machines/{machine}/tunnel": _on_machine(
        "follows that from its next join on",
        lambda stub, wanted, name: stub.set_machine_tunnel(SetMachineTunnelRequest(name=name, tunnel=wanted.text("tunnel"))),
    ),
    "/machines/{machine}/accept": _on_machine(
        "is accepted", lambda stub, wanted, name: stub.accept_machine(MachineRequest(name=name))
    ),
    "/machines/{machine}/deny": _on_machine(
        "is denied", lambda stub, wanted, name: stub.deny_machine(MachineRequest(name=name))
    ),
    "/machines/{machine}/forget": _on_machine(
        "has no unique token any more", lambda stub, wanted, name: stub.forget_unique_token(MachineRequest(name=name))
    ),
    "/machines/{machine}/remove": _on_machine(
        "is removed", lambda stub, wanted, name: stub.remove_machine(MachineRequest(name=name)), stays=False
    ),
    "/machines/{machine}/ban": _ban_machine,
    "/machines/{machine}/history": _delete_history,
    "/bans": _ban,
    "/bans/lift": _lift,
    "/tokens": _create_token,
    "/tokens/{token}/secret": _show_secret,
    "/tokens/{token}/documents": _download_documents,
    "/tokens/{token}/revoke": _on_token("is revoked", lambda stub, wanted, request: stub.revoke_token(request)),
    "/tokens/{token}/reinstate": _on_token("is reinstated", lambda stub, wanted, request: stub.reinstate_token(request)),
    "/tokens/{token}/renew": _on_token("is renewed", _renew),
    "/tokens/{token}/default": _on_token("is the default one", lambda stub, wanted, request: stub.set_default_token(request)),
    "/tokens/{token}/delete": _on_token("is deleted", lambda stub, wanted, request: stub.delete_token(request), stays=False),
}
