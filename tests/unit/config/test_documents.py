"""Documents: exact forms, refusals and their texts, and merging."""

import os
import re
from dataclasses import replace
from ipaddress import ip_network
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from siderolink.client.config import (
    Ingress,
    IngressRule,
    LogURL,
    MachineSettings,
    PortRange,
    Setting,
    Sources,
    merge,
    parse_kernel_arguments,
)
from siderolink.client.config.documents import MAX_FILES, Documents, load_documents, parse_documents
from siderolink.client.config.settings import read_ports, read_subnet
from siderolink.client.config.write import JoinParameters, kernel_arguments, machine_documents
from siderolink.common.errors import ConfigurationError
from siderolink.common.hostport import HostPort
from siderolink.common.join_url import JoinURL
from tests.support.certificates import make_certificate

TOKEN = "s3cr3t-t0k3n"
JOIN = f"apiVersion: v1alpha1\nkind: SideroLinkConfig\napiUrl: https://h?jointoken={TOKEN}\n"
RULE = "apiVersion: v1alpha1\nkind: NetworkRuleConfig\nname: r\n"
PORTS = "portSelector: {ports: [1], protocol: tcp}\n"

EVERY_KIND = """
# what a server hands out
apiVersion: v1alpha1
kind: SideroLinkConfig
apiUrl: https://siderolink.example/?jointoken=s3cr3t-t0k3n&user=alice
uniqueToken: '{"Fingerprint":"a","Token":"b"}'
---
apiVersion: v1alpha1
kind: EventSinkConfig
endpoint: "[fdae:41e4:649b:9303::1]:8090"
---
apiVersion: v1alpha1
kind: KmsgLogConfig
name: one
url: tcp://[fdae:41e4:649b:9303::1]:8092/
---
apiVersion: v1alpha1
kind: KmsgLogConfig
name: two
url: udp://logs.example:514
---
apiVersion: v1alpha1
kind: TrustedRootsConfig
name: roots
certificates: |
CERTIFICATES---
apiVersion: v1alpha1
kind: NetworkDefaultActionConfig
ingress: block
---
apiVersion: v1alpha1
kind: NetworkRuleConfig
name: rule
portSelector:
  ports:
    - 50000
    - 30000-32767
    - "443"
  protocol: tcp
ingress:
  - subnet: 192.168.0.0/16
    except: 192.168.178.0/24
  - subnet: 2001:db8::/32
"""


def parse(*texts: str) -> Documents:
    return parse_documents((text.encode(), f"f{number}.yaml") for number, text in enumerate(texts))


def refusal(*texts: str) -> str:
    with pytest.raises(ConfigurationError) as caught:
        parse(*texts)
    said = str(caught.value)
    assert "\n" not in said
    assert TOKEN not in said
    return said


def test_every_kind() -> None:
    pem = make_certificate("root").certificate_pem
    found = parse(EVERY_KIND.replace("CERTIFICATES", "".join(f"    {line}" for line in pem.splitlines(keepends=True))))
    settings = found.settings
    assert settings.url is not None
    assert settings.url.value == JoinURL("siderolink.example", join_token=TOKEN)
    assert settings.url.source == "f0.yaml:3 SideroLinkConfig"
    assert settings.unique_token is not None
    assert settings.unique_token.value == '{"Fingerprint":"a","Token":"b"}'
    assert settings.event_sink is not None
    assert settings.event_sink.value == HostPort("fdae:41e4:649b:9303::1", 8090)
    assert [str(log.value) for log in settings.kernel_logs] == [
        "tcp://[fdae:41e4:649b:9303::1]:8092",
        "udp://logs.example:514",
    ]
    assert settings.roots_pem is not None
    assert settings.roots_pem.split() == pem.split()
    assert settings.tls() is not None
    assert settings.ingress == Ingress(
        "block",
        (
            IngressRule(
                "rule",
                "tcp",
                (PortRange(50000, 50000), PortRange(30000, 32767), PortRange(443, 443)),
                (ip_network("192.168.0.0/16"), ip_network("2001:db8::/32")),
                (ip_network("192.168.178.0/24"),),
            ),
        ),
    )
    assert not found.others
    assert TOKEN not in repr(found)
    assert "Fingerprint" not in repr(found)


