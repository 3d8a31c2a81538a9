"""Debian's Prometheus scrapes a server and its machines, loads the alerts and answers every query of the dashboard."""

import json
import re
import shutil
import time
import urllib.error
import urllib.parse
import urllib.request
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import yaml

from tests.support.certificates import make_certificate
from tests.support.commands import COMMAND
from tests.support.netns import Namespace, stop
from tests.support.serving import API, TOKEN, Served, served
from tests.support.topology import SERVER_V4, routed

pytestmark = pytest.mark.timeout(400)

ROOT = Path(__file__).resolve().parents[2]
RULES = ROOT / "packaging" / "siderolink.rules.yaml"
DASHBOARD = ROOT / "packaging" / "grafana-siderolink.json"
PAGE = (ROOT / "docs" / "metrics.md").read_text()
PROMETHEUS = "http://127.0.0.1:9090"
SERVE, JOIN = "127.0.0.1:9180", "198.51.100.2:9181"
HOST_METRICS = re.compile(r"process_|python_")
UUIDS = tuple(f"00000000-0000-4000-8000-00000000000{number}" for number in range(3))


def need(command: str) -> str:
    found = shutil.which(command)
    assert found is not None, f"{command} is not installed; scripts/install-needs test gets it"
    return found


def fetch(url: str) -> tuple[int, str]:
    """An answer's status and body, in the calling thread's namespace."""
    try:
        with urllib.request.urlopen(url, timeout=10) as answer:
            return answer.status, answer.read().decode()
    except urllib.error.HTTPError as error:
        return error.code, error.read().decode()


@dataclass(frozen=True)
class Watched:
    """A server with machines, and the Prometheus beside it."""

    host: Namespace
    server: Served

    def page(self, path: str, target: str = SERVE) -> tuple[int, str]:
        return self.host.call(fetch, f"http://{target}{path}")

    def api(self, path: str, **parameters: str) -> Any:
        status, body = self.host.call(fetch, f"{PROMETHEUS}/api/v1/{path}?{urllib.parse.urlencode(parameters)}")
        answer = json.loads(body)
        assert (status, answer["status"]) == (200, "success"), answer
        return answer["data"]

    def query(self, expression: str) -> list[dict[str, Any]]:
        found: list[dict[str, Any]] = self.api("query", query=expression)["result"]
        return found

    def wait_for(self, expression: str) -> list[dict[str, Any]]:
        for _ in range(240):
            if found := self.query(expression):
                return found
            time.sleep(0.25)
        raise AssertionError(f"{expression} gives nothing")


@pytest.fixture(scope="module")
def watched(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Watched]:
    need("prometheus")
    folder = tmp_path_factory.mktemp("watched")
    root = make_certificate("root")
    (folder / "tls.pem").write_text(root.sign(SERVER_V4).pem)
    (folder / "root.pem").write_text(root.certificate_pem)
    options = ["--metrics-listen", "9180", "--metrics-machines", "2", "--event-sink-port", "8090", "--log-port", "8092"]
    processes = []
    with routed(len(UUIDS)) as net, served(net.server, folder, *options, "--tls-cert", str(folder / "tls.pem")) as server:
        for number, node_uuid in enumerate(UUIDS):
            url = f"https://{API}?jointoken={TOKEN}" + ("&grpc_tunnel=true" if number else "")
            join = [*COMMAND, "join", url, "--ca", str(folder / "root.pem"), "--uuid", node_uuid]
            join += ["--identity", str(folder / f"machine{number}"), "--interface", f"machine{number}"]
            join += ["--metrics-listen", JOIN] if not number else []
            environment = {"SIDEROLINK_RUNTIME_DIR": str(folder / f"run{number}"), "PATH": "/usr/bin:/bin:/usr/sbin:/sbin"}
            processes.append(net.machines[number].popen(join, env=environment))
        configuration = {
            "global": {"scrape_interval": "1s", "evaluation_interval": "1s"},
            "rule_files": [str(RULES)],
            "scrape_configs": [
                {"job_name": "siderolink", "static_configs": [{"targets": [SERVE, JOIN]}]},
            ],
        }
        (folder / "prometheus.yaml").write_text(yaml.safe_dump(configuration))
        command = ["prometheus", f"--config.file={folder / 'prometheus.yaml'}", f"--storage.tsdb.path={folder / 'data'}"]
        with (folder / "prometheus.log").open("w") as log:
            processes.append(net.server.popen([*command, "--web.listen-address=127.0.0.1:9090"], stderr=log, stdout=log))
        watched = Watched(net.server, server)
        try:
            _wait_until_it_answers(net.server)
            watched.wait_for('sum(siderolink_machines{state="up"}) == 3')
            watched.wait_for("sum(count_over_time(siderolink_serving[1m])) >= 4")
            yield watched
        finally:
            for process in processes:
                stop(process)


