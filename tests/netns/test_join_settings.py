"""`siderolink join` with documents and kernel arguments, in namespaces: reading them, and reacting to changes."""

import json
import os
import queue
import subprocess
import sys
import threading
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from functools import partial
from pathlib import Path
from typing import Any

import pytest

from siderolink.client.config.kernel_args import in_container
from tests.support.netns import Namespace, stop
from tests.support.reach import dial, keeps_out, lets_in, ruleset
from tests.support.talosctl import Talosctl
from tests.support.topology import SERVER_V4, Net, direct

TOKEN = "the-join-token"
URL = f"grpc://{SERVER_V4}:4000?jointoken={TOKEN}"
TUNNEL_URL = f"{URL}&grpc_tunnel=true"
OVERLAY = "fdae:41e4:649b:9303::1"
SECONDS = 90.0
BLOCK = "apiVersion: v1alpha1\nkind: NetworkDefaultActionConfig\ningress: block\n"


def join_document(url: str) -> str:
    return f"apiVersion: v1alpha1\nkind: SideroLinkConfig\napiUrl: {url}\n"


class Command:
    """A running `siderolink` command, whose lines are read as they come."""

    def __init__(self, process: subprocess.Popen[str]) -> None:
        self._process = process
        self._lines: queue.Queue[str | None] = queue.Queue()
        self.said: list[str] = []
        threading.Thread(target=self._read, daemon=True).start()

    def _read(self) -> None:
        assert self._process.stdout is not None
        for line in self._process.stdout:
            self._lines.put(line.rstrip("\n"))
        self._lines.put(None)

    def wait_for(self, words: str) -> str:
        """The next line that holds these words."""
        while True:
            try:
                line = self._lines.get(timeout=SECONDS)
            except queue.Empty:
                line = None
            assert line is not None, f"no line says {words!r}:\n" + "\n".join(self.said)
            self.said.append(line)
            if words in line:
                return line

    def stop(self) -> int:
        self._process.terminate()
        status = self._process.wait(SECONDS)
        while (line := self._lines.get(timeout=SECONDS)) is not None:
            self.said.append(line)
        return status


@contextmanager
def command(namespace: Namespace, run_folder: Path, *args: str, before: Sequence[str] = ()) -> Iterator[Command]:
    """A command in a namespace; local sockets lie in a folder of its own."""
    options: dict[str, Any] = {
        "stdout": subprocess.PIPE,
        "stderr": subprocess.STDOUT,
        "env": {**os.environ, "SIDEROLINK_RUNTIME_DIR": str(run_folder), "PYTHONUNBUFFERED": "1"},
    }
    process = namespace.popen([*before, sys.executable, "-m", "siderolink", *args], **options)
    try:
        yield Command(process)
    finally:
        stop(process)


@pytest.fixture
def net(tmp_path: Path) -> Iterator[Net]:
    """A running server, and a machine beside it."""
    with direct() as net:
        arguments = ["serve", "--api-listen", f"{SERVER_V4}:4000", "--wireguard-endpoint", f"{SERVER_V4}:51820"]
        with command(net.server, tmp_path, *arguments, "--join-token", TOKEN, "--device", "userspace") as server:
            server.wait_for("overlay")
            yield net


def overlay_address(machine: Namespace, interface: str) -> str:
    (address,) = (found for found in machine.addresses(interface) if found.startswith("fd"))
    return address.partition("/")[0]


def pings(namespace: Namespace, address: str) -> bool:
    """Whether any of several echo requests is answered: on a busy host the first one may be sent too early."""
    return any(" 0 received" not in namespace.run(["ping", "-c1", "-W20", address], check=False) for _ in range(5))


def status_of_machine(run_folder: Path) -> dict[str, Any]:
    """The output of `siderolink status --json`."""
    done = subprocess.run(
        [sys.executable, "-m", "siderolink", "status", "--json"],
        env={**os.environ, "SIDEROLINK_RUNTIME_DIR": str(run_folder)},
        capture_output=True,
        text=True,
        check=True,
    )
    [found] = [status for status in json.loads(done.stdout) if status["role"] == "machine"]
    return dict(found)


def replace_file(file: Path, text: str) -> None:
    """Like editors and configuration managers: rename another file over it."""
    new = file.with_suffix(".new")
    new.write_text(text)
    new.replace(file)


