"""`siderolink support-bundle`: one archive for troubleshooting, without secrets.

Every text passes through `Redactor` and is searched once more before the archive is written: if it still contains a known
secret, no archive is written.
"""

import base64
import http.client
import io
import json
import os
import platform
import re
import subprocess
import sys
import tarfile
import time
import urllib.error
import urllib.parse
import urllib.request
from collections.abc import Callable, Iterable, Mapping
from contextlib import redirect_stderr, redirect_stdout
from dataclasses import asdict
from importlib.metadata import PackageNotFoundError, distribution, version
from pathlib import Path
from typing import Final

import anyio

from siderolink.cli.admin.connection import TargetOptions, connect, find_target
from siderolink.cli.admin.contexts import contexts_path, read_contexts
from siderolink.cli.admin.formats import fields_of
from siderolink.cli.admin.records import read_history
from siderolink.cli.control import query_all
from siderolink.cli.doctor.run import check_all
from siderolink.cli.options import state_folder
from siderolink.cli.output import show
from siderolink.cli.running import loop_options
from siderolink.cli.secret import SECRET_VARIABLES
from siderolink.cli.status import to_json
from siderolink.common.errors import ConfigurationError, SideroLinkError
from siderolink.common.pb.siderolink.admin.v1 import ListHistoryRequest
from siderolink.common.private_files import new_private
from siderolink.common.text import printable

MASK: Final = "…"
SHORTEST: Final = 6
"""Shorter secrets are not searched for, because they would match ordinary words."""
LOG_LINES: Final = 2000
MOST_BYTES: Final = 8 * 1024 * 1024
"""Maximum size of one part; the rest is cut off."""
COMMAND_TIMEOUT: Final = 20.0

_FILE_VARIABLES: Final = (
    "SIDEROLINK_API_KEY_FILE",
    "SIDEROLINK_JOIN_TOKEN_FILE",
    "SIDEROLINK_STORE_PASSWORD_FILE",
    "SIDEROLINK_STATE_KEY_FILE",
)
_SECRET_FILES: Final = (
    "/etc/siderolink/join-token",
    "/etc/siderolink/unique-token",
    "/etc/siderolink/store-password",
    "/etc/siderolink/state-key",
    "/etc/siderolink/api-key",
)
SERVE_SETTINGS: Final = "/etc/siderolink/serve.yaml"
HISTORY_ENTRIES: Final = 1000
_PATTERNS: Final = (
    # a setting in a file, or in text inside JSON: the rest of its line
    re.compile(
        r"(?im)((?:^|\\n)[ \t]*-?[ \t]*[\w-]*(?:token|secret|password|private[_-]?key|api[_-]?key)[ \t]*:[ \t]+)\S(?:(?!\\n).)*"
    ),
    re.compile(r"(?i)(jointoken=)[^&\s\"']+"),
    re.compile(
        r"(?i)(\b[\w.-]*(?:token|secret|password|private[_-]?key|preshared[_-]?key|api[_-]?key)\b\\?[\"']?\s*[:=]\s*\\?[\"']?)[^\s\"',}&\\]+"
    ),
    re.compile(r"(?i)(--(?:join|unique)-token[ =])\S+"),
    re.compile(r"()\bv[12]:[A-Za-z0-9+/=_-]{16,}"),
    re.compile(r"()\bslk_[A-Za-z0-9_-]+"),
    re.compile(r"(?i)(\bbearer\s+)\S+"),
    re.compile(r"(-----BEGIN [A-Z ]*PRIVATE KEY-----).*?(?=-----END|\Z)", re.DOTALL),
    re.compile(r"(://[^/\s:@]+:)[^/\s@]+(?=@)"),
)
"""Patterns to mask; the first group is kept."""

Part = Callable[[], str]


