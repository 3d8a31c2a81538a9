"""A machine that joins, pings its server, and stays until it is stopped.

sudo python examples/ping/machine.py 'grpc://192.0.2.1:4000?jointoken=secret'
"""

import argparse
import asyncio
import contextlib

import siderolink


async def main(options: argparse.Namespace) -> None:
    async with siderolink.connect(options.url) as link:
        print(f"{link.address} joined by {link.transport}", flush=True)
        ping = await asyncio.create_subprocess_exec("ping", "-q", "-c3", "-i0.2", str(link.server_address))
        print(f"{link.server_address} {'answers' if await ping.wait() == 0 else 'is silent'}", flush=True)
        async for event in link.events():
            print(type(event).__name__, flush=True)


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("url", help="the join URL")
    with contextlib.suppress(KeyboardInterrupt):
        asyncio.run(main(parser.parse_args()))