@pytest.mark.parametrize(("url", "interface"), [(URL, "siderolink"), (TUNNEL_URL, "siderolinktun")])
def test_with_default_block_the_link_comes_up_and_only_it_is_let_in(net: Net, tmp_path: Path, url: str, interface: str) -> None:
    folder = tmp_path / "documents"
    folder.mkdir()
    (folder / "join.yaml").write_text(join_document(url) + "---\n" + BLOCK)
    before = ruleset(net.machine)
    options = ["--config", str(folder), "--maintenance-api", "--device", "userspace"]
    with command(net.machine, tmp_path, "join", *options) as join:
        join.wait_for(" connected: ")
        address = overlay_address(net.machine, interface)
        assert pings(net.machine, OVERLAY)
        assert pings(net.server, address)
        assert lets_in(net.server, partial(dial, address, 50001, None))
        assert "Tag: " in net.server.call(Talosctl(address).version_soon)
        assert keeps_out(net.server, partial(dial, "192.0.2.2", 50000, None))
        # a rule opens a port without any effect on the link
        (folder / "rule.yaml").write_text(
            "apiVersion: v1alpha1\nkind: NetworkRuleConfig\nname: api\n"
            "portSelector: {ports: [50000], protocol: tcp}\ningress: [{subnet: 192.0.2.0/24}]\n"
        )
        join.wait_for("1 rules")
        assert lets_in(net.server, partial(dial, "192.0.2.2", 50000, None))
        assert keeps_out(net.server, partial(dial, "192.0.2.2", 50001, None))
        (folder / "rule.yaml").unlink()
        join.wait_for("0 rules")
        assert keeps_out(net.server, partial(dial, "192.0.2.2", 50000, None))
        assert pings(net.server, address)
        assert join.stop() == 0
    assert sum("provisioned" in line for line in join.said) == 1
    assert ruleset(net.machine) == before
    assert net.machine.interfaces() == {"lo", "eth0"}


def test_a_change_joins_anew_at_once_and_nonsense_changes_nothing(net: Net, tmp_path: Path) -> None:
    file = tmp_path / "machine.yaml"
    file.write_text(join_document(URL))
    with command(net.machine, tmp_path, "join", "--config", str(file), "--device", "userspace") as join:
        join.wait_for(" connected: ")
        address = overlay_address(net.machine, "siderolink")
        replace_file(file, join_document("grpc://h/path"))
        assert "machine.yaml:3: apiUrl" in join.wait_for("setting ignored")
        assert pings(net.server, address)
        # a wrong token does not end a working link
        replace_file(file, join_document(URL) + "uniqueToken: of another machine\n")
        assert "another machine has joined" in join.wait_for("settings do not work: unique token")
        assert pings(net.server, address)
        assert "new settings do not work" in status_of_machine(tmp_path)["reason"]
        # equal settings change nothing; different ones apply with the same key, and so with the same address
        replace_file(file, "# a remark\n" + join_document(URL))
        replace_file(file, join_document(TUNNEL_URL))
        join.wait_for(" connected: tunnel ")
        assert overlay_address(net.machine, "siderolinktun") == address
        assert "siderolink" not in net.machine.interfaces()
        assert pings(net.machine, OVERLAY)
        # an unreachable server is retried, and the next change applies at once
        file.write_text(join_document(URL.replace(":4000", ":4001")))
        join.wait_for("settings do not work: server 192.0.2.1:4001")
        assert pings(net.machine, OVERLAY), "the link that works stays"
        file.write_text(join_document(URL))
        join.wait_for(" connected: udp ")
        assert overlay_address(net.machine, "siderolink") == address
        file.unlink()
        join.wait_for("settings refused")
        assert pings(net.machine, OVERLAY)
        file.write_text(BLOCK)
        join.wait_for("there is no join URL")
        assert join.stop() == 0
    assert TOKEN not in "\n".join(join.said)
    assert sum("settings refused" in line for line in join.said) == 1
    assert sum("setting ignored" in line for line in join.said) == 1