def test_unknown_kinds_are_kept_apart_with_a_note() -> None:
    found = parse(f"version: v1alpha1\nmachine: {{type: worker}}\n---\n{JOIN}---\napiVersion: v1beta1\nkind: Other\nx: 1\n")
    assert [(other.kind, other.source) for other in found.others] == [
        ("machine configuration", "f0.yaml:1"),
        ("Other", "f0.yaml:8"),
    ]
    assert found.others[1].value == {"apiVersion": "v1beta1", "kind": "Other", "x": 1}
    assert [note.split(" is not a document")[0] for note in found.settings.notes] == [
        "f0.yaml:1: machine configuration",
        "f0.yaml:8: Other",
    ]
    assert found.settings.url is not None


@pytest.mark.parametrize(
    ("text", "said"),
    [
        (JOIN + "apiURL: x", "f0.yaml:4: apiURL: unknown key; allowed are apiVersion, kind, apiUrl, uniqueToken"),
        (JOIN + "uniqueToken: 5", "f0.yaml:4: uniqueToken: must be text, not a number, so put it in quotes"),
        (JOIN + "uniqueToken: [a]", "f0.yaml:4: uniqueToken: must be text, not a list"),
        (JOIN + "uniqueToken: {a: b}", "f0.yaml:4: uniqueToken: must be text, not a mapping"),
        (JOIN + "uniqueToken: true", "f0.yaml:4: uniqueToken: must be text, not true or false, so put it in quotes"),
        (
            JOIN.replace(f"https://h?jointoken={TOKEN}", ""),
            "f0.yaml:3: apiUrl: is missing; needed are apiVersion, kind, apiUrl",
        ),
        (JOIN + f"uniqueToken: {TOKEN * 1000}", "f0.yaml:4: uniqueToken: is too long; at most 8192 are allowed"),
        (JOIN + "apiUrl: https://h", "f0.yaml:4: the key 'apiUrl' is repeated; it is first in line 3"),
        (JOIN + "<<: {a: b}", "f0.yaml:4: <<: unknown key; allowed are apiVersion, kind, apiUrl, uniqueToken"),
        (JOIN + "---\n" + JOIN, "f0.yaml:5: a SideroLinkConfig is already defined at f0.yaml:1; only one is allowed"),
        (JOIN.replace("v1alpha1", "v1"), "f0.yaml:1: apiVersion: must be 'v1alpha1'"),
        (JOIN.replace("apiVersion: v1alpha1\n", ""), "f0.yaml:1: apiVersion: is missing; needed are apiVersion, kind, apiUrl"),
        (JOIN.replace("https", "http"), "f0.yaml:3: apiUrl: cannot use this join URL: in a document it must begin with"),
        (JOIN.replace("https://", ""), "f0.yaml:3: apiUrl: cannot use this join URL: in a document it must begin with"),
        (JOIN.replace("h?", "h/path?"), "f0.yaml:3: apiUrl: cannot use this join URL: its path"),
        ("- a", "f0.yaml:1: a document is a mapping with apiVersion and kind"),
        (
            "a: b",
            "f0.yaml:1: kind is missing or is not text; supported kinds are SideroLinkConfig, EventSinkConfig, KmsgLogConfig",
        ),
        (RULE + PORTS.replace("tcp", "sctp"), "f0.yaml:4: portSelector.protocol: must be 'tcp', 'udp', 'icmp' or 'icmpv6'"),
        (RULE + PORTS.replace("[1]", "[]"), "f0.yaml:4: portSelector.ports: must not be empty"),
        (RULE + PORTS.replace("ports: [1], ", ""), "f0.yaml:4: portSelector.ports: is missing; needed are ports, protocol"),
        (RULE + PORTS.replace("[1]", "[5-9, 1-5]"), "f0.yaml:4: portSelector.ports: the port ranges 1-5 and 5-9 overlap"),
        (RULE + PORTS.replace("[1]", "[9-5]"), "f0.yaml:4: portSelector.ports[0]: ports must be numbers from 0 to 65535"),
        (RULE + PORTS.replace("[1]", "[1, 65536]"), "f0.yaml:4: portSelector.ports[1]: ports must be numbers"),
        (RULE + PORTS.replace("[1]", "[true]"), "f0.yaml:4: portSelector.ports[0]: must be a port such as"),
        (RULE + PORTS.replace("[1]", "80"), "f0.yaml:4: portSelector.ports: must be a list, not a number"),
        (RULE + PORTS + "ingress:\n  - subnet: 192.0.2.1", "f0.yaml:6: ingress[0].subnet: must be a subnet such as"),
        (RULE + PORTS + "ingress:\n  - subnet: fe80::1%eth0/64", "f0.yaml:6: ingress[0].subnet: must be a subnet"),
        (RULE + PORTS + "ingress:\n  - except: ::/0", "f0.yaml:6: ingress[0].subnet: is missing; needed are subnet"),
        (
            RULE + PORTS + "ingress:\n  - subnet: ::/0\n    x: 1",
            "f0.yaml:7: ingress[0].x: unknown key; allowed are subnet, except",
        ),
        (RULE + PORTS + "---\n" + RULE + PORTS, "f0.yaml:6: a NetworkRuleConfig named 'r' is already defined at f0.yaml:1"),
        (RULE.replace("r\n", '""\n') + PORTS, "f0.yaml:3: name: must not be empty"),
        (RULE.replace("r\n", '"a\\nb"\n') + PORTS, "f0.yaml:3: name: a name may contain only printable characters"),
        ("apiVersion: v1alpha1\nkind: EventSinkConfig\nendpoint: h", "f0.yaml:3: endpoint: 'h' is not host:port"),
        ("apiVersion: v1alpha1\nkind: KmsgLogConfig\nname: a\nurl: http://h:1", "f0.yaml:4: url: a log's destination is"),
        ("apiVersion: v1alpha1\nkind: KmsgLogConfig\nname: a\nurl: tcp://h", "f0.yaml:4: url: "),
        ("apiVersion: v1alpha1\nkind: TrustedRootsConfig\nname: a\ncertificates: x", "f0.yaml:4: certificates: must be"),
        (
            "apiVersion: v1alpha1\nkind: NetworkDefaultActionConfig\ningress: deny",
            "f0.yaml:3: ingress: must be 'accept' or 'block'",
        ),
    ],
)
def test_refusals_name_file_line_key_and_what_is_allowed(text: str, said: str) -> None:
    assert refusal(text).startswith(said)


