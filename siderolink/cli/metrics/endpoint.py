"""The pages of `--metrics-listen`: counters, process information and health.

Counters are read on the event loop, some hundred machines at a time; metric families are created and rendered some fifty
samples at a time. A thread would hold the interpreter lock for 5 ms at a time. Scrapes run one at a time, and those soon after
the last one share its answer, so that all scrapes together use at most a quarter of one processor.
"""

import json
import platform
import time
from collections.abc import AsyncIterator, Awaitable, Callable, Iterable, Iterator, Sequence
from contextlib import asynccontextmanager
from http import HTTPStatus
from importlib.metadata import version
from itertools import chain
from typing import Final, Protocol

import anyio
from anyio.lowlevel import checkpoint

from siderolink.cli.clock import ClockState, read_clock
from siderolink.cli.logs import log_event, lost_records
from siderolink.cli.metrics.http import PageAnswer, serve_pages
from siderolink.cli.options import MetricsOptions
from siderolink.common.errors import ConfigurationError, HostError
from siderolink.common.grpc import ServerCertificate
from siderolink.common.grpc.turns import Metered
from siderolink.common.histogram import Histogram
from siderolink.common.hostport import HostPort
from siderolink.common.tasks import background_tasks, in_parts, in_thread, keep_running
from siderolink.server import HealthCheck

try:
    from prometheus_client import CONTENT_TYPE_LATEST, CollectorRegistry, GCCollector, ProcessCollector, generate_latest
    from prometheus_client.core import Metric
    from prometheus_client.registry import Collector
except ModuleNotFoundError:
    raise ConfigurationError("metrics need prometheus-client: pip install 'siderolink[cli]'") from None

from siderolink.cli.metrics.families import counter, gauge, gauges, histogram

FRESH_SECONDS: Final = 1.0
"""A scrape within this time after another one gets the same answer."""
REST: Final = 3
"""The same within this multiple of the processor time of the last one."""
SAMPLES_AT_ONCE: Final = 50
"""Samples rendered before other tasks run."""
LAG_INTERVAL: Final = 0.25
LAG_BOUNDS: Final = (0.001, 0.0025, 0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1.0, 5.0)

Families = Callable[[], Iterable[Metric]]
"""Creates metric families from counters read before, each on demand. Consecutive metrics of one name are parts of one
family."""


class MetricsSource(Protocol):
    """The source of a process's metrics."""

    async def read(self) -> Families:
        """Read the counters now, on the event loop, yielding to other tasks in between."""

    async def health(self) -> Sequence[HealthCheck]:
        """The health of each part."""

    @property
    def certificate(self) -> ServerCertificate | None: ...

    @property
    def is_leaving(self) -> bool:
        """Whether it works, but new machines should use another server."""


