"""Paged lists. The page token contains the sort key of the page's last item, so no state is kept between calls."""

import base64
import binascii
import json
from collections.abc import AsyncIterable, Callable, Sequence
from dataclasses import dataclass, replace
from heapq import nlargest, nsmallest
from itertools import accumulate
from operator import itemgetter
from typing import Final, Generic, TypeVar

from siderolink.common.errors import ConfigurationError

T = TypeVar("T")

DEFAULT_PAGE: Final = 100
MAX_PAGE: Final = 1000
MAX_PAGE_BYTES: Final = 1024 * 1024
"""Approximate maximum size of a page, in bytes."""
_MAX_TOKEN_LENGTH: Final = 2048

SortKey = tuple[float | str, str]
"""A sort value and an id."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Page(Generic[T]):
    """One page of items."""

    items: Sequence[T]
    next_page_token: str = ""
    """Token of the next page; empty on the last one."""
    total: int = 0
    """Total number of items."""


def page_size(wanted: int) -> int:
    """Raises ConfigurationError."""
    if not 0 <= wanted <= MAX_PAGE:
        raise ConfigurationError(f"page_size must be 1 to {MAX_PAGE}, or 0 for {DEFAULT_PAGE}")
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
    """A page of items sorted by `key`; `weight` returns an item's size in bytes. Raises ConfigurationError."""
    size = page_size(size)
    first = 0
    if token:
        after = _decode_token(token, sort)
        first = _first_after(items, key, after, descending)
    part = items[first : first + size]
    weights = accumulate(map(weight, part))
    part = part[: max(sum(1 for whole in weights if whole <= MAX_PAGE_BYTES), 1)]
    has_more = first + len(part) < len(items)
    return Page(items=part, next_page_token=_encode_token(sort, key(part[-1])) if has_more else "", total=len(items))


async def page_of_unsorted(
    keyed: AsyncIterable[Sequence[tuple[SortKey, T]]],
    size: int,
    token: str,
    *,
    sort: str,
    descending: bool,
    weight: Callable[[tuple[SortKey, T]], int],
) -> Page[tuple[SortKey, T]]:
    """Like `page_of` for unsorted pairs, which come in parts: keeps and sorts only as many as the page needs."""
    size, after = page_size(size), _decode_token(token, sort) if token else None
    pick = nlargest if descending else nsmallest
    best: list[tuple[SortKey, T]] = []
    total = 0
    async for part in keyed:
        total += len(part)
        try:
            rest = part if after is None else [one for one in part if (one[0] < after if descending else one[0] > after)]
        except TypeError:
            raise _invalid_token() from None
        best = pick(size + 1, [*best, *rest], key=itemgetter(0))
    page = page_of(best, itemgetter(0), size, "", sort=sort, weight=weight)
    return replace(page, total=total)


def _first_after(items: Sequence[T], key: Callable[[T], SortKey], after: SortKey, descending: bool) -> int:
    low, high = 0, len(items)
    while low < high:
        middle = (low + high) // 2
        try:
            is_before = key(items[middle]) >= after if descending else key(items[middle]) <= after
        except TypeError:
            raise _invalid_token() from None
        if is_before:
            low = middle + 1
        else:
            high = middle
    return low


def _encode_token(sort: str, key: SortKey) -> str:
    return base64.urlsafe_b64encode(json.dumps([sort, *key]).encode()).decode()


def _decode_token(token: str, sort: str) -> SortKey:
    try:
        if len(token) > _MAX_TOKEN_LENGTH:
            raise ValueError
        found = json.loads(base64.b64decode(token.encode("ascii"), altchars=b"-_", validate=True))
        match found:
            case [str(given), float() | int() | str() as value, str(name)] if given == sort:
                return value, name
    except (binascii.Error, ValueError, RecursionError):
        pass
    raise _invalid_token()


def seq_of(page_token: str) -> int:
    """The number before which the next page of a list of numbered entries begins. Raises ConfigurationError."""
    if len(page_token) > 19 or not (page_token.isascii() and page_token.isdecimal()):
        raise _invalid_token()
    return min(int(page_token), 2**63 - 1)


def _invalid_token() -> ConfigurationError:
    return ConfigurationError("the page_token does not belong to this list; start without one")
