"""A server that accepts its machines' reports over HTTP, only on its overlay address.

WireGuard authenticates the sender: only the machine can send from its overlay address.

    sudo python examples/http/server.py --endpoint 192.0.2.1:51820 --token secret
"""

import argparse
import asyncio
import contextlib
import socket
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer

import siderolink


class Reports(BaseHTTPRequestHandler):
    def do_POST(self) -> None:
        report = self.rfile.read(min(int(self.headers["Content-Length"]), 10_000))
        print(f"{self.client_address[0]} reports: {report.decode()}", flush=True)
        self.send_response(200)
        self.end_headers()
        self.wfile.write(b"thank you")


class Web(ThreadingHTTPServer):
    address_family = socket.AF_INET6


async def main(options: argparse.Namespace) -> None:
    async with siderolink.Server(
        api_listen=options.api, wireguard_endpoints=[options.endpoint], join_token=options.token
    ) as server:
        with Web((str(server.address), options.port), Reports) as web:
            serving = asyncio.create_task(asyncio.to_thread(web.serve_forever, 0.1))
            print(f"http://[{server.address}]:{options.port}/ waits for reports", flush=True)
            try:
                async for event in server.events():
                    print(type(event).__name__, flush=True)
            finally:
                web.shutdown()
                await serving


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--api", default="0.0.0.0:4000", help="where machines join")
    parser.add_argument("--endpoint", required=True, help="where machines dial by WireGuard, host:port")
    parser.add_argument("--token", required=True, help="what machines must know")
    parser.add_argument("--port", type=int, default=8080, help="the HTTP port")
    with contextlib.suppress(KeyboardInterrupt):
        asyncio.run(main(parser.parse_args()))
