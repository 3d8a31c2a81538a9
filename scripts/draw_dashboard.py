"""python -m scripts.draw_dashboard FILE.svg: panels of packaging/grafana-siderolink.json, drawn from a Prometheus's answers.

A server, machines and a Prometheus run for some minutes in network namespaces, and things go wrong on purpose. Then each panel
is drawn at its place from the answers to its queries. Grafana is not used. Needs root, prometheus, and `--group bench`.
"""

import argparse
import json
import math
import os
import subprocess
import time
import uuid
from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager
from datetime import UTC, datetime
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import matplotlib
import yaml
from matplotlib.axes import Axes
from matplotlib.dates import DateFormatter, date2num
from matplotlib.figure import Figure
from matplotlib.ticker import FuncFormatter, MaxNLocator

from tests.interop.test_prometheus import Watched
from tests.support.certificates import make_certificate
from tests.support.commands import COMMAND
from tests.support.netns import Namespace, stop
from tests.support.serving import API, TOKEN, Served, served
from tests.support.topology import SERVER_V4, Net, routed

Answers = list[tuple[dict[str, str], list[dict[str, Any]]]]
"""The targets of a panel, each with the series of its query."""

ROOT = Path(__file__).resolve().parents[1]
DASHBOARD = ROOT / "packaging" / "grafana-siderolink.json"
COLUMN, UNIT = 0.46, 0.27
"""Size of one column and one row of the dashboard's grid in inches."""
STEP = 3
RATE_INTERVAL = "24s"
COLOURS = ("#0f8a7e", "#d98200", "#3b6fb6", "#b5433f", "#7a5aa6", "#6b8e23", "#c2588f", "#5a6772", "#2aa1c0", "#8a6d3b")


# --- what is watched


@contextmanager
def fleet(seconds: float) -> Iterator[Watched]:
    """A server whose machines join, leave, fail and lose their links for `seconds`, and the Prometheus that scrapes it."""
    with TemporaryDirectory() as name, ExitStack() as stack:
        folder = Path(name)
        net = stack.enter_context(routed(3))
        options = ["--metrics-listen", "9180", "--event-sink-port", "8090", "--log-port", "8092", "--device", "userspace"]
        authority = make_certificate("authority")
        (folder / "tls.pem").write_text(authority.sign(SERVER_V4).pem)
        (folder / "authority.pem").write_text(authority.certificate_pem)
        server = stack.enter_context(served(net.server, folder, *options, "--tls-cert", str(folder / "tls.pem")))
        configuration = {
            "global": {"scrape_interval": f"{STEP}s"},
            "scrape_configs": [{"job_name": "siderolink", "static_configs": [{"targets": ["127.0.0.1:9180"]}]}],
        }
        (folder / "prometheus.yaml").write_text(yaml.safe_dump(configuration))
        command = ["prometheus", f"--config.file={folder / 'prometheus.yaml'}", f"--storage.tsdb.path={folder / 'data'}"]
        log = stack.enter_context((folder / "prometheus.log").open("w"))
        command.append("--web.listen-address=127.0.0.1:9090")
        stack.callback(stop, net.server.popen(command, stdout=log, stderr=log))
        watched = Watched(net.server, server)
        time.sleep(seconds / 8)
        live(net, server, folder, stack, seconds * 7 / 8)
        yield watched


