"""How many descriptors this process may have: each connection takes one."""

import resource

SPARE_DESCRIPTORS = 64
"""File descriptors that a process needs besides its connections."""


def allow_descriptors(count: int) -> int:
    """Raise the soft limit towards `count`, as far as the hard one lets it; returns how many may be had now."""
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    if soft == resource.RLIM_INFINITY or soft >= count:
        return count
    most = count if hard == resource.RLIM_INFINITY else min(count, hard)
    resource.setrlimit(resource.RLIMIT_NOFILE, (most, hard))
    return most
