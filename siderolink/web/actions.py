"""Changes: each form of the web UI, as calls of the admin API."""

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
class Submission:
    """A submitted form."""

    caller: Caller
    form: Mapping[str, str]
    path: Mapping[str, str]
    host: str
    """The host name by which the web UI was reached, without the port."""

    def text(self, name: str) -> str:
        return self.form.get(name, "").strip()

    def number(self, name: str) -> float | None:
        """The field's number; None if it is empty. Raises ApiError."""
        text = self.text(name)
        if not text:
            return None
        if not (text.isascii() and text.isdigit() and len(text) < 10):
            raise ApiError(f"{name} must be a number", 400)
        return float(text)


@dataclass(frozen=True, slots=True)
class Shown:
    """A template with its values, shown instead of a redirect."""

    template: str
    values: Mapping[str, Any]


@dataclass(frozen=True, slots=True)
class Done:
    """A message for the next page, and that page's path."""

    text: str
    location: str


@dataclass(frozen=True, slots=True)
class Download:
    """A file to download."""

    name: str
    text: str


Outcome = Shown | Done | Download
Do = Callable[[Submission], Awaitable[Outcome]]


def machine_path(machine_id: str) -> str:
    return f"/machines/{quote(machine_id, safe='')}"


def token_path(token_id: str) -> str:
    return f"/tokens/{quote(token_id, safe='')}"


# --- machines


def _on_machine(text: str, call: Callable[[MachineServiceStub, Submission, str], Awaitable[Any]], *, stays: bool = True) -> Do:
    async def do(submission: Submission) -> Outcome:
        name = submission.path["machine"]
        with explained():
            found = await call(submission.caller.stub(MachineServiceStub), submission, name)
        return Done(f"{found.name} {text}.", machine_path(name) if stays else "/machines")

    return do


async def _label(stub: MachineServiceStub, submission: Submission, name: str) -> Any:
    """The field contains all labels, ``key=value``, separated by commas or line ends."""
    parts = [part.strip() for part in submission.text("labels").replace("\n", ",").split(",")]
    setting = {key.strip(): value.strip() for key, _, value in (part.partition("=") for part in parts if part)}
    before = await stub.get_machine(MachineRequest(name=name))
    removing = [key for key in before.labels if key not in setting]
    return await stub.label_machine(LabelMachineRequest(name=name, set=setting, remove=removing))


async def _ban_machine(submission: Submission) -> Outcome:
    request = BanRequest(name=submission.path["machine"], kind=submission.text("kind"), reason=submission.text("reason"))
    with explained():
        await submission.caller.stub(BanServiceStub).ban(request)
    return Done("The machine was banned.", "/bans")


async def _delete_history(submission: Submission) -> Outcome:
    name = submission.path["machine"]
    with explained():
        found = await submission.caller.stub(HistoryServiceStub).delete_history(DeleteHistoryRequest(machine=name))
    return Done(f"{found.entries} entries of its history were deleted.", machine_path(name))


# --- bans


async def _ban(submission: Submission) -> Outcome:
    if not submission.text("name"):
        raise ApiError("enter what to ban", 400)
    request = BanRequest(name=submission.text("name"), kind=submission.text("kind"), reason=submission.text("reason"))
    with explained():
        found = await submission.caller.stub(BanServiceStub).ban(request)
    return Done(f"{'' if found.ban is None else found.ban.value} is banned.", "/bans")


async def _lift(submission: Submission) -> Outcome:
    with explained():
        found = await submission.caller.stub(BanServiceStub).unban(
            UnbanRequest(value=submission.text("value"), kind=submission.text("kind"))
        )
    return Done(f"The ban of {found.value} is lifted.", "/bans")


# --- join tokens


async def _create_token(submission: Submission) -> Outcome:
    days, uses = submission.number("days"), submission.number("uses")
    request = CreateTokenRequest(
        name=submission.text("name"),
        note=submission.text("note"),
        kind=submission.text("kind"),
        ttl=None if days is None else days * _DAY,
        max_uses=None if uses is None else int(uses),
        bound_uuid=submission.text("uuid"),
        tunnel=submission.text("tunnel"),
    )
    with explained():
        made = await submission.caller.stub(TokenServiceStub).create_token(request)
    return await _secret_page(submission, made.token or Token(), made.secret)


async def _show_secret(submission: Submission) -> Outcome:
    with explained():
        told = await submission.caller.stub(TokenServiceStub).show_token_secret(TokenRequest(name=submission.path["token"]))
    return await _secret_page(submission, told.token or Token(), told.secret, told.join_url)


async def _download_documents(submission: Submission) -> Outcome:
    with explained():
        told = await submission.caller.stub(TokenServiceStub).show_token_secret(TokenRequest(name=submission.path["token"]))
    info = await _info(submission)
    texts = _texts(submission, info, told.secret, _reach(submission, info, told.join_url))
    return Download("siderolink.yaml", texts["documents"])


