"""The compose file of three servers without Docker: each service's command is run as the file says, in namespaces.

    sudo .venvs/3.11/bin/python scripts/compose_trial.py

It reads everything from the compose file and the Dockerfile: commands, variables, addresses, published ports, secrets,
configurations, capabilities, health checks and the stop timeout. It replaces the images by Debian's Postgres and HAProxy, set
up as the images' pages document. Machines join from outside, over UDP and through the tunnel. Then one server is drained by a
command and one is killed, and neither gets new connections.
"""

import json
import os
import re
import shlex
import shutil
import signal
import subprocess
import sys
import tempfile
import time
import uuid
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from contextlib import ExitStack
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import yaml

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))

from siderolink import Link, connect  # noqa: E402
from siderolink.cli.demo.programs import postgres_program  # noqa: E402
from tests.support.certificates import make_certificate  # noqa: E402
from tests.support.netns import Namespace, link  # noqa: E402

IMAGE = ROOT / "packaging" / "image"
NETWORKS = ("192.0.2", "198.51.100")
"""The networks of the two machines. The host has the first address in each; clients call its address in the first."""
PUBLIC = f"{NETWORKS[0]}.1"
SOURCES = "198.18.0.0/24"
"""The source addresses of new connections."""
GATEWAY_BITS = 24


def say(text: str) -> None:
    print(f"== {text}", flush=True)


def within(seconds: float, what: str, is_so: Callable[[], bool]) -> float:
    """Wait until the condition is true; returns the seconds it took."""
    began = time.monotonic()
    while not is_so():
        if time.monotonic() - began > seconds:
            sys.exit(f"FAILED: not within {seconds:g} s: {what}")
        time.sleep(0.1)
    return time.monotonic() - began


def compose_file(variables: Mapping[str, str]) -> dict[str, Any]:
    """The file as compose reads it: ${NAME} and ${NAME:?why} from the environment, $$ for a dollar."""

    def value(found: re.Match[str]) -> str:
        return "$" if found[0] == "$$" else variables[found[1]]

    text = re.sub(r"\$\$|\$\{(\w+)(?::\?[^}]*)?\}", value, (IMAGE / "compose-three-servers.yaml").read_text())
    read: dict[str, Any] = yaml.safe_load(text)
    return read


def dockerfile() -> tuple[dict[str, str], list[str]]:
    """The variables and the health check of the image that the servers use."""
    text = (IMAGE / "Dockerfile").read_text().replace("\\\n", " ")
    final = text[text.rindex("\nFROM ") :]
    assert 'ENTRYPOINT ["siderolink"]' in final
    given = shlex.split(re.findall(r"^ENV (.*)$", final, re.MULTILINE)[0])
    check = re.search(r"^HEALTHCHECK .*?CMD (\[.*\])$", final, re.MULTILINE)
    assert check is not None
    return dict(one.split("=", 1) for one in given if one.startswith("SIDEROLINK_")), json.loads(check[1])


def seconds(text: str) -> float:
    return float(text.removesuffix("s"))


