"""Kernel lines and events in files: bounded, private, whole after a crash and on a full disk, and found again."""

import json
import os
import re
import shutil
import subprocess
import sys
import textwrap
from collections.abc import AsyncIterator, Iterator
from contextlib import asynccontextmanager, contextmanager
from ipaddress import IPv6Address
from pathlib import Path

import anyio
import pytest
from hypothesis import given
from hypothesis import strategies as st

from siderolink.common.errors import ConfigurationError
from siderolink.common.machine_events import pack_event
from siderolink.common.pb.machine import TaskEvent
from siderolink.server import KeepOptions, KernelLine, LogLine, Machine, MachineEvent, ReportOptions, ReportQuery
from siderolink.server.reporting.archive import (
    QUEUE_ITEMS,
    Archive,
    decode_event,
    decode_line,
    encode_event,
    encode_line,
)
from siderolink.server.reporting.ingest import ReportIngest
from siderolink.server.reporting.search import CHUNK, ReportSearch
from siderolink.server.reporting.segments import Kept

pytestmark = pytest.mark.anyio

NOW = 1_764_400_000.25
MIB = 1024 * 1024


def machine(machine_id: str = "m-1", uuid: str = "") -> Machine:
    return Machine(
        id=machine_id,
        node_uuid=uuid or f"uuid-of-{machine_id}",
        public_key=None,
        overlay_address=IPv6Address("fdae::42"),
        created_at=0.0,
        joined_at=0.0,
    )


def line(text: str, at: float = NOW, of: Machine | None = None, **fields: object) -> LogLine:
    raw = json.dumps({"msg": text, "talos-level": "info", "facility": "kern", **fields}).encode()
    return LogLine(machine=of or machine(), received_at=at, raw=raw)


def event(task: str, at: float = NOW, of: Machine | None = None) -> MachineEvent:
    packed = pack_event(TaskEvent(task=task))
    return MachineEvent(
        machine=of or machine(), received_at=at, id=f"id-{task}", actor_id="", type_url=packed.type_url, data=packed.value
    )


@contextmanager
def kept(folder: Path, **options: float) -> Iterator[Archive]:
    archive = Archive(KeepOptions(folder=folder, max_age=1e12, write_after=0.01, **options))  # type: ignore[arg-type]
    archive.open()
    try:
        yield archive
    finally:
        archive.close()


@asynccontextmanager
async def searched(archive: Archive) -> AsyncIterator[ReportSearch]:
    yield ReportSearch(ReportIngest(ReportOptions(), lambda address: None), archive)


async def found(archive: Archive, name: str = "m-1", **query: object) -> list[str]:
    async with searched(archive) as search:
        return [one.message async for one in search.lines(name, ReportQuery(**query))]  # type: ignore[arg-type]


def files(folder: Path) -> list[Path]:
    return [path for path in folder.rglob("*") if re.match("lines|events", path.name)]


def listed(folder: Path) -> list[str]:
    return sorted(path.name for path in folder.iterdir())


@given(st.binary(max_size=300), st.floats(0, 4e9))
def test_any_line_comes_back_as_it_was(raw: bytes, at: float) -> None:
    record = encode_line(KernelLine(received_at=at, raw=raw))
    assert record.endswith(b"\n")
    assert record.count(b"\n") == 1
    decoded = decode_line(record[:-1])
    assert decoded is not None
    assert decoded.raw == raw
    assert abs(decoded.received_at - at) < 1e-6


@given(st.binary(max_size=300), st.text(max_size=30), st.text(max_size=30))
def test_any_event_comes_back_as_it_was(data: bytes, name: str, type_url: str) -> None:
    sent = MachineEvent(machine=machine(), received_at=NOW, id=name, actor_id="a", type_url=type_url, data=data)
    record = encode_event(sent)
    assert record.count(b"\n") == 1
    decoded = decode_event(record[:-1])
    assert decoded is not None
    assert (decoded.id, decoded.type_url, decoded.data, decoded.received_at) == (name, type_url, data, NOW)


@given(st.binary(max_size=200))
def test_malformed_records_are_skipped(data: bytes) -> None:
    decode_line(data)
    decode_event(data)