def _wait_until_it_answers(host: Namespace) -> None:
    for _ in range(240):
        try:
            if host.call(fetch, f"{PROMETHEUS}/-/ready")[0] == 200:
                return
        except OSError:
            pass
        time.sleep(0.25)
    raise AssertionError("Prometheus does not answer")


def dashboard_queries() -> list[str]:
    panels = json.loads(DASHBOARD.read_text())["panels"]
    return [target["expr"] for panel in panels for target in panel.get("targets", ())]


def test_server_and_machine_metrics_are_scraped(watched: Watched) -> None:
    for target in ("up", "siderolink_check_good"):
        assert {found["metric"]["instance"] for found in watched.wait_for(f"{target} == 1")} == {SERVE, JOIN}
    up = watched.wait_for('siderolink_machines{state="up", admission="accepted"} > 0')
    assert {found["metric"]["transport"]: found["value"][1] for found in up} == {"udp": "1", "tunnel": "2"}
    (streams,) = watched.wait_for("siderolink_tunnel_streams == 2")
    assert streams["metric"]["instance"] == SERVE
    (connected,) = watched.wait_for('siderolink_link_state{state="connected"} == 1')
    assert connected["metric"]["instance"] == JOIN


def test_machines_have_series_up_to_the_bound(watched: Watched) -> None:
    shown = {found["metric"]["node_uuid"] for found in watched.wait_for("siderolink_machine_up == 1")}
    assert len(shown) == 2
    assert shown < set(UUIDS)
    (omitted,) = watched.wait_for("siderolink_machine_series_omitted")
    assert omitted["value"][1] == "1"


def test_every_query_of_the_dashboard_gives_data(watched: Watched) -> None:
    queries = dashboard_queries()
    assert len(queries) > 30
    for query in queries:
        expression = query.replace("$__rate_interval", "1m").replace("$instance", ".*")
        assert "$" not in expression
        values = [float(found["value"][1]) for found in watched.wait_for(expression)]
        assert all(value == value for value in values), f"{expression} gives no number"


def test_the_alerts_are_loaded_and_none_is_in_error(watched: Watched) -> None:
    watched.wait_for("sum(count_over_time(siderolink_serving[1m])) >= 4")
    for _ in range(100):
        (group,) = watched.api("rules")["groups"]
        if all(rule["health"] == "ok" for rule in group["rules"]):
            break
        time.sleep(0.2)
    assert {rule["health"] for rule in group["rules"]} == {"ok"}
    firing = {rule["name"] for rule in group["rules"] if rule["state"] == "firing"}
    # the certificate is valid for an hour and the alert waits for an hour, by the host's clock
    assert firing == set()


def test_the_page_explains_every_metric(watched: Watched) -> None:
    names = set()
    for target in (SERVE, JOIN):
        _, text = watched.page("/metrics", target)
        names |= set(re.findall(r"^# TYPE (\S+) ", text, re.MULTILINE))
    explained = set(re.findall(r"^\| `(siderolink_\w+)`", PAGE, re.MULTILINE))
    ours = {re.sub(r"_gcount$|_gsum$", "", name) for name in names if not HOST_METRICS.match(name)}
    assert ours == explained


