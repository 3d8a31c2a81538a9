"""An embedder's hooks: their arguments, and the effect of their results."""

from collections.abc import AsyncIterator

import anyio
import anyio.from_thread
import pytest

from siderolink.client.maintenance import InstallRequest, LogRequest, MachineHooks, ShutdownRequest
from siderolink.client.maintenance.dispatch import caller_waits
from siderolink.client.maintenance.hooks import ServiceAction
from siderolink.client.maintenance.roles import CallerRole
from siderolink.common.errors import ConfigurationError
from siderolink.common.pb.machine import ServiceInfo
from tests.support.machine_api import MACHINE
from tests.support.machine_stubs import Stubs, ask, refusal, serving

pytestmark = pytest.mark.anyio


class Embedder:
    """Has every hook, and notes its calls."""

    def __init__(self) -> None:
        self.calls: list[object] = []

    def hooks(self) -> MachineHooks:
        return MachineHooks(
            reboot=self.note,
            reset=self.note,
            shutdown=self.note,
            install=self.install,
            pull_image=self.pull,
            logs=self.logs,
            log_names=("mine",),
            dmesg=self.dmesg,
            services=self.services,
            control_service=self.control,
        )

    async def note(self, request: object) -> None:
        self.calls.append(request)

    async def install(self, request: InstallRequest) -> AsyncIterator[str]:
        self.calls.append(request)
        if not request.image:
            raise ConfigurationError("no image")
        yield "half"
        yield "done"

    async def pull(self, image: str) -> str:
        self.calls.append(image)
        return f"{image}@sha256"

    async def logs(self, request: LogRequest) -> AsyncIterator[bytes]:
        self.calls.append(request)
        yield b"a line\n"

    async def dmesg(self, follow: bool, only_new: bool) -> AsyncIterator[bytes]:
        yield f"{follow} {only_new}\n".encode()

    async def services(self) -> list[ServiceInfo]:
        return [ServiceInfo(id="mine", state="Running")]

    async def control(self, action: ServiceAction, service: str) -> str:
        return f"{action} {service}"


def call_all(stubs: Stubs) -> None:
    assert stubs.call(f"{MACHINE}Reboot").messages[0].actor_id
    assert stubs.call(f"{MACHINE}Shutdown", force=True).messages[0].actor_id
    assert stubs.call(f"{MACHINE}Reset").messages[0].actor_id
    [pulled] = stubs.call("/machine.ImageService/Pull", image_ref="image")
    assert pulled.name == "image@sha256"
    answers = stubs.call("/machine.LifecycleService/Install", source={"image_name": "image"}, destination={"disk": "/dev/sda"})
    assert [answer.progress.message for answer in answers] == ["half", "done", ""]
    assert answers[-1].progress.WhichOneof("response") == "exit_code"
    assert refusal(stubs, "/machine.LifecycleService/Upgrade") == ("INVALID_ARGUMENT", "no image")
    assert stubs.call(f"{MACHINE}Upgrade", image="newer").messages[0].ack
    [line] = stubs.call(f"{MACHINE}Logs", id="mine", follow=True, tail_lines=7)
    assert line.bytes == b"a line\n"
    assert refusal(stubs, f"{MACHINE}Logs", id="siderolink")[0] == "NOT_FOUND"
    [kernel] = stubs.call(f"{MACHINE}Dmesg", follow=True, tail=True)
    assert kernel.bytes == b"True True\n"
    assert stubs.call(f"{MACHINE}ServiceList").messages[0].services[0].id == "mine"
    assert stubs.call(f"{MACHINE}ServiceStop", id="mine").messages[0].resp == "stop mine"


async def test_hooks_are_called_with_the_request(monkeypatch: pytest.MonkeyPatch) -> None:
    embedder = Embedder()
    async with serving(monkeypatch, CallerRole.ADMIN, embedder.hooks()) as api:
        await ask(api, call_all)
    calls = embedder.calls
    assert [found for found in calls if isinstance(found, ShutdownRequest)][0].force
    assert InstallRequest(image="image", disk="/dev/sda") in calls
    assert InstallRequest(image="newer", is_upgrade=True) in calls
    assert LogRequest(id="mine", follow=True, tail_lines=7) in calls


async def test_an_action_knows_how_long_its_caller_waits(monkeypatch: pytest.MonkeyPatch) -> None:
    """So that a verdict on new settings comes before the caller gives up."""
    waits: list[float] = []

    async def shutdown(_: object) -> None:
        waits.append(caller_waits())

    def call(stubs: Stubs) -> None:
        made = stubs.channel.unary_unary(f"{MACHINE}Shutdown")
        made(b"", timeout=100)
        made(b"")

    async with serving(monkeypatch, CallerRole.ADMIN, MachineHooks(shutdown=shutdown)) as api:
        await ask(api, call)
    assert 0 < waits[0] <= 100
    assert waits[1] == float("inf")
    assert caller_waits() == float("inf")


async def test_an_action_is_finished_although_its_caller_disconnects(monkeypatch: pytest.MonkeyPatch) -> None:
    begun, go_on, done = anyio.Event(), anyio.Event(), anyio.Event()

    async def write(key: int, value: bytes) -> None:
        begun.set()
        await go_on.wait()
        done.set()

    def call_and_leave(stubs: Stubs) -> None:
        future = stubs.channel.unary_unary(f"{MACHINE}MetaWrite").future(b"\x08\x01", timeout=20)
        anyio.from_thread.run(begun.wait)
        future.cancel()

    async with serving(monkeypatch, CallerRole.ADMIN, MachineHooks(meta_write=write)) as api:
        await ask(api, call_and_leave)
        await ask(api, lambda stubs: stubs.call(f"{MACHINE}Version"))
        go_on.set()
        with anyio.fail_after(30):
            await done.wait()


async def test_an_action_that_does_not_end_is_cancelled_with_the_api(monkeypatch: pytest.MonkeyPatch, no_leaks: None) -> None:
    begun, ended = anyio.Event(), anyio.Event()

    async def hang(request: object) -> None:
        begun.set()
        try:
            await anyio.sleep_forever()
        finally:
            ended.set()

    def call_and_leave(stubs: Stubs) -> None:
        future = stubs.channel.unary_unary(f"{MACHINE}Reboot").future(b"", timeout=20)
        anyio.from_thread.run(begun.wait)
        future.cancel()

    async with serving(monkeypatch, CallerRole.ADMIN, MachineHooks(reboot=hang)) as api:
        await ask(api, call_and_leave)
        assert not ended.is_set()
    assert ended.is_set()
