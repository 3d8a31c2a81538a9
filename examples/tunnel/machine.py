"""A machine behind a firewall that drops UDP: WireGuard runs inside a gRPC stream. The server echoes a line.

sudo python examples/tunnel/machine.py 'grpc://192.0.2.1:4000?jointoken=secret&grpc_tunnel=true'
"""

import argparse
import asyncio

import siderolink


async def main(options: argparse.Namespace) -> None:
    async with siderolink.connect(options.url) as link:
        print(f"{link.address} joined by {link.transport} on {link.interface}", flush=True)
        reader, writer = await asyncio.open_connection(str(link.server_address), options.port)
        writer.write(b"hello through the tunnel\n")
        print(f"the echo: {(await reader.readline()).decode()}", end="", flush=True)
        writer.close()


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("url", help="the join URL")
    parser.add_argument("--port", type=int, default=7000, help="the echo's TCP port")
    asyncio.run(main(parser.parse_args()))
