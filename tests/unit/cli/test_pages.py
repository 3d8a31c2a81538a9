"""The commands, options and variables that the pages name exist: those in their text, which is written by hand."""

import ast
import importlib
import re
import textwrap
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import typer

from siderolink.cli.app import app
from siderolink.cli.serve_config import ServeConfig

ROOT = Path(__file__).resolve().parents[3]
GENERATED = {"commands.md", "serve.md"}
PAGES = [ROOT / "README.md", *sorted(path for path in (ROOT / "docs").glob("*.md") if path.name not in GENERATED)]
FOREIGN = {"--save", "--insecure"}
"""Options of other programs that the pages name by themselves: of a benchmark, of the machines' client."""


def root() -> tuple[Any, Any]:
    command: Any = typer.main.get_command(app)
    return command, command.make_context("siderolink", ["version"], resilient_parsing=True)


def options(command: Any) -> set[str]:
    return {name for one in command.params for name in (*one.opts, *one.secondary_opts) if name.startswith("-")} | {"--help"}


def every_option() -> set[str]:
    group, context = root()
    found: set[str] = set()

    def look(command: Any) -> None:
        found.update(options(command))
        for name in command.list_commands(context) if hasattr(command, "list_commands") else ():
            look(command.get_command(context, name))

    look(group)
    return found


def commands(text: str) -> Iterator[str]:
    """What begins with the command's name: in lines of code blocks, and in code within a line."""
    for block in re.findall(r"^ *```(?:sh|console)?(?: .*)?\n(.*?)^ *```", text, re.MULTILINE | re.DOTALL):
        for line in block.replace("\\\n", " ").splitlines():
            yield from re.findall(r"(?:^|[$(;|&] *|sudo )(siderolink [^|&;<>()]+)", line.partition("  #")[0])
    yield from re.findall(r"`(siderolink [^`]+)`", re.sub(r"^ *```.*?^ *```", "", text, flags=re.MULTILINE | re.DOTALL))


def fault(line: str) -> str | None:
    """What is wrong with a command; values and placeholders are not judged."""
    command, context = root()
    words = re.sub(r"[\"'…]", " ", line).split()[1:]
    if words[:1] in (["COMMAND"], ["X"]):
        return None
    while words and hasattr(command, "list_commands") and not words[0].startswith("-"):
        inner = command.get_command(context, words[0])
        if inner is None:
            return f"there is no command {words[0]}"
        command, words = inner, words[1:]
    for word in words:
        name = word.partition("=")[0]
        if re.fullmatch(r"-[a-z]|--[a-z][a-z-]*", name) and name not in options(command):
            return f"{command.name} has no option {name}"
    return None


@pytest.mark.parametrize("page", PAGES, ids=lambda path: path.stem)
def test_the_commands_of_a_page_exist(page: Path) -> None:
    assert [f"{line}: {wrong}" for line in commands(page.read_text()) if (wrong := fault(line))] == []


def test_wrong_commands_are_found() -> None:
    assert fault("siderolink token renew NAME --ttl 90d") == "renew has no option --ttl"
    assert fault("siderolink tokens list") == "there is no command tokens"
    assert list(commands("see `siderolink x` and\n```sh\nsiderolink y --z | head  # no\n```\n")) == [
        "siderolink y --z ",
        "siderolink x",
    ]


@pytest.mark.parametrize("page", PAGES, ids=lambda path: path.stem)
def test_the_options_of_a_page_exist(page: Path) -> None:
    known = every_option() | {f"--{name.replace('_', '-')}" for name in ServeConfig.model_fields}
    named = set(re.findall(r"`(--[a-z][a-z-]+)", page.read_text()))
    assert named - known - FOREIGN == set()


@pytest.mark.parametrize("page", PAGES, ids=lambda path: path.stem)
def test_the_variables_of_a_page_exist(page: Path) -> None:
    sources = "".join(path.read_text() for path in (ROOT / "siderolink").rglob("*.py"))
    sources += "".join(path.read_text() for path in (ROOT / "packaging").glob("*.service"))
    known = set(re.findall(r"SIDEROLINK_[A-Z_]+", sources)) | {
        f"SIDEROLINK_{name.upper()}" for name in ServeConfig.model_fields
    }
    named = set(re.findall(r"SIDEROLINK_[A-Z_]+[A-Z]", page.read_text()))
    assert named - known - {"SIDEROLINK_NODE_UUID"} == set()  # a field in the journal


@pytest.mark.parametrize("page", PAGES, ids=lambda path: path.stem)
def test_the_programs_of_a_page_can_be_compiled_and_import_what_there_is(page: Path) -> None:
    for block in re.findall(r"^( *)```python\n(.*?)^\1```", page.read_text(), re.MULTILINE | re.DOTALL):
        text = textwrap.dedent(block[1])
        if text.startswith("--8<--"):
            continue
        tree = compile(text, page.name, "exec", ast.PyCF_ALLOW_TOP_LEVEL_AWAIT | ast.PyCF_ONLY_AST)
        compile(tree, page.name, "exec", ast.PyCF_ALLOW_TOP_LEVEL_AWAIT)
        for node in ast.walk(tree):
            if isinstance(node, ast.ImportFrom) and (node.module or "").startswith("siderolink"):
                module = importlib.import_module(str(node.module))
                assert [one.name for one in node.names if not hasattr(module, one.name)] == []
