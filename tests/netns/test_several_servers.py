"""`serve` on several hosts over one Postgres, as operators run it."""

from base64 import b64encode
from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager
from pathlib import Path

from tests.support.postgres import cluster
from tests.support.serving import TOKEN, Served, served
from tests.support.topology import ServersNet

KEY = b64encode(bytes(range(32))).decode()


@contextmanager
def servers(net: ServersNet, folder: Path, *options: str) -> Iterator[Sequence[Served]]:
    """One on each host."""
    with cluster().database() as name, ExitStack() as stack:
        yield [
            stack.enter_context(
                served(
                    namespace,
                    folder / f"server{number}",
                    *("--store", cluster().url(name), "--peer-listen", f"{net.address(number)}:4001", *options),
                    address=net.address(number),
                    SIDEROLINK_STATE_KEY=KEY,
                )
            )
            for number, namespace in enumerate(net.servers)
        ]


def url(net: ServersNet, number: int, query: str = "") -> str:
    return f"grpc://{net.address(number)}:4000?jointoken={TOKEN}{query}"