@dataclass
class Container:
    """One service: a network namespace, and a mount namespace with its files at the compose file's paths."""

    name: str
    service: dict[str, Any]
    host: Namespace
    address: str
    mounts: str
    """A shell script that mounts its files."""
    environment: dict[str, str] = field(default_factory=dict)
    process: "subprocess.Popen[str] | None" = None

    def start(self, command: Sequence[str], log: Path) -> None:
        limits = f"ulimit -n {self.service['ulimits']['nofile']}; " if "ulimits" in self.service else ""
        script = f'set -e; {self.mounts}; {limits}exec {self._rights()} "$@"'
        with log.open("a") as output:
            self.process = self.host.popen(
                ["sh", "-c", script, "sh", *command],
                env=os.environ | self.environment,
                stdout=output,
                stderr=subprocess.STDOUT,
                cwd="/",
            )

    def _rights(self) -> str:
        """Docker's capabilities: root's, or only those of `cap_add` if all are dropped."""
        if self.service.get("cap_drop") != ["ALL"]:
            return ""
        kept = ",".join(f"+{name.lower()}" for name in self.service["cap_add"])
        assert "no-new-privileges:true" in self.service["security_opt"]
        return f"setpriv --no-new-privs --bounding-set=-all,{kept} --inh-caps=-all"

    def exec(self, command: Sequence[str], *, check: bool = True) -> "subprocess.CompletedProcess[str]":
        """As `docker exec`."""
        assert self.process is not None
        done = subprocess.run(
            ["nsenter", "--net", "--mount", "--target", str(self.process.pid), *command],
            env=os.environ | self.environment,
            capture_output=True,
            text=True,
            check=False,
            timeout=120,
        )
        if check and done.returncode:
            sys.exit(f"FAILED: {self.name}: {shlex.join(command)}: {done.stdout}{done.stderr}")
        return done

    def is_healthy(self, command: Sequence[str]) -> bool:
        assert self.process is not None
        if self.process.poll() is not None:
            sys.exit(f"FAILED: {self.name} ended with {self.process.returncode}")
        return self.exec(command, check=False).returncode == 0

    def stop(self) -> float:
        """Send SIGTERM and return the seconds until it ended: within `stop_grace_period`, with exit status 0."""
        assert self.process is not None
        began = time.monotonic()
        self.process.terminate()
        grace = seconds(self.service.get("stop_grace_period", "10s"))
        try:
            status = self.process.wait(grace)
        except subprocess.TimeoutExpired:
            sys.exit(f"FAILED: {self.name} does not stop within {grace:g} s")
        if status:
            sys.exit(f"FAILED: {self.name} ended with {status}")
        return time.monotonic() - began


