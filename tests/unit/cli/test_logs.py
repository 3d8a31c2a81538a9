"""The parts of the log: sampling in virtual time, a writer on real pipes, and the rendering of all kinds of records."""

import json
import logging
import os
import resource
import subprocess
import sys
import threading
import time
import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from siderolink.cli import logs, output
from siderolink.cli.output import LineWriter, TextWriter
from siderolink.cli.sampling import INTERVAL_SECONDS, MAX_KINDS, RecordSampler, Suppressed
from siderolink.common.queues import LineQueue
from tests.support.waiting import until

SECRET = "a-very-secret-token"


# --- sampling


def test_the_first_of_each_kind_are_shown_and_the_rest_is_counted() -> None:
    now = 0.0
    sampler = RecordSampler(lambda: now)
    shown = [sampler.admit("refused", 3, "refused") for _ in range(10)]
    assert shown == [True] * 3 + [False] * 7
    assert sampler.admit("joined", 3, "joined")
    assert sampler.expired(now) == []
    now = INTERVAL_SECONDS
    assert sampler.admit("refused", 3, "refused")
    assert sampler.expired(now) == [Suppressed("refused", "refused", 7, INTERVAL_SECONDS)]
    assert sampler.expired(now) == []


def test_any_number_of_kinds_takes_bounded_memory() -> None:
    sampler = RecordSampler(lambda: 0.0)
    shown = sum(sampler.admit(f"kind {number}", 5, "event") for number in range(3 * MAX_KINDS))
    assert shown == MAX_KINDS + 5
    [others] = sampler.expired(INTERVAL_SECONDS)
    assert (others.kind, others.count) == ("others", 2 * MAX_KINDS - 5)


# --- the queue and the writer


def test_a_full_queue_refuses_and_counts() -> None:
    queue: LineQueue[int] = LineQueue(max_items=3, max_bytes=100)
    assert [queue.put(number, 10) for number in range(5)] == [True] * 3 + [False] * 2
    assert queue.dropped == 2
    assert queue.take(2) == [0, 1]
    assert not queue.put(9, 200)
    assert queue.put(5, 90)
    queue.end()
    assert not queue.put(6, 1)
    assert queue.take(10) == [2, 5]
    assert queue.take(10) is None
    assert queue.dropped == 4


