"""`siderolink` as an operator runs it: started, read until it says something, and ended."""

import signal
import subprocess
import sys

from tests.support.netns import Namespace

COMMAND = [sys.executable, "-m", "siderolink"]


def start(namespace: Namespace, *arguments: str) -> "subprocess.Popen[str]":
    return namespace.popen([*COMMAND, *arguments], stdout=subprocess.PIPE, stderr=subprocess.STDOUT)


def read_until(process: "subprocess.Popen[str]", *texts: str) -> list[str]:
    """The lines of output until each of the texts was in one."""
    assert process.stdout is not None
    lines, missing = [], set(texts)
    for line in process.stdout:
        lines.append(line)
        missing -= {text for text in missing if text in line}
        if not missing:
            return lines
    raise AssertionError(f"{sorted(missing)} are not in:\n{''.join(lines)}")


def end(process: "subprocess.Popen[str]", number: signal.Signals = signal.SIGTERM) -> str:
    """End a program by a signal: it succeeds. Returns the rest of its output, which has no traceback."""
    process.send_signal(number)
    assert process.stdout is not None
    rest = process.stdout.read()
    assert process.wait(60) == 0, rest
    assert "Traceback" not in rest
    return rest
