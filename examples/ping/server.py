"""A server that pings each machine as soon as its link is up.

sudo python examples/ping/server.py --endpoint 192.0.2.1:51820 --token secret
"""

import argparse
import asyncio
import contextlib

import siderolink
from siderolink.server import HandshakeCompleted


async def main(options: argparse.Namespace) -> None:
    async with siderolink.Server(
        api_listen=options.api, wireguard_endpoints=[options.endpoint], join_token=options.token
    ) as server:
        print(f"{server.address} waits for machines", flush=True)
        async for event in server.events():
            match event:
                case HandshakeCompleted(machine=machine, is_first=True):
                    ping = await asyncio.create_subprocess_exec("ping", "-q", "-c3", "-i0.2", str(machine.overlay_address))
                    print(f"{machine.overlay_address} {'answers' if await ping.wait() == 0 else 'is silent'}", flush=True)


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--api", default="0.0.0.0:4000", help="where machines join")
    parser.add_argument("--endpoint", required=True, help="where machines dial by WireGuard, host:port")
    parser.add_argument("--token", required=True, help="what machines must know")
    with contextlib.suppress(KeyboardInterrupt):
        asyncio.run(main(parser.parse_args()))
