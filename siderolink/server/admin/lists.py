"""Lists in pages: each page's token names the last item of it, so that nothing is kept between two calls."""

import base64
import binascii
import json
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from heapq import nlargest, nsmallest
from itertools import accumulate
from operator import itemgetter
from typing import Final, Generic, TypeVar

from anyio.lowlevel import checkpoint

from siderolink.common.errors import ConfigurationError
from siderolink.common.tasks import in_parts

T = TypeVar("T")

DEFAULT_PAGE: Final = 100
MAX_PAGE: Final = 1000
MAX_PAGE_BYTES: Final = 1024 * 1024
"""Approximate size limit of a page, in bytes."""
_MAX_TOKEN_LENGTH: Final = 2048
_AT_ONCE: Final = 500

SortKey = tuple[float | str, str]
"""A value to sort by, and an id."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Page(Generic[T]):
    """Some of the items that were asked for."""

    items: Sequence[T]
    next_page_token: str = ""
    """The token of the next page; empty on the last one."""
    total: int = 0
    """How many there are in all."""


def page_size(wanted: int) -> int:
    """Raises ConfigurationError."""
    if not 0 <= wanted <= MAX_PAGE:
        raise ConfigurationError(f"page_size is 1 to {MAX_PAGE}, or 0 for {DEFAULT_PAGE}")
    return wanted or DEFAULT_PAGE


def page_of(
    items: Sequence[T],
    key: Callable[[T], SortKey],
    size: int,
    token: str,
    *,
    sort: str = "",
    descending: bool = False,
    weight: Callable[[T], int] = lambda item: 0,
) -> Page[T]:
    """A page of items that are in the order of `key`; `weight` is an item's length in bytes. Raises ConfigurationError."""
    size = page_size(size)
    first = 0
    if token:
        after = _read(token, sort)
        first = _first_after(items, key, after, descending)
    part = items[first : first + size]
    weights = accumulate(map(weight, part))
    part = part[: max(sum(1 for whole in weights if whole <= MAX_PAGE_BYTES), 1)]
    has_more = first + len(part) < len(items)
    return Page(items=part, next_page_token=_write(sort, key(part[-1])) if has_more else "", total=len(items))


async def page_of_unsorted(
    keyed: Sequence[tuple[SortKey, T]],
    size: int,
    token: str,
    *,
    sort: str,
    descending: bool,
    weight: Callable[[tuple[SortKey, T]], int],
) -> Page[tuple[SortKey, T]]:
    """As `page_of`, of pairs in any order: only as many are sorted as the page needs, and other tasks run meanwhile."""
    size, after = page_size(size), _read(token, sort) if token else None
    pick = nlargest if descending else nsmallest
    best: list[tuple[SortKey, T]] = []
    for part in in_parts(keyed, _AT_ONCE):
        try:
            rest = part if after is None else [one for one in part if (one[0] < after if descending else one[0] > after)]
        except TypeError:
            raise _not_ours() from None
        best = pick(size + 1, [*best, *rest], key=itemgetter(0))
        await checkpoint()
    page = page_of(best, itemgetter(0), size, "", sort=sort, weight=weight)
    return replace(page, total=len(keyed))


def _first_after(items: Sequence[T], key: Callable[[T], SortKey], after: SortKey, descending: bool) -> int:
    low, high = 0, len(items)
    while low < high:
        middle = (low + high) // 2
        try:
            is_before = key(items[middle]) >= after if descending else key(items[middle]) <= after
        except TypeError:
            raise _not_ours() from None
        if is_before:
            low = middle + 1
        else:
            high = middle
    return low


def _write(sort: str, key: SortKey) -> str:
    return base64.urlsafe_b64encode(json.dumps([sort, *key]).encode()).decode()


def _read(token: str, sort: str) -> SortKey:
    try:
        if len(token) > _MAX_TOKEN_LENGTH:
            raise ValueError
        found = json.loads(base64.b64decode(token.encode("ascii"), altchars=b"-_", validate=True))
        match found:
            case [str(given), float() | int() | str() as value, str(name)] if given == sort:
                return value, name
    except (binascii.Error, ValueError, RecursionError):
        pass
    raise _not_ours()


def seq_of(page_token: str) -> int:
    """The number before which the next page begins, of a list of numbered entries. Raises ConfigurationError."""
    if len(page_token) > 19 or not (page_token.isascii() and page_token.isdecimal()):
        raise _not_ours()
    return min(int(page_token), 2**63 - 1)


def _not_ours() -> ConfigurationError:
    return ConfigurationError("the page_token is not one of this list; begin without one")