def test_a_folder_of_links_as_cluster_managers_make_it(net: Net, tmp_path: Path) -> None:
    folder = tmp_path / "mounted"
    for version, url in (("one", URL), ("two", TUNNEL_URL)):
        (folder / version).mkdir(parents=True)
        (folder / version / "join.yaml").write_text(join_document(url))
    (folder / "..data").symlink_to("one")
    (folder / "join.yaml").symlink_to("..data/join.yaml")
    with command(net.machine, tmp_path, "join", "--config", str(folder), "--device", "userspace") as join:
        join.wait_for(" connected: ")
        (folder / "..new").symlink_to("two")
        (folder / "..new").replace(folder / "..data")
        join.wait_for(" connected: tunnel ")


def test_join_by_the_kernel_command_line(net: Net, tmp_path: Path) -> None:
    line = tmp_path / "cmdline"
    line.write_text(f'quiet siderolink.api="{URL}" siderolink.api=grpc://other\n')
    with command(net.machine, tmp_path, "join", "--kernel-cmdline", str(line), "--device", "userspace") as join:
        assert "siderolink.api" in join.wait_for("join URL")
        join.wait_for(" connected: ")


def test_join_without_arguments_uses_the_hosts_kernel_command_line(tmp_path: Path) -> None:
    line = tmp_path / "cmdline"
    sink, log = f"talos.events.sink=[{OVERLAY}]:8090", f"talos.logging.kernel=tcp://[{OVERLAY}]:8092"
    line.write_text(f'BOOT_IMAGE=/vmlinuz quiet "siderolink.api={URL}" {sink} {log} -- siderolink.api=grpc://init\n')
    # each program that is started inside has a mount namespace of its own
    in_its_place = ["sh", "-c", f'mount --bind {line} /proc/cmdline && exec "$@"', "sh"]
    serve = [
        "serve",
        "--api-listen",
        f"{SERVER_V4}:4000",
        "--wireguard-endpoint",
        f"{SERVER_V4}:51820",
        "--device",
        "userspace",
    ]
    ports = ["--event-sink-port", "8090", "--log-port", "8092", "--print-machine-logs"]
    with direct() as net, command(net.server, tmp_path, *serve, *ports, "--join-token", TOKEN) as server:
        server.wait_for("log receiver")
        with command(net.machine, tmp_path, "join", "--device", "userspace", before=in_its_place) as join:
            if in_container():  # a container, whose kernel command line is the host's
                join.wait_for("the kernel command line is ignored because this is a container")
                return
            assert "/proc/cmdline: siderolink.api" in join.wait_for("join URL")
            join.wait_for(" connected: ")
            server.wait_for("kernel log: ")
            assert join.stop() == 0
            assert TOKEN not in "".join(join.said)


def test_in_a_container_join_without_arguments_ignores_the_kernel_command_line(tmp_path: Path) -> None:
    line = tmp_path / "cmdline"
    line.write_text(f"siderolink.api={URL}\n")
    in_its_place = ["sh", "-c", f'mount --bind {line} /proc/cmdline && container=podman exec "$@"', "sh"]
    with direct() as net, command(net.machine, tmp_path, "join", before=in_its_place) as join:
        join.wait_for("ignored because this is a container")
        join.wait_for("no join URL found")


def test_join_without_arguments_finds_the_hosts_settings(net: Net, tmp_path: Path) -> None:
    laid_over = tmp_path / "etc"
    laid_over.mkdir()
    (laid_over / "siderolink.yaml").write_text(join_document(URL))
    # each program that is started inside has a mount namespace of its own
    overlay = ["sh", "-c", f'mount -t overlay overlay -o lowerdir={laid_over}:/etc /etc && exec "$@"', "sh"]
    with command(net.machine, tmp_path, "join", "--device", "userspace", before=overlay) as join:
        assert "/etc/siderolink.yaml:1" in join.wait_for("join URL")
        join.wait_for(" connected: ")


def test_without_a_join_url_join_lists_where_it_looked(tmp_path: Path) -> None:
    file = tmp_path / "empty.yaml"
    file.write_text(BLOCK)
    done = subprocess.run(
        [sys.executable, "-m", "siderolink", "join", "--config", str(file)], capture_output=True, text=True, check=False
    )
    assert done.returncode == 1
    assert done.stderr.count("\n") == 1
    assert str(file) in done.stderr
