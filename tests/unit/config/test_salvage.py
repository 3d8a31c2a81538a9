"""What is wrong in one place costs that place: a machine joins by the rest, and each problem is one line."""

import base64
from pathlib import Path

import pytest
import zstandard
from hypothesis import given
from hypothesis import strategies as st

from siderolink.client.config import Ingress, MachineSettings, Setting, Sources
from siderolink.client.config.documents import salvage_documents
from siderolink.client.config.kernel_args import MAX_INLINE_BYTES
from siderolink.common.hostport import HostPort
from siderolink.common.join_url import JoinURL

JOIN = "apiVersion: v1alpha1\nkind: SideroLinkConfig\napiUrl: https://omni.example?jointoken=t\n"
SINK = 'apiVersion: v1alpha1\nkind: EventSinkConfig\nendpoint: "[fdae:41e4:649b:9303::1]:8091"\n'
LOG = "apiVersion: v1alpha1\nkind: KmsgLogConfig\nname: omni-kmsg\nurl: tcp://[fdae:41e4:649b:9303::1]:8092\n"
RULE = """apiVersion: v1alpha1
kind: NetworkRuleConfig
name: apid
portSelector: {ports: [50000], protocol: tcp}
ingress:
  - subnet: 192.0.2.0/24
  - subnet: 198.51.100.0/24
"""


def read(*documents: str) -> MachineSettings:
    return salvage_documents("---\n".join(documents).encode(), "f").settings


def summary(settings: MachineSettings) -> tuple[str | None, str | None, list[str]]:
    return (
        settings.url.value.host if settings.url else None,
        str(settings.event_sink.value) if settings.event_sink else None,
        [str(log.value) for log in settings.kernel_logs],
    )


WHOLE = ("omni.example", "[fdae:41e4:649b:9303::1]:8091", ["tcp://[fdae:41e4:649b:9303::1]:8092"])

# documents and command lines as public repositories and releases of this field have them
FINE = {
    "as a server hands them out": (JOIN, SINK, LOG),
    "document end markers": (JOIN + "...\n", SINK, LOG),
    "comments and empty documents": ("# join\n", JOIN, "# nothing\n", SINK, "", LOG),
    "a byte order mark first": ("\ufeff" + JOIN, SINK, LOG),
    "byte order marks of joined files": ("\ufeff" + JOIN, "\ufeff" + SINK, "\ufeff" + LOG),
    "null for what is optional": (JOIN + "uniqueToken: null\n", SINK, LOG),
    "nothing for what is optional": (JOIN + "uniqueToken:\n", SINK, LOG),
    "a tilde": (JOIN + "uniqueToken: ~\n", SINK, LOG),
    "lines that end as on Windows": (JOIN.replace("\n", "\r\n"), SINK, LOG),
    "a log URL with a query": (JOIN, SINK, LOG.replace("8092", "8092/?field=value&x=y")),
    "a log URL with a query and no slash": (JOIN, SINK, LOG.replace("8092", "8092?field=value")),
    "a main document before": ("version: v1alpha1\nmachine:\n  type: worker\ncluster: null\n", JOIN, SINK, LOG),
    "a main document without a version": ("machine:\n  type: worker\n", JOIN, SINK, LOG),
    "a main document of the cluster alone": ("cluster:\n  id: x\n", JOIN, SINK, LOG),
    "kinds of newer releases": (
        JOIN,
        SINK,
        LOG,
        "apiVersion: v1alpha1\nkind: HostnameConfig\nauto: stable\n",
        "apiVersion: v1alpha1\nkind: WatchdogTimerConfig\ndevice: /dev/watchdog0\n",
    ),
}
ODD = {
    "an unknown key of the join": (JOIN + "grpcTunnel: true\n", SINK, LOG),
    "a token that is a number": (JOIN + "uniqueToken: 5\n", SINK, LOG),
    "a token that is a mapping": (JOIN + "uniqueToken: {Token: x}\n", SINK, LOG),
    "a later apiVersion": (JOIN.replace("v1alpha1", "v1beta1"), SINK, LOG),
    "no apiVersion": (JOIN.replace("apiVersion: v1alpha1\n", ""), SINK, LOG),
    "extraTags of a newer release": (JOIN, SINK, LOG + "extraTags:\n  server: s03\n  site: lab\n"),
    "no name": (JOIN, SINK, LOG.replace("name: omni-kmsg\n", "")),
    "a name that is a number": (JOIN, SINK, LOG.replace("omni-kmsg", "5")),
    "a misspelt kind beside": (JOIN, SINK, LOG, "apiVersion: v1alpha1\nkind: KmsgLogsConfig\nname: x\nurl: tcp://h:1\n"),
    "a broken rule": (JOIN, SINK, LOG, RULE.replace("50000", "99999")),
    "a broken action": (JOIN, SINK, LOG, "apiVersion: v1alpha1\nkind: NetworkDefaultActionConfig\ningress: deny\n"),
    "broken roots": (JOIN, SINK, LOG, "apiVersion: v1alpha1\nkind: TrustedRootsConfig\nname: ca\ncertificates: x\n"),
    "no YAML between": (JOIN, "a: 'b\n", SINK, LOG),
    "tabs between": (JOIN, "a:\n\tb: c\n", SINK, LOG),
    "a second join": (JOIN, SINK, LOG, JOIN.replace("omni", "other")),
    "a list between": (JOIN, "- a\n", SINK, LOG),
    "a key that stands twice, elsewhere": (JOIN, SINK, LOG, "a: 1\na: 2\n"),
}