class Redactor:
    """Masks known secrets, and texts that look like secrets."""

    def __init__(self, secrets: Iterable[str]) -> None:
        self._secrets = sorted({form for secret in secrets for form in _forms(secret)}, key=len, reverse=True)

    def clean(self, text: str) -> str:
        for secret in self._secrets:
            text = text.replace(secret, MASK)
        for pattern in _PATTERNS:
            text = pattern.sub(rf"\1{MASK}", text)
        return printable(text)

    def holds_secret(self, text: str) -> bool:
        return any(secret in text for secret in self._secrets)


def _forms(secret: str) -> Iterable[str]:
    """The encodings in which a secret may appear."""
    if len(secret) < SHORTEST:
        return ()
    encoded = secret.encode()
    return (
        secret,
        urllib.parse.quote(secret),
        urllib.parse.quote(secret, safe=""),
        urllib.parse.quote_plus(secret),
        json.dumps(secret)[1:-1],
        base64.b64encode(encoded).decode(),
        base64.urlsafe_b64encode(encoded).decode().rstrip("="),
        encoded.hex(),
    )


def known_secrets(environment: Mapping[str, str], files: Iterable[Path]) -> list[str]:
    """Tokens, API keys, passwords and keys that this host's siderolink may use, as far as readable."""
    found = []
    for name in SECRET_VARIABLES:
        value = environment.get(name, "")
        found.append(value)
        found += urllib.parse.parse_qs(urllib.parse.urlsplit(value).query).get("jointoken", ())
    folder = environment.get("CREDENTIALS_DIRECTORY")
    named = (Path(environment[name]) for name in _FILE_VARIABLES if environment.get(name))
    states = _existing(state_folder().glob("*.state.key"))
    candidates = [*files, *named, *states, *(Path(folder).glob("siderolink.*") if folder else ())]
    for file in candidates:
        try:
            text = file.read_bytes()[:8192].decode(errors="replace")
        except OSError:
            continue
        found += [text.strip(), *(line.strip() for line in text.splitlines())]
    return [secret for secret in (*found, *_keys_of_contexts()) if secret]


def _existing(found: Iterable[Path]) -> list[Path]:
    try:
        return list(found)
    except OSError:
        return []


def _keys_of_contexts() -> list[str]:
    try:
        contexts = read_contexts(contexts_path())
    except SideroLinkError:
        return []
    return [context.api_key for context in contexts.contexts.values() if context.api_key]


# --- the parts


def history() -> str:
    """The history of each running server's machines, newest first."""

    async def work() -> dict[str, object]:
        found: dict[str, object] = {}
        for answer in (await query_all()).answers:
            if answer.role == "server":
                found[answer.interface] = await _history_of(answer.interface)
        return found

    return json.dumps(anyio.run(work, backend_options=loop_options()), indent=1)


async def _history_of(interface: str) -> object:
    try:
        async with connect(find_target(TargetOptions(interface=interface))) as connection:
            return [fields_of(entry) for entry in await read_history(connection, ListHistoryRequest(), HISTORY_ENTRIES)]
    except SideroLinkError as error:
        return f"not available: {error}"


def versions() -> str:
    found = {"python": sys.version, "kernel": platform.release(), "machine": platform.machine(), "system": platform.platform()}
    found["siderolink"] = version("siderolink")
    for requirement in distribution("siderolink").requires or ():
        name = re.split(r"[^A-Za-z0-9._-]", requirement)[0]
        try:
            found[name] = version(name)
        except PackageNotFoundError:
            found[name] = "not installed"
    # values may be secret, so only the names are included
    found["environment"] = ", ".join(sorted(name for name in os.environ if name.startswith("SIDEROLINK_")))
    return json.dumps(found, indent=2)


def status() -> str:
    result = anyio.run(query_all, backend_options=loop_options())
    found = {"answers": [to_json(answer) for answer in result.answers], "notes": result.notes, "failures": result.failures}
    return json.dumps(found, indent=2)


