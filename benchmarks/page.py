"""The page with many machines that come and go: what a visitor waits, and what it costs process, server and packets.

    sudo python benchmarks/page.py [--machines 10000] [--churn 50] [--turns 4] [--seconds 20] [--json FILE]

Server, page and browser are in one namespace, simulated machines in another. Figures with and without an open page are taken by
turns. The browser and the machines that come and go stand for other hosts: they have one half of the processors, and the
server, its page and the machine that is pinged have the other.
"""

import argparse
import json
import os
import re
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from statistics import median
from typing import Any

from playwright.sync_api import Browser, Page, expect

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from benchmarks.support.report import machine
from benchmarks.support.scale_net import ONE_SOURCE, SOURCES, URL, processor, scale_net
from tests.support.browser import browser_in, sign_in, visitor
from tests.support.netns import stop
from tests.support.topology import SERVER_V4, Net

COMMAND = (sys.executable, "-m", "siderolink")
BASE = "http://127.0.0.1:8096"
ROUNDS = 7
SEARCHES = {
    "list": "/machines",
    "list, page 50": "/machines?page=50",
    "search by name": "/machines?text={text}",
    "search in vain": "/machines?text=nobody",
    "sort by received": "/machines?sort=-received",
    "sort by last seen": "/machines?sort=-seen",
}
TIMED = """async (url) => {
  const began = performance.now();
  const text = await (await fetch(url)).text();
  new DOMParser().parseFromString(window.benchmarkPolicy.createHTML(text), "text/html");
  return performance.now() - began;
}"""
FRAMES = """(seconds) => new Promise((done) => {
  const gaps = [];
  let last = performance.now();
  const end = last + 1000 * seconds;
  const step = (now) => {
    gaps.push(now - last);
    last = now;
    if (now < end) requestAnimationFrame(step);
    else done(gaps);
  };
  requestAnimationFrame(step);
})"""
CALM_MS = 100.0
"""Above what any of the measured rounds shows, and far below the second that pings wait behind queued handshakes."""
STREAM = """async (seconds) => {
  const answer = await fetch("/live/machines");
  const reader = answer.body.getReader();
  const end = performance.now() + 1000 * seconds;
  let bytes = 0;
  while (performance.now() < end) bytes += (await reader.read()).value.length;
  await reader.cancel();
  return bytes / seconds;
}"""


@dataclass(slots=True)
class Turn:
    """The results of one round."""

    page_cpu: float
    server_cpu: float
    ping_p99: float
    """Milliseconds."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Served:
    """The server."""

    pid: int
    key: str
    """An API key."""
    address: str
    """The overlay address of the permanent machine."""


@dataclass(slots=True)
class Results:
    waits: dict[str, float] = field(default_factory=dict)
    """Milliseconds, the median."""
    frames: dict[str, float] = field(default_factory=dict)
    stream_bytes: float = 0.0
    with_page: list[Turn] = field(default_factory=list)
    without: list[Turn] = field(default_factory=list)


def page_process(server: int) -> int:
    """The server's child that serves the page."""
    for found in Path("/proc").glob("[0-9]*/cmdline"):
        try:
            parent = int(Path(found.parent, "stat").read_text().rpartition(")")[2].split()[1])
            if parent == server and b"\0web\0" in found.read_bytes():
                return int(found.parent.name)
        except (FileNotFoundError, ProcessLookupError):
            continue
    raise RuntimeError("the server has no page")


@contextmanager
def on_processors(half: slice) -> Iterator[None]:
    """Run processes started in the block on one half of the processors; all share a single processor."""
    every = sorted(os.sched_getaffinity(0))
    os.sched_setaffinity(0, every[half] or every)
    try:
        yield
    finally:
        os.sched_setaffinity(0, every)


def halves() -> tuple[slice, slice]:
    """The server's processors and those of other hosts."""
    middle = len(os.sched_getaffinity(0)) // 2
    return slice(None, middle), slice(middle, None)


@contextmanager
def fleet(net: Net, folder: Path, machines: int, churn: float) -> Iterator[Served]:
    """A server with its page, one permanent machine, and others that join and leave."""
    environment = os.environ | {"SIDEROLINK_RUNTIME_DIR": str(folder / "run")}
    listen = ["--api-listen", f"{SERVER_V4}:4000", "--wireguard-endpoint", f"{SERVER_V4}:51820", "--web-listen", "8096"]
    kept = ["--state", str(folder / "state"), "--join-token", "foo", "--device", "userspace"]
    limits = ["--limit", f"max-machines={10 * machines}"]
    said = folder / "said"
    with said.open("w") as output, ExitStack() as stack:
        command = [*COMMAND, "serve", *listen, *kept, *limits]
        ours, others = halves()
        with on_processors(ours):
            server = net.server.popen(command, stdout=output, stderr=subprocess.STDOUT, env=environment)
        stack.callback(stop, server)
        while not all(word in said.read_text() for word in (" page: ", " serving")):
            assert server.poll() is None, said.read_text()
            time.sleep(0.2)
        command = [*COMMAND, "apikey", "create", "bench", "--role", "viewer", "-o", "json"]
        key = str(json.loads(net.server.run(command, env=environment, timeout=60))["secret"])
        many = ["--machines", str(machines), "--churn", str(churn), "--sources", SOURCES, "--at-once", "64", "--timeout", "600"]
        address = ""
        steady_one = ["--machines", "1", "--sources", ONE_SOURCE]
        for some, half in ((steady_one, ours), (many, others)):  # the permanent one is pinged
            with on_processors(half):
                swarm = net.machine.popen([*COMMAND, "simulate", URL, "--json", *some], stdout=subprocess.PIPE)
            stack.callback(stop, swarm)
            assert swarm.stdout is not None
            for _ in ("join", "connect"):
                print(swarm.stdout.readline().strip(), file=sys.stderr)
            if not address:
                listed = net.server.run([*COMMAND, "machine", "list", "-o", "json"], env=environment, timeout=60)
                (steady,) = json.loads(listed)
                address = steady["overlay_address"]
        yield Served(pid=server.pid, key=key, address=address)


