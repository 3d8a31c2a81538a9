"""A machine with an API, as an embedder would write it: a configuration applied through the API starts the link."""

import uuid
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager

import anyio

from siderolink import JoinURL, connect
from siderolink.client.config.documents import parse_documents
from siderolink.client.maintenance import (
    ApplyAnswer,
    ApplyRequest,
    LinkFollower,
    MachineHooks,
    MaintenanceApi,
    RebootRequest,
    ResetRequest,
    serve_maintenance,
)
from siderolink.common.errors import ConfigurationError, JoinError
from siderolink.common.tasks import background_tasks


class Agent:
    """`calls` records the calls of the API."""

    def __init__(self) -> None:
        self.uuid = str(uuid.uuid4())
        self.calls: list[object] = []
        self.meta: dict[int, bytes] = {}
        self.api: MaintenanceApi
        self.presence: LinkFollower
        self._url: JoinURL | None = None
        self._changed = anyio.Event()

    def hooks(self) -> MachineHooks:
        async def reboot(request: RebootRequest) -> None:
            self.calls.append(request)

        async def reset(request: ResetRequest) -> None:
            self.calls.append(request)

        async def write(key: int, value: bytes) -> None:
            self.meta[key] = value

        async def delete(key: int) -> bool:
            return self.meta.pop(key, None) is not None

        return MachineHooks(apply_configuration=self.apply, reboot=reboot, reset=reset, meta_write=write, meta_delete=delete)

    async def apply(self, request: ApplyRequest) -> ApplyAnswer:
        url = parse_documents([(request.data, "the configuration")]).settings.url
        if url is None:
            raise ConfigurationError("there is no SideroLinkConfig in it")
        if not request.dry_run:
            self.join(url.value)
        return ApplyAnswer(warnings=("a warning",), details="applied")

    def join(self, url: JoinURL) -> None:
        self._url = url
        self.presence.configured(url)
        self._changed.set()

    async def run(self) -> None:
        await self._changed.wait()
        assert self._url is not None
        try:
            async with connect(self._url, uuid=self.uuid, device="userspace", on_event=self.presence.on_event):
                await anyio.sleep_forever()
        except JoinError:
            pass  # no server: the machine stays as it is


@asynccontextmanager
async def agent(url: JoinURL | None = None) -> AsyncIterator[Agent]:
    """A running machine; with `url`, it is already configured."""
    machine = Agent()
    async with serve_maintenance(machine.hooks(), node_uuid=machine.uuid) as machine.api, background_tasks() as tasks:
        machine.presence = LinkFollower(machine.api)
        if url is not None:
            machine.join(url)
        tasks.start_soon(machine.run)
        yield machine
