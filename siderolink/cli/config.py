"""`siderolink config show`, `kernel-args` and `machine-config`: the settings of machines."""

from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING

from cryptography import x509
from cryptography.hazmat.primitives.serialization import Encoding

from siderolink.cli.output import show, show_message, to_json
from siderolink.cli.secret import read_secret
from siderolink.cli.settings import SettingsOptions, SettingsReader
from siderolink.client.config import Ingress, IngressRule, MachineSettings
from siderolink.client.config.sources import needing_extra
from siderolink.common.addressing import overlay_prefix, server_address
from siderolink.common.errors import ConfigurationError
from siderolink.common.join_url import JoinURL
from siderolink.common.text import one_line

if TYPE_CHECKING:
    from siderolink.client.config.write import JoinParameters

MASK = "…"
_LONGEST_PEM = 512 * 1024


@dataclass(frozen=True, slots=True)
class Line:
    """One setting, for display."""

    name: str
    value: str
    source: str


def run_show(options: SettingsOptions, *, as_json: bool) -> bool:
    """Print the merged settings with their sources, secrets masked; False if any input was ignored. Raises SideroLinkError."""
    settings = SettingsReader(options).read()
    lines = describe(settings)
    if as_json:
        found = {"settings": [{"name": line.name, "value": line.value, "source": line.source} for line in lines]}
        found_too = {"notes": list(settings.notes), "problems": list(settings.problems)}
        show(to_json(found | found_too))
        return not settings.problems
    for line in lines:
        show(f"{line.name:16} {one_line(line.value)}  ({one_line(line.source)})")
    if not lines:
        show("nothing is set")
    for note in settings.notes:
        show_message(f"note: {one_line(note)}")
    for problem in settings.problems:
        show_message(f"problem: {one_line(problem)}")
    return not settings.problems


def describe(settings: MachineSettings) -> list[Line]:
    """All settings, one per line."""
    lines = []
    if settings.url is not None:
        lines.append(Line("join URL", str(settings.url.value), settings.url.source))
    if settings.unique_token is not None:
        lines.append(Line("unique token", MASK, settings.unique_token.source))
    if settings.event_sink is not None:
        lines.append(Line("event sink", str(settings.event_sink.value), settings.event_sink.source))
    lines += [Line("kernel log", str(log.value), log.source) for log in settings.kernel_logs]
    for roots in settings.trusted_roots:
        count = roots.value.count("-----BEGIN CERTIFICATE-----")
        lines.append(Line("trusted roots", f"{count} certificate{'s' * (count != 1)}", roots.source))
    if settings.default_action is not None:
        lines.append(Line("ingress", settings.default_action.value, settings.default_action.source))
    lines += [Line("ingress rule", _rule(rule.value, settings.ingress), rule.source) for rule in settings.ingress_rules]
    return lines


def _rule(rule: IngressRule, ingress: Ingress) -> str:
    ports = "" if rule.protocol.startswith("icmp") else " " + ", ".join(map(str, rule.ports))
    sources = ", ".join(map(str, rule.subnets)) or "nobody"
    but = f" but {', '.join(map(str, rule.exceptions))}" if rule.exceptions else ""
    what = "accept" if ingress.default == "block" else "accept only"
    return f"{rule.name}: {what} {rule.protocol}{ports} from {sources}{but}"


@dataclass(frozen=True, slots=True, kw_only=True)
class ForMachinesOptions:
    """A server's parameters as given on the command line."""

    url: str
    join_token_file: Path | None
    event_sink_port: int
    log_port: int
    installation_id: str
    ca_file: Path | None = None


def run_kernel_args(options: ForMachinesOptions) -> None:
    """Print one line of kernel arguments. Raises SideroLinkError."""
    with needing_extra():
        from siderolink.client.config.write import kernel_arguments
    show(kernel_arguments(_parameters(options)))


def run_machine_config(options: ForMachinesOptions) -> None:
    """Print a stream of configuration documents. Raises SideroLinkError."""
    with needing_extra():
        from siderolink.client.config.write import machine_documents
    show(machine_documents(_parameters(options)), end="")


def _parameters(options: ForMachinesOptions) -> "JoinParameters":
    with needing_extra():
        from siderolink.client.config.write import on_overlay
    url = JoinURL.parse(options.url)
    token = read_secret("join-token", None, options.join_token_file)
    if token is not None and url.join_token is None:
        url = replace(url, join_token=token)
    elif options.join_token_file is not None:
        raise ConfigurationError("give the join token either in the URL or with --join-token-file, not both")
    server = server_address(overlay_prefix(options.installation_id))
    roots = None if options.ca_file is None else _read_roots(options.ca_file)
    return on_overlay(url, server, options.event_sink_port, options.log_port, roots)


def _read_roots(file: Path) -> str:
    """The certificates in a file; other content is left out."""
    try:
        with file.open("rb") as opened:
            data = opened.read(_LONGEST_PEM + 1)
        found = x509.load_pem_x509_certificates(data[:_LONGEST_PEM])
    except OSError as error:
        raise ConfigurationError(f"cannot read certificates from {file}: {error.strerror}") from None
    except ValueError:
        raise ConfigurationError(f"{file} contains no certificates in PEM form") from None
    if len(data) > _LONGEST_PEM:
        raise ConfigurationError(f"{file} is longer than {_LONGEST_PEM // 1024} KiB")
    return "".join(certificate.public_bytes(Encoding.PEM).decode() for certificate in found)
