"""The journal's native protocol on real sockets: records have the documented form, and nothing blocks."""

import array
import contextlib
import logging
import os
import socket
import threading
from collections.abc import Iterator
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from siderolink.cli import logs
from siderolink.cli.journal import Journal, encode, is_journal

SECRET = "a-very-secret-token"


def fields_of(record: bytes) -> dict[str, bytes]:
    """Parses a record as systemd documents it."""
    found: dict[str, bytes] = {}
    while record:
        line, _, rest = record.partition(b"\n")
        name, equals, value = line.partition(b"=")
        if not equals:
            size = int.from_bytes(rest[:8], "little")
            value, rest = rest[8 : 8 + size], rest[8 + size + 1 :]
        assert name.decode() not in found
        found[name.decode()] = value
        record = rest
    return found


@given(
    st.text(max_size=200),
    st.dictionaries(st.sampled_from(["machine_id", "node-uuid", "x y", "\xe9", "=", "n" * 99]), st.text()),
)
def test_any_record_comes_back_as_it_was(message: str, fields: dict[str, str]) -> None:
    found = fields_of(encode(message, "warning", fields))
    assert found.pop("MESSAGE") == message.encode(errors="replace")
    assert (found.pop("PRIORITY"), found.pop("SYSLOG_IDENTIFIER")) == (b"4", b"siderolink")
    names = {"machine_id": "SIDEROLINK_MACHINE_ID", "node-uuid": "SIDEROLINK_NODE_UUID"}
    assert found == {names[name]: value.encode(errors="replace") for name, value in fields.items() if name in names}


@pytest.fixture
def journal(tmp_path: Path) -> Iterator[socket.socket]:
    with socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM) as listening:
        listening.bind(str(tmp_path / "socket"))
        listening.settimeout(30)
        yield listening


@contextlib.contextmanager
def log_to(path: Path) -> Iterator[logs.Log]:
    log = logs.Log(20, as_json=False, descriptor=1, journal=Journal(path))
    try:
        yield log
    finally:
        log.stop()


def test_records_have_their_level_their_fields_and_no_secret(journal: socket.socket, tmp_path: Path) -> None:
    logs.hide(SECRET)
    with log_to(tmp_path / "socket"):
        logs.log_event("joined", f"with {SECRET}\x1b[31m", fields={"machine_id": "m-1", "join_token": SECRET, "is_new": True})
        try:
            raise ValueError(SECRET)
        except ValueError:
            logs.log_event("failed", "a part", level=40)
            logging.getLogger("siderolink.cli").exception("it failed")
    found = [fields_of(journal.recv(65_536)) for _ in range(3)]
    assert found[0] == {
        "MESSAGE": "joined: with … [31m".encode(),
        "PRIORITY": b"6",
        "SYSLOG_IDENTIFIER": b"siderolink",
        "SIDEROLINK_EVENT": b"joined",
        "SIDEROLINK_LOGGER": b"siderolink.cli",
        "SIDEROLINK_MACHINE_ID": b"m-1",
        "SIDEROLINK_JOIN_TOKEN": "…".encode(),
        "SIDEROLINK_IS_NEW": b"True",
    }
    assert (found[1]["PRIORITY"], found[1]["MESSAGE"]) == (b"3", b"failed: a part")
    assert found[2]["MESSAGE"].startswith(b"it failed\nTraceback")
    assert found[2]["MESSAGE"].rstrip().endswith("ValueError: …".encode())


def test_a_record_that_is_too_large_for_a_datagram_travels_in_a_sealed_file(journal: socket.socket, tmp_path: Path) -> None:
    record = encode("x" * 4_000_000, "info", {})
    sender = Journal(tmp_path / "socket")
    sender.send([record])
    sender.close()
    data, ancillary, _, _ = journal.recvmsg(10, socket.CMSG_SPACE(array.array("i").itemsize))
    assert data == b""
    descriptors = array.array("i")
    descriptors.frombytes(ancillary[0][2])
    with open(descriptors[0], "rb") as file:
        file.seek(0)
        assert file.read() == record
        with pytest.raises(PermissionError):
            os.pwrite(descriptors[0], b"changed", 0)


def test_a_stuck_journal_loses_records_and_blocks_nothing(
    journal: socket.socket, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(logs, "STOP_SECONDS", 0.1)
    with log_to(tmp_path / "socket") as log:
        for number in range(20_000):
            logs.log_event("event", f"{number} {'x' * 500}", sample=("test", 1_000_000))
        assert log.writer.lost > 5000
    stuck = [thread for thread in threading.enumerate() if thread.name == "log writer"]
    journal.settimeout(0.2)
    while any(thread.is_alive() for thread in stuck):  # it continues where it stopped, and ends
        with contextlib.suppress(TimeoutError):
            journal.recv(65_536)


def test_an_absent_journal_is_reported_once_and_used_again_later(tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    with log_to(tmp_path / "socket") as log:
        logs.log_event("event", "lost")
        while not log.writer.lost:
            pass
        with socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM) as listening:
            listening.bind(str(tmp_path / "socket"))
            listening.settimeout(30)
            logs.log_event("event", "heard")
            texts = [fields_of(listening.recv(65_536))["MESSAGE"] for _ in range(2)]
    assert texts == [b"1 log records were lost: standard output did not accept them", b"event: heard"]
    assert capfd.readouterr().err.count("log records are lost") == 1


def test_only_the_stream_that_systemd_connected_is_the_journal(tmp_path: Path) -> None:
    with (tmp_path / "stream").open("wb") as stream:
        status = os.fstat(stream.fileno())
        here = {"JOURNAL_STREAM": f"{status.st_dev}:{status.st_ino}"}
        assert is_journal(stream.fileno(), here)
        assert not is_journal(1, here)  # it was redirected
        for text in ("", "1", "a:b", f"{status.st_dev}:{status.st_ino + 1}", ":"):
            assert not is_journal(stream.fileno(), {"JOURNAL_STREAM": text})
        assert not is_journal(stream.fileno(), {})