def test_a_directory_is_read_in_the_order_of_names(tmp_path: Path) -> None:
    (tmp_path / "b.yaml").write_text(JOIN)
    (tmp_path / "a.yml").write_text("apiVersion: v1alpha1\nkind: KmsgLogConfig\nname: a\nurl: tcp://h:1\n---\n" + RULE + PORTS)
    (tmp_path / "c.yaml").write_text(RULE.replace("name: r", "name: s") + PORTS)
    (tmp_path / ".hidden.yaml").write_text("- no")
    (tmp_path / "readme.txt").write_text("- no")
    (tmp_path / "serve.yaml").write_text("wireguard-endpoint: 192.0.2.1:50180")
    settings = load_documents(tmp_path).settings
    assert settings.problems == ()
    assert settings.url is not None
    assert settings.url.source == f"{tmp_path}/b.yaml:1 SideroLinkConfig"
    assert [rule.value.name for rule in settings.ingress_rules] == ["r", "s"]
    (tmp_path / "d.yaml").write_text(JOIN)
    (problem,) = load_documents(tmp_path).settings.problems
    assert re.search("d.yaml:1: a SideroLinkConfig is already defined at .*b.yaml:1", problem)


def test_files_that_cannot_be_read(tmp_path: Path) -> None:
    with pytest.raises(ConfigurationError, match="cannot be read: No such file"):
        load_documents(tmp_path / "none.yaml")
    (tmp_path / "x.yaml").mkdir()
    assert "x.yaml is not a regular file" in load_documents(tmp_path).settings.problems[0]
    (tmp_path / "x.yaml").rmdir()
    for number in range(MAX_FILES + 1):
        (tmp_path / f"{number}.yaml").touch()
    (tmp_path / "0.yaml").write_text(JOIN)
    settings = load_documents(tmp_path).settings
    assert "more than 64 files" in settings.problems[0]
    assert settings.url is not None


