"""Files that are watched while a command runs."""

from pathlib import Path

import anyio
import pytest

from siderolink.cli import watching


@pytest.mark.anyio
async def test_an_unreadable_folder_is_reported_once(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    def refuse(*_: object, **__: object) -> None:
        raise PermissionError(13, "Permission denied")

    monkeypatch.setattr(watching, "awatch", refuse)  # root may list everything
    with anyio.fail_after(30):
        await watching.watch_files([tmp_path / "token"], lambda: None)
    [record] = caplog.records
    assert str(tmp_path) in record.getMessage()
    assert "SIGHUP" in record.getMessage()
