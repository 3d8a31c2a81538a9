"""Python's collector of cycles, set for a server of many machines: it looks at what is new, and seldom at what stays."""

import gc

_YOUNG, _MIDDLE, _OLD = 20_000, 20, 100


def calm_collector() -> None:
    """For a process that is a server's own, once all that it remembers is loaded; a library leaves its host's collector alone.

    With ten thousand machines a full collection takes a good part of a second in which nothing else runs. What is loaded now is
    never looked at again. Connections that end leave no cycles, so there is little to find.
    """
    gc.collect()
    gc.freeze()
    gc.set_threshold(_YOUNG, _MIDDLE, _OLD)
