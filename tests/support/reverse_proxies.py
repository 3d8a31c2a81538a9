"""Debian's nginx and Caddy in a network namespace, each with its own configuration syntax."""

import os
import subprocess
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from tests.support.netns import Namespace, stop

_NGINX_HEAD = """\
daemon off;
worker_processes 1;
error_log stderr;
pid nginx.pid;
events {}
http {
    access_log access.log;
"""
_CADDY_HEAD = """\
{
    admin off
    auto_https disable_redirects
    log {
        output discard
    }
}
"""


@contextmanager
def nginx(namespace: Namespace, folder: Path, servers: str) -> Iterator[None]:
    """`servers` are the blocks inside ``http``; their files are found in the folder."""
    (folder / "nginx.conf").write_text(f"{_NGINX_HEAD}{servers}\n}}\n")
    command = ["nginx", "-p", str(folder), "-c", str(folder / "nginx.conf")]
    process = namespace.popen(command, stderr=subprocess.PIPE)
    try:
        while not (folder / "nginx.pid").exists():
            assert process.poll() is None, process.communicate()[1]
            time.sleep(0.05)
        yield
    finally:
        assert stop(process, 60) == 0


@contextmanager
def caddy(namespace: Namespace, folder: Path, sites: str) -> Iterator[None]:
    """Yields when it listens on port 443."""
    (folder / "Caddyfile").write_text(_CADDY_HEAD + sites)
    process = namespace.popen(
        ["caddy", "run", "--config", str(folder / "Caddyfile"), "--adapter", "caddyfile"],
        env=os.environ | {"HOME": str(folder), "XDG_DATA_HOME": str(folder), "XDG_CONFIG_HOME": str(folder)},
        stdout=subprocess.DEVNULL,
        stderr=subprocess.PIPE,
    )
    try:
        while not namespace.run(["ss", "-Hlnt", "sport = :443"]).strip():
            assert process.poll() is None, process.communicate()[1]
            time.sleep(0.05)
        yield
    finally:
        stop(process, 60)
