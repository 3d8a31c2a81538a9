"""`serve` under systemd's own journald, in namespaces and with a /run of its own: its records are found by their fields."""

import json
import subprocess
import sys
import textwrap
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]
TRIAL = """
    set -eu
    mount -t tmpfs tmpfs /run
    mkdir -p /run/log/journal /run/systemd/journal "$1"
    # a quiet journald: neither the kernel's log nor the audit is this test's affair
    printf '[Journal]\\nStorage=volatile\\nReadKMsg=no\\nAudit=no\\nForwardToWall=no\\n' >"$1/journald.conf"
    mount --bind "$1/journald.conf" /etc/systemd/journald.conf 2>/dev/null || true
    journald=/lib/systemd/systemd-journald
    [ -x $journald ] || journald=/usr/lib/systemd/systemd-journald
    $journald & journald=$!
    trap 'kill $journald $server 2>/dev/null || true; wait' EXIT
    server=
    for _ in $(seq 100); do [ -S /run/systemd/journal/stdout ] && break; sleep 0.1; done
    ip link set lo up
    systemd-cat -t cat "$2" -c "$3" &
    server=$!
    found() { journalctl -D /run/log/journal --no-pager -o json SIDEROLINK_EVENT=serving | grep -q MESSAGE; }
    for _ in $(seq 300); do found && break; sleep 0.1; done
    kill $server; wait $server || true
    journalctl -D /run/log/journal --no-pager -o json SYSLOG_IDENTIFIER=siderolink
"""
# as systemd starts a service: systemd-cat of Debian 12 does not set the variable
SERVE = """
    import os, sys
    status = os.fstat(1)
    os.environ["JOURNAL_STREAM"] = f"{status.st_dev}:{status.st_ino}"
    os.environ["SIDEROLINK_JOIN_TOKEN"] = "s3cret-token"  # journald notes the arguments of who writes to it
    where = ["--api-listen", "127.0.0.1:0", "--tunnel-only", "--no-state"]
    os.execv(sys.executable, [sys.executable, "-m", "siderolink", "serve", *where])
"""


def test_records_are_in_the_journal_with_their_fields(tmp_path: Path) -> None:
    done = subprocess.run(
        ["unshare", "--mount", "--net", "sh", "-c", TRIAL, "trial", str(tmp_path), sys.executable, textwrap.dedent(SERVE)],
        capture_output=True,
        text=True,
        timeout=90,
        cwd=ROOT,
        check=False,
    )
    records = [json.loads(line) for line in done.stdout.splitlines()]
    assert done.returncode == 0, done.stderr
    events = {record.get("SIDEROLINK_EVENT"): record for record in records}
    assert events["serving"]["MESSAGE"].startswith("serving: API on 127.0.0.1:0, WireGuard on the tunnel alone")
    assert (events["serving"]["PRIORITY"], events["serving"]["SIDEROLINK_LOGGER"]) == ("6", "siderolink.cli")
    assert events["serving"]["_TRANSPORT"] == "journal"
    assert "s3cret-token" not in done.stdout
