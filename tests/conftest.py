import asyncio
import inspect
import os
import signal
import sys
import time
from collections import Counter
from collections.abc import AsyncIterator, Generator, Iterator
from typing import Any

import pytest
from hypothesis import settings
from pyroute2 import netns

# A suite that a script starts in the background ignores SIGINT, and so would every program that it starts.
if signal.getsignal(signal.SIGINT) is signal.SIG_IGN:
    signal.signal(signal.SIGINT, signal.default_int_handler)


@pytest.fixture(scope="session")
def anyio_backend() -> str:
    return "asyncio"


@pytest.hookimpl(wrapper=True)
def pytest_pyfunc_call(pyfuncitem: pytest.Function) -> Generator[None, Any, Any]:
    """A plain test may run a loop of its own beside that of an asynchronous fixture; old versions of anyio forbid it."""
    library = sys.modules.get("sniffio")
    if library is None or inspect.iscoroutinefunction(pyfuncitem.obj):
        return (yield)
    token = library.current_async_library_cvar.set(None)
    try:
        return (yield)
    finally:
        library.current_async_library_cvar.reset(token)


def descriptors() -> dict[str, str]:
    """This process's open descriptors and what each one is."""
    found = {}
    for name in os.listdir("/proc/self/fd"):
        try:
            found[name] = os.readlink(f"/proc/self/fd/{name}")
        except FileNotFoundError:
            pass  # the descriptor of the listing itself
    return found


def descriptor_kinds() -> Counter[str]:
    """How many descriptors are open of each kind. Their numbers tell nothing: other threads take and free some meanwhile."""
    return Counter(what.partition(":")[0] for what in descriptors().values())


def opened_since(before: Counter[str]) -> Counter[str]:
    """The kinds of which more are open than before, when the threads beside the test have had time to close theirs."""
    deadline = time.monotonic() + 5
    while (opened := descriptor_kinds() - before) and time.monotonic() < deadline:
        time.sleep(0.02)
    return opened


def running_tasks() -> "set[asyncio.Task[object]]":
    """The loop's unfinished tasks, but for those of anyio's own test runner."""
    return {task for task in asyncio.all_tasks() if not getattr(task.get_coro(), "__qualname__", "").startswith("TestRunner.")}


@pytest.fixture
async def no_leaks(anyio_backend: str) -> AsyncIterator[None]:
    """The test ends with no more tasks and descriptors than it began with."""
    tasks, before = running_tasks(), descriptors()
    yield
    # transports close their sockets one turn of the loop after they were told to
    for _ in range(5):
        await asyncio.sleep(0)
    left = running_tasks() - tasks
    assert not left, f"tasks left behind: {left}"
    opened = {name: what for name, what in descriptors().items() if before.get(name) != what}
    assert not opened, f"descriptors left open: {opened}"


@pytest.fixture(scope="session", autouse=True)
def no_namespaces_left() -> Iterator[None]:
    """The run ends with no network namespace of its own."""
    yield
    left = [name for name in netns.listnetns() if name.startswith(f"sl{os.getpid()}-")]
    assert not left, f"network namespaces left behind: {left}"


@pytest.fixture(scope="session", autouse=True)
def folders_of_its_own(tmp_path_factory: pytest.TempPathFactory) -> Iterator[None]:
    """Servers and machines of another run beside this one do not show in `siderolink status`, and share no state."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("SIDEROLINK_RUNTIME_DIR", str(tmp_path_factory.mktemp("run")))
        patch.setenv("STATE_DIRECTORY", str(tmp_path_factory.mktemp("state")))
        yield


# examples are judged by what they show, not by how busy the machine is
# The same examples each time, so that what was green stays green; `--hypothesis-profile search` looks for new ones.
settings.register_profile("house", deadline=None, derandomize=True)
settings.register_profile("search", deadline=None)
settings.load_profile("house")
