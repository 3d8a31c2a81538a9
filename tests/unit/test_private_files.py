"""Private files: killed at any moment, a writer leaves the old content or the new one, and nothing that stays."""

import errno
import json
import os
import stat
import subprocess
import sys
import threading
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import pytest

from siderolink.cli.state_copy import put
from siderolink.common import private_files
from siderolink.common.private_files import create_private, draft_of, remove_drafts, replace_private

_KILLED = """
import json, os, signal, sys
from pathlib import Path
from siderolink.common import private_files

folder, function = Path(sys.argv[1]), getattr(private_files, sys.argv[2])
has_nameless, content = sys.argv[3] == "True", sys.argv[4]
CALLS = ("open", "write", "fchmod", "fsync", "link", "replace", "unlink")

def run(path, last):
    made = 0
    def counted(call):
        def wrapper(*args, **named):
            nonlocal made
            if not has_nameless and len(args) > 1 and call is calls["open"] and args[1] & os.O_TMPFILE == os.O_TMPFILE:
                raise OSError(95, "Operation not supported")
            made += 1
            if made == last:
                os.kill(os.getpid(), signal.SIGKILL)
            return call(*args, **named)
        return wrapper
    calls = {name: getattr(os, name) for name in CALLS}
    for name, call in calls.items():
        setattr(os, name, counted(call))
    function(path, content.encode())

found = []
for last in range(1, 40):
    path = folder / str(last) / "file"
    path.parent.mkdir()
    if sys.argv[2] == "replace_private":
        path.write_bytes(b"old")
    child = os.fork()
    if child == 0:
        try:
            run(path, last)
        except BaseException:
            os._exit(9)
        os._exit(0)
    _, status = os.waitpid(child, 0)
    found.append([status, path.read_bytes().decode() if path.exists() else None, sorted(os.listdir(path.parent))])
    if status == 0:
        break
print(json.dumps(found))
"""
"""Kills a writer before its first call, its second, and so on, until one reaches its end."""


def killed_at_each_call(folder: Path, function: str, *, has_nameless: bool = True) -> list[tuple[int, str | None, list[str]]]:
    """Status, content and directory after each run; the last one was not killed."""
    command = [sys.executable, "-c", _KILLED, str(folder), function, str(has_nameless), "new" * 9]
    found = json.loads(subprocess.run(command, check=True, capture_output=True, timeout=60).stdout)
    assert [status for status, *_ in found] == [9] * (len(found) - 1) + [0]
    assert len(found) > 4
    return [(status, content, names) for status, content, names in found]


def test_a_new_file_appears_complete_or_not_at_all(tmp_path: Path) -> None:
    found = killed_at_each_call(tmp_path, "create_private")
    assert {content for _, content, _ in found} == {None, "new" * 9}
    assert all(names in ([], ["file"]) for *_, names in found), "not even a draft is left"


def test_a_new_file_appears_complete_where_files_have_to_have_names(tmp_path: Path) -> None:
    found = killed_at_each_call(tmp_path, "create_private", has_nameless=False)
    assert {content for _, content, _ in found} == {None, "new" * 9}
    assert found[-1][2] == ["file"]


def test_a_replaced_file_is_the_old_or_the_new_one(tmp_path: Path) -> None:
    found = killed_at_each_call(tmp_path, "replace_private")
    assert {content for _, content, _ in found} == {"old", "new" * 9}
    assert found[-1][2] == ["file"]


def test_an_existing_file_is_not_replaced_by_a_new_one(tmp_path: Path) -> None:
    path = tmp_path / "file"
    create_private(path, b"first")
    with pytest.raises(FileExistsError):
        create_private(path, b"second")
    assert path.read_bytes() == b"first"
    assert stat.S_IMODE(path.stat().st_mode) == 0o600


@pytest.mark.parametrize("refusal", [errno.EPERM, errno.EOPNOTSUPP, errno.EACCES])
def test_a_file_system_without_links_or_nameless_files(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, refusal: int) -> None:
    def refuse(*_: Any, **__: Any) -> None:
        raise OSError(refusal, os.strerror(refusal))

    monkeypatch.setattr(private_files, "_link_nameless", refuse)
    monkeypatch.setattr(os, "link", refuse)
    path = tmp_path / "file"
    create_private(path, b"first")
    with pytest.raises(FileExistsError):
        create_private(path, b"second")
    assert path.read_bytes() == b"first"
    assert os.listdir(tmp_path) == ["file"]