class Trial:
    """All services on one host, and a namespace for machines."""

    def __init__(self, stack: ExitStack) -> None:
        self.stack = stack
        self.folder = Path(stack.enter_context(tempfile.TemporaryDirectory(prefix="siderolink-compose-")))
        self.folder.chmod(0o755)
        self.compose = compose_file({"PUBLIC_HOST": PUBLIC})
        self.environment, self.health = dockerfile()
        subnet: str = self.compose["networks"]["default"]["ipam"]["config"][0]["subnet"]
        self.network = subnet.rpartition(".")[0]
        self.host, *self.machines = (stack.enter_context(Namespace(name)) for name in ("host", "machine0", "machine1"))
        self.host.forward()
        self.host.run(["ip", "link", "add", "compose", "type", "bridge"])
        self.host.add_address("compose", f"{self.network}.1/{GATEWAY_BITS}")
        self.host.set_link("compose", up=True)
        for number, (machine, network) in enumerate(zip(self.machines, NETWORKS, strict=True)):
            ends = [f"{network}.1/24"], [f"{network}.2/24"]
            link(self.host, machine, names=(f"public{number}", "eth0"), addresses=ends)
            machine.add_route("default", f"{network}.1")
        self.host.run(["ip", "route", "add", SOURCES, "via", f"{NETWORKS[0]}.2"])
        self.machines[0].run(["ip", "route", "add", "local", SOURCES, "dev", "lo"])
        self._make_secrets()
        services: dict[str, dict[str, Any]] = self.compose["services"]
        fixed = {name: one["networks"]["default"]["ipv4_address"] for name, one in services.items() if "networks" in one}
        free = (f"{self.network}.{number}" for number in range(2, 10))
        self.addresses = {name: fixed.get(name) or next(free) for name in services}
        self.containers = {name: self._container(name, service) for name, service in services.items()}
        self._publish()
        self.servers = [one for one in self.containers.values() if one.service["image"] == "siderolink"]
        self.balancer, self.postgres = self.containers["balancer"], self.containers["postgres"]

    # --- the work of compose

    def _make_secrets(self) -> None:
        root = make_certificate("trial root")
        certificate = root.sign(PUBLIC)
        self.ca_file = self.folder / "ca.pem"
        self.ca_file.write_text(root.certificate_pem)
        key = subprocess.run(["openssl", "rand", "-base64", "32"], capture_output=True, text=True, check=True).stdout
        texts = {
            "join-token": "trial-token\n",
            "state-key": key,
            "store-password": "trial password\n",
            "tls.crt": certificate.certificate_pem,
            "tls.key": certificate.pem.partition("-----BEGIN CERTIFICATE")[0],
        }
        for secret in self.compose["secrets"].values():
            path = self.folder / secret["file"]
            path.write_text(texts[path.name])
            path.chmod(0o600)

    def _container(self, name: str, service: dict[str, Any]) -> Container:
        inside = self.stack.enter_context(Namespace(name))
        number = len(self.host.interfaces())
        link(inside, self.host, names=("eth0", f"port{number}"), addresses=([f"{self.addresses[name]}/{GATEWAY_BITS}"], []))
        self.host.run(["ip", "link", "set", f"port{number}", "master", "compose"])
        inside.add_route("default", f"{self.network}.1")
        for key, value in service.get("sysctls", {}).items():
            inside.sysctl(key, value)
        etc = Path("/etc/netns") / inside.name  # `ip netns exec` puts these over /etc
        etc.mkdir(parents=True)
        self.stack.callback(shutil.rmtree, etc)
        (etc / "hosts").write_text("127.0.0.1 localhost\n" + "".join(f"{ip} {one}\n" for one, ip in self.addresses.items()))
        environment = self.environment if service["image"] == "siderolink" else {}
        return Container(name, service, inside, self.addresses[name], self._mounts(name, service), environment)

    def _mounts(self, name: str, service: dict[str, Any]) -> str:
        tmpfs = ["/run", *(one for one in service.get("tmpfs", []) if one != "/run")]
        script = [f"mkdir -p {where}; mount -t tmpfs tmpfs {where}" for where in tmpfs]
        script.append("mkdir -p /run/secrets")
        for secret in service.get("secrets", []):
            source, target = (secret, secret) if isinstance(secret, str) else (secret["source"], secret["target"])
            file = self.folder / self.compose["secrets"][source]["file"]
            script.append(f"touch /run/secrets/{target}; mount --bind {file} /run/secrets/{target}")
        for config in service.get("configs", []):
            file, target = self.folder / f"{name}-{config['source']}", Path(config["target"])
            file.write_text(self.compose["configs"][config["source"]]["content"])
            # the host's folder must not be written to
            script.append(f"mount -t tmpfs tmpfs {target.parents[1]}; mkdir -p {target.parent}; cp {file} {target}")
        if service.get("read_only"):
            script.append("mount -o remount,bind,ro /")
        return "; ".join(script)

    def _publish(self) -> None:
        """Like Docker: rewrite the destination, keep the source."""
        rules = []
        for one in self.containers.values():
            for port in one.service.get("ports", []):
                outside, inside, protocol = re.fullmatch(r"(\d+):(\d+)/(udp|tcp)", port).groups()  # type: ignore[union-attr]
                rules.append(f"ip daddr {PUBLIC} {protocol} dport {outside} dnat ip to {one.address}:{inside}")
        inside = f"{self.network}.0/{GATEWAY_BITS}"
        self.host.nft(f"""
            table ip published {{
                chain prerouting {{
                    type nat hook prerouting priority dstnat;
                    {"; ".join(rules)};
                }}
                chain postrouting {{
                    type nat hook postrouting priority srcnat;
                    ip saddr {inside} oifname "public*" masquerade;
                }}
            }}
        """)

    # --- starting, in the order of depends_on

    def log(self, name: str) -> Path:
        return self.folder / f"{name}.log"

    def start_postgres(self) -> None:
        """Like the image: created from POSTGRES_*, password authentication from everywhere, listening on every address."""
        given = self.postgres.service["environment"]
        data = self.folder / "database"
        data.mkdir()
        user = ["setpriv", "--reuid=nobody", "--regid=nogroup", "--clear-groups"]
        shutil.chown(data, "nobody", "nogroup")
        programs = {name: postgres_program(name) for name in ("initdb", "postgres", "psql", "pg_isready")}
        assert all(programs.values()), programs
        password = (self.folder / self.compose["secrets"]["store-password"]["file"]).read_text().strip()
        (data / "password").write_text(password)
        shutil.chown(data / "password", "nobody", "nogroup")
        database = data / "data"
        made = [str(programs["initdb"]), "-D", str(database), "-U", given["POSTGRES_USER"], "--auth-local=trust"]
        subprocess.run(
            [*user, *made, "--auth-host=scram-sha-256", f"--pwfile={data / 'password'}", "-E", "UTF8", "--no-sync"],
            check=True,
            stdout=subprocess.DEVNULL,
            cwd="/",
        )
        with (database / "pg_hba.conf").open("a") as file:
            file.write("host all all all scram-sha-256\n")
        self.postgres.mounts += "; mkdir -m 777 /run/postgresql"
        options = ["-c", "listen_addresses=*", "-c", "unix_socket_directories=/run/postgresql"]
        self.postgres.start([*user, str(programs["postgres"]), "-D", str(database), *options], self.log("postgres"))
        check = self.postgres.service["healthcheck"]
        kind, program, *arguments = check["test"]
        assert kind == "CMD"
        health = [str(programs[program]), *arguments]
        within(seconds(check["interval"]) * check["retries"], "Postgres is healthy", lambda: self.postgres.is_healthy(health))
        self.postgres.exec(
            [
                str(programs["psql"]),
                "-U",
                given["POSTGRES_USER"],
                "-d",
                "postgres",
                "-c",
                f"CREATE DATABASE {given['POSTGRES_DB']}",
            ]
        )

    def start_server(self, server: Container) -> None:
        assert server.service["depends_on"] == {"postgres": {"condition": "service_healthy"}}
        server.start([sys.executable, "-m", "siderolink", *server.service["command"]], self.log(server.name))

    def is_healthy(self, server: Container) -> bool:
        """The image's HEALTHCHECK."""
        return server.is_healthy([sys.executable, *self.health[1:]])

    def start_balancer(self) -> None:
        haproxy = shutil.which("haproxy", path=os.environ["PATH"] + ":/usr/sbin")
        if haproxy is None:
            sys.exit("compose_trial needs haproxy: apt-get install haproxy")
        target = self.balancer.service["configs"][0]["target"]
        self.balancer.start([haproxy, "-W", "-db", "-f", target], self.log("balancer"))  # the image's own command

    def siderolink(self, server: Container, *arguments: str) -> str:
        """As `docker exec NAME siderolink …`."""
        return server.exec([sys.executable, "-m", "siderolink", *arguments]).stdout

    # --- observations

    def sources(self) -> list[str]:
        """Where machines were last heard from, as the database says; of tunnels by the PROXY protocol."""
        user, psql = self.postgres.service["environment"]["POSTGRES_USER"], str(postgres_program("psql"))
        query = "SELECT last_source FROM machines WHERE last_source IS NOT NULL"
        return self.postgres.exec([psql, "-U", user, "-Atc", query]).stdout.split()

    def connections(self, count: int = 60) -> Counter[str]:
        """Which servers get new connections from the balancer. Each comes from another address, with TLS and HTTP/2."""
        log = self.log("balancer")
        before = log.stat().st_size
        network = SOURCES.rpartition(".")[0]
        client = f"""
import socket, ssl
context = ssl.create_default_context(cafile={str(self.ca_file)!r})
context.set_alpn_protocols(["h2"])
for number in range(1, {count + 1}):
    with socket.create_connection(({PUBLIC!r}, 8090), 10, (f"{network}.{{number}}", 0)) as one:
        with context.wrap_socket(one, server_hostname={PUBLIC!r}) as other:
            assert other.selected_alpn_protocol() == "h2"
            other.sendall(b"PRI * HTTP/2.0\\r\\n\\r\\nSM\\r\\n\\r\\n" + bytes([0, 0, 0, 4, 0, 0, 0, 0, 0]))
            assert other.recv(9)[3] == 4, "no settings came"
"""
        self.machines[0].run([sys.executable, "-c", client], timeout=120)
        found: Counter[str] = Counter()

        def is_logged() -> bool:
            nonlocal found
            text = log.read_text()[before:]
            found = Counter(re.findall(rf"^{re.escape(network)}\.\S+ .* servers/(\S+) ", text, re.MULTILINE))
            return found.total() >= count

        within(20, "the balancer logs its connections", is_logged)
        return found


