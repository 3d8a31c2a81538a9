"""Completion of names from the server, and the completion scripts of shells."""

import re
from collections.abc import Awaitable, Callable, Iterable
from enum import StrEnum
from pathlib import Path
from typing import Annotated, Any

import anyio
import typer

from siderolink.cli.admin.connection import Connection, TargetOptions, connect, find_target
from siderolink.cli.admin.contexts import contexts_path, read_contexts
from siderolink.cli.options import COMPLETION_VARIABLE
from siderolink.cli.output import show
from siderolink.common.errors import SideroLinkError
from siderolink.common.pb.siderolink.admin.v1 import (
    ApiKeyServiceStub,
    BanServiceStub,
    ListApiKeysRequest,
    ListBansRequest,
    ListMachinesRequest,
    ListTokensRequest,
    MachineFilter,
    MachineServiceStub,
    TokenServiceStub,
)

app = typer.Typer(add_completion=False)

_SECONDS = 2.0
_MOST = 200
_SAFE = re.compile(r"[A-Za-z0-9][A-Za-z0-9._/+=:-]*\Z")
"""A plain word for shells. Names from the server are offered only if they match, because shells insert them unquoted."""

Complete = Callable[[typer.Context, str], list[str]]


class Shell(StrEnum):
    BASH = "bash"
    ZSH = "zsh"
    FISH = "fish"


_SCRIPTS = {
    Shell.BASH: f"""\
# bash: source <(siderolink completion bash), or put the output into /etc/bash_completion.d/siderolink
_siderolink() {{
    local IFS=$'\\n'
    mapfile -t COMPREPLY < <(
        COMP_WORDS="${{COMP_WORDS[*]}}" COMP_CWORD=$COMP_CWORD {COMPLETION_VARIABLE}=complete_bash "$1" 2>/dev/null
    )
}}
complete -o default -F _siderolink siderolink
""",
    Shell.ZSH: f"""\
#compdef siderolink
# zsh: put the output into a file _siderolink in a directory of $fpath, or: source <(siderolink completion zsh)
_siderolink() {{
    local -a found
    local IFS=$'\\n'
    local -x COMP_WORDS="${{words[*]}}" COMP_CWORD=$((CURRENT - 1)) {COMPLETION_VARIABLE}=complete_bash
    found=(${{(f)"$("$words[1]" 2>/dev/null)"}})
    if (( $#found )); then compadd -- $found; else _files; fi
}}
if [[ $zsh_eval_context[-1] == loadautofunc ]]; then _siderolink "$@"; else compdef _siderolink siderolink; fi
""",
    Shell.FISH: f"""\
# fish: siderolink completion fish >~/.config/fish/completions/siderolink.fish
function __siderolink_complete
    set -l words (commandline -opc) (commandline -ct)
    set -lx COMP_WORDS (string join \\n -- $words | string collect)
    set -lx COMP_CWORD (count (commandline -opc))
    set -lx {COMPLETION_VARIABLE} complete_bash
    $words[1] 2>/dev/null
end
complete --command siderolink --arguments '(__siderolink_complete)'
""",
}


@app.command()
def completion(shell: Shell) -> None:
    """Print a script that completes commands, options, and names from the server."""
    show(_SCRIPTS[shell], end="")


def use_completion() -> None:
    """Let this process answer a shell's completion request, which is passed in the environment."""
    from typer.completion import completion_init  # type: ignore[attr-defined]

    completion_init()


def _names(ask: Callable[[Connection, str], Awaitable[Iterable[str]]]) -> Complete:
    """Completes from the server that the options so far select; nothing if it does not answer quickly."""

    def complete(context: typer.Context, incomplete: str) -> list[str]:
        def path(name: str) -> Path | None:
            found = context.params.get(name)
            return None if found is None else Path(found)

        options = TargetOptions(
            server=context.params.get("server"),
            context=context.params.get("context"),
            interface=context.params.get("interface"),
            api_key_file=path("api_key_file"),
            ca_file=path("ca_file"),
        )

        async def work() -> list[str]:
            with anyio.fail_after(_SECONDS):
                async with connect(find_target(options), connect_timeout=_SECONDS) as connection:
                    return list(await ask(connection, incomplete))

        try:
            found = anyio.run(work)
        except (SideroLinkError, OSError):  # completion must not print errors
            return []
        return sorted(name for name in found if name.startswith(incomplete) and _SAFE.match(name))

    return complete


async def _machines(connection: Connection, incomplete: str) -> Iterable[str]:
    request = ListMachinesRequest(page_size=_MOST, filter=MachineFilter(text=incomplete))
    found = (await connection.stub(MachineServiceStub).list_machines(request)).machines
    return {machine.name if _SAFE.match(machine.name) else machine.node_uuid for machine in found} | (
        {machine.node_uuid for machine in found} if incomplete else set()
    )


async def _tokens(connection: Connection, incomplete: str) -> Iterable[str]:
    request = ListTokensRequest(page_size=_MOST, text=incomplete)
    return [token.name for token in (await connection.stub(TokenServiceStub).list_tokens(request)).tokens]


async def _api_keys(connection: Connection, incomplete: str) -> Iterable[str]:
    return [key.name for key in (await connection.stub(ApiKeyServiceStub).list_api_keys(ListApiKeysRequest())).keys]


async def _bans(connection: Connection, incomplete: str) -> Iterable[str]:
    return [ban.value for ban in (await connection.stub(BanServiceStub).list_bans(ListBansRequest(page_size=_MOST))).bans]


def complete_contexts(context: typer.Context, incomplete: str) -> list[str]:
    """Names of contexts."""
    try:
        return sorted(name for name in read_contexts(contexts_path()).contexts if name.startswith(incomplete))
    except SideroLinkError:
        return []


complete_machines: Any = _names(_machines)
MachineName = Annotated[
    str,
    typer.Argument(help="The machine's name, id, UUID or public key.", metavar="MACHINE", autocompletion=complete_machines),
]
complete_tokens: Any = _names(_tokens)
complete_api_keys: Any = _names(_api_keys)
complete_bans: Any = _names(_bans)
