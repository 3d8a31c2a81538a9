"""`siderolink serve` as an operator runs it, in a namespace; tests stop, kill and restart it."""

import os
import queue
import signal
import subprocess
import threading
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path

from tests.support.commands import COMMAND
from tests.support.netns import Namespace, stop

TOKEN = "s3cret-token"
SERVER = "192.0.2.1"
API = f"{SERVER}:4000"


class Served:
    """One `serve` with its own state file."""

    def __init__(self, namespace: Namespace, folder: Path, *options: str, address: str = SERVER, **environment: str) -> None:
        folder.mkdir(exist_ok=True)
        self.namespace = namespace
        self.address = address
        self.state = folder / "state" / "siderolink.state"
        self.state_key = folder / "database.key"
        """The key file that seals a state in Postgres."""
        self.lines: list[str] = []
        self._environment = os.environ | {"SIDEROLINK_RUNTIME_DIR": str(folder / "run")} | environment
        self._options = options
        self._has_key = "SIDEROLINK_STATE_KEY" in environment or bool({"--unsealed-secrets", "--state-key-file"} & {*options})
        self._folder = folder
        (folder / "token").write_text(TOKEN)
        self._process: subprocess.Popen[str] | None = None
        self._queue: queue.Queue[str | None] = queue.Queue()

    @property
    def pid(self) -> int:
        assert self._process is not None
        return self._process.pid

    def start(self, *, until: str = "remembering") -> None:
        """Start, and wait for a line with `until`."""
        arguments = ["serve", "--api-listen", "0.0.0.0:4000", "--wireguard-endpoint", f"{self.address}:51820"]
        arguments += ["--join-token-file", str(self._folder / "token"), *self._options]
        if "--store" not in self._options:
            arguments += ["--state", str(self.state)]
        elif not self._has_key:
            arguments += ["--state-key-file", str(self.state_key)]
        self._process = self.namespace.popen(
            [*COMMAND, *arguments], env=self._environment, stdout=subprocess.PIPE, stderr=subprocess.STDOUT
        )
        self._queue = queue.Queue()
        threading.Thread(target=_read, args=(self._process, self._queue), daemon=True).start()
        self.wait_for(until, 90)  # starting is slow beside twenty busy processes

    def wait_for(self, text: str, timeout: float = 60) -> str:
        """The next line that contains the text."""
        while True:
            try:
                line = self._queue.get(timeout=timeout)
            except queue.Empty:
                raise AssertionError(f"{text!r} did not come within {timeout} s after:\n{''.join(self.lines)}") from None
            assert line is not None, f"{text!r} is not in:\n{''.join(self.lines)}"
            self.lines.append(line)
            if text in line:
                return line

    def said(self) -> str:
        """The whole output so far."""
        while not self._queue.empty():
            self.lines.append(self._queue.get() or "(end)\n")
        return "".join(self.lines)

    def kill(self) -> None:
        """Send SIGKILL."""
        assert self._process is not None
        self._process.kill()
        self._process.wait()

    def signal(self, number: signal.Signals) -> None:
        assert self._process is not None
        self._process.send_signal(number)

    def stop(self, timeout: float = 60) -> int:
        """Send SIGTERM and return the exit status."""
        assert self._process is not None
        self._process.terminate()
        return self._process.wait(timeout)

    def close(self) -> None:
        if self._process is not None:
            stop(self._process)

    def popen(self, arguments: Sequence[str]) -> "subprocess.Popen[str]":
        """Start a long-running command on the same host."""
        return self.namespace.popen([*COMMAND, *arguments], env=self._environment, stdout=subprocess.PIPE)

    def command(self, arguments: Sequence[str], *, check: bool = True) -> str:
        """Run another command on the same host."""
        return self.namespace.run([*COMMAND, *arguments], env=self._environment, check=check)


def _read(process: "subprocess.Popen[str]", lines: "queue.Queue[str | None]") -> None:
    assert process.stdout is not None
    try:
        for line in process.stdout:
            lines.put(line)
    except ValueError:
        pass  # closed at the end of the test
    lines.put(None)


@contextmanager
def served(namespace: Namespace, folder: Path, *options: str, address: str = SERVER, **environment: str) -> Iterator[Served]:
    """A `serve` that runs when the body begins; the body may stop it."""
    server = Served(namespace, folder, *options, address=address, **environment)
    try:
        server.start()
        yield server
    finally:
        server.close()
