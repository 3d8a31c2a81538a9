"""Commands tell whose failure it is: this host's, as of a full disk, or the server's, as of an answer that cannot be used."""

import resource
import socket
import subprocess
import sys
from collections.abc import AsyncIterator, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import IO, Any

import anyio.from_thread
import pytest
from hpack import Encoder
from hyperframe.frame import Frame, HeadersFrame, SettingsFrame

from siderolink.cli.admin.connection import ExitStatus
from siderolink.cli.output import new_file
from siderolink.common.errors import HostError
from siderolink.common.grpc import serve
from siderolink.common.pb.siderolink.admin.v1 import (
    AuditServiceBase,
    ExportAuditRequest,
    Machine,
    MachineChange,
    MachineServiceBase,
    WatchMachinesRequest,
)
from siderolink.common.pb.siderolink.admin.v1 import Chunk as AuditChunk
from siderolink.common.pb.siderolink.control import BackupRequest, Chunk, StateBase
from tests.support.http2 import PREFACE, data, message

CANNOT_BE_WRITTEN = "siderolink: standard output cannot be written: No space left on device\n"


class Copies(AuditServiceBase, StateBase, MachineServiceBase):
    """Sends more than a small disk holds."""

    def __mapping__(self) -> Any:
        return {path: one for base in Copies.__bases__ for path, one in base.__mapping__(self).items()}  # type: ignore[attr-defined]

    async def export_audit(self, message: ExportAuditRequest) -> AsyncIterator[AuditChunk]:
        for _ in range(4):
            yield AuditChunk(data=bytes(8192))

    async def backup(self, message: BackupRequest) -> AsyncIterator[Chunk]:
        for _ in range(4):
            yield Chunk(data=bytes(8192))

    async def watch_machines(self, message: WatchMachinesRequest) -> AsyncIterator[MachineChange]:
        yield MachineChange(kind="known", machine=Machine(id="m1"))
        yield MachineChange(kind="synced")


@pytest.fixture
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    """The folder of a server's local socket."""
    monkeypatch.setenv("SIDEROLINK_RUNTIME_DIR", str(tmp_path))
    monkeypatch.setenv("SIDEROLINK_CONTEXTS", str(tmp_path / "contexts.yaml"))
    server = serve([Copies()], path=tmp_path / "siderolink.sock")
    with anyio.from_thread.start_blocking_portal() as portal, portal.wrap_async_context_manager(server):
        yield tmp_path


def siderolink(*arguments: str, output: int | IO[str] = subprocess.PIPE, **more: Any) -> "subprocess.CompletedProcess[str]":
    command = [sys.executable, "-m", "siderolink", *arguments]
    return subprocess.run(command, stdout=output, stderr=subprocess.PIPE, text=True, check=False, timeout=60, **more)


def test_a_failure_of_the_source_is_not_taken_for_one_of_the_file(tmp_path: Path) -> None:
    with pytest.raises(HostError, match="no file descriptor is left"), new_file(tmp_path / "copy"):
        raise HostError("no file descriptor is left")
    assert not list(tmp_path.iterdir())


def on_a_small_disk() -> None:
    resource.setrlimit(resource.RLIMIT_FSIZE, (10_000, 10_000))


@pytest.mark.parametrize("arguments", [("audit", "--export"), ("state", "backup")])
def test_a_full_disk_of_this_host_is_no_failure_of_the_server(folder: Path, arguments: Sequence[str]) -> None:
    file = folder / "copy"
    done = siderolink(*arguments, str(file), preexec_fn=on_a_small_disk)
    assert (done.returncode, done.stderr) == (1, f"siderolink: cannot write {file}: File too large\n")
    assert not file.exists()


@pytest.mark.parametrize("arguments", [("version", "--client"), ("machine", "list", "--watch")])
def test_output_that_cannot_be_written_is_one_line(folder: Path, arguments: Sequence[str]) -> None:
    with open("/dev/full", "w") as full:
        done = siderolink(*arguments, output=full)
    assert (done.returncode, done.stderr) == (1, CANNOT_BE_WRITTEN)


@pytest.mark.parametrize(
    ("answer", "reason"),
    [
        (message(b"x", compressed=1), "the message is compressed, but no compression was negotiated"),
        (message(b"x", length=1 << 31), "the message has 2147483648 bytes, more than 16777216"),
        (message(b"x", length=9), "the message was cut short"),
    ],
)
def test_an_answer_that_cannot_be_used_is_told_as_that(folder: Path, answer: bytes, reason: str) -> None:
    def respond() -> None:
        """Answer the first call of one connection."""
        connection, _ = listening.accept()
        with connection, connection.makefile("rb") as received:
            received.read(len(PREFACE))
            while True:
                frame, length = Frame.parse_frame_header(memoryview(received.read(9)))
                received.read(length)
                if "END_STREAM" in frame.flags:
                    break
            connection.sendall(SettingsFrame(0).serialize() + b"".join(one.serialize() for one in (headers, body, trailers)))
            received.read()

    encoder = Encoder()
    headers, body = HeadersFrame(1, flags=["END_HEADERS"]), data(1, answer)
    headers.data = encoder.encode([(":status", "200"), ("content-type", "application/grpc")])
    trailers = HeadersFrame(1, flags=["END_HEADERS", "END_STREAM"])
    trailers.data = encoder.encode([("grpc-status", "0")])
    with socket.socket(socket.AF_UNIX) as listening, ThreadPoolExecutor(1) as thread:
        listening.bind(str(folder / "liar.sock"))
        listening.listen()
        answered = thread.submit(respond)
        done = siderolink("machine", "show", "m1", "--interface", "liar")
        answered.result(60)
    assert (done.returncode, done.stdout) == (ExitStatus.ERROR, "")
    assert done.stderr == f"siderolink: the answer is invalid: {reason}\n"
