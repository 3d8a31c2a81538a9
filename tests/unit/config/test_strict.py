"""What is sent to a machine is judged as the machine's own decoder would, by the texts that clients know."""

from contextlib import suppress

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from siderolink.client.config.strict import OTHER_KINDS, decode
from siderolink.common.errors import ConfigurationError

JOIN = "apiVersion: v1alpha1\nkind: SideroLinkConfig\napiUrl: grpc://192.0.2.1:4000?jointoken=t\n"
SINK = 'apiVersion: v1alpha1\nkind: EventSinkConfig\nendpoint: "[fdae::1]:8090"\n'


def refusal(text: str) -> str:
    with pytest.raises(ConfigurationError) as caught:
        decode(text.encode())
    return str(caught.value)


@pytest.mark.parametrize("text", ["", "\n", "# a comment\n", "---\n---\n", "null\n", "~\n---\n# nothing\n", "\ufeff"])
def test_an_empty_configuration_is_refused(text: str) -> None:
    assert refusal(text) == "config not found"


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        (
            "apiVersion: v1alpha1\nkind: Misspelt\n",
            'error decoding document v1alpha1/Misspelt/ (line 1): "Misspelt" "v1alpha1": not registered',
        ),
        (
            f"{SINK}---\napiVersion: v1alpha1\nkind: SiderolinkConfig\nname: x\n",
            'error decoding document v1alpha1/SiderolinkConfig/x (line 5): "SiderolinkConfig" "v1alpha1": not registered',
        ),
        (
            JOIN.replace("v1alpha1", "v1beta1"),
            'error decoding document v1beta1/SideroLinkConfig/ (line 1): "SideroLinkConfig" "v1beta1": not registered',
        ),
        ("name: something\n", "error decoding document /v1alpha1/something (line 1): missing kind"),
        ("apiVersion: v1beta1\n", "error decoding document v1beta1/v1alpha1/ (line 1): missing kind"),
        ("{}\n", "error decoding document /v1alpha1/ (line 1): missing kind"),
        ("kind: SideroLinkConfig\n", "error decoding document /SideroLinkConfig/ (line 1): missing apiVersion"),
        (f"{JOIN}more: true\n", "unknown keys found during decoding:\nmore: true\n"),
        (
            f"{JOIN}zeta:\n  inner: [1, {{a: b}}]\nalpha: text\n",
            "unknown keys found during decoding:\nalpha: text\nzeta:\n    inner:\n        - 1\n        - a: b\n",
        ),
        (
            "apiVersion: v1alpha1\nkind: NetworkRuleConfig\nname: x\nportSelector:\n  ports: [1]\n  protocol: tcp\n  port: 2\n"
            "ingress:\n  - subnet: 192.0.2.0/24\n  - subnet: 198.51.100.0/24\n    only: me\n",
            "unknown keys found during decoding:\ningress:\n    - only: me\nportSelector:\n    port: 2\n",
        ),
        (f"{SINK}---\n{SINK}", "duplicate document v1alpha1/EventSinkConfig/ is not allowed (line 5)"),
        ("- kind: SideroLinkConfig\n", "expected a YAML document at line 1"),
        ("text\n", "expected a YAML document at line 1"),
        (f"{JOIN}---\n42\n", "expected a YAML document at line 5"),
    ],
)
def test_refusals_have_the_texts_of_existing_machines(text: str, expected: str) -> None:
    assert refusal(text) == expected


@pytest.mark.parametrize(
    "text",
    [
        "version: v1alpha1\nmachine:\n  type: worker\n",
        "machine: {}\n",
        "cluster: {}\ndebug: false\n",
        "persist: true\n",
        "apiVersion: v1alpha1\n",
        f"{JOIN}---\nmachine: {{}}\n",
        f"{SINK}machine: {{}}\n",
    ],
)
def test_a_main_document_is_refused_with_a_text_for_people(text: str) -> None:
    assert "a main configuration (machine, cluster) is not for this machine" in refusal(text)


@pytest.mark.parametrize(
    ("text", "part"),
    [
        ("kind: [", "not YAML"),
        ("apiVersion: v1alpha1\nkind: SideroLinkConfig\n", "apiUrl: is missing"),
        ("apiVersion: v1alpha1\nkind: SideroLinkConfig\napiUrl: http://192.0.2.1\n", "must begin with https:// or grpc://"),
        ("apiVersion: v1alpha1\nkind: EventSinkConfig\nendpoint: 1\n", "must be text"),
        (f"{SINK}endpoint: again\n", "is repeated"),
        ("a: " + "[" * 100, "nested deeper"),
    ],
)
def test_values_that_cannot_be_used_are_named(text: str, part: str) -> None:
    assert part in refusal(text)


def test_other_known_kinds_are_accepted_with_a_warning_each() -> None:
    kinds = ("HostnameConfig", "RegistryAuthConfig")
    text = SINK + "".join(f"---\napiVersion: v1alpha1\nkind: {kind}\nname: a\n" for kind in kinds)
    found = decode(text.encode())
    assert found.warnings == tuple(f"{kind} is kept and has no effect on this machine" for kind in kinds)
    assert found.data == text.encode()
    assert not found.has_join
    assert found.settings.event_sink is not None
    assert {"HostnameConfig", "RegistryAuthConfig", "OOMConfig", "WatchdogTimerConfig", "UserVolumeConfig"} <= OTHER_KINDS


def test_null_is_absent_and_a_byte_order_mark_is_skipped() -> None:
    found = decode(f"\ufeff{JOIN}uniqueToken:\n".encode())
    assert found.has_join
    assert found.settings.unique_token is None


@pytest.mark.parametrize(
    ("text", "unknown"),
    [
        (f"{JOIN}extra: null\n", "extra: null\n"),
        (f"{JOIN}uniqueToken: ~\nextra:\n    inner: ~\n", "extra:\n    inner: null\n"),
    ],
)
def test_an_unknown_key_without_a_value_is_named(text: str, unknown: str) -> None:
    with pytest.raises(ConfigurationError) as caught:
        decode(text.encode())
    assert str(caught.value) == f"unknown keys found during decoding:\n{unknown}"


def test_keys_that_aliases_repeat_are_told_in_a_text_of_bounded_length() -> None:
    text = f"{SINK}more:\n  - &a {'x' * 1000}\n" + "  - *a\n" * 2000
    found = refusal(text)
    assert found.startswith("unknown keys found during decoding:\nmore:\n    - xxx")
    assert found.endswith("…\n")
    assert len(found) < 5000
    assert len(refusal(f"{SINK}more: {'x' * 100_000}\n")) < 5000


def test_the_join_of_another_configuration_can_be_kept() -> None:
    before = decode(f'{JOIN}uniqueToken: "a: \\"b\\""\n'.encode())
    after = decode(SINK.encode()).with_join_of(before)
    assert after.has_join
    assert decode(after.data).settings.url == after.settings.url
    assert after.settings.unique_token is not None
    assert after.settings.unique_token.value == 'a: "b"'
    assert after.settings.event_sink is not None


@settings(max_examples=200, deadline=None)
@given(st.binary(max_size=80) | st.text("apiVersion:kndSroLCfg \n-[]{}&*!|>'\"1~#%@", max_size=60).map(str.encode))
def test_any_configuration_is_accepted_or_refused(data: bytes) -> None:
    with suppress(ConfigurationError):
        decode(data)
