"""The kernel command line, taken apart as the kernel does it."""

from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from siderolink.client.config import MachineSettings, parse_kernel_arguments, read_kernel_arguments
from siderolink.client.config.kernel_args import MAX_BYTES, first_values, in_container, split_arguments
from siderolink.common.errors import ConfigurationError

TOKEN = "s3cr3t-t0k3n"


@pytest.mark.parametrize(
    ("line", "arguments"),
    [
        ("", []),
        ("  \t\n ", []),
        ("quiet", [("quiet", None)]),
        ("a=b", [("a", "b")]),
        ("a=", [("a", "")]),
        ("=a", [("=a", None)]),
        ("a=b=c", [("a", "b=c")]),
        ("  a=b\tc=d\n", [("a", "b"), ("c", "d")]),
        ('a="b c"', [("a", "b c")]),
        ('"a=b c"', [("a", "b c")]),
        ('a="b c" d', [("a", "b c"), ("d", None)]),
        ('a=b" "c', [("a", 'b" "c')]),
        ('a="b"c', [("a", 'b"c')]),
        ('a="b', [("a", "b")]),
        ('"a b', [("a b", None)]),
        ('a=""', [("a", "")]),
        ('a="', [("a", "")]),
        ("a=b a=c", [("a", "b"), ("a", "c")]),
        ("a=1 -- a=2", [("a", "1")]),
        ("a=1 --x=2", [("a", "1"), ("--x", "2")]),
    ],
)
def test_kernel_arguments_are_split_like_the_kernel_does(line: str, arguments: list[tuple[str, str | None]]) -> None:
    assert list(split_arguments(line)) == arguments


def test_the_first_occurrence_counts() -> None:
    settings = parse_kernel_arguments(
        f"ro siderolink.api=grpc://one?jointoken={TOKEN} siderolink.api=grpc://two talos.logging.kernel=tcp://[fd00::1]:1"
        " talos.logging.kernel=udp://two:2 talos.events.sink=[fd00::1]:8090 talos.events.sink=two:2"
    )
    assert settings.url is not None
    assert settings.event_sink is not None
    assert (settings.url.value.host, settings.url.value.join_token) == ("one", TOKEN)
    assert str(settings.event_sink.value) == "[fd00::1]:8090"
    assert [str(log.value) for log in settings.kernel_logs] == ["tcp://[fd00::1]:1"]
    assert settings.url.source == "the kernel command line: siderolink.api"
    assert TOKEN not in repr(settings)


def test_an_empty_first_occurrence_counts_as_missing() -> None:
    assert parse_kernel_arguments("siderolink.api= siderolink.api=grpc://two").url is None


@pytest.mark.parametrize(("text", "tls"), [("http://h", True), ("https://h", True), ("h:1", False), ("grpc://h", False)])
def test_the_schemes_of_a_join_url_apply(text: str, tls: bool) -> None:
    found = parse_kernel_arguments(f"siderolink.api={text}").url
    assert found is not None
    assert found.value.tls is tls


@pytest.mark.parametrize(
    "line",
    [
        f"siderolink.api=grpc://h/{TOKEN}",
        f'siderolink.api="grpc://h?jointoken={TOKEN} x#"',
        f"siderolink.api={TOKEN}:{TOKEN}",
        "talos.events.sink=h",
        "talos.events.sink=[fd00::1]",
        "talos.logging.kernel=h:1",
        "talos.logging.kernel=http://h:1",
        "talos.logging.kernel=tcp://h",
        "talos.logging.kernel=tcp://h:1/p",
    ],
)
def test_refusals_name_the_argument_and_keep_the_token(line: str) -> None:
    settings = parse_kernel_arguments(line, "f")
    (said,) = settings.problems
    assert settings == MachineSettings(problems=settings.problems)
    assert said.startswith(f"f: {line.split('=')[0]}: ")
    assert TOKEN not in said


def test_a_given_file_is_read_in_a_container_too(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    file = tmp_path / "cmdline"
    file.write_text("siderolink.api=grpc://h\n")
    monkeypatch.setenv("container", "podman")
    found = read_kernel_arguments(file)
    assert found.url is not None
    assert found.url.source == f"{file}: siderolink.api"


def test_in_a_container_the_hosts_line_is_ignored(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("container", "podman")
    found = read_kernel_arguments()
    assert found == MachineSettings(notes=found.notes)
    assert "container" in found.notes[0]


def test_how_a_container_is_recognised(tmp_path: Path) -> None:
    assert not in_container(tmp_path, {})
    assert in_container(tmp_path, {"container": "lxc"})
    assert in_container(tmp_path, {"PLATFORM": "container"})
    assert not in_container(tmp_path, {"PLATFORM": "metal"})
    (tmp_path / "proc/self/ns").mkdir(parents=True)
    namespace = tmp_path / "proc/self/ns/pid"
    namespace.symlink_to("pid:[4026531836]")
    assert not in_container(tmp_path, {})
    namespace.unlink()
    namespace.symlink_to("pid:[4026532000]")
    assert in_container(tmp_path, {})
    namespace.unlink()
    (tmp_path / "run").mkdir()
    (tmp_path / "run/.containerenv").touch()
    assert in_container(tmp_path, {})


@pytest.mark.parametrize("content", [b"a" * (MAX_BYTES + 1), b"siderolink.api=grpc://\xff", b"siderolink.api=grpc://h\0"])
def test_malformed_files_are_refused(tmp_path: Path, content: bytes) -> None:
    file = tmp_path / "cmdline"
    file.write_bytes(content)
    if len(content) > MAX_BYTES:
        with pytest.raises(ConfigurationError):
            read_kernel_arguments(file)
    else:
        found = read_kernel_arguments(file)
        assert found.url is None
        assert len(found.problems) == 1
    with pytest.raises(ConfigurationError, match="cannot be read"):
        read_kernel_arguments(tmp_path / "none")


words = st.text(st.characters(min_codepoint=33, max_codepoint=126, exclude_characters='"= '), min_size=1, max_size=8).filter(
    lambda word: not word.startswith("-")
)
quoted = st.text(st.characters(min_codepoint=32, max_codepoint=126, exclude_characters='"'), max_size=12)


@given(st.lists(st.tuples(words, quoted), max_size=6))
def test_quoted_arguments_are_read_back(arguments: list[tuple[str, str]]) -> None:
    inside = " ".join(f'{name}="{value}"' for name, value in arguments)
    around = " ".join(f'"{name}={value}"' for name, value in arguments)
    assert list(split_arguments(inside)) == arguments
    assert list(split_arguments(around)) == arguments


@given(st.text('ab=" -\t', max_size=60) | st.text(max_size=60))
def test_any_line_is_read_or_refused(line: str) -> None:
    arguments = list(split_arguments(line))
    assert sum(len(name) + len(value or "") for name, value in arguments) <= len(line)
    assert first_values(line).keys() <= {name for name, _ in arguments}
    try:
        parse_kernel_arguments(f"siderolink.api={line}")
    except ConfigurationError as error:
        said = str(error)
    else:
        return
    assert "\n" not in said