@contextmanager
def browser_elsewhere(net: Net, folder: Path) -> Iterator[Browser]:
    """A browser on other processors than the server's."""
    with ExitStack() as stack:
        with on_processors(halves()[1]):
            browser = stack.enter_context(browser_in(net.server, folder))
        yield browser


def ping_p99(net: Net, address: str, seconds: float) -> float:
    said = net.server.run(["ping", "-i", "0.02", "-w", str(int(seconds)), address], timeout=seconds + 30)
    times = sorted(float(one) for one in re.findall(r"time=([\d.]+)", said))
    return times[int(0.99 * (len(times) - 1))] if times else float("nan")


def await_calm(net: Net, address: str) -> None:
    """Wait until the handshakes that queued up while all machines connected are worked off: pings no longer wait seconds."""
    calm = 0
    for _ in range(60):
        calm = calm + 1 if ping_p99(net, address, 2) < CALM_MS else 0
        if calm == 3:
            return
    print("pings still wait after two minutes; measuring all the same", file=sys.stderr)


def one_turn(net: Net, server: Served, seconds: float) -> Turn:
    page = page_process(server.pid)
    before, began = (processor(page), processor(server.pid)), time.perf_counter()
    p99 = ping_p99(net, server.address, seconds)
    passed = time.perf_counter() - began
    return Turn((processor(page) - before[0]) / passed, (processor(server.pid) - before[1]) / passed, p99)


def measure_page(page: Page, seconds: float, results: Results) -> None:
    page.evaluate(
        "window.benchmarkPolicy = window.trustedTypes"
        " ? trustedTypes.createPolicy('siderolink', { createHTML: (html) => html }) : { createHTML: (html) => html }"
    )
    text = page.locator("tbody th a").first.inner_text()[:6]
    for name, url in SEARCHES.items():
        waits = [page.evaluate(TIMED, url.format(text=text)) for _ in range(ROUNDS)]
        results.waits[name] = round(median(waits), 1)
    gaps = sorted(page.evaluate(FRAMES, seconds))
    results.frames = {
        "median": round(median(gaps), 1),
        "p99": round(gaps[int(0.99 * (len(gaps) - 1))], 1),
        "longest": round(gaps[-1], 1),
    }
    results.stream_bytes = page.evaluate(STREAM, seconds)


def run(options: argparse.Namespace) -> Results:
    results = Results()
    with (
        tempfile.TemporaryDirectory() as name,
        scale_net() as net,
        fleet(net, Path(name), options.machines, options.churn) as server,
        browser_elsewhere(net, Path(name)) as browser,
    ):
        await_calm(net, server.address)
        for _ in range(options.turns):
            results.without.append(one_turn(net, server, options.seconds))
            with visitor(browser, BASE, bypass_csp=True) as page:
                sign_in(page, server.key)
                page.goto("/machines?sort=-seen")
                expect(page.locator("#live-state")).to_have_text("Live")
                page.wait_for_timeout(3000)
                results.with_page.append(one_turn(net, server, options.seconds))
                measure_page(page, options.seconds, results)
    return results


def show(results: Results) -> Iterator[str]:
    for name, wait in results.waits.items():
        yield f"{name:20} {wait:8.1f} ms"
    yield f"frame gaps           {results.frames}"
    yield f"stream               {results.stream_bytes / 1024:8.1f} KiB/s"
    parts: dict[str, Callable[[Turn], float]] = {
        "page, of a core": lambda turn: turn.page_cpu,
        "server, of a core": lambda turn: turn.server_cpu,
        "ping p99, ms": lambda turn: turn.ping_p99,
    }
    for name, part in parts.items():
        without, with_page = (median(map(part, turns)) for turns in (results.without, results.with_page))
        yield f"{name:20} {without:8.3f} without a page, {with_page:8.3f} with one"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--machines", type=int, default=10_000)
    parser.add_argument("--churn", type=float, default=50.0, help="machines replaced per second")
    parser.add_argument("--turns", type=int, default=4)
    parser.add_argument("--seconds", type=float, default=20.0)
    parser.add_argument("--json", type=Path)
    options = parser.parse_args()
    results = run(options)
    print("\n".join(show(results)))
    if options.json is not None:
        found: dict[str, Any] = {"machine": machine(), "machines": options.machines, "churn": options.churn}
        found |= {"waits_ms": results.waits, "frames_ms": results.frames, "stream_bytes_per_second": results.stream_bytes}
        for name in ("without", "with_page"):
            found[name] = [[turn.page_cpu, turn.server_cpu, turn.ping_p99] for turn in getattr(results, name)]
        options.json.write_text(json.dumps(found, indent=1) + "\n")


if __name__ == "__main__":
    main()