def test_of_two_writers_one_creates_the_file_where_no_links_are_permitted(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    both, exists = threading.Barrier(2), os.path.lexists

    def refuse(*_: Any, **__: Any) -> None:
        raise OSError(errno.EPERM, os.strerror(errno.EPERM))

    def look(path: Path) -> bool:
        """Both writers look before either renames."""
        found = exists(path)
        both.wait(30)
        return found

    def create(content: bytes) -> bytes | None:
        try:
            create_private(tmp_path / "file", content)
        except FileExistsError:
            return None
        return content

    monkeypatch.setattr(os, "link", refuse)
    monkeypatch.setattr(os.path, "lexists", look)
    with ThreadPoolExecutor(2) as threads:
        created = list(threads.map(create, (b"one", b"other")))
    assert created.count(None) == 1
    assert (tmp_path / "file").read_bytes() in created
    assert os.listdir(tmp_path) == ["file"]


@pytest.mark.parametrize("refusal", [errno.EPERM, errno.EOPNOTSUPP, errno.EACCES])
def test_a_replaced_state_is_kept_by_a_copy_where_no_links_are_permitted(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, refusal: int
) -> None:
    def refuse(*_: Any, **__: Any) -> None:
        raise OSError(refusal, os.strerror(refusal))

    state, copy, kept = tmp_path / "state", tmp_path / "copy", tmp_path / "state.before-restore"
    state.write_bytes(b"old")
    copy.write_bytes(b"new")
    monkeypatch.setattr(os, "link", refuse)
    put(copy, state)
    assert (state.read_bytes(), kept.read_bytes()) == (b"new", b"old")
    assert stat.S_IMODE(kept.stat().st_mode) == 0o600
    assert sorted(os.listdir(tmp_path)) == [state.name, kept.name]


def test_a_profile_that_permits_no_link(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """AppArmor and SELinux refuse both links; the file without a name was written before."""
    refused = []

    def refuse(source: Any, *_: Any, **__: Any) -> None:
        refused.append(source)
        raise OSError(errno.EACCES, os.strerror(errno.EACCES))

    monkeypatch.setattr(os, "link", refuse)
    path = tmp_path / "file"
    create_private(path, b"first")
    assert len(refused) == 2
    with pytest.raises(FileExistsError):
        create_private(path, b"second")
    assert path.read_bytes() == b"first"
    assert stat.S_IMODE(path.stat().st_mode) == 0o600
    assert os.listdir(tmp_path) == ["file"]


@pytest.mark.parametrize("refusal", [errno.EINVAL, errno.EOPNOTSUPP, errno.EIO])
@pytest.mark.parametrize("write", [create_private, replace_private])
def test_a_directory_that_cannot_be_synced(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, write: Callable[[Path, bytes], None], refusal: int
) -> None:
    sync, refused = os.fsync, []

    def refuse(descriptor: int) -> None:
        if not stat.S_ISDIR(os.fstat(descriptor).st_mode):
            return sync(descriptor)
        refused.append(descriptor)
        raise OSError(refusal, os.strerror(refusal))

    monkeypatch.setattr(os, "fsync", refuse)
    path = tmp_path / "file"
    if refusal == errno.EIO:
        with pytest.raises(OSError, match="Input/output error"):
            write(path, b"new")
    else:
        write(path, b"new")
        assert path.read_bytes() == b"new"
    assert len(refused) == 1
    assert os.listdir(tmp_path) == ["file"]


def test_a_file_whose_contents_cannot_be_synced_is_not_written(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(_: int) -> None:
        raise OSError(errno.EINVAL, os.strerror(errno.EINVAL))

    monkeypatch.setattr(os, "fsync", refuse)
    for write in (create_private, replace_private):
        with pytest.raises(OSError, match="Invalid argument"):
            write(tmp_path / "file", b"new")
    assert os.listdir(tmp_path) == []


def test_a_failed_write_leaves_the_old_file(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(*_: object) -> None:
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    path = tmp_path / "file"
    replace_private(path, b"old")
    monkeypatch.setattr(os, "write", refuse)
    for write in (replace_private, create_private):
        with pytest.raises(OSError, match="No space left"):
            write(path if write is replace_private else tmp_path / "other", b"new")
    assert path.read_bytes() == b"old"
    assert os.listdir(tmp_path) == ["file"]


def test_only_old_drafts_of_the_same_file_are_removed(tmp_path: Path) -> None:
    path = tmp_path / "file"
    fresh, old, other = draft_of(path), draft_of(path), draft_of(tmp_path / "another")
    for draft in (fresh, old, other):
        draft.touch()
    for draft in (old, other):
        os.utime(draft, (0, 0))
    replace_private(path, b"new")
    assert {file.name for file in tmp_path.iterdir()} == {path.name, fresh.name, other.name}
    remove_drafts(path)
    assert fresh.exists(), "its process may still write it"
    os.utime(fresh, (0, 0))
    remove_drafts(path)
    assert {file.name for file in tmp_path.iterdir()} == {path.name, other.name}