def test_a_writer_with_a_stuck_reader_never_blocks_and_later_reports_its_losses(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(output, "MAX_ITEMS", 100)
    reading, writing = os.pipe()
    writer: LineWriter[str] = LineWriter(writing, lambda text: f"{text}\n".encode(), notice=lambda text: text)
    for number in range(2000):
        writer.put(f"{number} " + "x" * 1000, 1000)
    until(lambda: writer.lost > 0)
    lost = writer.lost
    received = bytearray()

    def read() -> None:
        while part := os.read(reading, 65536):
            received.extend(part)

    reader = threading.Thread(target=read)
    reader.start()
    until(lambda: b"\n99 " in received)
    writer.put("at last", 10)
    writer.stop(10)
    os.close(writing)
    reader.join()
    os.close(reading)
    lines = received.decode().splitlines()
    assert writer.lost >= lost
    notice = " log records were lost: standard output did not accept them"
    # one line, or several if more was lost after the first
    assert sum(int(line.removesuffix(notice)) for line in lines if line.endswith(notice)) == writer.lost
    assert lines[-1] == "at last"


def test_a_writer_without_a_reader_says_so_once(capfd: pytest.CaptureFixture[str]) -> None:
    reading, writing = os.pipe()
    os.close(reading)
    writer = TextWriter(writing, end="\n")
    for number in range(10):
        writer.put(str(number))
        time.sleep(0.01)
    writer.stop(5)
    os.close(writing)
    assert capfd.readouterr().err == (
        "siderolink: standard output is closed, nothing more is logged: Broken pipe; the program continues\n"
    )


def test_a_disk_that_fails_for_a_while_loses_only_what_was_written_then(
    tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    """The kernel answers EIO to a write where this process has no memory."""
    descriptor = os.open("/proc/self/mem", os.O_WRONLY)
    writer: LineWriter[str] = LineWriter(descriptor, lambda text: f"{text}\n".encode(), notice=lambda text: text)
    writer.put("lost", 10)
    until(lambda: writer.lost == 1)
    sound = os.open(tmp_path / "log", os.O_WRONLY | os.O_CREAT)
    os.dup2(sound, descriptor)
    os.close(sound)
    writer.put("written", 10)
    writer.stop(10)
    os.close(descriptor)
    notice = "1 log records were lost: standard output did not accept them"
    assert (tmp_path / "log").read_text().splitlines() == [notice, "written"]
    assert capfd.readouterr().err == (
        "siderolink: standard output fails, log records are lost: Input/output error; the program continues\n"
    )


def test_a_line_that_a_full_disk_cut_off_swallows_none_of_the_next(tmp_path: Path) -> None:
    """A limit of the file's size stands for the disk's: part of a write succeeds, the next one fails."""
    descriptor = os.open(tmp_path / "log", os.O_WRONLY | os.O_CREAT)
    queued = threading.Event()

    def render(text: str) -> bytes:
        queued.wait(30)  # so that the lines are one batch
        return f"{text}\n".encode()

    writer: LineWriter[str] = LineWriter(descriptor, render, notice=lambda text: text)
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (25, hard))
    try:
        for number in range(4):
            writer.put(f"line {number} ..", 10)  # ten bytes
        queued.set()
        until(lambda: writer.lost > 0)
        lost = writer.lost
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
    writer.put("after", 10)
    writer.stop(10)
    os.close(descriptor)
    lines = (tmp_path / "log").read_text().splitlines()
    assert lines[:2] == ["line 0 ..", "line 1 .."]
    assert lines[2] == "line "
    assert lines[-2:] == [f"{lost} log records were lost: standard output did not accept them", "after"]
    assert len(lines) == 5
    assert lost == 2


@pytest.mark.parametrize("later", ["writer.put('second')", "pass"])
def test_a_writer_waits_for_a_host_that_has_no_thread_for_it(later: str) -> None:
    """A thread needs address space for its stack."""
    code = (
        "import resource; from siderolink.cli.output import TextWriter; writer = TextWriter(1, end='\\n')\n"
        "size = int(open('/proc/self/statm').read().split()[0]) * resource.getpagesize()\n"
        "soft, hard = resource.getrlimit(resource.RLIMIT_AS)\n"
        "resource.setrlimit(resource.RLIMIT_AS, (size + 2**20, hard)); writer.put('first')\n"
        f"resource.setrlimit(resource.RLIMIT_AS, (soft, hard)); {later}; writer.stop(10)"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=60, check=False)
    assert (done.stdout, done.stderr) == ("first\n" if later == "pass" else "first\nsecond\n", "")


def test_a_descriptor_that_somebody_made_nonblocking_gets_all() -> None:
    reading, writing = os.pipe()
    os.set_blocking(writing, False)
    writer = TextWriter(writing, end="\n")
    for number in range(300):
        writer.put(f"{number} " + "x" * 1000)
    received = b""
    while received.count(b"\n") < 300:
        received += os.read(reading, 65536)
    writer.stop(5)
    os.close(writing)
    os.close(reading)


# --- what is logged


@contextmanager
def logging_to_pipe(level: str = "info", *, as_json: bool = True) -> Iterator[Callable[[], bytes]]:
    """The log of this process on a pipe; the function ends it and gives all that was written."""
    reading, writing = os.pipe()
    logs.start_log(level, as_json=as_json, descriptor=writing)

    def written() -> bytes:
        logs.stop_log()
        os.close(writing)
        with os.fdopen(reading, "rb", closefd=False) as file:
            return file.read()

    try:
        yield written
    finally:
        logs.stop_log()
        os.close(reading)


def test_an_ended_log_leaves_the_process_as_it_was() -> None:
    loggers = logging.root, logging.getLogger("siderolink"), logging.getLogger("siderolink.cli")
    before = sys.unraisablehook, threading.excepthook, warnings.showwarning, logging.root.handlers[:]
    levels = [logger.level for logger in loggers]
    with logging_to_pipe() as written:
        assert [logger.level for logger in loggers] != levels
        assert sys.unraisablehook is not before[0]
        assert threading.excepthook is not before[1]
        assert warnings.showwarning is not before[2]
        written()
    assert (sys.unraisablehook, threading.excepthook, warnings.showwarning, logging.root.handlers) == before
    assert [logger.level for logger in loggers] == levels


def test_library_records_carry_their_fields_and_tracebacks() -> None:
    log = logging.getLogger("siderolink")
    with logging_to_pipe() as written:
        log.warning("a peer at %s", "192.0.2.1", extra={"machine_id": "m1", "node_uuid": "u1"})
        try:
            raise ValueError(f"with {SECRET}")
        except ValueError:
            log.exception("it failed")
        log.debug("not shown")
        log.warning("badly %s %s", "formatted")
        logs.hide(SECRET)
        first, failure, bad = [json.loads(line) for line in written().splitlines()]
    assert (first["level"], first["message"], first["machine_id"], first["node_uuid"]) == (
        "warning",
        "a peer at 192.0.2.1",
        "m1",
        "u1",
    )
    assert failure["level"] == "error"
    assert "ValueError" in failure["traceback"]
    assert "could not be formatted" in bad["message"]


def test_secrets_are_masked_wherever_they_stand() -> None:
    logs.hide(SECRET)
    with logging_to_pipe(as_json=False) as written:
        logs.log_event(
            "one", f"the token {SECRET} is wrong", fields={"url": f"grpc://h?jointoken={SECRET}", "join_token": "abc"}
        )
        logs.log_event("two", "grpc://h?jointoken=unregistered&grpc_tunnel=true")
        try:
            raise ValueError(SECRET)
        except ValueError:
            logging.getLogger("siderolink").exception("failed")
        text = written().decode()
    assert SECRET not in text
    assert "abc" not in text
    assert "unregistered" not in text
    assert "grpc_tunnel=true" in text


def test_a_secret_that_a_limit_cuts_leaves_no_part() -> None:
    logs.hide(SECRET)
    with logging_to_pipe(as_json=False) as written:
        for inside in range(4, len(SECRET)):
            logs.log_event("one", "x" * (logs.MESSAGE_LIMIT - inside) + SECRET)
            try:
                raise ValueError(SECRET + "x" * (logs.TRACEBACK_LIMIT - 1 - inside))
            except ValueError:
                logging.getLogger("siderolink").exception("failed")
        text = written().decode()
    assert text.count("one: x") == text.count("error: failed") == len(SECRET) - 4
    assert SECRET[:4] not in text
    assert SECRET[-4:] not in text


HOSTILE = ["\x1b[2J\x1b]0;owned\x07", "a\nb level=error", "\u202eevil", "\ud800", "\u2028", "x" * 100_000, "\x00", "🙂", ""]


@pytest.mark.parametrize("as_json", [False, True])
def test_hostile_text_is_one_printable_line_of_bounded_length(as_json: bool) -> None:
    with logging_to_pipe(as_json=as_json) as written:
        for text in HOSTILE:
            logs.log_event("event", text, fields={"id": text, "number": 5})
        lines = written().decode().split("\n")
    assert lines.pop() == ""
    assert len(lines) == len(HOSTILE)
    assert all(line.isprintable() and len(line) < 2000 for line in lines)
    if as_json:
        assert all(json.loads(line)["number"] == 5 for line in lines)


@given(st.text(max_size=50), st.text(max_size=50))
def test_anything_can_be_logged(text: str, value: str) -> None:
    with logging_to_pipe() as written:
        logs.log_event("event", text, fields={"value": value})
        [line] = written().splitlines()
    assert set(json.loads(line)) == {"time", "level", "logger", "event", "message", "value"}
