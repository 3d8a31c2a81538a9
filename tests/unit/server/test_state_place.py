"""The place of an open state file."""

from pathlib import Path

import pytest

from siderolink.server.store.sql import SqlStore
from tests.unit.server.test_store import machine, work_of


@pytest.mark.anyio
async def test_a_process_may_leave_the_folder_in_which_it_opened_its_state_file(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    async with SqlStore.open(Path("state")) as store:
        monkeypatch.chdir("/")
        await store.transact(work_of("insert", machine(1, 1)))
    async with SqlStore.open(tmp_path / "state") as store:
        assert [row.id async for row in store.machines()] == ["1"]
