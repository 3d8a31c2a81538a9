"""A machine killed during a trial of settings starts with the working ones, and tests the new ones alongside again."""

import queue
import subprocess
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path

import anyio
import anyio.to_thread
import grpc
import pytest

from siderolink import JoinURL, Server
from siderolink.cli.trial import JoinSettings, SettingsTrial
from siderolink.common.pb.machine import ApplyConfigurationRequest
from siderolink.server import Allow, Deny, JoinRequest
from tests.netns.test_machine_command import TOKEN, UUID, ask_when_linked, end
from tests.support.commands import COMMAND, read_until, start
from tests.support.machine_api import MACHINE, MachineClient, status_of
from tests.support.machine_stubs import Stubs
from tests.support.topology import Net, direct

URL = f"grpc://192.0.2.1:4000?jointoken={TOKEN}"
NOBODY = f"grpc://192.0.2.1:5000?jointoken={TOKEN}"
"""A server whose port swallows all that is sent there."""
SWALLOWS = "table inet hole { chain input { type filter hook input priority 0; tcp dport 5000 drop; }; }"
DROPS_UDP = "table inet wall { chain input { type filter hook input priority 0; udp dport 51820 drop; }; }"
OTHER = UUID[:-1] + "2"
GIVEN = '{"Fingerprint":"' + "0" * 64 + '","Token":"a1b2c3d4-0000-4000-8000-00000000000f"}'
TUNNEL = f"{URL}&grpc_tunnel=true"
TRYING, BACK = "trying settings", "a trial was interrupted"


def document(url: str) -> str:
    return f"apiVersion: v1alpha1\nkind: SideroLinkConfig\napiUrl: {url}\n"


class Bench:
    """A server that delays the joins selected by `is_held`, and a machine that is killed and started again."""

    def __init__(self, net: Net, folder: Path) -> None:
        self.net = net
        self.folder = folder
        self.joins: queue.Queue[JoinRequest] = queue.Queue()
        self.is_held: Callable[[JoinRequest], bool] = lambda request: False
        self.release = threading.Event()
        self.machine: subprocess.Popen[str] | None = None
        self._server = Server(
            api_listen="0.0.0.0:4000", join_token=TOKEN, wireguard_endpoints=["192.0.2.1:51820"], authorize=self._authorize
        )

    async def _authorize(self, request: JoinRequest) -> Allow | Deny:
        self.joins.put(request)
        if self.is_held(request):
            await anyio.to_thread.run_sync(self.release.wait, abandon_on_cancel=True)
        return Allow()

    @contextmanager
    def serving(self) -> Iterator[None]:
        with self.net.server.portal() as self._portal, self._portal.wrap_async_context_manager(self._server):
            try:
                yield
            finally:
                self.release.set()

    def start(self, *arguments: str) -> JoinRequest:
        """The first join of the process."""
        self._arguments: tuple[str, ...] = ("join", *arguments, "--uuid", UUID, "--identity", str(self.folder / "identity"))
        options: tuple[str, ...] = ("--maintenance-api", "--device", "userspace", "--meta", str(self.folder / "meta"))
        options += ("--keep-config", str(self.folder / "kept"))
        self.machine = start(self.net.machine, *self._arguments, *options)
        return self.joins.get(timeout=60)

    def said(self, *texts: str) -> None:
        assert self.machine is not None
        read_until(self.machine, *texts)

    def kill_and_start(self) -> JoinRequest:
        assert self.machine is not None
        self.machine.kill()
        self.machine.communicate(timeout=60)
        while not self.joins.empty():
            self.joins.get()
        return self.start(*self._arguments[1:-4])

    def call(self, method: str, **fields: object) -> object:
        """By the machine's API over the link."""
        return self.ask(lambda client: Stubs(client.channel).call(f"{MACHINE}{method}", **fields))

    def ask(self, work: Callable[[MachineClient], object]) -> object:
        [found] = [one for one in self._portal.call(self._server.machines) if one.machine.public_key is not None]
        return ask_when_linked(self.net.server, str(found.machine.overlay_address), work)

    def call_and_lose_it(self, method: str, **fields: object) -> None:
        """A call that the machine's end interrupts."""

        def call() -> None:
            with pytest.raises(grpc.RpcError):
                self.call(method, **fields)

        self._caller = threading.Thread(target=call)
        self._caller.start()

    def stop(self) -> None:
        assert self.machine is not None
        end(self.machine)


@pytest.fixture
def bench(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Bench]:
    monkeypatch.setenv("SIDEROLINK_RUNTIME_DIR", str(tmp_path / "run"))
    with direct() as net:
        net.server.nft(SWALLOWS)
        bench = Bench(net, tmp_path)
        with bench.serving():
            yield bench
        assert bench.machine is not None
        bench.machine.kill()
        bench.machine.communicate()


def notes(bench: Bench) -> list[str]:
    return [path.name for path in (bench.folder / "identity").glob("trial-*")]


