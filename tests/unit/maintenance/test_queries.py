"""Query conditions of callers: patterns compared with Python's, terms on labels, and changes seen through a selection."""

import sys
import time
from collections.abc import Mapping
from datetime import UTC, datetime

import pytest
from grpclib import GRPCError
from hypothesis import given, settings
from hypothesis import strategies as st

from siderolink.client.maintenance.queries import LONGEST_PATTERN, MAX_TERMS, Pattern, PatternError, Selection, read_selection
from siderolink.client.maintenance.resources import Resource, ResourceSpec
from siderolink.client.maintenance.resources.definitions import LINK_STATUS
from siderolink.client.maintenance.resources.store import BookmarkError, Change, ChangeKind, RecentChanges
from siderolink.common.pb.cosi.resource import IdQuery, LabelQuery, LabelTerm, LabelTermOperation

Operation = LabelTermOperation


@settings(max_examples=300)
@given(st.text(st.sampled_from("()[]{}|*+?\\^$.-,:<>PiszAdxQab12é\n"), max_size=40) | st.text(max_size=300))
def test_any_text_is_a_pattern_or_refused(text: str) -> None:
    try:
        Pattern(text).matches("some-id.of:a/resource")
    except PatternError:
        pass


@pytest.mark.parametrize(
    ("pattern", "text", "wanted"),
    [
        ("^eth", "eth0", True),
        ("^eth", "veth0", False),
        ("0$", "eth0", True),
        ("(?i)ETH[0-9]", "eth0", True),
        ("eth|wl", "wlan0", True),
        ("é", "é", True),
    ],
)
def test_a_pattern_may_occur_anywhere(pattern: str, text: str, wanted: bool) -> None:
    assert Pattern(pattern).matches(text) is wanted


@pytest.mark.parametrize(
    "text",
    [
        "(",
        "a)",
        "[a",
        "[b-a]",
        "*",
        "a{2,1}",
        "a{1001}",
        "\\",
        r"\1",
        "(?=a)",
        "(a{100}){100}",
        "\ud800",
        "a" * (LONGEST_PATTERN + 1),
    ],
)
def test_what_is_malformed_or_too_large_is_refused(text: str) -> None:
    with pytest.raises(PatternError, match="."):
        Pattern(text)


def test_without_the_package_a_pattern_is_not_implemented(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "re2", None)
    with pytest.raises(GRPCError, match=r"siderolink\[patterns\]") as caught:
        read_selection([], IdQuery(regexp="eth"))
    assert caught.value.status.name == "UNIMPLEMENTED"


@pytest.mark.parametrize("text", ["(a+)+$", "(a|aa)+$", "(a|a)*b", "(.*)*x", "(a?){60}a{60}", "((a*)*)*b", "(x+x+)+y|(a*a*)*c"])
def test_no_pattern_takes_long(text: str) -> None:
    pattern = Pattern(text)
    started = time.process_time()
    pattern.matches("a" * 200 + "!")
    assert time.process_time() - started < 5  # milliseconds; another kind of matching would take years


LABELS = {"colour": "red", "size": "10", "empty": ""}


@pytest.mark.parametrize(
    ("term", "holds"),
    [
        (LabelTerm(key="colour"), True),
        (LabelTerm(key="none"), False),
        (LabelTerm(key="none", invert=True), True),
        (LabelTerm(key="colour", op=Operation.NOT_EXISTS), False),
        (LabelTerm(key="none", op=Operation.NOT_EXISTS), True),
        (LabelTerm(key="empty"), True),
        (LabelTerm(key="colour", op=Operation.EQUAL, value=["red"]), True),
        (LabelTerm(key="colour", op=Operation.EQUAL, value=["blue"]), False),
        (LabelTerm(key="colour", op=Operation.EQUAL, value=["blue"], invert=True), True),
        (LabelTerm(key="colour", op=Operation.EQUAL), False),
        (LabelTerm(key="colour", op=Operation.IN, value=["blue", "red"]), True),
        (LabelTerm(key="colour", op=Operation.IN, value=["blue", "red"], invert=True), False),
        (LabelTerm(key="size", op=Operation.LT, value=["9"]), True),
        (LabelTerm(key="size", op=Operation.LTE, value=["10"]), True),
        (LabelTerm(key="size", op=Operation.LT, value=["10"]), False),
        (LabelTerm(key="size", op=Operation.LT_NUMERIC, value=["9"]), False),
        (LabelTerm(key="size", op=Operation.LT_NUMERIC, value=["11"]), True),
        (LabelTerm(key="size", op=Operation.LTE_NUMERIC, value=["10"]), True),
        (LabelTerm(key="colour", op=Operation.LT_NUMERIC, value=["11"]), False),
        (LabelTerm(key="colour", op=Operation.LT_NUMERIC, value=["11"], invert=True), False),
        (LabelTerm(key="size", op=Operation.LT_NUMERIC, value=["1" * 5000]), False),
    ],
)
def test_which_labels_a_term_matches(term: LabelTerm, holds: bool) -> None:
    assert selected(LabelQuery(terms=[term])).holds(resource(LABELS)) is holds