def test_promtool_accepts_the_names(watched: Watched) -> None:
    promtool = need("promtool")
    for target in (SERVE, JOIN):
        _, text = watched.page("/metrics", target)
        text = "".join(line for line in text.splitlines(keepends=True) if "_gcount" not in line and "_gsum" not in line)
        told = watched.host.run([promtool, "check", "metrics"], check=False, input=text)
        problems = [line for line in told.splitlines() if line.startswith("siderolink_")]
        assert problems == []


def test_health(watched: Watched) -> None:
    for path in ("/healthz", "/readyz"):
        status, body = watched.page(path)
        assert (status, json.loads(body)["status"]) == (200, "ok"), body
    assert set(json.loads(watched.page("/readyz")[1])["checks"]) == {"device", "listeners", "store", "clock", "certificate"}
    watched.host.set_link("siderolink", up=False)
    try:
        status, body = watched.page("/readyz")
        assert (status, json.loads(body)["checks"]["device"]["ok"]) == (503, False)
        assert watched.page("/healthz")[0] == 503
        watched.wait_for('siderolink_check_good{check="device"} == 0')
    finally:
        watched.host.set_link("siderolink", up=True)
    assert watched.page("/readyz")[0] == 200


# --- the alerts, by promtool alone

GROWING = "0+100x60"
TRIGGERS: dict[str, dict[str, str]] = {
    "SiderolinkDown": {'up{job="siderolink"}': "0x60"},
    "SiderolinkPartFailing": {'siderolink_check_good{check="store"}': "0x60"},
    "SiderolinkMachinesDown": {
        'siderolink_machines{state="down", admission="accepted"}': "2x60",
        'siderolink_machines{state="up", admission="accepted"}': "8x60",
    },
    "SiderolinkLinksLost": {
        "siderolink_links_down_total": GROWING,
        'siderolink_machines{state="up", admission="accepted"}': "100x60",
    },
    "SiderolinkNoHandshakes": {
        'siderolink_machines_left_total{reason="no handshake"}': GROWING,
        'siderolink_handshakes_total{kind="first"}': "5x60",
    },
    "SiderolinkJoinsFailing": {'siderolink_join_refusals_total{reason="store full"}': GROWING},
    "SiderolinkJoinsRefused": {'siderolink_join_refusals_total{reason="invalid join token"}': GROWING},
    "SiderolinkFull": {'siderolink_join_refusals_total{reason="too many machines"}': GROWING},
    "SiderolinkMachineContested": {
        "siderolink_claims_refused_total": GROWING,
        'siderolink_join_refusals_total{reason="link alive"}': "0x60",
    },
    "SiderolinkPacketsDropped": {'siderolink_drops_total{reason="write_failed"}': "0+6000x60"},
    "SiderolinkHandshakeFlood": {'siderolink_drops_total{reason="rate_limited"}': "0+60000x60"},
    "SiderolinkApiFlood": {'siderolink_api_refusals_total{reason="reset_flood"}': GROWING},
    "SiderolinkStoreSlow": {
        'siderolink_store_transaction_seconds_bucket{le="0.5"}': "0+1x60",
        'siderolink_store_transaction_seconds_bucket{le="1"}': "0+2x60",
        'siderolink_store_transaction_seconds_bucket{le="+Inf"}': "0+2x60",
    },
    "SiderolinkStoreFailing": {"siderolink_store_failures_total": GROWING},
    "SiderolinkEventLoopSlow": {
        'siderolink_event_loop_lag_seconds_bucket{le="0.1"}': "0+1x60",
        'siderolink_event_loop_lag_seconds_bucket{le="0.25"}': "0+2x60",
        'siderolink_event_loop_lag_seconds_bucket{le="+Inf"}': "0+2x60",
    },
    "SiderolinkCertificateExpires": {"siderolink_certificate_expiry_timestamp_seconds": "1000000x90"},
    "SiderolinkClockNotKept": {"siderolink_clock_synchronized": "0x90"},
    "SiderolinkReportsDropped": {'siderolink_report_drops_total{reason="line rate limited"}': "0+600x60"},
    "SiderolinkReportsNotKept": {'siderolink_reports_not_kept_total{reason="disk"}': GROWING},
    "SiderolinkHistoryLost": {'siderolink_history_entries_total{outcome="lost"}': GROWING},
    "SiderolinkTokenExpires": {
        'siderolink_token_expiry_timestamp_seconds{token="spring"}': "500000x90",
        'siderolink_token_admits{token="spring"}': "1x90",
    },
    "SiderolinkFewDescriptors": {
        'process_open_fds{job="siderolink"}': "90x60",
        'process_max_fds{job="siderolink"}': "100x60",
    },
    "SiderolinkLogLost": {"siderolink_log_records_lost_total": GROWING},
    "SiderolinkLinkNotConnected": {'siderolink_link_state{state="connected"}': "0x60"},
}
"""For each alert, series that have to fire it, a sample a minute."""