def test_stronger_sources_override_and_log_destinations_are_merged(tmp_path: Path) -> None:
    file, line = tmp_path / "f.yaml", tmp_path / "cmdline"
    file.write_text(
        JOIN + "---\napiVersion: v1alpha1\nkind: KmsgLogConfig\nname: a\nurl: tcp://h:1\n"
        "---\napiVersion: v1alpha1\nkind: KmsgLogConfig\nname: b\nurl: tcp://h:2\n"
    )
    line.write_text("siderolink.api=grpc://k talos.events.sink=k:1 talos.logging.kernel=tcp://h:1")
    sources = Sources(documents=(file,), kernel_cmdline=line)
    settings = sources.read()
    assert settings.url is not None
    assert settings.event_sink is not None
    assert (settings.url.value.host, settings.event_sink.value.host) == ("h", "k")
    assert [(str(log.value), log.source) for log in settings.kernel_logs] == [
        ("tcp://h:1", f"{file}:5 KmsgLogConfig"),
        ("tcp://h:2", f"{file}:10 KmsgLogConfig"),
    ]
    explicit = MachineSettings(url=Setting(JoinURL("e"), "argument"))
    stronger = replace(sources, explicit=explicit).read()
    assert stronger.url == explicit.url
    file.write_text("apiVersion: v1alpha1\nkind: KmsgLogConfig\nname: b\nurl: tcp://h:2\n")
    weaker = sources.read()
    assert weaker.url is not None
    assert (weaker.url.value.host, weaker.url.source) == ("k", f"{line}: siderolink.api")
    assert [str(log.value) for log in weaker.kernel_logs] == ["tcp://h:2", "tcp://h:1"]


def test_a_pipe_is_read_once_and_its_settings_stay(tmp_path: Path) -> None:
    reading, writing = os.pipe()
    os.write(writing, JOIN.encode())
    os.close(writing)
    sources = Sources(documents=(Path(f"/dev/fd/{reading}"),), host_kernel=False)
    one, two = sources.read(), sources.read()
    os.close(reading)
    assert one.url is not None
    assert one == two
    os.mkfifo(tmp_path / "x.yaml")
    assert "x.yaml is not a regular file" in load_documents(tmp_path).settings.problems[0]


hosts = st.from_regex(r"[a-z]{1,9}", fullmatch=True)
ports = st.integers(1, 65535)
tokens = st.none() | st.text(st.characters(exclude_categories=("Cc", "Cs", "Zl", "Zp")), min_size=1, max_size=60)
parameters = st.builds(
    JoinParameters,
    url=st.builds(JoinURL, host=hosts, port=ports, tls=st.booleans(), join_token=tokens, tunnel=st.booleans()),
    event_sink=st.none() | st.builds(HostPort, st.just("fd00::1") | hosts, ports),
    kernel_log=st.none() | st.builds(LogURL, st.sampled_from(["tcp", "udp"]), st.builds(HostPort, hosts, ports)),
)


@given(parameters)
def test_written_documents_are_read_back(wanted: JoinParameters) -> None:
    line = kernel_arguments(wanted)
    assert line.isascii()
    text = machine_documents(wanted)
    for found in (parse_kernel_arguments(line), parse(text).settings, merge(*[parse(text).settings] * 3)):
        assert found.url is not None
        assert found.url.value == wanted.url
        assert (found.event_sink and found.event_sink.value) == wanted.event_sink
        assert [log.value for log in found.kernel_logs] == ([wanted.kernel_log] if wanted.kernel_log else [])


def test_certificates_are_written_as_block_text() -> None:
    pem = make_certificate("root").certificate_pem
    text = machine_documents(JoinParameters(url=JoinURL("h"), roots_pem=pem))
    assert "certificates: |\n" in text
    assert parse(text).settings.roots_pem == pem


@given(st.text("0123456789-/.:abf% []tcpud", max_size=40) | st.text(max_size=40))
def test_ports_subnets_and_destinations_are_read_or_refused(text: str) -> None:
    for read, before in ((read_ports, ""), (read_subnet, ""), (LogURL.parse, ""), (LogURL.parse, "udp://")):
        try:
            found = read(before + text)
        except ConfigurationError as error:
            said = str(error)
        else:
            assert read(str(found)) == found
            continue
        assert "\n" not in said


pieces = st.sampled_from(
    [
        "apiVersion: v1alpha1",
        "kind: SideroLinkConfig",
        "kind: NetworkRuleConfig",
        "apiUrl: https://h",
        "name: a",
        "portSelector:",
        "  ports: [1, 2-3]",
        "  protocol: tcp",
        "ingress:",
        "  - subnet: ::/0",
        "    except: ::1/128",
        "ingress: block",
        "---",
        "x: &x [1]",
        "y: *x",
    ]
)


@given(st.lists(pieces | st.text(max_size=8), max_size=14).map("\n".join))
def test_any_text_is_read_or_refused(text: str) -> None:
    try:
        parse(text)
    except ConfigurationError as error:
        said = str(error)
    else:
        return
    assert said.startswith("f0.yaml:")
    assert "\n" not in said
