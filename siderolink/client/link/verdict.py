"""What became of new settings for a link."""

from dataclasses import dataclass
from typing import Literal

VERDICT_TIMEOUT = 20.0
"""Seconds within which whoever changes a link's settings learns what became of them."""
PROMPT_TIMEOUT = 1.0
"""Seconds for a caller on whose return the server itself waits before it answers the new Provision (META writes)."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Verdict:
    """The outcome of a change of settings; text is for people and holds no secret."""

    outcome: Literal["unchanged", "applied", "pending", "refused"]
    """`applied`: the link runs by the new settings. `pending`: they are still being tried, and retried until they work or are
    replaced; the old link stays meanwhile. `refused`: they do not work and were dropped; the old link stays."""
    reason: str = ""
    """Why they were refused, or are still pending."""
    warnings: tuple[str, ...] = ()
    """What the caller should know although the change was applied: connections that end, for instance."""

    @property
    def is_refused(self) -> bool:
        return self.outcome == "refused"
