"""Asking the server's API until it answers: what is tried again, and how soon."""

import ssl
from collections.abc import Callable
from dataclasses import replace

from siderolink.client import events
from siderolink.client.provisioning import Machine, Provisioned, provision
from siderolink.common.addressing import format_peer_addr_port
from siderolink.common.backoff import Backoff
from siderolink.common.errors import JoinError, JoinRefusedError, ServerUnreachableError
from siderolink.common.join_url import JoinURL
from siderolink.common.keys import PublicKey
from siderolink.common.nudge import Nudge
from siderolink.common.transport.choice import choose

PASSING = frozenset({"ALREADY_EXISTS", "RESOURCE_EXHAUSTED", "ABORTED", "CANCELLED", "INTERNAL", "UNKNOWN"})
"""Refusals that pass by themselves: another link of this machine must end first, there is no room now, or something went wrong
over there, such as a proxy's own HTTP status."""


class Asker:
    """Calls Provision for one machine. A nudge ends the wait for an API that was away, but not the wait after a refusal."""

    def __init__(
        self,
        url: JoinURL,
        machine: Machine,
        public_key: PublicKey,
        emit: Callable[[events.LinkEvent], None],
        nudge: Nudge,
        *,
        tls: ssl.SSLContext | None,
        timeout: float,
    ) -> None:
        self._url = url
        self._machine = machine
        self._public_key = public_key
        self._emit = emit
        self._nudge = nudge
        self._quiet = Nudge()
        self._tls = tls
        self._timeout = timeout

    async def ask(self, *, tunnel: bool = False) -> Provisioned:
        """Ask once; `tunnel` asks for it though the URL does not. Raises JoinError."""
        url = replace(self._url, tunnel=True) if tunnel else self._url
        answer = await provision(url, self._machine, self._public_key, tls=self._tls, timeout=self._timeout)
        self._emit(
            events.Joined(
                server_key=answer.server_key,
                address=answer.address,
                server_address=answer.server_address,
                transport=choose(url, answer, self._tls).kind,
                endpoints=tuple(str(endpoint) for endpoint in answer.endpoints),
                virtual_address=format_peer_addr_port(*answer.virtual_address) if answer.virtual_address else "",
            )
        )
        return answer

    async def ask_until_answered(self, *, tunnel: bool = False) -> Provisioned:
        """Ask again and again, each failure an event."""
        away = Backoff(first=0.5, cap=30.0, factor=1.5)
        passing = Backoff(first=2.0, cap=20.0)
        refused = Backoff(first=60.0, floor=30.0, cap=300.0)
        while True:
            try:
                return await self.ask(tunnel=tunnel)
            except ServerUnreachableError as error:
                problem: JoinError = error
                delay, nudge = away.next(), self._nudge
            except JoinError as error:
                problem = error
                passes = isinstance(error, JoinRefusedError) and error.status in PASSING
                delay, nudge = (passing if passes else refused).next(), self._quiet
            self._emit(events.ProvisionFailed(reason=str(problem), retry_in=delay))
            await nudge.sleep(delay)
