"""A machine that joins, reports to its server over HTTP inside the overlay, and leaves.

sudo python examples/http/machine.py 'grpc://192.0.2.1:4000?jointoken=secret'
"""

import argparse
import asyncio
import platform
from urllib.request import Request, urlopen

import siderolink


def report(url: str) -> str:
    text = f"{platform.node()} runs {platform.system()} {platform.release()}"
    with urlopen(Request(url, data=text.encode()), timeout=10) as response:
        return str(response.read(1000).decode())


async def main(options: argparse.Namespace) -> None:
    async with siderolink.connect(options.url) as link:
        url = f"http://[{link.server_address}]:{options.port}/"
        print(f"{link.address} reports to {url}: {await asyncio.to_thread(report, url)}", flush=True)


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("url", help="the join URL")
    parser.add_argument("--port", type=int, default=8080, help="the server's HTTP port")
    asyncio.run(main(parser.parse_args()))
