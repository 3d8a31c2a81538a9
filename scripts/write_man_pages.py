"""python -m scripts.write_man_pages FOLDER: a manual page of each command, from the same sources as docs/commands.md."""

import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import typer

from scripts.generate_docs import argument_name, described, shown_option
from siderolink.cli.app import app
from siderolink.cli.output import own_version


def pages(path: str, command: Any, context: Any = None) -> Iterator[tuple[str, str]]:
    """The names and texts of the page of a command and of those below it."""
    if command.hidden:
        return
    paragraphs = [" ".join(part.split()) for part in (command.help or "").split("\n\n")]
    inner = {}
    if hasattr(command, "list_commands"):  # which loads them, as `commands` alone does not
        inner = {name: command.get_command(context, name) for name in command.list_commands(context)}
    name = path.replace(" ", "-")
    usage = " ".join(argument_name(one) for one in command.params if one.param_type_name == "argument")
    text = [f'.TH "{name.upper()}" "1" "" "siderolink {own_version()}" "siderolink"']
    text += [".SH NAME", f"{escaped(name)} \\- {escaped(paragraphs[0].rstrip('.'))}"]
    text += [".SH SYNOPSIS", f".B {escaped(path)}", f"[OPTIONS] {'COMMAND' if inner else escaped(usage)}"]
    text += [".SH DESCRIPTION", *(f".PP\n{escaped(part)}" for part in paragraphs)]
    shown = [one for one in command.params if not getattr(one, "hidden", False) and one.name != "help"]
    if shown:
        text.append(".SH OPTIONS")
    for one in shown:
        option = shown_option(one).replace("\\|", "|")
        text.append(f".TP\n.B {escaped(option)}\n{escaped(' '.join(described(one).split()))}")
    if inner:
        text.append(".SH COMMANDS")
    for below, found in inner.items():
        if not found.hidden:
            text.append(f".TP\n.BR {escaped(f'{name}-{below}')} (1)\n{escaped((found.help or '').splitlines()[0])}")
    yield name, "\n".join(text) + "\n"
    for below, found in inner.items():
        yield from pages(f"{path} {below}", found, context)


def escaped(text: str) -> str:
    """As roff's macros take it: hyphens that can be copied, no request at the beginning of a line."""
    text = text.replace("\\", "\\e").replace("-", "\\-").replace('"', "\\(dq").replace("`", "")
    return f"\\&{text}" if text.startswith((".", "'")) else text


def main(folder: Path) -> None:
    root: Any = typer.main.get_command(app)
    for name, text in pages("siderolink", root, root.make_context("siderolink", ["version"], resilient_parsing=True)):
        (folder / f"{name}.1").write_text(text)


if __name__ == "__main__":
    main(Path(sys.argv[1]))