@pytest.mark.timeout(180)
@pytest.mark.parametrize(("key", "value"), [(15, OTHER), (16, GIVEN)], ids=["uuid", "unique-token"])
def test_a_crash_while_meta_is_tried(bench: Bench, key: int, value: str) -> None:
    """The server answers the new Provision only after the write has returned: the file has the value when the machine dies."""
    bench.is_held = lambda request: request.node_uuid == OTHER or request.unique_token == GIVEN
    first = bench.start(URL)
    bench.said("monitoring the link")
    bench.call("MetaWrite", key=key, value=value.encode())
    new = bench.joins.get(timeout=60)
    assert (new.node_uuid, new.unique_token) == ((OTHER, first.unique_token) if key == 15 else (UUID, GIVEN))
    assert len(notes(bench)) == 1
    again = bench.kill_and_start()
    assert (again.node_uuid, again.unique_token) == (first.node_uuid, first.unique_token)
    bench.said(BACK, "monitoring the link")
    bench.said(TRYING)
    assert bench.is_held(bench.joins.get(timeout=60)), "what was written is not lost: it is tried beside the link"
    assert len(notes(bench)) == 1, "another crash comes back with them, too"
    bench.release.set()
    if key == 16:  # a foreign token, which the server does not take
        bench.said("settings do not work")
        bench.stop()
        assert len(notes(bench)) == 1
        return
    bench.said("settings applied", "monitoring the link")
    bench.stop()
    assert not notes(bench)


@pytest.mark.timeout(180)
@pytest.mark.parametrize(("old", "new"), [(URL, NOBODY), (TUNNEL, URL)], ids=["server", "transport"])
def test_a_crash_while_a_files_settings_are_tried(bench: Bench, tmp_path: Path, old: str, new: str) -> None:
    file = tmp_path / "machine.yaml"
    file.write_text(document(old))
    if old == TUNNEL:
        bench.net.server.nft(DROPS_UDP)
    first = bench.start("--config", str(file))
    bench.said("monitoring the link")
    file.write_text(document(new))
    bench.said(TRYING)
    again = bench.kill_and_start()
    assert (again.unique_token, again.wants_tunnel) == (first.unique_token, old == TUNNEL)
    bench.said(BACK, "monitoring the link")
    bench.said(TRYING)
    assert bench.call("Version")
    file.write_text(document(old))
    deadline = time.monotonic() + 60
    while notes(bench):
        assert time.monotonic() < deadline, "nobody wants the other settings any more"
        time.sleep(0.02)
    bench.stop()


@pytest.mark.timeout(180)
def test_a_crash_after_the_server_has_bound_the_new_settings(bench: Bench, tmp_path: Path) -> None:
    """The old settings are refused by now, so the new ones are used at once."""
    first = bench.start(URL)
    bench.said("monitoring the link")
    bench.stop()
    new = JoinSettings(url=JoinURL.parse(URL), uuid=UUID, unique_token=first.unique_token or "")
    old = replace(new, unique_token="of the time before")
    anyio.run(SettingsTrial(tmp_path / "identity", f"{UUID} None").begin, new, old)
    assert bench.start(URL).unique_token == old.unique_token
    bench.said(BACK, "provision failed", TRYING, "monitoring the link")
    assert bench.joins.get(timeout=60).unique_token == first.unique_token
    bench.stop()
    assert not notes(bench)


@pytest.mark.timeout(180)
def test_a_crash_while_configurations_by_the_api_are_tried(bench: Bench, tmp_path: Path) -> None:
    file = tmp_path / "machine.yaml"
    file.write_text(document(URL))
    bench.start("--config", str(file))
    bench.said("monitoring the link")
    bench.call_and_lose_it("ApplyConfiguration", data=document(NOBODY).encode(), mode=1)
    bench.said(TRYING)
    bench.kill_and_start()
    bench.said("monitoring the link")
    assert not (tmp_path / "kept").exists()
    assert not notes(bench)
    order = bytes(ApplyConfigurationRequest(data=document(NOBODY).encode()))
    with pytest.raises(grpc.RpcError) as caught:
        bench.ask(lambda client: client.channel.unary_unary(f"{MACHINE}ApplyConfiguration")(order, timeout=6))
    assert status_of(caught.value)[0] == "FAILED_PRECONDITION", "the verdict comes before the caller's six seconds are over"
    shown = subprocess.run([*COMMAND, "status", "--json"], check=True, capture_output=True, text=True)
    assert "the last new settings were refused: server 192.0.2.1:5000" in shown.stdout
    bench.call("ApplyConfiguration", data=document(TUNNEL).encode(), mode=1)
    bench.said("transport changed", "monitoring the link")
    assert bench.kill_and_start().wants_tunnel, "what was applied for good is what the next start begins with"
    bench.said("monitoring the link")
    bench.call("ApplyConfiguration", data=document(URL).encode(), mode=4)
    bench.said("transport changed", "monitoring the link")
    assert bench.kill_and_start().wants_tunnel, "what was on trial is forgotten"
    bench.said("monitoring the link")
    bench.stop()
