"""Bounded YAML: valid documents, and refusals that name the line."""

import re
import time

import pytest
import yaml
from hypothesis import example, given
from hypothesis import strategies as st

from siderolink.client.config.yaml_stream import (
    MAX_BYTES,
    MAX_DEPTH,
    MAX_DOCUMENTS,
    MAX_NODES,
    Value,
    YamlDocument,
    read_stream,
)
from siderolink.common.errors import ConfigurationError


def read(text: str | bytes) -> list[YamlDocument]:
    return list(read_stream(text.encode() if isinstance(text, str) else text, "f.yaml"))


def refusal(text: str | bytes) -> str:
    with pytest.raises(ConfigurationError) as caught:
        read(text)
    said = str(caught.value)
    assert said.startswith("f.yaml:")
    assert "\n" not in said
    assert len(said) < 300
    return said


@pytest.mark.parametrize(
    ("text", "value"),
    [
        ("a: b", {"a": "b"}),
        ("a: yes", {"a": "yes"}),
        ("a: on", {"a": "on"}),
        ("a: true", {"a": True}),
        ("a: 'true'", {"a": "true"}),
        ("a: !!str 12", {"a": "12"}),
        ("a: ! 12", {"a": "12"}),
        ("a: 12", {"a": 12}),
        ("a: 012", {"a": 12}),
        ("a: 0x1F", {"a": 31}),
        ("a: 0o17", {"a": 15}),
        ("a: 1_000", {"a": "1_000"}),
        ("a: 1.5e3", {"a": 1500.0}),
        ("a: -.inf", {"a": float("-inf")}),
        ("a: 22:30", {"a": "22:30"}),
        ("a: 2001-01-01", {"a": "2001-01-01"}),
        ("a:", {"a": None}),
        ("a: ~", {"a": None}),
        ("a: |\n  b\n  c\n", {"a": "b\nc\n"}),
        ("[a, {b: c}]", ["a", {"b": "c"}]),
        ("a: &x [1, 2]\nb: *x", {"a": [1, 2], "b": [1, 2]}),
        ("\ufeffa: b", {"a": "b"}),
        ("a: " + "9" * 5000, {"a": "9" * 5000}),
    ],
)
def test_scalars_are_read_as_their_types(text: str, value: Value) -> None:
    assert [document.value for document in read(text)] == [value]


def test_a_stream_of_documents_knows_its_lines() -> None:
    one, two = read("# first\na:\n  - b\n  - c: d\n---\n---\n# empty\n---\n\ne: &x {f: 1}\ng: *x\n")
    assert (one.line, one.line_of(("a",)), one.line_of(("a", 1, "c"))) == (2, 2, 4)
    assert one.line_of(("a", 1, "missing")) == 4
    assert (two.line, two.line_of(("e", "f")), two.line_of(("g", "f"))) == (10, 10, 11)


@pytest.mark.parametrize(
    ("text", "line", "words"),
    [
        ("a: 1\nb: 2\na: 3", 3, "'a' is repeated; it is first in line 1"),
        ("a: {b: 1,\n b: 2}", 2, "is repeated"),
        ("a: 1\n2: b", 2, "a key must be text"),
        ("true: b", 1, "a key must be text"),
        ("? [a]\n: b", 1, "a key must be text"),
        ("a: b\n*x : c", 2, "a key must be text"),
        ("a: *x", 1, "an alias"),
        ("a: &x [*x]", 1, "an alias"),
        ("a: &x b\n---\nc: *x", 3, "an alias"),
        ("a: !!python/object/apply:os.system [echo]", 1, "tag"),
        ("a: !custom b", 1, "tag"),
        ("a: !!int b", 1, "tag"),
        ("a: !!binary aGk=", 1, "tag"),
        ("a: [b", 1, "not YAML"),
        ("a: b: c", 1, "not YAML"),
        ("a:\n\t- b", 2, "not YAML"),
        ('a: "\\q"', 1, "not YAML"),
        ("a: b\nc: \x00", 2, "not YAML"),
        (b"a: b\nc: \xff", 2, "UTF-8"),
        ("%YAML 3.0\n---\na: b", 1, "not YAML"),
        ("[" * 100 + "]" * 100, 1, f"deeper than {MAX_DEPTH}"),
        ("- " * 100 + "a", 1, f"deeper than {MAX_DEPTH}"),
        ("{a: " * 100 + "b" + "}" * 100, 1, f"deeper than {MAX_DEPTH}"),
        ("a\n---\n" * (MAX_DOCUMENTS + 1), 2 * MAX_DOCUMENTS, "documents"),
        ("a: [" + "b," * MAX_NODES + "]", 1, f"more than {MAX_NODES} values"),
    ],
)
def test_refusals_name_the_line(text: str | bytes, line: int, words: str) -> None:
    said = refusal(text)
    assert words in said
    # a parser may notice the end of its input one line later
    assert int(re.match(r"f\.yaml:(\d+):", said)[1]) in (line, line + 1)  # type: ignore[index]


def test_aliases_cannot_expand_without_bound() -> None:
    rows = [f"a{n}: &a{n} [{', '.join([f'*a{n - 1}'] * 9)}]" for n in range(1, 12)]
    assert "including those of aliases" in refusal("a0: &a0 [x, x, x, x, x, x, x, x, x]\n" + "\n".join(rows))


def test_aliases_cannot_nest_deeper_than_text_can() -> None:
    rows = [f"a{n}: &a{n} [*a{n - 1}]" for n in range(1, 60)]
    assert "deeper" in refusal("a0: &a0 [x]\n" + "\n".join(rows))


def test_a_long_file_is_not_parsed_at_all() -> None:
    with pytest.raises(ConfigurationError, match="longer than 512 KiB"):
        read(b"a: " + b"b" * MAX_BYTES)


@pytest.mark.parametrize(
    "text", ["[" * 500_000, "{" * 500_000, "a: &" + "b" * 500_000, "? " * 250_000, '"' + "\\" * 400_000, "- " * 250_000]
)
def test_hostile_yaml_does_not_take_long(text: str) -> None:
    started = time.process_time()
    try:
        read(text)
    except ConfigurationError:
        pass
    assert time.process_time() - started < 10


plain = st.text(
    st.characters(exclude_categories=("Cc", "Cs", "Cn", "Co"), exclude_characters="\ufeff\ufffe\uffff"), max_size=12
)
scalars = st.none() | st.booleans() | st.integers(-(10**18), 10**18) | plain
values = st.recursive(
    scalars, lambda inner: st.lists(inner, max_size=4) | st.dictionaries(plain, inner, max_size=4), max_leaves=20
)


@given(st.lists(st.dictionaries(plain, values, min_size=1, max_size=4), max_size=3))
def test_output_of_another_yaml_writer_is_read(documents: list[dict[str, Value]]) -> None:
    text = yaml.safe_dump_all(documents, allow_unicode=True, default_style='"')
    assert [document.value for document in read(text)] == documents


@given(st.binary(max_size=200) | st.text("abc:-[]{}&*!|>'\"#%@`,? \n\t0129~.<=", max_size=80).map(str.encode))
@example(b"\x85")
@example(b"a: !<tag:yaml.org,2002:str> b")
def test_any_bytes_are_read_or_refused(data: bytes) -> None:
    try:
        found = read(data)
    except ConfigurationError as error:
        said = str(error)
        found = []
    else:
        said = ""
    assert "\n" not in said
    assert all(document.line >= 1 for document in found)
