"""A TCP proxy as a program, for a namespace of its own: ``python cutting_proxy.py LISTEN_PORT TARGET_HOST TARGET_PORT``.

SIGUSR1 cuts all its connections at once, like a restarted proxy. It prints how many, and keeps serving.
"""

import asyncio
import signal
import sys


def say(text: str) -> None:
    sys.stdout.write(text + "\n")
    sys.stdout.flush()


async def main(port: int, host: str, target: int) -> None:
    writers: set[asyncio.StreamWriter] = set()

    async def carry(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        try:
            while data := await reader.read(65_536):
                writer.write(data)
                await writer.drain()
        except OSError:
            pass
        finally:
            writer.close()

    async def serve(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        try:
            there, on = await asyncio.open_connection(host, target)
        except OSError:
            writer.transport.abort()
            return
        both = {writer, on}
        writers.update(both)
        try:
            await asyncio.gather(carry(reader, on), carry(there, writer))
        finally:
            writers.difference_update(both)

    def cut() -> None:
        say(f"cut {len(writers)}")
        for writer in list(writers):
            writer.transport.abort()

    asyncio.get_running_loop().add_signal_handler(signal.SIGUSR1, cut)
    server = await asyncio.start_server(serve, "0.0.0.0", port)
    say("serving")
    async with server:
        await server.serve_forever()


if __name__ == "__main__":
    asyncio.run(main(int(sys.argv[1]), sys.argv[2], int(sys.argv[3])))