@pytest.mark.parametrize("documents", FINE.values(), ids=FINE)
def test_documents_that_are_fine(documents: tuple[str, ...]) -> None:
    settings = read(*documents)
    assert settings.problems == ()
    assert summary(settings) == WHOLE


@pytest.mark.parametrize("documents", ODD.values(), ids=ODD)
def test_an_invalid_value_disables_its_own_part_and_is_one_line(documents: tuple[str, ...]) -> None:
    settings = read(*documents)
    assert summary(settings) == WHOLE
    assert settings.unique_token is None
    (problem,) = settings.problems
    assert problem.startswith("f:")
    assert "\n" not in problem


def test_an_unusable_document_leaves_the_rest_in_force() -> None:
    assert summary(read(JOIN, SINK.replace(":8091", ""), LOG)) == (WHOLE[0], None, WHOLE[2])
    assert summary(read(JOIN, SINK, LOG.replace("tcp", "http"))) == (WHOLE[0], WHOLE[1], [])
    assert summary(read(JOIN.replace("https", "ftp"), SINK, LOG)) == (None, WHOLE[1], WHOLE[2])


def test_a_kind_in_the_wrong_case_is_reported_with_the_right_one() -> None:
    settings = read(JOIN.replace("SideroLink", "Siderolink"))
    assert settings.url is None
    assert settings.problems == ("f:1: unknown kind 'SiderolinkConfig'; did you mean SideroLinkConfig?",)


@pytest.mark.parametrize(
    ("change", "subnets"),
    [
        (("192.0.2.0/24", "nonsense"), ["198.51.100.0/24"]),
        (("subnet: 192.0.2.0/24", "subnet: 192.0.2.0/24\n    except: nonsense"), ["198.51.100.0/24"]),
        (("subnet: 192.0.2.0/24", "subnet: 192.0.2.0/24\n    interface: eth0"), ["198.51.100.0/24"]),
        (("name: apid", "name: apid\nsource: trusted"), []),
        (("name: apid", "name: 5"), ["192.0.2.0/24", "198.51.100.0/24"]),
    ],
)
def test_a_firewall_rule_with_an_invalid_value_admits_nobody(change: tuple[str, str], subnets: list[str]) -> None:
    (rule,) = read(RULE.replace(*change)).ingress_rules
    assert [str(subnet) for subnet in rule.value.subnets] == subnets