async def test_lines_and_events_outlive_the_server(tmp_path: Path) -> None:
    with kept(tmp_path / "a" / "kept") as archive:
        archive.add(line("one"))
        archive.add(event("boot"))
    with kept(tmp_path / "a" / "kept") as archive:
        archive.add(line("two", NOW + 1))
        assert await found(archive) == ["one", "two"]
        assert await found(archive, "uuid-of-m-1") == ["one", "two"]
        async with searched(archive) as search:
            events = [one async for one in search.events("m-1", ReportQuery())]
        assert [(one.kind, one.summary, one.id) for one in events] == [("TaskEvent", "task boot: start", "id-boot")]
        assert archive.size == sum(path.stat().st_size for path in files(tmp_path))


async def test_ids_never_become_paths_and_nobody_else_may_look(tmp_path: Path) -> None:
    before = os.umask(0)
    try:
        names = ["../../../etc/x", "/etc/passwd", "a/b", "..", "\0", "x" * 5000, "\ud800", ""]
        with kept(tmp_path / "kept") as archive:
            for name in names:
                archive.add(line(name, of=machine(name, uuid="../u\n")))
            for name in names:
                assert await found(archive, name) == [name.encode(errors="replace").decode()]
    finally:
        os.umask(before)
    assert listed(tmp_path) == ["kept"]
    folders = listed(tmp_path / "kept")
    assert len(folders) == len(names)
    assert all(re.fullmatch("[0-9a-f]{32}", folder) for folder in folders)
    for path in (tmp_path / "kept", *(tmp_path / "kept").rglob("*")):
        assert path.stat().st_mode & 0o777 == (0o700 if path.is_dir() else 0o600)


