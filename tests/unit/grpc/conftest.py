import asyncio
from collections.abc import AsyncIterator
from typing import Any

import anyio
import pytest

from siderolink.common.grpc import private


@pytest.fixture(scope="session", autouse=True)
def used_uvloop() -> None:
    """Its first use opens a pipe that stays open as long as the process."""
    anyio.run(anyio.sleep, 0, backend_options={"use_uvloop": True})


@pytest.fixture(autouse=True, params=["short ways", "public API"])
def h2_by(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> None:
    """Runs each test with the shortcuts past h2 and without them, as with another h2."""
    if request.param == "public API":
        monkeypatch.setattr(private, "has_shortcuts", lambda: False)


@pytest.fixture(autouse=True)
async def quiet(no_leaks: None, caplog: pytest.LogCaptureFixture) -> AsyncIterator[None]:
    """Nothing a peer does reaches the loop's exception handler, or the log above debug."""
    contexts: list[dict[str, Any]] = []
    loop = asyncio.get_running_loop()
    loop.set_exception_handler(lambda _, context: contexts.append(context))
    yield
    loop.set_exception_handler(None)
    assert not contexts
    loud = [record.getMessage() for record in caplog.records if record.levelname in ("WARNING", "ERROR", "CRITICAL")]
    assert not loud
