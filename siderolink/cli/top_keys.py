"""The key bindings of `siderolink top`: reading keys, and their effect on the view."""

import asyncio
import os
import sys
import termios
import tty
from collections import deque
from collections.abc import Iterator, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass
from enum import StrEnum
from types import TracebackType
from typing import Final, Self

import anyio
from anyio.lowlevel import checkpoint

MAX_FILTER: Final = 60
_READ: Final = 1024


class Order(StrEnum):
    """The sort order of the rows."""

    RATE = "rate"
    HANDSHAKE = "handshake"
    NAME = "name"


class Key(StrEnum):
    """Keys other than characters."""

    UP = "<up>"
    DOWN = "<down>"
    PAGE_UP = "<page up>"
    PAGE_DOWN = "<page down>"
    ENTER = "<enter>"
    ESCAPE = "<escape>"
    BACKSPACE = "<backspace>"


_SEQUENCES: Final = {
    "\x1b[A": Key.UP,
    "\x1bOA": Key.UP,
    "\x1b[B": Key.DOWN,
    "\x1bOB": Key.DOWN,
    "\x1b[5~": Key.PAGE_UP,
    "\x1b[6~": Key.PAGE_DOWN,
    "\r": Key.ENTER,
    "\n": Key.ENTER,
    "\x7f": Key.BACKSPACE,
    "\b": Key.BACKSPACE,
}
_STEPS: Final = {Key.DOWN: 1, "j": 1, Key.UP: -1, "k": -1}
_PAGES: Final = {Key.PAGE_DOWN: 1, " ": 1, Key.PAGE_UP: -1}


def split_keys(text: str) -> Iterator[str]:
    """The keys in one read of a terminal. An escape without a known sequence is the escape key; the rest is ignored."""
    while text:
        known = next((sequence for sequence in _SEQUENCES if text.startswith(sequence)), None)
        if known is not None:
            yield _SEQUENCES[known]
            text = text[len(known) :]
        elif text[0] == "\x1b":
            yield Key.ESCAPE
            end = 1
            if text[1:2] in ("[", "O"):
                end = 2
                while end < len(text) and not "@" <= text[end] <= "~":
                    end += 1
                end += 1
            text = text[end:]
        else:
            if text[0].isprintable():
                yield text[0]
            text = text[1:]


@dataclass(slots=True)
class ViewState:
    """The part of the view that keys change."""

    order: Order = Order.RATE
    containing: str = ""
    is_typing: bool = False
    """Whether typed characters go to the filter."""
    selected: str = ""
    """The key of the selected row; empty for the first one."""
    is_timeline: bool = False
    scrolled: int = 0
    """Number of timeline entries scrolled past."""
    is_over: bool = False

    def press(self, key: str, rows: Sequence[str], page: int) -> None:
        """Handle a key. `rows` are the keys of the displayed or scrollable rows, `page` is how many fit."""
        if self.is_typing:
            self._type(key)
        elif self.is_timeline:
            self._read_timeline(key, page)
        else:
            self._walk(key, rows, page)

    def _type(self, key: str) -> None:
        match key:
            case Key.ENTER:
                self.is_typing = False
            case Key.ESCAPE:
                self.is_typing, self.containing = False, ""
            case Key.BACKSPACE:
                self.containing = self.containing[:-1]
            case _ if len(key) == 1 and len(self.containing) < MAX_FILTER:
                self.containing += key

    def _read_timeline(self, key: str, page: int) -> None:
        match key:
            case Key.ESCAPE | Key.ENTER | Key.BACKSPACE | "q":
                self.is_timeline = False
            case _:
                self.scrolled = max(0, self.scrolled + _STEPS.get(key, 0) + _PAGES.get(key, 0) * page)

    def _walk(self, key: str, rows: Sequence[str], page: int) -> None:
        match key:
            case "q":
                self.is_over = True
            case "s":
                orders = list(Order)
                self.order = orders[(orders.index(self.order) + 1) % len(orders)]
            case "r" | "h" | "n":
                self.order = {"r": Order.RATE, "h": Order.HANDSHAKE, "n": Order.NAME}[key]
            case "/":
                self.is_typing = True
            case Key.ESCAPE:
                self.containing = ""
            case Key.ENTER if rows:
                self.selected = self.selected if self.selected in rows else rows[0]
                self.is_timeline, self.scrolled = True, 0
            case _:
                self._select(rows, _STEPS.get(key, 0) + _PAGES.get(key, 0) * page)

    def _select(self, rows: Sequence[str], steps: int) -> None:
        if rows and steps:
            at = rows.index(self.selected) if self.selected in rows else 0
            self.selected = rows[max(0, min(len(rows) - 1, at + steps))]


class Keyboard(AbstractContextManager["Keyboard"]):
    """The terminal of standard input, without echo and line buffering, until the context ends."""

    def __init__(self) -> None:
        self._loop = asyncio.get_running_loop()
        self._keys: deque[str] = deque()
        self._pressed = anyio.Event()
        self._descriptor = sys.stdin.fileno()
        self._is_terminal = os.isatty(self._descriptor)

    def __enter__(self) -> Self:
        if self._is_terminal:
            self._before = termios.tcgetattr(self._descriptor)
            tty.setcbreak(self._descriptor, termios.TCSADRAIN)
            self._loop.add_reader(self._descriptor, self._read_keys)
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None) -> None:
        if self._is_terminal:
            self._loop.remove_reader(self._descriptor)
            termios.tcsetattr(self._descriptor, termios.TCSADRAIN, self._before)

    def _read_keys(self) -> None:
        try:
            data = os.read(self._descriptor, _READ)
        except OSError:
            data = b""
        if not data:  # the terminal was closed
            self._loop.remove_reader(self._descriptor)
        self._keys.extend(split_keys(data.decode(errors="ignore")))
        self._pressed.set()

    async def pressed(self, seconds: float) -> list[str]:
        """Keys pressed so far; waits up to `seconds` for the first one."""
        if not self._keys:
            self._pressed = anyio.Event()
            with anyio.move_on_after(seconds):
                await self._pressed.wait()
        await checkpoint()
        found = list(self._keys)
        self._keys.clear()
        return found