def live(net: Net, server: Served, folder: Path, stack: ExitStack, seconds: float) -> None:
    """A day of a fleet, in minutes: many join, traffic flows, a token is revoked, a site is cut off and reconnects."""

    def start(host: Namespace, *arguments: str) -> "subprocess.Popen[str]":
        environment = os.environ | {"SIDEROLINK_RUNTIME_DIR": str(folder / uuid.uuid4().hex)}
        environment["SSL_CERT_FILE"] = str(folder / "authority.pem")
        process = host.popen([*COMMAND, *arguments], env=environment, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
        stack.callback(stop, process)
        return process

    server.command(["token", "create", "rack-1", "--expires", "7d"])
    (folder / "rack-1").write_text(server.command(["token", "show", "rack-1", "--secret"]).splitlines()[-1])
    url = f"https://{API}?jointoken={TOKEN}"
    rack = ["simulate", f"https://{API}?jointoken={(folder / 'rack-1').read_text().strip()}", "--at-once", "2"]
    start(net.machines[0], *rack, "--machines", "30", "--tunnel-share", "0.4", "--churn", "0.3")
    machine = ["join", url, "--uuid", str(uuid.uuid4()), "--device", "userspace", "--identity", str(folder / "identity")]
    start(net.machines[1], *machine)
    site = start(net.machines[2], "simulate", url, "--machines", "12", "--at-once", "1")
    time.sleep(seconds / 4)
    for line in server.command(["machine", "list", "--output", "json"]).splitlines():
        if '"overlay_address"' in line:
            ping = ["ping", "-i", "0.2", "-s", "900", line.split('"')[3]]
            stack.callback(stop, net.server.popen(ping, stdout=subprocess.DEVNULL))
    time.sleep(seconds / 8)
    stop(site)
    time.sleep(seconds / 8)
    server.command(["token", "revoke", "rack-1", "--yes"])
    start(net.machines[2], "simulate", url.replace(TOKEN, "guessed"), "--machines", "5", "--at-once", "1")
    time.sleep(seconds / 2)


# --- what is drawn


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("target", type=Path, metavar="FILE.svg")
    parser.add_argument("--seconds", type=float, default=640.0, help="how long the fleet lives (default: %(default)s)")
    parser.add_argument("--rows", nargs="+", default=["Fleet", "Joins", "Traffic"], help="default: %(default)s")
    options = parser.parse_args()
    panels = chosen(json.loads(DASHBOARD.read_text())["panels"], options.rows)
    with fleet(options.seconds) as watched:
        end = time.time()
        answers = [
            [(target, ask(watched, target["expr"], end - options.seconds, end)) for target in panel.get("targets", ())]
            for panel in panels
        ]
    draw(panels, answers).savefig(options.target, metadata={"Date": None})


def chosen(panels: Sequence[dict[str, Any]], rows: Sequence[str]) -> list[dict[str, Any]]:
    """The panels of these rows, moved up to close gaps."""
    found: list[dict[str, Any]] = []
    kept, gap, row_at = False, 0, 0
    for panel in panels:
        if panel["type"] == "row":
            gap += 0 if kept or not found and not gap else panel["gridPos"]["y"] - row_at
            kept, row_at = panel["title"] in rows, panel["gridPos"]["y"]
        if kept:
            found.append(panel | {"gridPos": panel["gridPos"] | {"y": panel["gridPos"]["y"] - gap}})
    return found


def ask(watched: Watched, expression: str, start: float, end: float) -> list[dict[str, Any]]:
    query = expression.replace("$__rate_interval", RATE_INTERVAL).replace("$instance", ".*")
    asked = watched.api("query_range", query=query, start=f"{start}", end=f"{end}", step=f"{STEP}")
    found: list[dict[str, Any]] = asked["result"]
    return found


def draw(panels: Sequence[dict[str, Any]], answers: Sequence[Answers]) -> Figure:
    matplotlib.rcParams.update(
        {"font.size": 8, "svg.fonttype": "none", "font.family": "sans-serif", "svg.hashsalt": "siderolink"}
    )
    height = max(panel["gridPos"]["y"] + panel["gridPos"]["h"] for panel in panels)
    figure = Figure(figsize=(24 * COLUMN, height * UNIT), facecolor="#f4f5f6")
    for panel, answer in zip(panels, answers, strict=True):
        place = panel["gridPos"]
        x, y, w, h = place["x"] / 24, 1 - (place["y"] + place["h"]) / height, place["w"] / 24, place["h"] / height
        if panel["type"] == "row":
            figure.text(x + 0.008, y + h / 2, panel["title"], weight="bold", size=9.5, va="center")
            continue
        outer = (x + 0.004, y + 0.1 / height, w - 0.008, h - 0.2 / height)
        card = figure.add_axes(outer, facecolor="white", xticks=[], yticks=[])
        card.spines[:].set_color("#dde1e5")
        card.set_title(panel["title"], loc="left", size=8, weight="bold", x=0.02, y=1, pad=-12)
        unit = panel["fieldConfig"]["defaults"]["unit"]
        if panel["type"] == "timeseries":
            inner = (x + 0.052, y + 1.9 / height, w - 0.068, h - 3.5 / height)
            lines(figure.add_axes(inner, facecolor="white"), answer, unit)
        else:
            text = words(answer) if panel["type"] == "table" else number(answer, unit)
            card.text(0.5, 0.42, text, ha="center", va="center", size=7 if panel["type"] == "table" else 20, color=COLOURS[0])
    return figure


def lines(axes: Axes, answer: Answers, unit: str) -> None:
    series = [(legend(target, found["metric"]), found["values"]) for target, all_found in answer for found in all_found]
    highest = {name: max(value(text) for _, text in values) for name, values in series}
    # most reasons never occur; a legend has room for six
    shown = [one for one in sorted(series, key=lambda one: -highest[one[0]]) if highest[one[0]] > 0][:6] or series[:3]
    for colour, (name, values) in zip(COLOURS, shown, strict=False):
        times = [date2num(datetime.fromtimestamp(at, UTC)) for at, _ in values]
        axes.plot(times, [value(text) for _, text in values], color=colour, linewidth=1.1, label=name)
    axes.spines[["top", "right"]].set_visible(False)
    axes.spines[["left", "bottom"]].set_color("#b0b7bf")
    axes.grid(axis="y", color="#eceff1", linewidth=0.7)
    axes.set_ylim(bottom=0, top=None if any(value(text) > 0 for _, values in series for _, text in values) else 1)
    axes.tick_params(labelsize=6.5, color="#b0b7bf")
    if series:
        first, last = series[0][1][0][0], series[0][1][-1][0]
        axes.set_xticks([date2num(datetime.fromtimestamp(first + (last - first) * part / 4, UTC)) for part in range(5)])
    axes.xaxis.set_major_formatter(DateFormatter("%H:%M"))
    axes.yaxis.set_major_locator(MaxNLocator(4))
    axes.yaxis.set_major_formatter(FuncFormatter(lambda amount, _: in_unit(amount, unit)))
    if shown:
        below = {"loc": "upper center", "bbox_to_anchor": (0.46, -0.12), "ncols": 3, "frameon": False}
        axes.legend(**below, fontsize=5.5, handlelength=1.2, labelspacing=0.2, columnspacing=1)


def value(text: str) -> float:
    return 0.0 if math.isnan(found := float(text)) else found


def legend(target: dict[str, str], labels: dict[str, str]) -> str:
    told = target.get("legendFormat", "")
    for name, label in labels.items():
        told = told.replace(f"{{{{{name}}}}}", label)
    return told


def number(answer: Answers, unit: str) -> str:
    found = [result["values"][-1][1] for _, results in answer for result in results]
    return in_unit(value(found[0]), unit) if found else "No data"


def words(answer: Answers) -> str:
    metrics = [result["metric"] for _, results in answer for result in results]
    told = [(name, text.partition(" (")[0]) for metric in metrics for name, text in metric.items()]
    return "\n".join(f"{name}: {text}" for name, text in told if not name.startswith(("__", "job", "instance")))


def in_unit(amount: float, unit: str) -> str:
    """As Grafana's units have it: ``1.5 kB/s``, ``3 ops/s``, ``20 ms``."""
    if unit == "s" and 0 < abs(amount) < 1:
        return f"{amount * 1000:.3g} ms"
    if unit == "s" and amount >= 120:
        length, name = next(one for one in ((86_400, "days"), (3_600, "h"), (60, "min")) if amount >= one[0])
        return f"{amount / length:.3g} {name}"
    if unit == "percentunit":
        return f"{amount * 100:.3g} %"
    suffix = {"Bps": "B/s", "bytes": "B", "pps": "p/s", "ops": "/s", "s": "s"}.get(unit, "")
    for size, prefix in ((1e9, "G"), (1e6, "M"), (1e3, "k")):
        if abs(amount) >= size:
            return f"{amount / size:.3g} {prefix}{suffix}"
    return f"{amount:.3g} {suffix}".strip()


if __name__ == "__main__":
    main()