def answered(trial: Trial, links: Sequence[Link]) -> None:
    """Check that the servers answer both machines."""
    for number, (namespace, one) in enumerate(zip(trial.machines, links, strict=True)):
        command = ["ping", "-c1", "-W1", str(one.server_address)]
        took = within(60, "the server answers", lambda: " 0 received" not in namespace.run(command, check=False))  # noqa: B023
        print(f"machine {number} is answered after {took:.1f} s")


def run(trial: Trial, stack: ExitStack) -> None:
    say("Postgres, until it is healthy")
    trial.start_postgres()
    say("three servers, until the image's health check says so of each")
    for server in trial.servers:
        trial.start_server(server)
    for server in trial.servers:
        within(120, f"{server.name} is healthy", lambda server=server: trial.is_healthy(server))  # type: ignore[misc]
    trial.start_balancer()
    first = trial.servers[0]
    within(30, "all servers know each other", lambda: len(json.loads(trial.siderolink(first, "servers", "-o", "json"))) == 3)
    time.sleep(3)  # two checks of the balancer
    spread = trial.connections()
    say(f"new connections go to {dict(spread)}")
    assert len(spread) == 3, spread
    say("machines join by the balancer, one by UDP and one by the tunnel")
    url = f"https://{PUBLIC}:8090?jointoken=trial-token"
    links: list[Link] = []
    for namespace, query in zip(trial.machines, ("", "&grpc_tunnel=true"), strict=True):
        portal = stack.enter_context(namespace.portal())
        machine = connect(url + query, uuid=str(uuid.uuid4()), device="userspace", ca_file=trial.ca_file)
        links.append(stack.enter_context(portal.wrap_async_context_manager(machine)))
    answered(trial, links)
    rows = json.loads(trial.siderolink(first, "machine", "list", "-o", "json"))
    assert len(rows) == 2, rows
    expected = sorted(f"{network}.2" for network in NETWORKS)
    within(30, "the servers store where machines are, behind the balancer too", lambda: sorted(trial.sources()) == expected)
    drain(trial, links)
    kill(trial, links)
    say("SIGTERM to all, one after the other")
    for server in trial.servers:
        print(f"{server.name} ended after {server.stop():.1f} s of {server.service['stop_grace_period']}")


