"""Lets grpcio connect inside a network namespace: its own threads may have been started in another one."""

import contextlib
import socket
import tempfile
import threading
from collections.abc import Iterator


@contextlib.contextmanager
def target_in_namespace(host: str, port: int) -> Iterator[str]:
    """A target whose connections are opened in the caller's namespace."""
    with tempfile.TemporaryDirectory() as folder, socket.socket(socket.AF_UNIX) as listener:
        listener.bind(f"{folder}/socket")
        listener.listen()
        accepting = threading.Thread(target=_accept_connections, args=(listener, host, port))
        accepting.start()
        try:
            yield f"unix:{folder}/socket"
        finally:
            listener.shutdown(socket.SHUT_RDWR)
            accepting.join()


def _accept_connections(listener: socket.socket, host: str, port: int) -> None:
    with contextlib.ExitStack() as stack:
        while True:
            try:
                near = stack.enter_context(listener.accept()[0])
            except OSError:  # the listener is closed
                return
            try:
                far = stack.enter_context(socket.create_connection((host, port), timeout=10))
            except OSError:
                near.close()
                continue
            far.settimeout(None)
            for source, sink in ((near, far), (far, near)):
                pump = threading.Thread(target=_pump, args=(source, sink))
                pump.start()
                stack.callback(pump.join)
            for end in (near, far):
                stack.callback(_end, end)


def _pump(source: socket.socket, sink: socket.socket) -> None:
    with contextlib.suppress(OSError):
        while data := source.recv(1 << 16):
            sink.sendall(data)
    _end(sink)


def _end(sink: socket.socket) -> None:
    with contextlib.suppress(OSError):
        sink.shutdown(socket.SHUT_RDWR)
