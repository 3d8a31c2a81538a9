"""The stored settings of a trial: their content, their permissions, and that damaged ones do no harm."""

import stat
from pathlib import Path

import pytest

from siderolink.cli.trial import JoinSettings, SettingsTrial
from siderolink.common.join_url import JoinURL

pytestmark = pytest.mark.anyio

OLD = JoinSettings(
    url=JoinURL.parse("https://a.example?jointoken=secret&grpc_tunnel=y"), uuid="u", unique_token="t", roots="PEM"
)
NEW = JoinSettings(url=JoinURL.parse("grpc://b.example:1"), uuid="v", unique_token="")
OTHER = JoinSettings(url=NEW.url, uuid="w", unique_token="")


def notes(folder: Path) -> list[Path]:
    return sorted(folder.glob("trial-*"))


async def test_the_note_of_a_trial_is_found_for_the_same_settings_only(tmp_path: Path) -> None:
    folder = tmp_path / "identity"
    await SettingsTrial(folder, "m").begin(NEW, OLD)
    [note] = notes(folder)
    assert stat.S_IMODE(note.stat().st_mode) == 0o600
    assert stat.S_IMODE(folder.stat().st_mode) == 0o700
    assert await SettingsTrial(folder, "m").interrupted(NEW) == OLD
    assert await SettingsTrial(folder, "m").interrupted(OTHER) is None
    assert await SettingsTrial(folder, "another machine").interrupted(NEW) is None
    assert "secret" not in repr(OLD)


async def test_the_end_of_a_trial_leaves_nothing_of_this_machine_behind(tmp_path: Path) -> None:
    await SettingsTrial(tmp_path, "m").begin(NEW, OLD)  # written by a process that was killed
    await SettingsTrial(tmp_path, "another machine").begin(NEW, OLD)
    trial = SettingsTrial(tmp_path, "m")
    await trial.begin(OTHER, OLD)
    assert len(notes(tmp_path)) == 2, "the last settings that are wanted count"
    await trial.end()
    assert len(notes(tmp_path)) == 1
    assert await SettingsTrial(tmp_path, "m").interrupted(OTHER) is None


@pytest.mark.parametrize(
    "data",
    [
        b"",
        b"{",
        b"[]",
        b"null",
        b'{"version": 2}',
        OLD.encode().replace(b"https", b"ftp ://"),
        b"\xff" * 9,
        b"1" * 5000,
        b"[" * 100_000,
    ],
)
async def test_an_unreadable_note_counts_as_none(tmp_path: Path, data: bytes) -> None:
    trial = SettingsTrial(tmp_path, "m")
    await trial.begin(NEW, OLD)
    [note] = notes(tmp_path)
    note.write_bytes(data)
    assert await SettingsTrial(tmp_path, "m").interrupted(NEW) is None


async def test_without_a_folder_nothing_is_kept_and_nothing_fails(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    (tmp_path / "file").write_text("")
    for folder in (None, tmp_path / "file"):
        trial = SettingsTrial(folder, "m")
        await trial.begin(NEW, OLD)
        assert await trial.interrupted(NEW) is None
        await trial.end()
    assert "cannot store the working settings" in caplog.text
