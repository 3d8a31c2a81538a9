"""`siderolink join`: one machine in the foreground."""

from collections.abc import AsyncIterator
from dataclasses import dataclass, field, replace
from pathlib import Path

import anyio

from siderolink.cli.control import control_socket, peer_message
from siderolink.cli.describe import link_event
from siderolink.cli.running import run_until_stopped, say
from siderolink.cli.secret import read_secret
from siderolink.client import Link, LinkEvent, connect
from siderolink.common.errors import ConfigurationError
from siderolink.common.join_url import JoinURL
from siderolink.common.pb.siderolink.control import Event, StatusResponse
from siderolink.common.wireguard.device import DeviceKind


@dataclass(frozen=True, slots=True, kw_only=True)
class JoinOptions:
    """As given on the command line."""

    url: str = field(repr=False)
    uuid: str | None
    unique_token: str | None = field(repr=False)
    unique_token_file: Path | None
    join_token_file: Path | None
    interface: str | None
    device: DeviceKind


class LinkSource:
    """A link, as the control socket shows it."""

    def __init__(self, link: Link) -> None:
        self._link = link

    async def status(self) -> StatusResponse:
        status = await self._link.status()
        return StatusResponse(
            role="machine",
            interface=status.interface or "",
            device_kind=status.device or "",
            transport=status.transport or "",
            addresses=[str(status.address)] if status.address else [],
            public_key=str(status.public_key),
            listen_port=status.listen_port or 0,
            peers=[peer_message(status.server)] if status.server else [],
            drops=status.drops,
            state=status.state,
        )

    async def events(self) -> AsyncIterator[Event]:
        async for event in self._link.events():
            name, text = link_event(event)
            yield Event(time=event.time, kind=name, subject=str(self._link.public_key), detail=text)


def run_join(options: JoinOptions) -> None:
    """Join and stay. Raises SideroLinkError."""
    url = _url(options)
    unique_token = read_secret("unique-token", options.unique_token, options.unique_token_file) or ""

    async def work() -> None:
        async with (
            connect(
                url,
                uuid=options.uuid,
                unique_token=unique_token,
                interface=options.interface,
                device=options.device,
                on_event=_say_event,
            ) as link,
            control_socket(link.interface, LinkSource(link)),
        ):
            await anyio.sleep_forever()

    run_until_stopped(work)


def _url(options: JoinOptions) -> JoinURL:
    url = JoinURL.parse(options.url)
    token = read_secret("join-token", None, options.join_token_file)
    if token is None:
        return url
    if url.join_token is not None and options.join_token_file is not None:
        raise ConfigurationError("give the join token either in the URL or by --join-token-file, not both")
    return url if url.join_token is not None else replace(url, join_token=token)


def _say_event(event: LinkEvent) -> None:
    say(*link_event(event))
