"""Reports on their way to any number of readers."""

from typing import Generic, TypeVar

from siderolink.common.broadcast import Broadcast, Subscription
from siderolink.server.reporting.reports import ReportsLost

T = TypeVar("T")

ReportStream = Subscription[T | ReportsLost]
"""What was published since it was made; a slow reader is told by ReportsLost."""


class ReportFeed(Broadcast[T | ReportsLost], Generic[T]):
    """Bounded for each reader in number and in bytes."""

    def __init__(self, limit: int, max_bytes: int) -> None:
        super().__init__(limit=limit, max_bytes=max_bytes, lost=lambda count: ReportsLost(count=count))