def rules() -> list[dict[str, Any]]:
    found: list[dict[str, Any]] = yaml.safe_load(RULES.read_text())["groups"][0]["rules"]
    return found


def test_every_alert_has_a_trigger_and_a_section() -> None:
    names = [rule["alert"] for rule in rules()]
    assert set(names) == set(TRIGGERS)
    assert re.findall(r"^### (\w+)$", PAGE, re.MULTILINE) == names
    assert [rule["annotations"]["runbook"] for rule in rules()] == [f"docs/metrics.md#{name.lower()}" for name in names]


def with_labels(series: str) -> str:
    name, _, labels = series.partition("{")
    return f'{name}{{instance="here", {labels}' if labels else f'{name}{{instance="here"}}'


def still(samples: str) -> str:
    """The same series when nothing happens: counters stand, and states are good."""
    return "0x90" if "+" in samples else "1x90"


def run_rules(folder: Path, tests: list[dict[str, Any]]) -> str:
    file = folder / "test.yaml"
    file.write_text(yaml.safe_dump({"rule_files": [str(RULES)], "evaluation_interval": "1m", "tests": tests}))
    with Namespace("promtool") as namespace:
        return namespace.run([need("promtool"), "test", "rules", str(file)], check=False, timeout=60)


def test_each_alert_fires_when_it_has_to(tmp_path: Path) -> None:
    tests = [
        {
            "name": name,
            "interval": "1m",
            "input_series": [{"series": with_labels(key), "values": values} for key, values in series.items()],
            "promql_expr_test": [
                {
                    "expr": f'count(ALERTS{{alertname="{name}", alertstate="firing"}})',
                    "eval_time": "80m" if values_are_long(series) else "40m",
                    "exp_samples": [{"labels": "{}", "value": 1}],
                }
            ],
        }
        for name, series in TRIGGERS.items()
    ]
    told = run_rules(tmp_path, tests)
    assert "SUCCESS" in told, told


def values_are_long(series: dict[str, str]) -> bool:
    return any(values.endswith("x90") for values in series.values())


def test_no_alert_fires_when_nothing_happens(tmp_path: Path) -> None:
    quiet = {
        key: still(values)
        for series in TRIGGERS.values()
        for key, values in series.items()
        if "fds" not in key and "machines{" not in key and "expiry" not in key
    }
    quiet["siderolink_certificate_expiry_timestamp_seconds"] = "9000000x90"
    quiet['siderolink_machines{state="up", admission="accepted"}'] = "100x90"
    quiet['siderolink_machines{state="down", admission="accepted"}'] = "1x90"
    quiet['process_open_fds{job="siderolink"}'] = "10x90"
    quiet['process_max_fds{job="siderolink"}'] = "100x90"
    quiet |= {key: "1x90" for key in ('up{job="siderolink"}', 'siderolink_link_state{state="connected"}')}
    quiet |= {key: "1x90" for key in ('siderolink_check_good{check="store"}', "siderolink_clock_synchronized")}
    test = {
        "name": "quiet",
        "interval": "1m",
        "input_series": [{"series": with_labels(key), "values": values} for key, values in quiet.items()],
        "promql_expr_test": [{"expr": "count(ALERTS)", "eval_time": f"{minute}m", "exp_samples": []} for minute in (5, 30, 80)],
    }
    told = run_rules(tmp_path, [test])
    assert "SUCCESS" in told, told