def drain(trial: Trial, links: Sequence[Link]) -> None:
    one, other = trial.servers[:2]
    say(f"drain {one.name}, by a command at {other.name}")
    address = dict(option.removeprefix("--").split("=", 1) for option in one.service["command"][1:])["peer-address"]
    print(trial.siderolink(other, "drain", address, "--timeout", "30s").strip().splitlines()[-1])
    time.sleep(3)  # two checks of the balancer
    spread = trial.connections()
    say(f"new connections go to {dict(spread)}")
    assert spread[one.name] == 0, spread
    answered(trial, links)
    assert trial.is_healthy(one) is False, "it is not to be ready"
    trial.siderolink(one, "drain", "--undo")
    within(30, "it gets connections again", lambda: trial.connections()[one.name] > 0)


def kill(trial: Trial, links: Sequence[Link]) -> None:
    victim = trial.servers[1]
    say(f"kill -9 {victim.name}")
    assert victim.process is not None
    victim.process.send_signal(signal.SIGKILL)
    victim.process.wait()
    spread = trial.connections()
    say(f"new connections go to {dict(spread)}")
    assert spread[victim.name] == 0, spread
    answered(trial, links)
    assert victim.service["restart"] == "unless-stopped"
    trial.start_server(victim)
    within(120, "it is healthy again", lambda: trial.is_healthy(victim))
    within(30, "it gets connections again", lambda: trial.connections()[victim.name] > 0)


def main() -> None:
    if os.geteuid():
        sys.exit("compose_trial needs root")
    with ExitStack() as stack:
        trial = Trial(stack)
        try:
            run(trial, stack)
        except BaseException:
            for name in trial.containers:
                if trial.log(name).exists():
                    print(f"--- {name}\n{trial.log(name).read_text()[-3000:]}", file=sys.stderr)
            raise
    say("all is well: the compose file of three servers")


if __name__ == "__main__":
    main()