class Pages:
    """The pages of one process."""

    def __init__(self, source: MetricsSource, clock: Callable[[], float] = time.monotonic) -> None:
        self._source = source
        self._clock = clock
        self._lag = Histogram(LAG_BOUNDS)
        """The delay with which the event loop runs due callbacks, in seconds."""
        self._lock = anyio.Lock()
        self._rendered = b""
        self._rendered_at = float("-inf")
        self._fresh_for = FRESH_SECONDS
        self._spent = 0.0
        """Processor time of the last scrape, in seconds."""
        self._versions = version("siderolink"), platform.python_version()  # read from files
        self._process = CollectorRegistry()
        ProcessCollector(registry=self._process)
        GCCollector(registry=self._process)

    async def run(self) -> None:
        """Measure the event loop, until cancelled."""
        while True:
            due_at = time.monotonic() + LAG_INTERVAL
            await anyio.sleep(LAG_INTERVAL)
            self._lag.add(max(0.0, time.monotonic() - due_at))

    async def metrics(self) -> PageAnswer:
        async with self._lock:
            if self._clock() - self._rendered_at > self._fresh_for:
                self._spent = 0.0
                await Metered(self._render(), self._spend)
                self._fresh_for = max(FRESH_SECONDS, REST * self._spent)
                self._rendered_at = self._clock()
            return PageAnswer(self._rendered, CONTENT_TYPE_LATEST)

    def _spend(self, seconds: float) -> None:
        self._spent += seconds

    async def _render(self) -> None:
        began_at = time.perf_counter()
        checks = await self._checks()
        families = await self._source.read()
        process = await self._process_families()
        own = self._own_families(checks, read_clock(), began_at)
        self._rendered = await render(chain(families(), own, process))

    async def _process_families(self) -> list[Metric]:
        """In a thread, because each descriptor is a file in /proc; without one the metrics are needed even more."""
        try:
            return await in_thread(list, self._process.collect())
        except HostError:
            return list(self._process.collect())

    async def live(self) -> PageAnswer:
        """Liveness: only a restart helps if this fails."""
        return _health_page([check for check in await self._source.health() if check.name == "device"])

    async def ready(self) -> PageAnswer:
        """Readiness: whether machines can join, can be reached, and should use this server. A drain is not a fault, so no
        metric shows it."""
        checks = await self._checks()
        if self._source.is_leaving:
            checks.append(HealthCheck(name="drain", is_good=False, text="this server is draining: machines are moving"))
        return _health_page(checks)

    async def _checks(self) -> list[HealthCheck]:
        checks = list(await self._source.health())
        clock = read_clock()
        text = "it shows a date long past" if not clock.is_plausible else "it is synchronised by a time service"
        if clock.is_plausible and not clock.is_synchronized:
            text = "plausible, but not synchronised"
        checks.append(HealthCheck(name="clock", is_good=clock.is_plausible, text=text))
        if (certificate := self._source.certificate) is not None:
            left = certificate.expires_at - time.time()
            text = f"it expires in {left / 86400:.1f} days" if left > 0 else "it has expired"
            checks.append(HealthCheck(name="certificate", is_good=left > 0, text=text))
        return checks

    def _own_families(self, checks: Sequence[HealthCheck], clock: ClockState, began_at: float) -> Iterator[Metric]:
        yield gauges("build_info", "The running versions.", ("version", "python"), [(self._versions, 1)])
        yield gauges("check_good", "Whether a part works, as in /readyz.", ["check"], [([c.name], c.is_good) for c in checks])
        text = "Delay with which the event loop runs due callbacks."
        yield histogram("event_loop_lag_seconds", text, self._lag)
        yield gauge("clock_synchronized", "Whether a time service synchronises this host's clock.", clock.is_synchronized)
        yield gauge("clock_offset_seconds", "Correction of the clock that the kernel has yet to apply.", clock.offset)
        yield gauge("clock_max_error_seconds", "Upper bound on the clock's error.", clock.max_error)
        if (certificate := self._source.certificate) is not None:
            text = "Unix time at which the API's certificate, or one of its chain, expires."
            yield gauge("certificate_expiry_timestamp_seconds", text, certificate.expires_at)
        lost = sum(lost_records().values())
        yield counter("log_records_lost", "Log records that standard output did not accept.", lost)
        text = "Time to read this process's counters and to render the metrics."
        yield gauge("scrape_seconds", text, time.perf_counter() - began_at)


class _Collected(Collector):
    """One family, or a part of one."""

    def __init__(self, family: Metric) -> None:
        self._family = family

    def collect(self) -> Iterator[Metric]:
        yield self._family


async def render(families: Iterable[Metric]) -> bytes:
    """The text of the families, rendered `SAMPLES_AT_ONCE` at a time, yielding to other tasks in between."""
    texts: list[bytes] = []
    name, count = "", 0
    for family in families:
        for part in _parts(family):
            count += len(part.samples)
            text = generate_latest(_Collected(part))
            texts.append(text.split(b"\n", 2)[2] if part.name == name else text)  # the first part has HELP and TYPE
            name = part.name
            if count >= SAMPLES_AT_ONCE:
                count = 0
                await checkpoint()
    return b"".join(texts)


def _parts(family: Metric) -> Iterator[Metric]:
    if len(family.samples) <= SAMPLES_AT_ONCE:
        yield family
        return
    for samples in in_parts(family.samples, SAMPLES_AT_ONCE):
        part = Metric(family.name, family.documentation, family.type)
        part.samples = samples
        yield part


def _health_page(checks: Sequence[HealthCheck]) -> PageAnswer:
    is_good = all(check.is_good for check in checks)
    found = {
        "status": "ok" if is_good else "failing",
        "checks": {check.name: {"ok": check.is_good, "text": check.text} for check in checks},
    }
    status = HTTPStatus.OK if is_good else HTTPStatus.SERVICE_UNAVAILABLE
    return PageAnswer(json.dumps(found, indent=2).encode() + b"\n", "application/json", status)


@asynccontextmanager
async def serve_metrics(options: MetricsOptions, source: MetricsSource) -> AsyncIterator[None]:
    """Serve the pages until the context ends. Raises AddressInUseError or ConfigurationError."""
    pages = Pages(source)
    paths: dict[str, Callable[[], Awaitable[PageAnswer]]] = {
        "/metrics": pages.metrics,
        "/healthz": pages.live,
        "/readyz": pages.ready,
    }
    async with serve_pages(options.listen, paths) as port, background_tasks() as tasks:
        tasks.start_soon(keep_running, "measuring the event loop", pages.run)
        log_event("metrics", f"http://{HostPort(options.listen.host, port)}/metrics, with /healthz and /readyz")
        yield
