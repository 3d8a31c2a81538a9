"""What the keys of `top` do, and that a timeline cannot steer the terminal."""

import io

import pytest
from hypothesis import given
from hypothesis import strategies as st
from rich.console import Console

from siderolink.cli.control import ControlAnswers
from siderolink.cli.top import PeerRow, Rates, render, render_timeline
from siderolink.cli.top_keys import MAX_FILTER, Key, Order, ViewState, split_keys
from siderolink.common.pb.siderolink.admin.v1 import HistoryEntry
from siderolink.common.pb.siderolink.control import Peer, StatusResponse

ROWS = [f"row {number}" for number in range(10)]


def press(view: ViewState, *keys: str, rows: list[str] = ROWS) -> ViewState:
    for key in keys:
        view.press(key, rows, 4)
    return view


def test_terminal_input_is_parsed_into_keys() -> None:
    assert list(split_keys("s/ab\x7f\r\x1b[A\x1b[B\x1bOA\x1b[5~\x1b[6~\x1b")) == [
        *("s", "/", "a", "b", Key.BACKSPACE, Key.ENTER, Key.UP, Key.DOWN, Key.UP, Key.PAGE_UP, Key.PAGE_DOWN, Key.ESCAPE)
    ]
    assert list(split_keys("\x1b[1;5Hx\x1b[200~\x00y")) == [Key.ESCAPE, "x", Key.ESCAPE, "y"]


@given(st.text(max_size=50))
def test_any_terminal_input_is_parsed_in_bounded_steps(text: str) -> None:
    view = ViewState()
    keys = list(split_keys(text))
    assert len(keys) <= len(text)
    press(view, *keys, rows=[])
    press(view, *keys)
    assert len(view.containing) <= MAX_FILTER


def test_sorting_cycles_through_columns_and_goes_by_name() -> None:
    view = ViewState()
    assert [press(view, "s").order for _ in range(3)] == [Order.HANDSHAKE, Order.NAME, Order.RATE]
    assert [press(view, key).order for key in "nhr"] == [Order.NAME, Order.HANDSHAKE, Order.RATE]
    assert press(view, "q").is_over


def test_a_filter_is_typed_corrected_and_given_up() -> None:
    view = press(ViewState(), "/", "q", "s", "x", Key.BACKSPACE)
    assert (view.containing, view.is_typing, view.is_over, view.order) == ("qs", True, False, Order.RATE)
    assert not press(view, Key.ENTER).is_typing
    assert press(view, "/", "z", Key.ESCAPE).containing == ""
    assert len(press(view, "/", *"x" * 100).containing) == MAX_FILTER


def test_a_row_is_selected_and_its_timeline_opened_scrolled_and_closed() -> None:
    view = press(ViewState(), Key.DOWN, Key.DOWN, "j")
    assert view.selected == "row 3"
    assert press(view, Key.UP, Key.PAGE_DOWN, " ", " ", " ").selected == "row 9"
    assert press(view, Key.PAGE_UP).selected == "row 5"
    assert press(view, Key.ENTER, Key.DOWN, Key.PAGE_DOWN).scrolled == 5
    assert view.is_timeline
    assert press(view, Key.PAGE_UP, Key.PAGE_UP).scrolled == 0
    assert not press(view, "q").is_timeline
    assert not view.is_over
    assert press(ViewState(), Key.ENTER).selected == "row 0"
    assert not press(ViewState(), Key.ENTER, rows=[]).is_timeline


def test_a_limited_machine_is_marked() -> None:
    peers = [Peer(public_key=name, name=name, last_handshake=100.0) for name in ("free", "held")]
    peers[1].limits_biting = ["bandwidth_in", "line rate limited"]
    asked = ControlAnswers(answers=[StatusResponse(role="server", interface="siderolink", peers=peers)])
    rows = Rates().rows(asked.answers, 1.0)
    console = Console(width=200, record=True, file=io.StringIO())
    console.print(render(asked, rows, rows, 101.0))
    console.print(render_timeline(rows[1], (), "", 10, 0))
    lines = console.export_text().splitlines()
    assert "2 peers, 2 up, 0 by the tunnel, 1 limited" in [line.strip() for line in lines]
    assert [line.split("  ")[0] for line in lines if "free" in line] == ["up"]
    assert next(line for line in lines if line.startswith("up, limited")).split()[2] == "held"
    assert "limited: bandwidth_in, line rate limited" in [line.strip() for line in lines]


@pytest.mark.parametrize("problem", ["", "the server \x1b[31m is away"])
def test_a_timeline_is_printable(problem: str) -> None:
    hostile = "v1\x1b]0;x\x07\N{RIGHT-TO-LEFT OVERRIDE}"
    entries = [HistoryEntry(at=number, kind="up", detail=hostile, source=hostile, version=hostile) for number in range(50)]
    row = PeerRow("m", "192.0.2.1:1", None, 0.0, 0.0, [1.0, 2.0], "siderolink", "u-1", "key")
    console = Console(width=200, record=True, file=io.StringIO())
    console.print(render_timeline(row, entries, problem, 10, 45))
    text = console.export_text()
    assert "m (u-1): 192.0.2.1:1" in text
    assert text.count("1970-01-01T00:00:4") == 5
    assert all(character.isprintable() or character == "\n" for character in text)
