"""Hostnames from machines' events, for display and search only: machines may claim any name, so no call accepts one."""

import re
from collections.abc import AsyncIterator
from typing import Final

from siderolink.common.pb.machine import AddressEvent
from siderolink.server.fleet.directory import Directory
from siderolink.server.reporting import MachineEvent, ReportsLost

_EVENT: Final = AddressEvent.__name__
_NAME: Final = re.compile(r"[a-z0-9](?:[a-z0-9.-]{0,251}[a-z0-9])?")
_PRUNED_ABOVE: Final = 1024
"""Names of removed machines are dropped once there are this many more names than machines."""


class Hostnames:
    """The last hostname that each machine reported since this server started."""

    def __init__(self, directory: Directory) -> None:
        self._directory = directory
        self._names: dict[str, str] = {}

    def of(self, machine_id: str) -> str:
        """Empty if it reported none."""
        return self._names.get(machine_id, "")

    async def follow(self, events: AsyncIterator[MachineEvent | ReportsLost]) -> None:
        """Process machines' events until cancelled."""
        async for event in events:
            if isinstance(event, MachineEvent) and event.kind == _EVENT:
                self.note(event)

    def note(self, event: MachineEvent) -> None:
        """Store the event's hostname if it has a valid one."""
        told = event.payload
        name = told.hostname.lower() if isinstance(told, AddressEvent) and len(told.hostname) <= 253 else ""
        if _NAME.fullmatch(name) is None:
            return
        if len(self._names) > len(self._directory) + _PRUNED_ABOVE:
            self._names = {key: name for key, name in self._names.items() if self._directory.get(key) is not None}
        self._names[event.machine.id] = name
