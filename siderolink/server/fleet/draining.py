"""A server that is about to stop: its row says so, and the machines whose links it owns are asked to go to another server.

Others leave it out of their answers from then on. Machines that do not know the word stay until the server stops; those that
can be dialled are dialled by another one then.
"""

import logging
from collections.abc import Callable
from ipaddress import IPv6Address
from typing import Final

from siderolink.common.errors import SideroLinkError
from siderolink.common.tasks import in_parts
from siderolink.server.clock import Clock
from siderolink.server.fleet.directory import Directory, LinkState, MachineLink
from siderolink.server.fleet.membership import Membership
from siderolink.server.fleet.owners import Owners

log = logging.getLogger(__name__)

LOOK_SECONDS: Final = 1.0
ASKED_TIMES: Final = 5
"""A datagram may be lost, and the first answer of the API too."""
_AT_ONCE: Final = 32
_PAUSE_SECONDS: Final = 0.02
"""Between so many machines: they all ask the API at once."""

AskToMove = Callable[[IPv6Address], None]


class Draining:
    """One server's end, in good order."""

    def __init__(
        self, membership: Membership | None, owners: Owners | None, directory: Directory, ask: AskToMove, clock: Clock
    ) -> None:
        self._membership = membership
        self._owners = owners
        self._directory = directory
        self._ask = ask
        self._clock = clock
        self.has_begun = False

    async def run(self, timeout: float) -> int:
        """Let machines go until none is left that this server owns, or for so many seconds; tells how many are left.

        Returns at once where no other server stays.
        """
        membership = self._membership
        if membership is None or not any(one.id != membership.id and not one.is_draining for one in membership.living()):
            return 0
        self.has_begun = True
        membership.describe(is_draining=True)
        try:
            await membership.beat()
        except SideroLinkError as error:
            log.warning("the other servers do not learn that this one drains: %s", error)
        ends_at = self._clock.monotonic() + timeout
        asked: dict[str, int] = {}
        while (left := self._left()) and self._clock.monotonic() < ends_at:
            for part in in_parts([link for link in left if asked.get(link.machine.id, 0) < ASKED_TIMES], _AT_ONCE):
                for link in part:
                    asked[link.machine.id] = asked.get(link.machine.id, 0) + 1
                    self._ask(link.machine.overlay_address)
                await self._clock.sleep(_PAUSE_SECONDS)
            await self._clock.sleep(min(LOOK_SECONDS, max(0.0, ends_at - self._clock.monotonic())))
        return len(left)

    def _left(self) -> list[MachineLink]:
        """The machines whose links are up here."""
        owners = self._owners
        return [
            link
            for link in self._directory
            if link.state is LinkState.UP and (owners is None or owners.is_mine(link.machine.id))
        ]