def test_an_invalid_default_action_blocks() -> None:
    settings = read("apiVersion: v1alpha1\nkind: NetworkDefaultActionConfig\ningress: deny\n")
    assert settings.ingress == Ingress("block")
    assert "taken as block" in settings.problems[0]


def test_earlier_settings_stay_in_force_while_there_are_problems() -> None:
    before = read(JOIN, SINK, LOG, RULE)
    damaged = read(JOIN.replace("https", "ftp"), SINK.replace("8091", "x"), LOG, RULE.replace("50000", "x"))
    assert summary(damaged.keeping(before)) == WHOLE
    assert damaged.keeping(before).ingress_rules == before.ingress_rules
    without = read(JOIN)
    assert without.keeping(before) == without


# the kernel command line


def inline(*documents: str, compressed: bool = True) -> str:
    data = "---\n".join(documents).encode()
    return base64.b64encode(zstandard.compress(data) if compressed else data).decode()


def from_line(tmp_path: Path, line: str | bytes) -> MachineSettings:
    file = tmp_path / "cmdline"
    file.write_bytes(line if isinstance(line, bytes) else line.encode())
    return Sources(kernel_cmdline=file, host_documents=False).read()


def test_an_invalid_argument_does_not_affect_others(tmp_path: Path) -> None:
    settings = from_line(
        tmp_path, "siderolink.api=https://omni.example talos.events.sink=h talos.logging.kernel=tcp://h:1/?a=b"
    )
    assert summary(settings) == ("omni.example", None, ["tcp://h:1"])
    assert len(settings.problems) == 1
    settings = from_line(tmp_path, "siderolink.api=ftp:// talos.events.sink=h:1")
    assert summary(settings) == (None, "h:1", [])


def test_a_byte_order_mark_is_skipped(tmp_path: Path) -> None:
    settings = from_line(tmp_path, b"\xef\xbb\xbfsiderolink.api=https://omni.example")
    assert summary(settings)[0] == "omni.example"


@pytest.mark.parametrize("compressed", [True, False])
def test_inline_documents_override_arguments(tmp_path: Path, compressed: bool) -> None:
    text = inline(JOIN, SINK, compressed=compressed)
    line = f"siderolink.api=grpc://k talos.config.inline={text[:40]} talos.config.inline={text[40:]} talos.events.sink=k:1"
    settings = from_line(tmp_path, line)
    assert summary(settings)[:2] == WHOLE[:2]
    assert settings.url is not None
    assert settings.url.source.endswith("talos.config.inline:1 SideroLinkConfig")
    assert settings.problems == ()


@pytest.mark.parametrize(
    "value",
    [
        "%%%",
        "AAA",
        base64.b64encode(zstandard.compress(b"x" * 99)[:-9]).decode(),
        base64.b64encode(b"\x28\xb5\x2f\xfd\xff\xff\xff").decode(),
        base64.b64encode(zstandard.compress(b"#" * (64 * MAX_INLINE_BYTES))).decode(),
        base64.b64encode(b"\xff\xfe").decode(),
    ],
    ids=["no base64", "cut", "damaged", "not zstd", "a bomb", "no text"],
)
def test_unreadable_inline_documents_affect_nothing_else(tmp_path: Path, value: str) -> None:
    settings = from_line(tmp_path, f"siderolink.api=https://omni.example talos.config.inline={value}")
    assert summary(settings)[0] == "omni.example"
    assert len(settings.problems) == 1


@given(st.binary(max_size=200))
def test_any_bytes_give_settings_without_an_error(data: bytes) -> None:
    found = salvage_documents(JOIN.encode() + b"---\n" + data, "f").settings
    assert all("\n" not in problem for problem in found.problems)


def test_settings_are_kept_for_files_only() -> None:
    url = Setting(JoinURL("a"), "argument")
    sink = Setting(HostPort("b", 1), "f:1")
    assert MachineSettings(event_sink=sink).keeping(MachineSettings(url=url)) == MachineSettings(event_sink=sink)