def doctor() -> str:
    async def work() -> list[dict[str, object]]:
        return [asdict(finding) async for finding in check_all(None, None)]

    return json.dumps(anyio.run(work, backend_options=loop_options()), indent=2)


def configuration() -> str:
    """The output of `siderolink config show`."""
    from siderolink.cli.config import run_show
    from siderolink.cli.settings import SettingsOptions

    with io.StringIO() as output, redirect_stdout(output), redirect_stderr(output):
        run_show(SettingsOptions(url=os.environ.get("SIDEROLINK_URL")), as_json=True)
        return output.getvalue()


def journal(unit: str) -> str:
    command = ["journalctl", "--no-pager", "--output=short-iso", f"--lines={LOG_LINES}", f"--unit={unit}"]
    done = subprocess.run(command, capture_output=True, timeout=COMMAND_TIMEOUT, check=False)
    return (done.stdout + done.stderr).decode(errors="replace")


def log_file(path: Path) -> str:
    """The last lines of the file."""
    with path.open("rb") as file:
        file.seek(max(0, path.stat().st_size - MOST_BYTES))
        return "\n".join(file.read(MOST_BYTES).decode(errors="replace").splitlines()[-LOG_LINES:])


def metrics(listen: str) -> str:
    from siderolink.cli.options import metrics_options

    options = metrics_options(listen)
    assert options is not None
    found = []
    directly = urllib.request.build_opener(urllib.request.ProxyHandler({}))
    for page in ("/metrics", "/readyz"):
        try:
            with directly.open(f"http://{options.listen}{page}", timeout=COMMAND_TIMEOUT) as answer:
                found.append(answer.read(MOST_BYTES).decode(errors="replace"))
        except urllib.error.HTTPError as error:
            found.append(error.read(MOST_BYTES).decode(errors="replace"))
    return "\n".join(found)


def run_support_bundle(
    output: Path, *, unit: str, log: Path | None, metrics_at: str | None, secret_files: tuple[Path, ...]
) -> None:
    """Write the archive, readable only by its owner. Raises ConfigurationError if that fails."""
    redactor = Redactor(known_secrets(os.environ, (*map(Path, _SECRET_FILES), *secret_files)))
    parts: dict[str, Part] = {
        "versions.json": versions,
        "status.json": status,
        "doctor.json": doctor,
        "configuration.json": configuration,
        "serve.yaml": lambda: log_file(Path(os.environ.get("SIDEROLINK_CONFIG", SERVE_SETTINGS))),
        "history.json": history,
        "log.txt": (lambda: journal(unit)) if log is None else (lambda: log_file(log)),
    }
    if metrics_at is not None:
        parts["metrics.txt"] = lambda: metrics(metrics_at)
    texts = {name: redactor.clean(_make(name, part))[:MOST_BYTES] for name, part in parts.items()}
    for name, text in texts.items():
        if redactor.holds_secret(text):
            raise ConfigurationError(f"{name} would contain a secret: the bundle was not written")
    try:
        write(output, texts)
    except OSError as error:
        raise ConfigurationError(f"cannot write {output}: {error.strerror}") from None
    show(f"{output} contains {', '.join(texts)}; tokens and private keys are masked. Review it before you send it.")


def _make(name: str, part: Part) -> str:
    """Collect one part. A failure does not affect the others."""
    try:
        return part()
    except (SideroLinkError, OSError, subprocess.SubprocessError, http.client.HTTPException) as error:
        return f"{name} is not available: {error}\n"


def write(output: Path, texts: Mapping[str, str]) -> None:
    """Write a compressed tar archive. Raises OSError, also if the file exists."""
    with new_private(output) as file, tarfile.open(fileobj=file, mode="w:gz") as archive:
        for name, text in texts.items():
            data = text.encode(errors="replace")
            info = tarfile.TarInfo(f"siderolink-support/{name}")
            info.size, info.mtime, info.mode = len(data), int(time.time()), 0o600
            archive.addfile(info, io.BytesIO(data))