def test_one_matching_query_is_enough_and_needs_all_its_terms() -> None:
    red, large = (
        LabelTerm(key="colour", op=Operation.EQUAL, value=["red"]),
        LabelTerm(key="size", op=Operation.EQUAL, value=["99"]),
    )
    assert not selected(LabelQuery(terms=[red, large])).holds(resource(LABELS))
    assert selected(LabelQuery(terms=[large]), LabelQuery(terms=[red])).holds(resource(LABELS))
    assert selected(LabelQuery()).holds(resource({}))
    assert selected().holds(resource({}))


@pytest.mark.parametrize(
    ("queries", "ids", "status"),
    [
        ([LabelQuery(terms=[LabelTerm(key="a")] * (MAX_TERMS + 1))], None, "INVALID_ARGUMENT"),
        ([LabelQuery(terms=[LabelTerm(key="a", op=Operation(99))])], None, "UNIMPLEMENTED"),
        ([], IdQuery(regexp="("), "INVALID_ARGUMENT"),
    ],
)
def test_queries_that_cannot_be_answered(queries: list[LabelQuery], ids: IdQuery | None, status: str) -> None:
    with pytest.raises(GRPCError) as caught:
        read_selection(queries, ids)
    assert caught.value.status.name == status


def test_a_filtered_watch_sees_changes_into_and_out_of_its_filter() -> None:
    red = selected(LabelQuery(terms=[LabelTerm(key="colour", op=Operation.EQUAL, value=["red"])]))
    inside, outside = resource({"colour": "red"}), resource({"colour": "blue"})

    def seen(kind: ChangeKind, new: Resource, old: Resource | None = None) -> ChangeKind | None:
        return red.kind_of(Change(kind=kind, resource=new, old=old))

    kinds = ChangeKind
    assert seen(kinds.CREATED, inside) is kinds.CREATED
    assert seen(kinds.CREATED, outside) is None
    assert seen(kinds.DESTROYED, inside) is kinds.DESTROYED
    assert seen(kinds.UPDATED, inside, inside) is kinds.UPDATED
    assert seen(kinds.UPDATED, inside, outside) is kinds.CREATED
    assert seen(kinds.UPDATED, outside, inside) is kinds.DESTROYED
    assert seen(kinds.UPDATED, outside, outside) is None


def test_a_history_is_bounded_and_knows_its_own_bookmarks() -> None:
    history, other = RecentChanges(limit=3), RecentChanges(limit=3)
    start = history.bookmark()
    assert history.after(start) == []
    changes = [history.add(ChangeKind.CREATED, resource({})) for _ in range(3)]
    assert history.after(start) == changes
    assert history.after(history.bookmark(1)) == changes[2:]
    assert history.last(2) == changes[1:]
    assert history.last(2, "another") == []
    history.add(ChangeKind.CREATED, resource({}))
    for bad in (start, other.bookmark(), b"", bytes(16), history.bookmark(4), history.bookmark()[:-1]):
        with pytest.raises(BookmarkError, match="invalid watch bookmark"):
            history.after(bad)


def test_a_history_of_long_resources_is_bounded_too() -> None:
    now, history = datetime.now(UTC), RecentChanges()
    long = ResourceSpec(bytes(100_000), {}, "x" * 100_000)
    for number in range(100):
        fields = {"namespace": "network", "id": str(number), "version": 1, "created": now, "updated": now}
        history.add(ChangeKind.CREATED, Resource(type=LINK_STATUS, spec=long, **fields))  # type: ignore[arg-type]
    assert [change.resource.id for change in history.last(100)] == ["98", "99"]


def selected(*queries: LabelQuery) -> Selection:
    return read_selection(queries, None)


def resource(labels: Mapping[str, str]) -> Resource:
    now = datetime.now(UTC)
    spec = ResourceSpec(b"", {})
    return Resource(
        type=LINK_STATUS, namespace="network", id="eth0", version=1, created=now, updated=now, spec=spec, labels=labels
    )
