"""`siderolink wireguard`: a bare interface in the foreground."""

from siderolink.cli.running import run_until_stopped, say
from siderolink.common.wireguard.interface import open_interface


def run_wireguard(name: str) -> None:
    """Run until stopped, or until the interface is deleted. Raises SideroLinkError."""

    async def work() -> None:
        async with open_interface(name) as lost:
            say(name, "ready: set it up with wg and ip")
            await lost.wait()
            say(name, "the interface was deleted")

    run_until_stopped(work)