def test_a_folder_that_others_could_read_is_closed_and_one_in_use_is_refused(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    tmp_path.chmod(0o755)
    with kept(tmp_path):
        assert tmp_path.stat().st_mode & 0o777 == 0o700
        assert "permissions were restricted" in caplog.text
        with pytest.raises(ConfigurationError, match="in use by another server"), kept(tmp_path):
            pass
    (tmp_path / "file").write_text("")
    with pytest.raises(ConfigurationError, match="cannot keep reports in .*file"), kept(tmp_path / "file"):
        pass


async def test_foreign_files_in_the_folder_are_not_touched(tmp_path: Path) -> None:
    outside = tmp_path / "outside"
    outside.mkdir()
    (outside / "machine").write_text('["m-1", "u"]')
    (outside / "lines-0000000000000").write_text("1 secret\n")
    folder = tmp_path / "kept"
    with kept(folder) as archive:
        archive.add(line("one"))
    own = files(folder)[0].parent
    (folder / ("0" * 32)).symlink_to(outside)
    (folder / ("1" * 32)).mkdir()
    (folder / ("1" * 32) / "machine").write_text("[[[[")
    (folder / "notes").write_text("mine")
    (own / "lines-0000000000001").symlink_to(outside / "lines-0000000000000")
    with kept(folder) as archive:
        assert await found(archive) == ["one"]
        archive.delete("m-1")
    assert (folder / "notes").read_text() == "mine"
    assert (outside / "lines-0000000000000").read_text() == "1 secret\n"


async def test_one_machine_and_all_are_bounded_and_the_oldest_go_first(tmp_path: Path) -> None:
    with kept(tmp_path, machine_bytes=100_000, total_bytes=250_000) as archive:
        for number in range(2000):
            archive.add(line(f"{number:05} {'x' * 100}", NOW + number))
        texts = await found(archive)
        assert texts[-1].startswith("01999")
        assert 300 < len(texts) < 700
        assert archive.size <= 100_000
        for other in range(2, 6):
            for number in range(600):
                archive.add(line(f"{number:05} {'x' * 100}", NOW + 3000 + number, machine(f"m-{other}")))
            await found(archive, f"m-{other}")
        assert archive.size <= 250_000
        assert await found(archive) == []
        assert len(await found(archive, "m-5")) > 300
        on_disk = sum(path.stat().st_size for path in files(tmp_path))
        assert on_disk == archive.size
        assert len(listed(tmp_path)) <= 4


async def test_old_files_go_with_their_machine_s_folder(tmp_path: Path) -> None:
    with kept(tmp_path) as archive:
        archive.add(line("long ago", NOW))
        archive.add(line("a day later", NOW + 90_000))
        assert len(await found(archive)) == 2
    os.utime(min(files(tmp_path)), (NOW, NOW))
    os.utime(max(files(tmp_path)), (NOW + 90_000, NOW + 90_000))
    archive = Archive(KeepOptions(folder=tmp_path, max_age=10.0))
    archive.open()
    archive.close()
    assert listed(tmp_path) == []


async def test_a_partial_line_left_by_a_crash_is_removed(tmp_path: Path) -> None:
    with kept(tmp_path) as archive:
        archive.add(line("one"))
    (path,) = files(tmp_path)
    whole = path.read_bytes()
    for rest in (b'1764400001.5 {"msg": "ha', b"\0" * 200_000, b"1764400001"):
        path.write_bytes(whole + rest)
        with kept(tmp_path) as archive:
            assert await found(archive) == ["one"]
            archive.add(line("two", NOW + 1))
            assert await found(archive) == ["one", "two"]
    path.write_bytes(b"no newline at all")
    with kept(tmp_path) as archive:
        archive.add(line("three", NOW + 2))
        assert await found(archive) == ["three"]


def test_a_killed_process_leaves_whole_lines(tmp_path: Path) -> None:
    program = """
        import os, signal, sys, time
        from pathlib import Path
        sys.path.insert(0, ".")
        from tests.unit.reporting.test_archive import *
        archive = Archive(KeepOptions(folder=Path(sys.argv[1]), write_after=0.001))
        archive.open()
        for number in range(10**9):
            archive.add(line(f"{number}", time.time()))
            if number == 5000:
                archive.segments("m-1", Kept.LINES)
                print("go", flush=True)
            if number > 5000:
                time.sleep(0.0001)
    """
    process = subprocess.Popen([sys.executable, "-c", textwrap.dedent(program), str(tmp_path)], stdout=subprocess.PIPE)
    assert process.stdout is not None
    with process, process.stdout:
        assert process.stdout.readline() == b"go\n"
        process.kill()
    with kept(tmp_path) as archive:
        texts = anyio.run(found, archive)
    assert len(texts) > 5000
    assert texts == [str(number) for number in range(len(texts))]


def test_a_full_disk_loses_reports_only_and_is_reported(tmp_path: Path) -> None:
    """A limit of the size of files stands for the disk: the kernel writes a part, and then refuses."""
    program = """
        import logging, resource, signal, sys
        from pathlib import Path
        sys.path.insert(0, ".")
        from tests.unit.reporting.test_archive import *
        logging.basicConfig(format="%(message)s", stream=sys.stdout)
        signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
        archive = Archive(KeepOptions(folder=Path(sys.argv[1]), max_age=1e12, write_after=0.01))
        archive.open()
        archive.add(line("before"))
        assert anyio.run(found, archive) == ["before"]
        resource.setrlimit(resource.RLIMIT_FSIZE, (1000, resource.RLIM_INFINITY))
        for number in range(100):
            archive.add(line(f"number {number}"))
            archive.segments("m-1", Kept.LINES)
        during = anyio.run(found, archive)
        assert during == ["before", *(f"number {number}" for number in range(len(during) - 1))], during
        assert 2 < len(during) < 20
        assert archive.lost["disk"] == 101 - len(during)
        resource.setrlimit(resource.RLIMIT_FSIZE, (resource.RLIM_INFINITY, resource.RLIM_INFINITY))
        archive.add(line("after"))
        assert anyio.run(found, archive) == [*during, "after"]
        archive.close()
    """
    done = subprocess.run(
        [sys.executable, "-c", textwrap.dedent(program), str(tmp_path)], capture_output=True, text=True, timeout=60, check=False
    )
    assert done.returncode == 0, done.stderr
    refused, again = done.stdout.splitlines()
    assert refused.startswith("cannot keep machines' reports, retrying with the next ones: File too large")
    assert re.fullmatch("keeping machines' reports again; [0-9]+ were lost", again)


@pytest.mark.parametrize("change", ["cut off", "cut within a line", "longer", "file removed", "folder removed"])
async def test_files_that_others_change_are_continued(tmp_path: Path, change: str) -> None:
    """As logrotate does, a clean-up by hand, or a failing disk that leaves a part of a line."""
    folder = tmp_path / "kept"
    with kept(folder) as archive:
        for text in ("one", "two"):
            archive.add(line(text))
        assert await found(archive) == ["one", "two"]
        (path,) = files(folder)
        whole = path.read_bytes()
        match change:
            case "cut off":
                path.write_bytes(b"")
            case "cut within a line":
                path.write_bytes(whole[:-5])
            case "longer":
                path.write_bytes(whole + b'1764400001.5 {"msg": "' + b"x" * 1000)
            case "file removed":
                path.unlink()
            case _:
                shutil.rmtree(path.parent)
        stay = {"cut within a line": ["one"], "longer": ["one", "two"]}.get(change, [])
        archive.add(line("three", NOW + 1))
        assert await found(archive) == [*stay, "three"]
        (path,) = files(folder)
        assert b"\0" not in path.read_bytes()
        assert archive.size == path.stat().st_size
        assert not archive.lost
    with kept(folder) as archive:
        assert await found(archive) == [*stay, "three"]


def test_the_loop_never_waits_for_the_disk(tmp_path: Path) -> None:
    archive = Archive(KeepOptions(folder=tmp_path, write_after=0.0))  # the folder was not opened, so nobody writes
    for number in range(QUEUE_ITEMS + 100):
        archive.add(line(f"{number}"))
    assert archive.lost["queue full"] >= 100


# --- found again


async def test_a_search_finds_what_matches(tmp_path: Path) -> None:
    cafe = "caf\N{LATIN SMALL LETTER E WITH ACUTE}"
    texts = [
        'said "no"',
        "eth0: link up",
        "ETH0: link down",
        "50% (a+b)*",
        "caf\N{LATIN SMALL LETTER E WITH ACUTE}",
        "two\nlines",
    ]
    with kept(tmp_path) as archive:
        for number, text in enumerate(texts):
            archive.add(line(text, NOW + number))
        archive.add(LogLine(machine=machine(), received_at=NOW + 9, raw=b"\xff plain eth0"))
        assert await found(archive, text="eth0") == ["eth0: link up", "\ufffd plain eth0"]
        assert await found(archive, text="eth0", ignore_case=True) == ["eth0: link up", "ETH0: link down", "\ufffd plain eth0"]
        assert await found(archive, text='"no"') == ['said "no"']
        assert await found(archive, text="(a+b)*") == ["50% (a+b)*"]
        assert await found(archive, text=cafe) == [cafe]
        assert await found(archive, text="two\nlines") == ["two\nlines"]
        assert await found(archive, text="nowhere") == []
        assert await found(archive, since=NOW + 1, until=NOW + 3) == texts[1:3]
        assert await found(archive, tail=2) == ["two\nlines", "\ufffd plain eth0"]
        assert await found(archive, tail=1, text="link") == ["ETH0: link down"]
        assert await found(archive, "m-2") == []
    with pytest.raises(ConfigurationError, match="at most 1000 characters"):
        ReportQuery(text="x" * 1001)


async def test_the_last_lines_are_found_over_several_files(tmp_path: Path) -> None:
    with kept(tmp_path, machine_bytes=400_000) as archive:
        for number in range(1500):
            archive.add(line(f"{number} {'x' * 100}", NOW + number))
        assert len(await anyio.to_thread.run_sync(archive.segments, "m-1", Kept.LINES)) > 2
        assert [text.split()[0] for text in await found(archive, tail=1200)] == [str(number) for number in range(300, 1500)]


async def test_a_search_reads_a_bounded_piece_in_each_turn(tmp_path: Path) -> None:
    with kept(tmp_path, machine_bytes=16 * MIB, total_bytes=16 * MIB) as archive:
        for number in range(20_000):
            archive.add(line(f"{number} {'x' * 100}", NOW))
        size = sum(segment.size for _, segment in archive.segments("m-1", Kept.LINES))
        turns = 0

        async def count_turns() -> None:
            nonlocal turns
            while True:
                turns += 1
                await anyio.lowlevel.checkpoint()

        async with anyio.create_task_group() as tasks:
            tasks.start_soon(count_turns)
            assert len(await found(archive, text="19999")) == 1
            tasks.cancel_scope.cancel()
        assert turns >= size // CHUNK > 30


async def test_new_lines_are_followed_without_gap_or_repetition(tmp_path: Path) -> None:
    with kept(tmp_path) as archive:
        ingest = ReportIngest(ReportOptions(lines_per_second=0, line_bytes_per_second=0), lambda address: None)
        ingest.keep = archive.add
        search = ReportSearch(ingest, archive)
        owner, other = machine(), machine("m-2")

        def come(number: int) -> None:
            ingest.add_line(owner, json.dumps({"msg": str(number)}).encode())
            ingest.add_line(other, b'{"msg": "of another"}')

        for number in range(100):
            come(number)
        seen: list[str] = []
        with anyio.fail_after(30):
            async for one in search.lines("m-1", ReportQuery(), follow=True):
                seen.append(one.message)
                if len(seen) < 300:
                    come(99 + len(seen))  # while the files are read, and after
                if len(seen) == 300:
                    break
        assert seen == [str(number) for number in range(300)]


async def test_a_slow_follower_reads_missed_lines_from_the_files(tmp_path: Path) -> None:
    with kept(tmp_path) as archive:
        options = ReportOptions(reader_limit=10, lines_per_second=0, line_bytes_per_second=0)
        ingest = ReportIngest(options, lambda address: None)
        ingest.keep = archive.add
        owner, seen = machine(), list[str]()
        archive.add(line("first", of=owner))
        with anyio.fail_after(30):
            async for one in ReportSearch(ingest, archive).lines("m-1", ReportQuery(since=0.0), follow=True):
                seen.append(one.message)
                if len(seen) in (1, 301):
                    for number in range(300):  # thirty times the queue's bound
                        ingest.add_line(owner, json.dumps({"msg": str(len(seen) + number)}).encode())
                if len(seen) == 601:
                    break
                if len(seen) == 1:
                    assert seen == ["first"]
        assert seen == ["first", *map(str, range(1, 601))]


def size_of(folder: Path) -> int:
    return sum(file.stat().st_size for file in folder.rglob("*-*"))


async def test_older_reports_of_one_machine_or_of_all_are_deleted(tmp_path: Path) -> None:
    with kept(tmp_path) as archive:
        for name in ("m-1", "m-2", "m-3"):
            for number in range(6):
                archive.add(line(f"{number} \r of {name}", NOW + number, machine(name)))
            archive.add(event("boot", NOW, machine(name)))
        assert archive.delete("m-1", NOW + 2) > 100
        assert await found(archive) == [f"{number} \r of m-1" for number in range(2, 6)]
        assert len(await found(archive, "m-2")) == 6
        assert archive.delete(None, NOW + 4) > 200
        for name in ("m-1", "m-2", "m-3"):
            assert await found(archive, name) == [f"4 \r of {name}", f"5 \r of {name}"]
            assert archive.segments(name, Kept.EVENTS) == []
        archive.add(line("more", NOW + 9))
        assert await found(archive) == ["4 \r of m-1", "5 \r of m-1", "more"]
        assert archive.size == size_of(tmp_path)
        assert archive.delete(None, NOW + 100) > 0
        assert archive.size == size_of(tmp_path) == 0


@pytest.mark.parametrize("until", [NOW + 1, NOW + 100])
async def test_what_others_removed_does_not_keep_the_rest_from_being_deleted(tmp_path: Path, until: float) -> None:
    with kept(tmp_path) as archive:
        archive.add(line("one"))
        archive.add(line("two", NOW + 2))
        archive.add(event("boot"))
        assert await found(archive) == ["one", "two"]
        next(path for path in files(tmp_path) if path.name.startswith("lines")).unlink()
        archive.delete("m-1", until)
        assert files(tmp_path) == []
        assert archive.size == 0


async def test_one_machine_s_reports_are_deleted_and_the_others_stay(tmp_path: Path) -> None:
    with kept(tmp_path) as archive:
        for name in ("m-1", "m-2", "m-3"):
            archive.add(line("text", of=machine(name)))
            archive.add(event("boot", of=machine(name)))
        assert archive.delete("m-1") > 100  # queued lines were written and deleted
        assert archive.delete("uuid-of-m-2") > 100
        assert archive.delete("m-4") == 0
        assert [len(await found(archive, name)) for name in ("m-1", "m-2", "m-3")] == [0, 0, 1]
        assert len(listed(tmp_path)) == 1
        archive.add(line("again"))
        assert await found(archive) == ["again"]