async def _info(submission: Submission) -> ServerInfo:
    with explained():
        return await submission.caller.stub(ServerServiceStub).get_info(GetInfoRequest())


async def _secret_page(submission: Submission, token: Token, secret: str, join_url: str = "") -> Outcome:
    info = await _info(submission)
    values = {
        "token": token,
        "secret": secret,
        "location": token_path(token.id),
        "reach": submission.text("reach"),
        "problem": "",
    }
    try:
        reach = _reach(submission, info, join_url)
        values |= {"reach": reach} | _texts(submission, info, secret, reach)
    except ApiError as error:  # the token exists in any case
        values |= {"problem": str(error), "join_url": "", "kernel_arguments": "", "documents": ""}
    return Shown("token_secret.html", values)


def _reach(submission: Submission, info: ServerInfo, join_url: str) -> str:
    """Where machines reach the API: as given in the form or by the server; otherwise its port on the host of the first
    WireGuard endpoint, or on this page's host."""
    if given := submission.text("reach"):
        return given
    if join_url:
        return JoinURL.parse(join_url).authority
    host = HostPort.parse(info.wireguard_endpoints[0]).host if info.wireguard_endpoints else submission.host
    return str(HostPort(host, info.api_port or 443))


def _texts(submission: Submission, info: ServerInfo, secret: str, reach: str) -> dict[str, str]:
    """The join URL, kernel arguments and documents with a token. Raises ApiError."""
    try:
        reached = HostPort.parse(reach)
        url = JoinURL(
            host=reached.host, port=reached.port, tls=info.has_tls, join_token=secret, tunnel=bool(submission.text("tunnelled"))
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
    text: str, call: Callable[[TokenServiceStub, Submission, TokenRequest], Awaitable[Token]], *, stays: bool = True
) -> Do:
    async def do(submission: Submission) -> Outcome:
        with explained():
            found = await call(
                submission.caller.stub(TokenServiceStub), submission, TokenRequest(name=submission.path["token"])
            )
        return Done(f"The token {found.name} {text}.", token_path(found.id) if stays else "/tokens")

    return do


async def _renew(stub: TokenServiceStub, submission: Submission, request: TokenRequest) -> Token:
    days = submission.number("days")
    return await stub.renew_token(RenewTokenRequest(name=request.name, ttl=None if days is None else days * _DAY))


ACTIONS: Final[Mapping[str, Do]] = {
    "/machines/{machine}/rename": _on_machine(
        "is now its name",
        lambda stub, submission, name: stub.rename_machine(RenameMachineRequest(name=name, new_name=submission.text("name"))),
    ),
    "/machines/{machine}/note": _on_machine(
        "has the note",
        lambda stub, submission, name: stub.note_machine(NoteMachineRequest(name=name, note=submission.text("note"))),
    ),
    "/machines/{machine}/labels": _on_machine("has the labels", _label),
    "/machines/{machine}/tunnel": _on_machine(
        "uses that from its next join on",
        lambda stub, submission, name: stub.set_machine_tunnel(
            SetMachineTunnelRequest(name=name, tunnel=submission.text("tunnel"))
        ),
    ),
    "/machines/{machine}/accept": _on_machine(
        "is accepted", lambda stub, submission, name: stub.accept_machine(MachineRequest(name=name))
    ),
    "/machines/{machine}/deny": _on_machine(
        "is denied", lambda stub, submission, name: stub.deny_machine(MachineRequest(name=name))
    ),
    "/machines/{machine}/forget": _on_machine(
        "no longer has a unique token", lambda stub, submission, name: stub.forget_unique_token(MachineRequest(name=name))
    ),
    "/machines/{machine}/remove": _on_machine(
        "is removed", lambda stub, submission, name: stub.remove_machine(MachineRequest(name=name)), stays=False
    ),
    "/machines/{machine}/ban": _ban_machine,
    "/machines/{machine}/history": _delete_history,
    "/bans": _ban,
    "/bans/lift": _lift,
    "/tokens": _create_token,
    "/tokens/{token}/secret": _show_secret,
    "/tokens/{token}/documents": _download_documents,
    "/tokens/{token}/revoke": _on_token("is revoked", lambda stub, submission, request: stub.revoke_token(request)),
    "/tokens/{token}/reinstate": _on_token("is reinstated", lambda stub, submission, request: stub.reinstate_token(request)),
    "/tokens/{token}/renew": _on_token("is renewed", _renew),
    "/tokens/{token}/default": _on_token(
        "is now the default token", lambda stub, submission, request: stub.set_default_token(request)
    ),
    "/tokens/{token}/delete": _on_token(
        "is deleted", lambda stub, submission, request: stub.delete_token(request), stays=False
    ),
}
