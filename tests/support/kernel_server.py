"""A whole server with the kernel's WireGuard."""

from collections.abc import Iterator
from contextlib import contextmanager

from anyio.from_thread import BlockingPortal

from siderolink.server import Server, Store

TOKEN = "the-join-token"


@contextmanager
def kernel_server(portal: BlockingPortal, address: str, store: Store, *, keep_interface: bool = False) -> Iterator[Server]:
    server = Server(
        api_listen=f"{address}:4000",
        wireguard_endpoints=[f"{address}:51820"],
        join_token=TOKEN,
        device="kernel",
        store=store,
        keep_interface=keep_interface,
    )
    with portal.wrap_async_context_manager(server):
        yield server
