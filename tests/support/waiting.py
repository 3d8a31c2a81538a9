"""Waiting for what other threads and processes do."""

import inspect
import time
from collections.abc import Callable


def until(condition: Callable[[], object], seconds: float = 60) -> None:
    """Wait until the condition holds. The failure shows its source, its last value, and the values that it looks at."""
    deadline = time.monotonic() + seconds
    while not (found := condition()):
        if time.monotonic() >= deadline:
            raise AssertionError(f"after {seconds:g} s it is {found!r}: {_described(condition)}")
        time.sleep(0.02)


def _described(condition: Callable[[], object]) -> str:
    try:
        source = inspect.getsource(condition).strip()
        seen = inspect.getclosurevars(condition).nonlocals
    except (OSError, TypeError, ValueError):
        return repr(condition)
    return "\n".join((source, *(f"  {name} = {value!r}"[:2000] for name, value in seen.items())))
