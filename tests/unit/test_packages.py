"""The files that packages, image and chart are made from, read as their tools read them. `make verify-dist` uses them."""

import re
import subprocess
import sys
import tomllib
from pathlib import Path

import pytest
import yaml

from siderolink.cli.serve_config import ServeConfig

ROOT = Path(__file__).resolve().parents[2]
PACKAGING = ROOT / "packaging"
CHART = PACKAGING / "chart"
SCRIPTS = [
    *PACKAGING.glob("deb/p*"),
    PACKAGING / "deb/siderolink",
    *(path for path in (ROOT / "scripts").iterdir() if path.is_file() and b"bash" in path.read_bytes()[:40]),
]

PAGES = sorted(path for folder in (".", "docs", "native", "benchmarks") for path in (ROOT / folder).glob("*.md"))


@pytest.mark.parametrize("script", SCRIPTS, ids=lambda path: path.name)
def test_every_script_can_be_parsed(script: Path) -> None:
    shell = "bash" if b"bash" in script.read_bytes()[:40] else "sh"
    subprocess.run([shell, "-n", script], check=True)


def test_every_value_of_the_chart_is_used_and_every_used_one_is_there() -> None:
    values = yaml.safe_load((CHART / "values.yaml").read_text())
    templates = "".join(path.read_text() for path in (CHART / "templates").iterdir())
    used = set(re.findall(r"\.Values\.([A-Za-z.]+)", templates))

    def paths(found: object, prefix: str = "") -> set[str]:
        if not isinstance(found, dict) or not found:
            return {prefix}
        return {path for key, value in found.items() for path in paths(value, f"{prefix}.{key}" if prefix else key)}

    leaves = paths(values)
    assert {path for path in used if not any(leaf == path or leaf.startswith(f"{path}.") for leaf in leaves)} == set()
    assert {leaf for leaf in leaves if not any(path == leaf or leaf.startswith(f"{path}.") for path in used)} == set()


def test_the_compose_file_drops_every_right_that_it_does_not_need() -> None:
    service = yaml.safe_load((PACKAGING / "image/compose.yaml").read_text())["services"]["siderolink"]
    assert (service["cap_drop"], service["cap_add"], service["read_only"]) == (["ALL"], ["NET_ADMIN"], True)
    assert (PACKAGING / "image" / service["build"]["context"] / service["build"]["dockerfile"]).exists()


def test_the_compose_file_of_three_servers_differs_between_them_in_their_addresses_alone() -> None:
    text = (PACKAGING / "image/compose-three-servers.yaml").read_text()
    compose = yaml.safe_load(text)
    servers = {name: service for name, service in compose["services"].items() if name.startswith("siderolink-")}
    assert len(servers) == 3
    commands = []
    for number, (name, service) in enumerate(servers.items(), start=1):
        assert (service["cap_drop"], service["cap_add"], service["read_only"]) == (["ALL"], ["NET_ADMIN"], True)
        options = dict(option.removeprefix("--").split("=", 1) for option in service["command"][1:])
        assert {option.replace("-", "_") for option in options} <= ServeConfig.model_fields.keys()
        assert options.pop("wireguard-endpoint").endswith(f"}}:5018{number}")
        assert service["ports"] == [f"5018{number}:{options['wireguard-listen-port']}/udp"]
        assert options.pop("peer-address") == f"{name}:8094"
        (address,) = service["networks"]["default"].values()
        assert f"server {name} {address}:8090\n" in compose["configs"]["balancer"]["content"]
        assert int(service["stop_grace_period"].removesuffix("s")) > float(options["drain-timeout"])
        commands.append(options)
    assert commands[0] == commands[1] == commands[2]


def test_versions_agree() -> None:
    version = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]["version"]
    chart = yaml.safe_load((CHART / "Chart.yaml").read_text())
    assert (chart["version"], chart["appVersion"]) == (version, version)


def test_every_page_has_its_place_in_the_site() -> None:
    text = (ROOT / "mkdocs.yml").read_text()
    pages = re.findall(r": ([\w-]+\.md)$", text, re.MULTILINE)
    assert sorted(pages) == sorted(path.name for path in (ROOT / "docs").glob("*.md"))


def anchors(page: Path) -> set[str]:
    """Those of a page's headings, as sites that show Markdown make them."""
    headings = re.findall(
        r"^#+ (.+)$", re.sub(r"^```.*?^```", "", page.read_text(), flags=re.MULTILINE | re.DOTALL), re.MULTILINE
    )
    return {re.sub(r"[^\w -]", "", heading.lower()).replace(" ", "-") for heading in headings}


@pytest.mark.parametrize("page", PAGES, ids=lambda path: str(path.relative_to(ROOT)))
def test_links_between_files_lead_somewhere(page: Path) -> None:
    for target in re.findall(r"\]\(([^()\s]+)\)", page.read_text()):
        if re.match(r"[a-z]+:", target):
            continue
        name, _, anchor = target.partition("#")
        path = (page.parent / name) if name else page
        assert path.exists(), target
        assert not anchor or path.suffix != ".md" or anchor in anchors(path), target


@pytest.mark.parametrize("workflow", sorted((ROOT / ".github/workflows").iterdir()), ids=lambda path: path.name)
def test_a_workflow_runs_what_there_is(workflow: Path) -> None:
    targets = set(re.findall(r"^([a-z-]+)(?: [a-z -]+)?:", (ROOT / "Makefile").read_text(), re.MULTILINE))
    jobs = yaml.safe_load(workflow.read_text())["jobs"]
    steps = [step for job in jobs.values() for step in job["steps"]]
    assert all(set(step) <= {"uses", "with", "run", "env", "name"} and ("uses" in step) != ("run" in step) for step in steps)
    assert {needed for job in jobs.values() for needed in [job.get("needs", [])] if isinstance(needed, str)} <= jobs.keys()
    for command in (step["run"] for step in steps if "run" in step):
        assert set(re.findall(r"(?:^|&& )make ([a-z-]+)", command)) <= targets, command
        for script in re.findall(r"^(\.ci/\w+|[a-z]+/[\w-]+)", command, re.MULTILINE):
            assert (ROOT / script).stat().st_mode & 0o100, script


def test_each_command_has_a_manual_page(tmp_path: Path) -> None:
    done = [sys.executable, "-m", "scripts.write_man_pages", str(tmp_path)]
    subprocess.run(done, cwd=ROOT, check=True)
    sections = re.findall(r"^##+ ([a-z -]+)$", (ROOT / "docs" / "commands.md").read_text(), re.MULTILINE)
    assert {page.stem for page in tmp_path.iterdir()} == {
        "siderolink",
        *(f"siderolink-{name.replace(' ', '-')}" for name in sections),
    }
    page = (tmp_path / "siderolink-token-create.1").read_text()
    assert "\n.B \\-\\-expires WHEN\n" in page
    assert "\n.B siderolink token create\n[OPTIONS] NAME\n" in page
