"""A connection to the server's API that is kept for one purpose: its end tells within moments that the server has ended.

Nothing travels on it. A server that ends it for idleness costs a handshake, which shows that the link is well.
"""

import ssl

import anyio

from siderolink.client.signals import ApiBack, ApiLost, Put
from siderolink.common.backoff import Backoff
from siderolink.common.errors import JoinError
from siderolink.common.grpc import open_channel, translate_errors
from siderolink.common.join_url import JoinURL
from siderolink.common.nudge import Nudge

_STABLE = 5.0
"""Seconds after which a connection is one that was kept. Of shorter ones in a row only the first one's end means anything."""
_SPACING = 30.0
"""Seconds from one connection to the next at the least, where each is ended soon although the API answers."""


async def watch_api(url: JoinURL, tls: ssl.SSLContext | None, put: Put, nudge: Nudge) -> None:
    """Keep the connection for ever, and tell of its end and of its return."""
    # Not too soon: handshakes find a server that remembers, and it has enough to do in its first seconds.
    backoff = Backoff(first=4.0, cap=30.0, factor=1.5)
    context = (tls or True) if url.tls else None
    is_lost = ends_soon = False
    while True:
        stood_for = 0.0
        try:
            with translate_errors():
                async with open_channel(url.host, url.port, context) as channel:
                    await channel.connect()
                    began_at = anyio.current_time()
                    if is_lost:
                        put(ApiBack())
                    await channel.wait_lost()
                    stood_for = anyio.current_time() - began_at
        except JoinError:
            pass
        if stood_for > _STABLE or (stood_for and not ends_soon):
            put(ApiLost())
            is_lost = True
            ends_soon = stood_for <= _STABLE
            backoff.reset()
        elif stood_for:
            is_lost = False
            await anyio.sleep(_SPACING)
            continue
        await nudge.sleep(backoff.next())
