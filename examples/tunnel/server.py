"""A server for machines behind firewalls that drop UDP. It needs no UDP port, and echoes a line on its overlay address.

sudo python examples/tunnel/server.py --token secret
"""

import argparse
import asyncio
import contextlib

import siderolink


async def echo(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
    writer.write(await reader.readline())
    writer.close()


async def main(options: argparse.Namespace) -> None:
    async with (
        siderolink.Server(api_listen=options.api, force_tunnel=True, join_token=options.token) as server,
        await asyncio.start_server(echo, str(server.address), options.port),
    ):
        print(f"[{server.address}]:{options.port} echoes", flush=True)
        async for event in server.events():
            print(type(event).__name__, flush=True)


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--api", default="0.0.0.0:4000", help="where machines join, and all their traffic goes")
    parser.add_argument("--token", required=True, help="what machines must know")
    parser.add_argument("--port", type=int, default=7000, help="the echo's TCP port")
    with contextlib.suppress(KeyboardInterrupt):
        asyncio.run(main(parser.parse_args()))
